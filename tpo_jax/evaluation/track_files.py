"""Submissions of mask and tracking benchmarks: a picture or a line for every annotated frame.

    python -m tpo_jax.evaluate --model=MODEL --data=prepared/valid_u --tasks=mask \\
        --mask_frames=all --benchmark=mevis --submission=out/valid_u --out=eval.json

The free answers are written: of a call that the model did not make, empty masks, or the box that
the question has. A frame that the folder does not store has what is said of the nearest one. Of a
split whose labels are not published the frames are those that its reader says are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from tpo_jax.data import files
from tpo_jax.data.records import Example, PreparedDataset, VideoInfo
from tpo_jax.data.target_parts import part
from tpo_jax.errors import UserError
from tpo_jax.evaluation import benchmarks
from tpo_jax.evaluation.metrics import tracking

REF_YOUTUBE_VOS_RATE = 30.0  # frames a second that the names of its pictures count

Files = Iterator[tuple[str, bytes]]


@dataclasses.dataclass(frozen=True)
class Track:
    """What was answered about one thing, at its n annotated times.

    Attributes:
      item: the question that was answered.
      name: of the record that was read: "VIDEO/EXPRESSION", "VIDEO/OBJECT" or "SEQUENCE".
      times: seconds of the annotations.
      frames: numbers of the files of these frames, where the annotations say them.
      size: (height, width) of masks, and of the frames that boxes are in, pixels.
      masks: n COCO RLEs or None; boxes: n normalised xyxy or None; presence: float[n].
      given: the box of the question, if it has one.
    """

    item: str
    name: str
    times: Sequence[float]
    frames: Sequence[int] | None
    size: tuple[int, int]
    masks: Sequence[Mapping[str, Any] | None]
    boxes: Sequence[Sequence[float] | None]
    presence: np.ndarray
    given: Sequence[float] | None

    def pictures(self) -> Iterator[np.ndarray]:
        """bool[height, width] a time."""
        for rle in self.masks:
            mask = benchmarks.decode_rles([rle], self.size)
            yield benchmarks.resize_nearest(mask, *self.size)[0]


def _refuse_twice(names: Iterable[str], tracks: Iterable[Track]) -> None:
    """Refuses two answers that would be in the same place of the files, before any is written."""
    first: dict[str, Track] = {}
    for name, track in zip(names, tracks, strict=True):
        if (other := first.setdefault(name, track)) is not track:
            raise UserError(
                f"--submission: {other.item} and {track.item} are both answers about {name}; "
                "prepare the split alone, with each object or expression once"
            )


def _referred(tracks: Sequence[Track], number: Callable[[int, float], int]) -> Files:
    """VIDEO/EXPRESSION/00000.png, 255 where the thing is."""
    _refuse_twice((track.name for track in tracks), tracks)
    for track in tracks:
        numbers = track.frames or [number(i, time) for i, time in enumerate(track.times)]
        for frame, mask in zip(numbers, track.pictures(), strict=True):
            yield f"{track.name}/{frame:05d}.png", _png(np.where(mask, 255, 0))


def _davis(tracks: Sequence[Track]) -> Files:
    """VIDEO/00000.png, the number of the object at each pixel; of two the surer one."""
    videos: dict[str, list[tuple[int, Track]]] = defaultdict(list)
    for track in tracks:
        video, _, number = track.name.rpartition("/")
        if not (number.isdecimal() and 0 < int(number) < 256):
            raise UserError(
                f"--submission: --benchmark=davis: record {track.name!r}, expected VIDEO/NUMBER "
                "with a number of 1 to 255; prepare with --format=davis, or name the benchmark "
                "that the data are of"
            )
        videos[video].append((int(number), track))
    for video, objects in videos.items():
        _refuse_twice((f"{video}/{number}" for number, _ in objects), (t for _, t in objects))
        _refuse_other_frames([track for _, track in objects])
    for video, objects in videos.items():
        pictures = [track.pictures() for _, track in objects]
        numbers = objects[0][1].frames or range(len(objects[0][1].times))
        for i, (frame, *masks) in enumerate(zip(numbers, *pictures, strict=True)):
            labels = np.zeros(masks[0].shape, np.uint8)
            for k in np.argsort([track.presence[i] for _, track in objects], kind="stable"):
                labels[masks[k]] = objects[k][0]
            yield f"{video}/{frame:05d}.png", _png(labels, palette=True)


def _refuse_other_frames(tracks: Sequence[Track]) -> None:
    """Refuses objects of one video that cannot be in the same pictures."""
    first, *others = tracks
    for other in others:
        one, two = ((list(track.times), track.size) for track in (first, other))
        if one != two:
            raise UserError(
                f"--submission: {first.item} has {len(one[0])} frames of {one[1]} pixels, "
                f"{other.item} has {len(two[0])} of {two[1]}, expected the same times and size: "
                "they are objects of one video; prepare the split alone, from its own masks"
            )


def _boxes(tracks: Sequence[Track], name: str) -> Files:
    """x,y,w,h in pixels, a line a frame; where there is none, the last one."""
    places = [name.format(track.name.rpartition("/")[2]) for track in tracks]
    _refuse_twice(places, tracks)
    for place, track in zip(places, tracks, strict=True):
        height, width = track.size
        boxes = tracking.pixel_boxes(tracking.hold_last(track.boxes, track.given), width, height)
        lines = (",".join(f"{side:.3f}" for side in box) + "\n" for box in boxes)
        yield place, "".join(lines).encode()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a benchmark has its files.

    Attributes:
      task: of the examples that it is about.
      files: tracks of a split -> (path below the folder, content).
      in_pixels: whether it has boxes in pixels, which need frames of their own size.
    """

    task: str
    files: Callable[[Sequence[Track]], Files]
    in_pixels: bool = False


