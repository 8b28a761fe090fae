"""What all readers share: files loaded with named errors, and the context of one of them."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tpo_jax.data import media as media_lib
from tpo_jax.data import validation
from tpo_jax.data import video as video_lib
from tpo_jax.data.example_checks import check_example
from tpo_jax.data.formats import splits
from tpo_jax.data.problems import Invalid, Problem
from tpo_jax.data.records import Example, Turn

# A label that finds the record in its file, and the record, or why it cannot be read.
Record = tuple[str, Any]
# What a COCO file says of itself (cocodataset.org, "Data format"), by keys that may be missing.
COCO_ABOUT = {
    "info": ("year", "version", "description", "contributor", "url", "date_created"),
    "licenses": ("id", "name", "url"),
    "categories": ("id", "name", "supercategory"),
}


@dataclasses.dataclass(frozen=True)
class Draft:
    """An example as read, with the place it comes from; its video is not decoded yet."""

    example: Example
    file: str
    record: str


@dataclasses.dataclass(frozen=True)
class Context:
    """One annotation file being read.

    `media` is None when the annotations are checked without their media; then names are only
    checked for safety. `source` names the data set in every example. `picture_rate` is the frame
    rate of folders of pictures where the annotations do not say it; `unlabelled`, whether the split
    is one that is published without labels; `split`, which one is read where a file holds several.
    """

    file: pathlib.Path
    source: str
    media: media_lib.MediaFolder | None = None
    ignore_keys: frozenset[str] = frozenset()
    picture_rate: float | None = None
    unlabelled: bool = False
    split: str | None = None

    def keys(
        self, data: Any, required: Sequence[str], optional: Sequence[str] = (), field: str = ""
    ) -> None:
        """Refuses missing and unknown keys."""
        validation.check_keys(data, optional, required, field, self.ignore_keys)

    def coco_about(self, data: Mapping[str, Any]) -> None:
        """Refuses unknown keys in what a COCO file says of itself; none of it is read."""
        self.keys(data.get("info", {}), (), COCO_ABOUT["info"], "info")
        for name in ("licenses", "categories"):
            for i, item in enumerate(validation.check_list(name, data.get(name, []))):
                self.keys(item, (), COCO_ABOUT[name], f"{name}[{i}]")

    def find(self, name: Any, field: str, *others: str, frame_rate: float | None = None) -> str:
        """The media file, as a path below the media folder; it is also the video id.

        Args:
          name: as the annotation has it.
          field: where it stands there.
          others: names that stand for it where there is no file of this name.
          frame_rate: where the media is a folder of numbered pictures, how many a second.
        """
        safe = media_lib.safe_name(name, field)
        if self.media is None:
            return safe
        known = [n for n in (safe, *others) if self.media.has(media_lib.safe_name(n, field))]
        found = self.media.find(known[0] if known else name, field)
        self.media.set_frame_rate(found, frame_rate or self.picture_rate, field)
        return found

    def has(self, name: str) -> bool:
        """Whether there is such media; where no media are at hand there is."""
        return self.media is None or self.media.has(name)

    def kind(self, name: str, expected: str) -> str:
        """ "video" or "image" of a name from `find`; `expected` where there are no media."""
        if self.media is None:
            return expected
        try:
            return video_lib.media_kind(self.media.path(name))
        except video_lib.VideoError as error:  # a GIF or WebP has to be opened
            raise Invalid(expected, name, error.reason, error.fix) from error

    def frame_size(self, name: str, field: str) -> tuple[int, int]:
        """(width, height) in pixels, read from the file's header."""
        if self.media is None:
            raise Invalid(
                field, None, "the frame size is not in the annotation", "give it, or say --media"
            )
        found = self.media.probe(name, field)
        return found.width, found.height

    def frame_rate(self, name: str, field: str) -> float:
        """Frames a second: as said for a folder of pictures, else read from the file's header."""
        rate = self.picture_rate
        if self.media is not None:
            rate = self.media.frame_rate(name) or self.media.probe(name, field).rate
        if not rate:
            raise Invalid(
                field,
                None,
                "the frame rate is not in the annotation",
                "give it, or say --media or --frame_rate",
            )
        return rate

    def duration(self, name: str, field: str) -> float:
        """Seconds, read from the file's header; infinite where nobody says."""
        known = 0.0 if self.media is None else self.media.probe(name, field).duration
        return known or math.inf

    def example(
        self,
        name: str,
        label: str,
        task: str,
        turns: Sequence[Turn],
        targets: Mapping[str, Any],
        **changes: Any,
    ) -> Example:
        """An example about the whole video `name`, unless `changes` say otherwise."""
        return Example(
            **{
                "example_id": f"{self.source}/{label}",
                "video_id": name,
                "media": self.kind(name, "video"),
                "task": task,
                "source": self.source,
                "start": 0.0,
                "end": float("inf"),
                "turns": tuple(turns),
                "targets": dict(targets),
            }
            | changes
        )


