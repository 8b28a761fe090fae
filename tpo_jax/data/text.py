"""Tokenizer, chat template and the codec between marked text and token ids.

Text of an example carries markers: "<region>", "<temporal>" and "<mask>" in an answer call the head
of that name, "<box>" in a question is a box drawn by the user. In tokens a call is a routing token
(predicted) followed by a slot token (forced, replaced by a learned vector); a box is a slot token
alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tpo_jax.data import files
from tpo_jax.data.records import PreparedDataset
from tpo_jax.data.sampling import SAMPLERS
from tpo_jax.errors import MissingFile, UserError
from tpo_jax.models.heads import BOX_TOKEN, HEADS, task_tokens

FORMAT_VERSION = 1
REMEMBERED_TEXTS = 2**15
LONGEST_SECONDS = 99999.99  # of a video whose times are told in words
SPECIAL_TOKENS = (
    "<pad>", "<bos>", "<eos>", "<user>", "<assistant>",
    "<video>", "</video>", "<image>", "</image>",
)


class _TaskTokens(Mapping):
    """{task: (routing token, slot token)} of the heads that are registered now, then the box."""

    def __getitem__(self, task: str) -> tuple[str | None, str]:
        # The box is an input: it has no routing token.
        return (None, BOX_TOKEN) if task == "box" else task_tokens()[task]

    def __iter__(self) -> Iterator[str]:
        return iter((*task_tokens(), "box"))

    def __len__(self) -> int:
        return len(task_tokens()) + 1


# Entries of template.json that folders written before them lack, and what they mean there.
_YOUNGER = {"sampling": "uniform", "frames": 0, "time_instruction": False, "stops": ()}
TASK_TOKENS: Mapping[str, tuple[str | None, str]] = _TaskTokens()
_MARKER = re.compile(r"<(/?[A-Za-z_]+)>")


class TextError(UserError):
    """A text that cannot become a training row; the message names the text and the fix."""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1000) -> Tokenizer:
    """Byte-level BPE over `texts`; any text round-trips, digits are single tokens.

    Args:
      texts: questions, answers and options as separate texts, so that a word is learned both with
        and without a leading space. Markers are cut out before training.
      vocab_size: upper bound; 9 special tokens and 256 bytes are always in it.
    """
    if vocab_size < len(SPECIAL_TOKENS) + 256:
        raise UserError(
            f"vocab_size: {vocab_size}, expected at least {len(SPECIAL_TOKENS) + 256} "
            "(special tokens and bytes).")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False)
    pieces = (piece for text in texts for piece in _MARKER.split(text)[::2] if piece)
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def texts_of(dataset: PreparedDataset) -> Iterator[str]:
    """Every question, answer and option of a prepared folder, to train a tokenizer on."""
    for video_id in dataset.videos:
        for example in dataset.examples(video_id):
            for turn in example.turns:
                yield from (turn.question, turn.answer, *turn.options)


def add_task_tokens(tokenizer: Tokenizer, heads: Sequence[str]) -> None:
    """Appends the tokens of `heads`, and the box token if there is any head, to the vocabulary.

    Tokens that are there keep their ids, so a stage may add heads to the model of the one before.
    """
    if unknown := set(heads) - set(HEADS):
        raise UserError(f"heads: unknown {sorted(unknown)}, expected some of {list(HEADS)}.")
    tasks = {HEADS[head].task for head in heads}
    for task, tokens in TASK_TOKENS.items():
        if task in tasks or (task == "box" and tasks):
            tokenizer.add_special_tokens(
                [AddedToken(token, special=True) for token in tokens if token is not None])


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The texts around video, question and answer; special tokens are written by name.

    prefix = before visual [visual tokens] after visual [time]; branch = user question assistant
    answer end. `visual_offset` is the static number of tokens before the visual ones.

    sampling: how frames of a video are chosen, of data.sampling.SAMPLERS. frames: how many, as the
    model was published; 0: as many as it takes. time_instruction: whether the times of the frames
    are told in words, by `time_instruction`, after the video. stops: tokens beside `end` at which
    an answer stops, too; a model may have learnt to say them, though no label here has them.
    """

    before_video: str = "<bos><video>"
    after_video: str = "</video>"
    before_image: str = "<bos><image>"
    after_image: str = "</image>"
    user: str = "<user>"
    assistant: str = "<assistant>"
    end: str = "<eos>"
    pad: str = "<pad>"
    visual_offset: int = 2
    sampling: str = "uniform"
    frames: int = 0
    time_instruction: bool = False
    stops: tuple[str, ...] = ()

    def __post_init__(self):
        if self.sampling not in SAMPLERS:
            raise UserError(
                f"template.sampling: {self.sampling!r}, expected one of {sorted(SAMPLERS)}.")

    def to_json(self) -> dict:
        """Without what older folders lack, where it has its default: their fingerprints stay."""
        values = dataclasses.asdict(self)
        return {"format_version": FORMAT_VERSION} | {
            name: value for name, value in values.items()
            if name not in _YOUNGER or value != _YOUNGER[name]}

    @classmethod
    def from_json(cls, value: dict, where: str = "template") -> ChatTemplate:
        value = dict(value)
        if (version := value.pop("format_version", None)) != FORMAT_VERSION:
            raise UserError(f"{where}: format_version {version!r}, expected {FORMAT_VERSION}.")
        value = _YOUNGER | value
        names = {field.name for field in dataclasses.fields(cls)}
        if wrong := names ^ value.keys():
            raise UserError(f"{where}: missing or unknown keys {sorted(wrong)}.")
        return cls(**value | {"stops": tuple(value["stops"])})


