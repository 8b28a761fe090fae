"""The same videos with masks and tracks that are labelled on the first frame of their clip alone.

python -m experiments.task_preference.first_frame --data runs/data/train --out runs/first/train
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator

from tpo_jax.data.ingest.derive import derive
from tpo_jax.data.records import Example, PreparedDataset

TASKS = ("mask", "tracking")


def first_frame(example: Example) -> Example | None:
    """The example with its first label alone, which may be that the object is absent; None of a
    track that is absent there, as no box can be drawn.

    The head makes a box of a mask itself.
    """
    given = example.targets
    first = {k: given[k][:1] for k in ("times", "rles", "boxes") if given.get(k) is not None}
    if first.get("boxes") == [None]:
        return None
    return dataclasses.replace(example, targets={**given, **first})


def examples(dataset: PreparedDataset) -> Iterator[Example]:
    for video in dataset.videos:
        for example in dataset.examples(video):
            changed = first_frame(example) if example.task in TASKS else example
            if changed is not None:
                yield changed


def was_made(out: pathlib.Path, data: pathlib.Path) -> bool:
    """Whether `out`, which is written in one rename, is there and of these videos."""
    settings = out / "prepared.json"
    return settings.exists() and json.loads(settings.read_text()).get("derived_from") == str(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True, help="prepared folder")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="prepared folder to write")
    flags = parser.parse_args()
    dataset = PreparedDataset(flags.data)
    if not was_made(flags.out, flags.data):
        derive(dataset, examples(dataset), flags.out)
    print(flags.out)


if __name__ == "__main__":
    main()