LAYOUTS = {
    "mevis": Layout("mask", lambda tracks: _referred(tracks, lambda i, _: i)),
    "ref_youtube_vos": Layout(
        "mask", lambda tracks: _referred(tracks, lambda _, t: round(t * REF_YOUTUBE_VOS_RATE))
    ),
    "davis": Layout("tracking", _davis),
    "got10k": Layout("tracking", lambda tracks: _boxes(tracks, "{0}/{0}_001.txt"), True),
    "lasot": Layout("tracking", lambda tracks: _boxes(tracks, "{0}.txt"), True),
}


def check(layout: str, dataset: PreparedDataset, tasks: Sequence[str], mask_frames: str) -> None:
    """Refuses a submission that could not be written, before anything is scored."""
    if mask_frames != "all":
        raise UserError(
            f"--submission: --benchmark={layout} wants every annotated frame; add --mask_frames=all"
        )
    asked = LAYOUTS[layout].task
    if asked not in tasks:
        raise UserError(
            f"--submission: --benchmark={layout} is about the task {asked}, but --tasks are "
            f"{','.join(tasks)}; add {asked}"
        )
    if LAYOUTS[layout].in_pixels and dataset.settings["size"]:
        raise UserError(
            f"--submission: --benchmark={layout} wants boxes in pixels of the videos, but "
            f"{dataset.path} was prepared with --size={dataset.settings['size']}; prepare it "
            "without --size"
        )


def write(
    folder: epath.PathLike,
    layout: str,
    dataset: PreparedDataset,
    samples: Iterable[Mapping[str, Any]],
) -> int:
    """Writes a submission below `folder`; returns the number of its files.

    Args:
      layout: of LAYOUTS.
      dataset: whose questions were answered.
      samples: `Results.samples` of an evaluator.
    """
    task, count = LAYOUTS[layout].task, 0
    examples = functools.lru_cache(maxsize=1)(dataset.examples)  # samples of a video are together
    tracks = [
        _track(dataset.video_info(sample["video"]), examples(sample["video"]), sample)
        for sample in samples
        if sample["task"] == task
    ]
    for track in tracks:
        _check_name(track.name)
    for name, content in LAYOUTS[layout].files(tracks):
        files.write(epath.Path(folder) / name, content)
        count += 1
    return count


def _check_name(name: str) -> None:
    """Refuses a name, taken from the annotations, that leads out of the folder."""
    if not {"", ".", ".."}.isdisjoint(name.split("/")):
        raise UserError(
            f"--submission: the record {name!r} of the annotations names the files of its answer, "
            "and would lead out of the folder; rename it there and prepare again"
        )


def _track(info: VideoInfo, examples: Sequence[Example], sample: Mapping[str, Any]) -> Track:
    example = next(e for e in examples if e.example_id == sample["example"])
    targets = part(example.targets, sample["occurrence"])
    times = targets["times"]
    events = sample["answer"]["events"][sample["place"] : sample["place"] + 1]
    found = next((event["result"] for event in events if event["task"] == "mask"), None)
    if found is None:
        nobody = [None] * len(times)
        found = {"times": times, "masks": nobody, "boxes": nobody, "presence": [0.0] * len(times)}
    seconds = np.asarray(found["times"])
    nearest = [int(np.abs(seconds - time).argmin()) for time in times]
    size = targets.get("size") or benchmarks.rle_size(targets.get("rles") or ())
    return Track(
        item=sample["item"],
        name=example.example_id.removeprefix(f"{example.source}/"),  # of the record
        times=times,
        frames=targets.get("frames"),
        size=tuple(size or (info.height, info.width)),
        masks=[found["masks"][i] for i in nearest],
        boxes=[found["boxes"][i] for i in nearest],
        presence=np.asarray(found["presence"])[nearest],
        given=targets.get("input_box"),
    )


def _png(picture: np.ndarray, *, palette: bool = False) -> bytes:
    """An 8-bit PNG of [h, w]; `palette`: numbers of objects, with a colour each."""
    mode, (height, width) = "P" if palette else "L", picture.shape
    image = Image.frombytes(mode, (width, height), picture.astype(np.uint8).tobytes())
    if palette:
        colours = np.random.default_rng(0).integers(64, 256, (256, 3), np.uint8)
        colours[0] = 0
        image.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
