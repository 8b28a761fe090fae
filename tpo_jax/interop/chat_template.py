"""The published chat template (Jinja) of a checkpoint as the program's ChatTemplate, and its stops.

The template is rendered once with a question and an answer that stand for themselves; the texts
around them are what ChatTemplate holds. For a language model a video stands at the start of the
user's turn, with a newline behind it, as in LLaVA; a multimodal one says itself where it stands.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from tpo_jax.data.text import ChatTemplate
from tpo_jax.errors import UserError

_QUESTION, _ANSWER = "QUESTIONquestion", "ANSWERanswer"
_AFTER_VISUAL = "\n"


class ChatTemplateError(UserError):
    """A chat template that is missing or cannot be split, or a stop that is no token; the message
    names the fix."""


def read_chat_template(directory: epath.Path) -> str | None:
    """The Jinja text of a folder, from chat_template.jinja or tokenizer_config.json."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text()
    given = read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(given, list):  # several by name
        by_name = {entry["name"]: entry["template"] for entry in given}
        given = by_name.get("default")
    return given


def chat_template(
    jinja: str, special: Mapping[str, str], tokenizer: Any, where: str
) -> ChatTemplate:
    """The ChatTemplate that gives the same texts as `jinja` for one question and its answer.

    Args:
      special: texts of the special tokens by name: bos_token, eos_token, pad_token.
      tokenizer: tokenizers.Tokenizer, to count the tokens before a video.
      where: prefix of error messages.
    """
    user = {"role": "user", "content": _QUESTION}
    answer = {"role": "assistant", "content": _ANSWER}
    prompt = _render(jinja, special, [user], True, where)
    whole = _render(jinja, special, [user, answer], False, where)
    before, _, assistant = prompt.partition(_QUESTION)
    end = whole.rpartition(_ANSWER)[2].rstrip()
    if whole != f"{before}{_QUESTION}{assistant}{_ANSWER}{whole.rpartition(_ANSWER)[2]}" or not end:
        raise ChatTemplateError(
            f"{where}: the answer of the chat template does not follow its prompt ({prompt!r}, "
            f"{whole!r}); give one with --chat_template=FILE.jinja"
        )
    pad = special.get("pad_token") or special.get("unk_token") or special["eos_token"]
    return ChatTemplate(
        before_video=before, after_video=_AFTER_VISUAL, before_image=before,
        after_image=_AFTER_VISUAL, user="", assistant=assistant, end=end, pad=pad,
        visual_offset=len(template_ids(before, tokenizer)),
    )  # fmt: skip


def read_processor_template(directory: epath.Path) -> str | None:
    """The Jinja text of a multimodal folder; what its tokenizer has is for text alone."""
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text()
    for name in ("chat_template.json", "processor_config.json"):
        given = read_json(directory / name).get("chat_template")
        if given is not None:
            return given["default"] if isinstance(given, dict) else given
    return None


def multimodal_template(
    jinja: str, directory: epath.Path, tokenizer: Any, default: ChatTemplate
) -> ChatTemplate:
    """The ChatTemplate that gives the same texts as `jinja` for one video or image, a question and
    an answer.

    Args:
      directory: of the checkpoint; its processor_config.json may rename <video> and <image>.
      tokenizer: tokenizers.Tokenizer; what it puts in front of every text (<s>) comes first.
      default: what the Jinja text does not say: the padding token, and the end of an answer.

    Raises:
      ChatTemplateError: the text does not split at the visual tokens and the question.
    """
    where, special = str(directory), special_tokens(directory)
    names = read_json(directory / "processor_config.json")
    texts: dict[str, str] = {}
    for media in ("video", "image"):
        visual = names.get(f"{media}_token") or f"<{media}>"
        user = {"role": "user", "content": [
            {"type": media}, {"type": "text", "text": _QUESTION},
        ]}  # fmt: skip
        answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
        prompt = _render(jinja, special, [user], True, where)
        whole = _render(jinja, special, [user, answer], False, where)
        before, seen, rest = prompt.partition(visual)
        after, asked, assistant = rest.partition(_QUESTION)
        told, _, end = whole.rpartition(_ANSWER)
        # llava-hf's template has "assistant \n" before an answer that is given, "assistant\n"
        # where it asks for one; generation and training here have the latter.
        if not seen or not asked or told.split() != prompt.split():
            raise ChatTemplateError(
                f"{where}: the chat template gives {prompt!r} and {whole!r}; expected {visual} "
                "before the question and the answer behind its prompt; give another with "
                "--chat_template=FILE.jinja"
            )
        texts |= {f"before_{media}": _leading(tokenizer, before) + before, f"after_{media}": after}
    end = end.strip() or default.end
    return dataclasses.replace(default, **texts, user="", assistant=assistant, end=end)