@dataclasses.dataclass(frozen=True)
class Format:
    """A published annotation format.

    `records` walks a file or folder; `parse` makes examples of one record and raises Invalid.
    `unlabelled`: whether it also reads splits that are published without labels. `split`: of
    formats whose files may hold several, the name of that of a record and its label; None where
    the record names none.
    """

    name: str
    description: str
    records: Callable[[Context], Iterator[Record]]
    parse: Callable[[Any, str, Context], Sequence[Example]]
    unlabelled: bool = False
    split: Callable[[Any, str], Any] | None = None

    def read(self, context: Context) -> tuple[list[Draft], list[Problem]]:
        """All good examples of a file, and what is wrong with the others.

        Raises:
          splits.WrongSplit: `context.split` is missing, or is none that the file holds.
        """
        drafts, problems = [], []
        file = str(context.file)
        chosen = splits.Chosen(context.file, context.split)
        try:
            for label, record in self.records(context):
                try:
                    if isinstance(record, Invalid):
                        raise record
                    if self.split and not chosen.takes(self.split(record, label)):
                        continue
                    found = self.parse(record, label, context)
                    examples = [check_example(example) for example in found]
                except Invalid as invalid:
                    problems.append(invalid.at(file, label))
                else:
                    drafts += [Draft(example, file, label) for example in examples]
        except Invalid as invalid:  # the file as a whole
            problems.append(invalid.at(file, ""))
        chosen.check()
        return drafts, problems


def load_json(path: pathlib.Path, kind: type[list] | type[dict]) -> Any:
    """The list or object that a JSON file holds; raises Invalid with line and column."""
    try:
        data = json.loads(load_text(path))
    except RecursionError as error:
        raise Invalid("", None, "lists in lists without end", "correct the file") from error
    except json.JSONDecodeError as error:
        raise Invalid(
            f"line {error.lineno} column {error.colno}",
            None,
            f"not JSON: {error.msg}",
            "correct it; a file cut by a crash must be written again",
        ) from error
    if not isinstance(data, kind):
        expected = {list: "a JSON list", dict: "a JSON object"}[kind]
        raise Invalid("", type(data).__name__, f"expected {expected}", "check the format's name")
    return data


def as_object(field: str, value: Any) -> Mapping[str, Any]:
    """A JSON object whose keys are names, not fields."""
    if not isinstance(value, Mapping):
        raise Invalid(field, value, "expected {name: ...}", "write it as {...}")
    return value


def paired(entry: Mapping[str, Any], *keys: str) -> list[tuple[Any, ...]]:
    """The lists under `keys` side by side; raises Invalid where their lengths differ."""
    lists = [validation.check_list(key, entry[key]) for key in keys]
    if len({len(values) for values in lists}) > 1:
        raise Invalid(
            keys[0],
            [len(values) for values in lists],
            f"expected as many {' as '.join(keys)}",
            "make them agree",
        )
    return list(zip(*lists, strict=True))


def load_text(path: pathlib.Path) -> str:
    """The text of a file; raises Invalid where there is none."""
    if not path.is_file():
        raise Invalid("", None, "the annotation file does not exist", f"check the path {path}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid("", None, f"not UTF-8 text: {error}", "save it as UTF-8") from error


def inside(root: pathlib.Path, name: Any, field: str) -> pathlib.Path:
    """The file that an annotation names, relative to `root`; raises Invalid outside of it."""
    path = root / media_lib.safe_name(name, field)
    if not path.resolve().is_relative_to(root.resolve()):
        raise Invalid(field, name, f"it leads out of {root}", f"copy the file into {root}")
    return path


def expand(
    items: Iterable[tuple[str, Any]], split: Callable[[str, Any], Iterator[Record]]
) -> Iterator[Record]:
    """The records that `split` makes of each (label, item); what it refuses is one Invalid."""
    for label, item in items:
        try:
            yield from split(label, item)
        except Invalid as invalid:
            yield label, invalid


def json_lines(path: pathlib.Path) -> Iterator[Record]:
    """(line number, object) of a JSON-lines file; blank lines are skipped."""
    if not path.is_file():
        raise Invalid("", None, "the annotation file does not exist", f"check the path {path}")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            label = f"line {number}"
            try:
                yield label, json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                yield label, Invalid("", line[:80], f"not JSON: {error}", "correct the line")


def text_lines(path: pathlib.Path) -> Iterator[Record]:
    """(line number, text) of a text file; blank lines are skipped."""
    for number, line in enumerate(load_text(path).splitlines(), 1):
        if line.strip():
            yield f"line {number}", line.strip()


def pixel_box(
    field: str, value: Any, width: float, height: float, cut: bool = False
) -> list[float]:
    """[x, y, w, h] in pixels to normalised [x1, y1, x2, y2]; raises Invalid outside the frame.

    Up to one pixel over the border is rounding and is cut; more only where `cut` says that the
    data set draws its boxes over the border.
    """
    if len(validation.check_list(field, value)) != 4:
        raise Invalid(field, value, "expected [x, y, width, height] in pixels", "correct it")
    x, y, w, h = (validation.check_number(field, v, float("-inf"), float("inf"), "") for v in value)
    margin = math.inf if cut else 1
    right, bottom = x + w - width, y + h - height
    if max(-x, -y, right, bottom) > margin or w <= 0 or h <= 0:
        raise Invalid(
            field,
            value,
            f"the box is outside the frame of {width:g}x{height:g} pixels, or empty: "
            "expected [x, y, width, height] in pixels",
            "correct the box, or check that the record names the right video",
        )
    x1, y1 = max(x / width, 0.0), max(y / height, 0.0)
    x2, y2 = min((x + w) / width, 1.0), min((y + h) / height, 1.0)
    return validation.check_box(field, [x1, y1, x2, y2])
