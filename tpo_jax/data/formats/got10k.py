"""GOT-10k tracking: a folder per sequence with groundtruth.txt, one "x,y,w,h" in pixels a frame.

Beside it, optional as in the release: absence.label (1 = the object is not in this frame),
meta_info.ini (anno_fps, resolution, object_class, ...) and the frames 00000001.jpg, ...; the labels
cover.label and cut_by_image.label are not used, nor url, begin and end, which say where on the web
the frames are from. The sequence folder has the name of its video.
The split test is published with the box of the first frame alone. Names of the release say the
split: GOT-10k_Val_000001.
"""

from __future__ import annotations

import configparser
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpo_jax.data.formats import asking, tracks, unlabelled
from tpo_jax.data.formats.reading import Context, Format, Record, load_text, pixel_box
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

META = "meta_info.ini"
META_KEYS = (
    *("url", "begin", "end", "anno_fps", "object_class", "motion_class", "major_class"),
    *("root_class", "motion_adverb", "resolution"),
)


def records(context: Context) -> Iterator[Record]:
    return tracks.sequences(context.file, lambda truth: _read(truth, context))


def _read(truth: pathlib.Path, context: Context) -> Any:
    boxes = tracks.read_boxes(truth)
    label = truth.with_name("absence.label")
    absent = tracks.read_flags(label, len(boxes)) if label.is_file() else [False] * len(boxes)
    meta = _meta(truth.with_name(META))
    context.keys(meta, (), META_KEYS, META)
    return boxes, absent, meta


def parse(record: Any, label: str, context: Context) -> list[Example]:
    boxes, absent, meta = record
    video = re.sub(r"#.*$", "", label)  # "<video>#<object>" when a video has several tracks
    rate = re.findall(r"[\d.]+", meta.get("anno_fps", ""))
    name = context.find(video, "sequence", frame_rate=float(rate[0]) if rate else None)
    size = re.findall(r"\d+", meta.get("resolution", ""))
    width, height = map(int, size) if len(size) == 2 else context.frame_size(name, "resolution")
    fps = float(rate[0]) if rate else context.frame_rate(name, "anno_fps")
    there = len(boxes) > 1  # one box is where a track begins; its label is the boxes after it
    if context.unlabelled:
        unlabelled.check_labels(context, tracks.TRUTH, there)
        targets = _first_frame(boxes, name, fps, (width, height), context)
    else:
        times = [i / fps for i in range(len(boxes))]
        targets = tracks.targets(boxes, absent, times, (width, height))
        unlabelled.check_labels(context, tracks.TRUTH, there)
        tracks.check_count(context, name, boxes)
    return [context.example(name, label, "tracking", [asking.tracking()], targets)]


def _first_frame(
    boxes: Sequence[Sequence[float]], name: str, fps: float, size: tuple[int, int], context: Context
) -> dict[str, Any]:
    """Targets without labels; the frames are all pictures of the video, the first has the box."""
    box = pixel_box(f"{tracks.TRUTH} line 1", boxes[0] if boxes else None, *size)
    frames = unlabelled.picture_numbers(context, name, "sequence")
    times = [(number - frames[0]) / fps for number in frames]
    return unlabelled.targets(frames, times, size, input_box=box)


def _meta(path: pathlib.Path) -> Mapping[str, str]:
    if not path.is_file():
        return {}
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(load_text(path))
    except configparser.Error as error:
        raise Invalid(META, None, f"not an INI file: {error}", "correct it") from error
    return {key: value for section in parser.sections() for key, value in parser[section].items()}


def _split(record: Any, label: str) -> str | None:
    """train, val or test by the name of a sequence of the release; None of others."""
    named = re.fullmatch(r"GOT-10k_(Train|Val|Test)_\d+", label.split("/")[-1])
    return named[1].lower() if named else None


FORMAT = Format(
    *("got10k", "GOT-10k tracking boxes, one folder per sequence", records, parse),
    unlabelled=True,
    split=_split,
)
