"""DAVIS 2017: a palette PNG per frame, Annotations/480p/VIDEO/00000.png; pixel value = object.

--annotations is the folder DAVIS (all videos), one of its lists (ImageSets/2017/train.txt), or a
folder with a folder of PNGs per video. Frames are 24 a second; 255 is void. No object has words:
each is a tracking example with masks. (Ref-DAVIS in the form of ref_youtube_vos has words.)
The split test-dev is published with the mask of the first frame alone. In the folder DAVIS the
lists of ImageSets/2017 say the splits.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

from tpo_jax.data.formats import asking, masks, unlabelled
from tpo_jax.data.formats.reading import Context, Format, Record, expand, inside, load_text
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example

FRAME_RATE = 24.0
LISTS, SPLITS = "ImageSets/2017", ("train", "val", "test-dev", "test-challenge")
FOLDERS = (
    *("Annotations/480p", "Annotations/Full-Resolution"),
    *("Annotations_unsupervised/480p", "Annotations_unsupervised/Full-Resolution"),
)


def records(context: Context) -> Iterator[Record]:
    """One record per object of a video."""
    return expand(_videos(context.file), _objects)


def _videos(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    """(name, (folder of PNGs, split)); a list that is named is a split, whatever is in it."""
    if path.is_dir():
        root = next((path / f for f in FOLDERS if (path / f).is_dir()), path)
        found = sorted({file.parent for file in root.rglob("*.png")})
        if not found:
            raise Invalid("", None, "no folder of .png masks below it", f"check {path}")
        listed = {
            video: split
            for split in SPLITS
            if (lines := path / LISTS / f"{split}.txt").is_file()
            for video in load_text(lines).split()
        }
        for folder in found:
            name = folder.relative_to(root).as_posix()
            yield name, (folder, listed.get(name))
        return
    names = load_text(path).split()
    root = next((path.parents[2] / f for f in FOLDERS if _is_list(path, f)), None)
    if root is None:
        raise Invalid(
            "",
            None,
            f"expected a list ImageSets/2017/*.txt beside one of {', '.join(FOLDERS)}",
            f"check the path {path}",
        )
    yield from ((name, (inside(root, name, "video"), path.stem)) for name in names)


def _is_list(path: pathlib.Path, folder: str) -> bool:
    return len(path.parents) > 2 and (path.parents[2] / folder).is_dir()


def _objects(video: str, item: tuple[pathlib.Path, str | None]) -> Iterator[Record]:
    folder, split = item
    files = sorted(folder.glob("*.png"))
    if not files:
        raise Invalid("video", video, f"no .png in {folder}", "correct the list")
    numbers = masks.objects([masks.read_labels(file) for file in files])
    if not numbers:
        raise Invalid("masks", None, "no object: expected pixels of 1..254", "remove the video")
    for number in numbers:
        yield f"{video}/{number}", (video, files, number, split)


def parse(record: Any, label: str, context: Context) -> list[Example]:
    video, files, number, _ = record
    # One mask is where a track begins; the label of a track is the masks after it.
    unlabelled.check_labels(context, "masks", len(files) > 1)
    rate = context.picture_rate or FRAME_RATE
    name = context.find(video, "video", frame_rate=rate)
    numbers = [masks.frame_number(file.name, "masks") for file in files]
    if context.unlabelled:
        targets = _first_frame(files[0], number, name, rate, context)
        return [context.example(name, label, "tracking", [asking.tracking()], targets)]
    times = masks.frame_times(numbers, rate, "masks")
    rles = [masks.encode(masks.read_labels(file) == number) for file in files]
    targets = masks.tracking_targets(times, rles)
    return [context.example(name, label, "tracking", [asking.tracking()], targets)]


def _first_frame(
    file: pathlib.Path, number: int, name: str, rate: float, context: Context
) -> dict[str, Any]:
    """Targets without labels; the frames are all pictures of the video, the first has the mask."""
    frames = unlabelled.picture_numbers(context, name, "masks")
    if masks.frame_number(file.name, "masks") != frames[0]:
        raise Invalid(
            "masks", file.name, f"the first picture of the video is number {frames[0]}",
            "expected the mask of the first picture",
        )  # fmt: skip
    labels = masks.read_labels(file)
    times = masks.frame_times(frames, rate, "masks")
    box = masks.box(masks.encode(labels == number))
    return unlabelled.targets(frames, times, labels.shape[::-1], input_box=box)


FORMAT = Format(
    *("davis", "DAVIS 2017 palette masks", records, parse),
    unlabelled=True,
    split=lambda record, label: record[3],
)
