"""The published chat template (Jinja) of a checkpoint as the program's ChatTemplate.

The template is rendered once with a question and an answer that stand for themselves; the texts
around them are what ChatTemplate holds. A video stands at the start of the user's turn, with a
newline behind it, as in LLaVA.
"""

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
    """A chat template that is missing or cannot be split; the message names the fix."""


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
        visual_offset=len(_ids(before, tokenizer)),
    )  # fmt: skip


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


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a file, {} where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def _ids(text: str, tokenizer: Any) -> list[int]:
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

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    try:
        # Answers without a thinking part, where a template knows both.
        return environment.from_string(jinja).render(
            messages=messages, add_generation_prompt=generate, enable_thinking=False, **special
        )
    except jinja2.exceptions.TemplateError as error:
        raise ChatTemplateError(
            f"{where}: the chat template fails on one question ({error}); give one with "
            "--chat_template=FILE.jinja"
        ) from error