@dataclasses.dataclass(frozen=True)
class Slot:
    """A slot token: the head that it belongs to and its position in the branch."""

    head: str
    index: int


@dataclasses.dataclass(frozen=True)
class Branch:
    """Tokens of one question and answer.

    Attributes:
      ids: int32[n].
      weights: float32[n], 1 where the token is predicted and trained on: answer and end, but no
        slot token (it is forced after its routing token).
      answer: int, position of the first answer token; n if there is no answer.
      slots: in order of position.
    """

    ids: np.ndarray
    weights: np.ndarray
    answer: int
    slots: tuple[Slot, ...]


def render_options(question: str, options: Sequence[str]) -> str:
    """The question with its options, as shown to the model: 'Q? Options: a; b; c.'"""
    return f"{question} Options: {'; '.join(options)}."


def time_instruction(times: Sequence[float], duration: float) -> str:
    """The sentence about time that LLaVA-Video reads before a question, word for word."""
    stamps = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly "
        f"sampled from it. These frames are located at {stamps}.Please answer the following "
        "questions related to this video."
    )


class TextCodec:
    """Text <-> token ids for one tokenizer and one template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None):
        self.tokenizer = tokenizer
        self.template = template or ChatTemplate()
        # A user's text never turns into special tokens: those are inserted by id only.
        self.tokenizer.encode_special_tokens = True
        # Questions and answers of a data set repeat, and all are checked before training starts.
        self._encoded = functools.lru_cache(maxsize=REMEMBERED_TEXTS)(self._encode)
        self._branches = functools.lru_cache(maxsize=REMEMBERED_TEXTS)(self._build_branch)
        self.special_ids = {
            token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
        self.task_tokens = {
            token: self.special_ids[token] for tokens in TASK_TOKENS.values()
            for token in tokens if token in self.special_ids}
        self.heads = tuple(
            head for head, tokens in TASK_TOKENS.items()
            if head != "box" and all(token in self.special_ids for token in tokens))
        t = self.template
        # Llama's tokenizers put a space in front of every text that they encode.
        alone = tokenizer.encode("a", add_special_tokens=False).tokens
        self._spaced = "".join(alone).startswith("▁")
        self.pad_id, = self._template_ids("pad")
        self.eos_id = self._template_ids("end")[-1]
        # Where a generated answer stops; the first is the one that labels have.
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *map(self._stop_id, t.stops))))
        self._before = {m: self._template_ids(f"before_{m}") for m in ("video", "image")}
        self._after = {m: self._template_ids(f"after_{m}") for m in ("video", "image")}
        self._user, self._assistant, self._end = (
            self._template_ids(name) for name in ("user", "assistant", "end"))
        # Whether a question goes on a text before it, without a space of its own.
        front = t.user or t.after_video
        self._goes_on = bool(self._spaced and front and not front.endswith(
            (" ", *self.special_ids)))
        for media, ids in self._before.items():
            if len(ids) != t.visual_offset:
                raise UserError(
                    f"template.before_{media}: {len(ids)} tokens, but visual_offset is "
                    f"{t.visual_offset}; the visual tokens must start at one fixed position.")
        if len(self._after["video"]) != len(self._after["image"]):
            raise UserError("template: after_video and after_image differ in number of tokens.")
        self._names = {id: name for name, id in self.special_ids.items()}
        self._names |= {id: tokenizer.id_to_token(id) for id in self.stop_ids[1:]}
        self._markers = {}  # (routing id, slot id) -> marker; the box has no routing id
        for head, (routing, slot) in TASK_TOKENS.items():
            if slot in self.special_ids:
                self._markers[self.special_ids.get(routing), self.special_ids[slot]] = f"<{head}>"

    def __reduce__(self):
        # The tokenizer's own pickle forgets encode_special_tokens.
        return TextCodec, (self.tokenizer, self.template)

    def _stop_id(self, token: str) -> int:
        """Id of a token of `template.stops`, which need not be a special one."""
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise UserError(
                f"template.stops: {token!r} is not in the tokenizer, expected one of its tokens; "
                "correct template.json or import the model again.")
        return number

    def _template_ids(self, field: str) -> list[int]:
        """Ids of one template text; special tokens by name, the rest as ordinary text."""
        ids, text = [], getattr(self.template, field)
        before_question = field == "user" or field.startswith("after_") and not self.template.user
        if self._spaced and field == "assistant":  # the spaces at the seams are the tokenizer's
            text = text.removeprefix(" ")
        elif self._spaced and before_question:
            text = text.removesuffix(" ")
        # Published tokenizers have special tokens of any form, such as "[INST]".
        names = "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True)))
        for piece in re.split(f"({names})", text) if names else [text]:
            if piece in self.special_ids:
                ids.append(self.special_ids[piece])
                continue
            for name in re.findall(r"<[^<>\s]+>", piece):
                if name.islower():  # VideoChat2's <Video> is text
                    raise UserError(
                        f"template.{field}: {name!r} is not in the tokenizer, which has "
                        f"{sorted(self.special_ids)}.")
            if piece:
                ids.extend(self.encode(piece))
        return ids

    @property
    def vocab_size(self) -> int:
        """Number of ids in use, added tokens included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def after_visual(self) -> int:
        """Number of tokens after the visual ones in a prefix without a question."""
        return len(self._after["video"])

    def time_room(self, frames: int) -> int:
        """Most tokens of the sentence about the times of `frames` frames; 0 without one."""
        return len(self.time_ids([LONGEST_SECONDS] * frames, LONGEST_SECONDS))

    def time_ids(self, times: Sequence[float], duration: float) -> list[int]:
        """The sentence about times in seconds and the line break behind it, if there is one."""
        if not self.template.time_instruction:
            return []
        return self.encode(time_instruction(times, duration) + "\n")

    def token_id(self, token: str) -> int:
        """Id of a special or task token by name."""
        if token not in self.special_ids:
            raise KeyError(f"tokenizer: no token {token!r}, it has {sorted(self.special_ids)}.")
        return self.special_ids[token]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; nothing in it is read as a special token."""
        return list(self._encoded(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_on(self, text: str) -> list[int]:
        """Ids of plain text that goes on another: no space in front that is not in it."""
        front = self.encode("\n")
        return self.encode("\n" + text)[len(front):]

    def encode_marked(self, text: str, markers: Sequence[str], where: str,
                      goes_on: bool = False) -> tuple[list[int], list[bool], list[Slot]]:
        """Ids, is-slot flags and slots of a text with markers of some kinds ('region').

        goes_on: the text before it is text, too, and of the same turn.
        """
        ids: list[int] = []
        forced: list[bool] = []
        slots: list[Slot] = []
        for i, piece in enumerate(_MARKER.split(text)):
            if i % 2 == 0:
                encode = self._encode_on if goes_on and i == 0 else self.encode
                new = encode(piece) if piece else []
                ids += new
                forced += [False] * len(new)
                continue
            if piece not in markers:
                raise TextError(
                    f"{where}: marker '<{piece}>' in {text!r}, expected only "
                    f"{[f'<{m}>' for m in markers]}. Write '< {piece}>' if it is meant as text.")
            routing, slot = TASK_TOKENS[piece]
            if slot not in self.special_ids:
                raise TextError(
                    f"{where}: marker '<{piece}>', but the tokenizer has no {slot}. Train with "
                    f"{piece!r} in model.heads or leave the task out of the data weights.")
            if routing is not None:
                ids.append(self.special_ids[routing])
                forced.append(False)
            slots.append(Slot(piece, len(ids)))
            ids.append(self.special_ids[slot])
            forced.append(True)
        return ids, forced, slots

    def build_prefix(self, visual_tokens: int, media: str = "video",
                     question: str | None = None, where: str = "question",
                     time: Sequence[int] = ()) -> np.ndarray:
        """int32[n]: before, visual span of <pad>, after, `time_ids` and, in a preference row, the
        question."""
        ids = [*self._before[media], *[self.pad_id] * visual_tokens, *self._after[media], *time]
        if question is not None:
            ids += self._user + self.encode_marked(question, (), where, self._goes_on)[0]
        return np.asarray(ids, np.int32)

    def build_branch(self, question: str | None, answer: str | None,
                     where: str = "branch") -> Branch:
        """Tokens of one branch; equal texts give the same object, whose arrays are read-only.

        Args:
          question: None when it stands in the prefix (preference rows).
          answer: None for a prompt that the model continues.
          where: prefix of error messages.

        Raises:
          TextError: empty answer, or a marker that is unknown or in the wrong place.
        """
        try:
            return self._branches(question, answer)
        except TextError:
            return self._build_branch(question, answer, where)  # the same error, with the place

    def _build_branch(self, question: str | None, answer: str | None,
                      where: str = "branch") -> Branch:
        ids: list[int] = []
        slots: list[Slot] = []
        if question is not None:
            text, _, found = self.encode_marked(
                question, ("box",), f"{where}.question", self._goes_on)
            ids = self._user + text
            slots = [Slot(s.head, s.index + len(self._user)) for s in found]
        ids = ids + self._assistant
        start = len(ids)
        weights = [0.0] * start
        if answer is not None:
            if not answer.strip():
                raise TextError(f"{where}.answer: empty, expected text. Remove the example.")
            heads = tuple(head for head in TASK_TOKENS if head != "box")
            text, forced, found = self.encode_marked(answer, heads, f"{where}.answer")
            slots = slots + [Slot(s.head, s.index + start) for s in found]
            ids = ids + text + self._end
            weights += [0.0 if f else 1.0 for f in forced] + [1.0] * len(self._end)
        arrays = np.asarray(ids, np.int32), np.asarray(weights, np.float32)
        for array in arrays:
            array.flags.writeable = False
        return Branch(*arrays, start, tuple(slots))

    def decode(self, ids: Iterable[int]) -> str:
        """Marked text; special tokens are dropped, a routing token without slot is kept by name."""
        parts: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                parts.append(self.tokenizer.decode(run, skip_special_tokens=False))
                run.clear()

        routing_ids = {routing for routing, _ in self._markers if routing is not None}
        ids = [int(i) for i in ids]
        position = 0
        while position < len(ids):
            here, after = ids[position], ids[position + 1] if position + 1 < len(ids) else None
            if here not in self._names:
                run.append(here)
            else:
                flush()
                if (here, after) in self._markers:
                    parts.append(self._markers[here, after])
                    position += 1
                elif (None, here) in self._markers:
                    parts.append(self._markers[None, here])
                elif here in routing_ids:
                    parts.append(self._names[here])
            position += 1
        flush()
        return "".join(parts)

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """One readable text per token, special tokens by name (for inspection)."""
        return [self._names.get(int(i)) or self.tokenizer.decode([int(i)]) for i in ids]

    def save(self, directory: epath.PathLike) -> None:
        """Writes tokenizer.json and template.json, each under a temporary name first."""
        directory = epath.Path(directory)
        template = json.dumps(self.template.to_json(), indent=2) + "\n"
        files.write(directory / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        files.write(directory / "template.json", template)

    @classmethod
    def load(cls, directory: epath.PathLike) -> TextCodec:
        """Reads what `save` wrote.

        Args:
          directory: the folder, or a tokenizer.json; one without a template.json beside it (as
            written before there is a model) gets the default template.
        """
        directory = epath.Path(directory)
        alone = directory.name == "tokenizer.json"
        if alone:
            directory = directory.parent
        path = directory / "template.json"
        if not (directory / "tokenizer.json").exists():
            fix = (
                "write it with `python -m tpo_jax.prepare tokenizer`" if alone
                else f"{directory} is no model folder; give the one that training wrote "
                "(workdir/model)"
            )  # fmt: skip
            raise MissingFile(f"{directory / 'tokenizer.json'}: missing; {fix}")
        if path.exists():
            template = ChatTemplate.from_json(json.loads(path.read_text()), str(path))
        elif alone:
            template = ChatTemplate()
        else:
            raise MissingFile(f"{path}: missing; the codec of a model is both files.")
        return cls(Tokenizer.from_str((directory / "tokenizer.json").read_text()), template)
