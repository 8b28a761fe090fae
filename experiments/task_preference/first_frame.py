"""The same videos with masks and tracks that are labelled on the first frame of their clip alone.

python -m experiments.task_preference.first_frame --data runs/data/train --out runs/first/train
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator

from tpo_jax.data.ingest.derive import derive
from tpo_jax.data.records import Example, PreparedDataset
from tpo_jax.data.task_text import rle_box

TASKS = ("mask", "tracking")


def first_box(example: Example) -> Example | None:
    """The example with the box at its first annotated time; None where the object is absent."""
    targets = example.targets
    boxed = targets.get("rles") is None
    label = (targets["boxes"] if boxed else targets["rles"])[0]
    box = label if boxed else rle_box(label)
    if box is None:
        return None
    kept = {key: value for key, value in targets.items() if key not in ("rles", "boxes", "times")}
    return dataclasses.replace(
        example, targets=kept | {"times": targets["times"][:1], "boxes": [box]}
    )


def examples(dataset: PreparedDataset) -> Iterator[Example]:
    for video in dataset.videos:
        for example in dataset.examples(video):
            changed = first_box(example) if example.task in TASKS else example
            if changed is not None:
                yield changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="prepared folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="prepared folder to write")
    flags = parser.parse_args()
    dataset = PreparedDataset(flags.data)
    derive(dataset, examples(dataset), flags.out)
    print(flags.out)


if __name__ == "__main__":
    main()