def _leading(tokenizer: Any, text: str) -> str:
    """The special tokens that a tokenizer puts in front of a text, where it has them not yet."""
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a").ids
    front = ids[: len(ids) - len(alone)] if ids[-len(alone) :] == alone else []
    names = "".join(tokenizer.id_to_token(i) for i in front)
    return "" if text.startswith(names) else names


def jinja_of(template: ChatTemplate) -> str:
    """Jinja text for a conversation without a video, whose embeddings tpo_torch.py puts in."""

    def say(text: str) -> str:
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""

    before = template.before_video.replace("<video>", "")
    return (
        say(before) + "{% for message in messages %}{% if message['role'] == 'user' %}"
        + say(template.user) + "{{ message['content'] }}{% else %}" + say(template.assistant)
        + "{{ message['content'] }}" + say(template.end) + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + say(template.assistant) + "{% endif %}"
    )  # fmt: skip


def special_tokens(directory: epath.Path) -> dict[str, str]:
    """Texts of bos_token, eos_token, pad_token and unk_token, where the folder names them."""
    files = ("special_tokens_map.json", "tokenizer_config.json")
    found: dict[str, str] = {}
    for values in (read_json(directory / file) for file in files):
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = values.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if value:
                found[name] = value
    return found


def stop_tokens(directory: epath.Path, tokenizer: Any, end: str) -> tuple[str, ...]:
    """Texts of the tokens beside `end` at which answers of a checkpoint stop.

    They are `eos_token_id` of generation_config.json, an id or a list; of config.json where that
    file does not say; the tokenizer's eos_token where neither does.

    Args:
      tokenizer: tokenizers.Tokenizer.

    Raises:
      ChatTemplateError: an id that is not in the tokenizer's vocabulary.
    """
    for name in ("generation_config.json", "config.json"):
        about = read_json(directory / name)
        # A multimodal config.json may leave it to the part that is the language model.
        parts = (about, about.get("text_config") or {}, about.get("llm_config") or {})
        given = [part["eos_token_id"] for part in parts if part.get("eos_token_id") is not None]
        if given:
            ids = given[0] if isinstance(given[0], list) else given[:1]
            texts = [_token_of(number, tokenizer, directory / name) for number in ids]
            break
    else:
        texts = [special_tokens(directory).get("eos_token", end)]
    return tuple(text for text in dict.fromkeys(texts) if text != end)


def _token_of(number: Any, tokenizer: Any, file: epath.Path) -> str:
    """Text of the token with an id that a file says."""
    is_id = isinstance(number, int) and 0 <= number < 2**32
    text = tokenizer.id_to_token(number) if is_id else None
    if text is None:
        raise ChatTemplateError(
            f"{file}: eos_token_id has {number!r}, expected ids of tokenizer.json, which has "
            f"{tokenizer.get_vocab_size()} tokens; correct it, or copy both files of one checkpoint"
        )
    return text


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a file, {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def template_ids(text: str, tokenizer: Any) -> list[int]:
    """Ids of a template text, the special tokens in it by name (as data.text does)."""
    names = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items()}
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    ids: list[int] = []
    for piece in re.split(f"({pattern})", text) if names else [text]:
        if piece in names:
            ids.append(names[piece])
        elif piece:
            ids += tokenizer.encode(piece, add_special_tokens=False).ids
    return ids


def _render(
    jinja: str, special: Mapping[str, str], messages: list[dict], generate: bool, where: str
) -> str:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks answers for a loss, is its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    try:
        # Answers without a thinking part, where a template knows both.
        return environment.from_string(jinja).render(
            messages=messages, add_generation_prompt=generate, enable_thinking=False, **special
        )
    # TypeError: a template for texts that gets a list of a video and a text, or the other way.
    except (jinja2.exceptions.TemplateError, TypeError) as error:
        raise ChatTemplateError(
            f"{where}: the chat template fails on one question ({error}); give one with "
            "--chat_template=FILE.jinja"
        ) from error
