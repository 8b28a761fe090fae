"""The same videos with other labels of masks and tracks.

    python -m experiments.task_preference.relabelled first_frame --data D/train --out runs/D

  first_frame  the first label of the clip alone
  drawn_boxes  every masked object as one to follow through pieces of its video, from a box around
               it where each first shows it: what a SAM 2 learns from before a language model
               prompts it
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from pycocotools import mask as coco_mask

from tpo_jax.data.ingest.derive import derive
from tpo_jax.data.records import Example, PreparedDataset, Turn

TASKS = ("mask", "tracking")
# Eight frames of such a piece are as far apart as the 32 of a whole video in a test.
PIECE = 4.0  # seconds
_FOLLOW = (Turn("Where does the object at <box> go?", "It moves along <mask>.", kind="tracking"),)


def first_frame(example: Example) -> list[Example]:
    """The example with its first label alone, which may be that the object is absent; nothing of a
    track that is absent there, as no box can be drawn.

    The head makes a box of a mask itself.
    """
    given = example.targets
    first = {k: given[k][:1] for k in ("times", "rles", "boxes") if given.get(k) is not None}
    if first.get("boxes") == [None]:
        return []
    return [dataclasses.replace(example, targets={**given, **first})]


def drawn_boxes(example: Example) -> list[Example]:
    """A masked object as tracks of PIECE seconds, whose targets are its masks; nothing of pieces
    that never show it. Tracks have boxes alone, no masks, and are left out."""
    if example.task == "tracking":
        return []
    starts = np.arange(example.start, example.end, PIECE)
    pieces = (_piece(example, float(start), number) for number, start in enumerate(starts))
    return [piece for piece in pieces if piece is not None]


def _piece(example: Example, start: float, number: int) -> Example | None:
    given, end = example.targets, min(start + PIECE, example.end)
    inside = [i for i, time in enumerate(given["times"]) if start <= time < end]
    times, rles = ([given[name][i] for i in inside] for name in ("times", "rles"))
    boxes = [_extent(rle) for rle in rles]
    seen = [i for i, box in enumerate(boxes) if box is not None]
    if not seen:
        return None
    drawn = {"input_box": boxes[seen[0]], "input_time": times[seen[0]]}
    return dataclasses.replace(
        example, example_id=f"{example.example_id}/{number}", task="tracking", turns=_FOLLOW,
        start=start, end=end, targets={"times": times, "rles": rles, "boxes": boxes} | drawn,
    )  # fmt: skip


RELABEL: dict[str, Callable[[Example], list[Example]]] = {
    "first_frame": first_frame,
    "drawn_boxes": drawn_boxes,
}


def _extent(rle: dict | None) -> list[float] | None:
    """The tight box, normalised xyxy, of a COCO RLE; None of nothing."""
    if rle is None or not coco_mask.area(rle):
        return None
    x, y, w, h = coco_mask.toBbox(rle)
    height, width = rle["size"]
    return [x / width, y / height, (x + w) / width, (y + h) / height]


def examples(
    dataset: PreparedDataset, relabel: Callable[[Example], list[Example]]
) -> Iterator[Example]:
    for video in dataset.videos:
        for example in dataset.examples(video):
            yield from relabel(example) if example.task in TASKS else [example]


def was_made(out: pathlib.Path, data: pathlib.Path) -> bool:
    """Whether `out`, which is written in one rename, is there and of these videos."""
    settings = out / "prepared.json"
    return settings.exists() and json.loads(settings.read_text()).get("derived_from") == str(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("labels", choices=sorted(RELABEL))
    parser.add_argument("--data", type=pathlib.Path, required=True, help="prepared folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="prepared folder to write")
    flags = parser.parse_args()
    dataset = PreparedDataset(flags.data)
    if not was_made(flags.out, flags.data):
        derive(dataset, examples(dataset, RELABEL[flags.labels]), flags.out)
    print(flags.out)


if __name__ == "__main__":
    main()
