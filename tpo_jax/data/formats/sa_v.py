"""SA-V: masks of objects in every 4th frame of videos of 24 a second.

The training set is VIDEO_manual.json and VIDEO_auto.json: {"video_id", "video_duration" s,
"video_frame_count", "masklet": [frame][object] RLE, "masklet_id": [...], "masklet_num", ...}. The
validation and test sets are folders with Annotations_6fps/VIDEO/OBJECT/00004.png, not 0 where the
object is. `video_split` of a JSON says where it belongs. No object has words: each is a tracking
example with masks, asked for by the box of the first frame that shows it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from tpo_jax.data import validation
from tpo_jax.data.formats import asking, masks
from tpo_jax.data.formats.reading import Context, Format, Record, expand, load_json
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

FRAME_RATE = 24.0  # of the validation and test sets
PNGS = "Annotations_6fps"
STEP = 4  # frames of the video from one annotation to the next
REQUIRED = ("video_id", "video_duration", "video_frame_count", "masklet", "masklet_id")
OPTIONAL = (
    *("video_height", "video_width", "video_resolution", "video_environment", "video_split"),
    *("masklet_size_rel", "masklet_size_abs", "masklet_size_bucket", "masklet_num"),
    *("masklet_visibility_changes", "masklet_first_appeared_frame", "masklet_frame_count"),
    *("masklet_edited_frame_count", "masklet_type", "masklet_stability_score"),
)


def records(context: Context) -> Iterator[Record]:
    """One record per object; the file is one JSON, a folder of them, or a folder of PNGs."""
    if (context.file / PNGS).is_dir():
        root = context.file / PNGS
        folders = sorted({file.parent for file in root.rglob("*.png")})
        return ((folder.relative_to(root).as_posix(), folder) for folder in folders)
    files = [context.file]
    if context.file.is_dir():
        files = sorted(context.file.rglob("*.json"))
        if not files:
            raise Invalid("", None, "no .json below it", f"check the path {context.file}")
    return expand(((f.stem, f) for f in files), lambda *item: _objects(context, *item))


def _objects(context: Context, label: str, path: pathlib.Path) -> Iterator[Record]:
    data = load_json(path, dict)
    context.keys(data, REQUIRED, OPTIONAL)
    ids = validation.check_list("masklet_id", data["masklet_id"])
    frames = validation.check_list("masklet", data["masklet"])
    for i, frame in enumerate(frames):
        if len(validation.check_list(f"masklet[{i}]", frame)) != len(ids):
            raise Invalid(
                f"masklet[{i}]",
                len(frame),
                f"expected one RLE for each of the {len(ids)} objects of masklet_id",
                "write null where an object is absent",
            )
    for k, masklet in enumerate(ids):
        yield f"{label}/{masklet}", (data, k, [frame[k] for frame in frames])


def parse(record: Any, label: str, context: Context) -> list[Example]:
    if isinstance(record, pathlib.Path):
        name, targets = _pictured(record, context)
    else:
        name, targets = _listed(*record, context)
    return [context.example(name, label, "tracking", [asking.tracking()], targets)]


def _pictured(folder: pathlib.Path, context: Context) -> tuple[str, dict[str, Any]]:
    rate = context.picture_rate or FRAME_RATE
    name = context.find(folder.parent.name, "video", frame_rate=rate)
    files = sorted(folder.glob("*.png"))
    numbers = [masks.frame_number(file.name, "masks") for file in files]
    rles = [masks.encode(masks.read_labels(file) > 0) for file in files]
    # Their numbers are those of the frames of the video, which begin with 0.
    return name, masks.tracking_targets([n / rate for n in numbers], rles)


def _listed(data: Any, k: int, rles: Any, context: Context) -> tuple[str, dict[str, Any]]:
    duration = validation.check_number("video_duration", data["video_duration"], 1e-3, 1e9, "s")
    count = validation.check_number("video_frame_count", data["video_frame_count"], 1, 1e9, "")
    if (len(rles) - 1) * STEP >= count:
        raise Invalid(
            "masklet",
            len(rles),
            f"expected a mask every {STEP} frames of {count:g}",
            "correct video_frame_count",
        )
    name = context.find(data["video_id"], "video_id", frame_rate=count / duration)
    times = [i * STEP * duration / count for i in range(len(rles))]
    checked = [
        None if rle is None else validation.check_rle(f"masklet[{i}][{k}]", rle)
        for i, rle in enumerate(rles)
    ]
    return name, masks.tracking_targets(times, checked)


def _split(record: Any, label: str) -> Any:
    """Of a JSON; folders of PNGs name none."""
    return None if isinstance(record, pathlib.Path) else record[0].get("video_split")


FORMAT = Format(
    *("sa_v", "SA-V masklets, JSON per video or PNG per object", records, parse), split=_split
)
