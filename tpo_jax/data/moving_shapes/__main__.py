"""Renders a data set of moving shapes: H.264 videos, PNG images, labels in published formats.

python -m tpo_jax.data.moving_shapes --out data/shapes --videos 500 --images 200 --seed 0
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import tqdm

from tpo_jax.data.moving_shapes.build import SPLITS, build
from tpo_jax.data.moving_shapes.world import WorldConfig
from tpo_jax.errors import Parser, UserError, report

EXAMPLES = """examples:
  # shares of --videos and --images
  python -m tpo_jax.data.moving_shapes --out data/shapes --videos 500 --images 200 --seed 0
  # numbers of videos; the images follow in proportion
  python -m tpo_jax.data.moving_shapes --out data/shapes --videos 620 --images 240 --seed 1 \\
      --splits train:400,validation:60,test:160
  # longer, busier videos
  python -m tpo_jax.data.moving_shapes --out data/long --videos 100 --seconds 32 --density 2.5

Read the result with: python -m tpo_jax.prepare run --data data/shapes/train --out prepared/train
"""
WORLD_FLAGS = {
    "size": "frame height and width in pixels",
    "fps": "frames per second of the files",
    "seconds": "length of a video",
    "density": "mean number of events per 10 s",
    "annotation_fps": "masks and boxes per second; the rate that models should see",
    "noise": "standard deviation of the pixel noise, 8-bit levels",
    "crf": "H.264 quality, lower is better",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        config = WorldConfig(**{name: getattr(options, name) for name in WORLD_FLAGS})
        videos, images = parse_splits(options.splits, options.videos, options.images)
    except ValueError as error:
        parser.error(str(error))
    total = sum(videos.values()) + sum(images.values())
    started = time.monotonic()
    try:
        with tqdm.tqdm(total=total, unit="scene", desc="render", mininterval=1) as bar:
            build(options.out, videos, images, options.seed, config, options.processes, bar.update)
    except UserError as error:
        return report(error)
    seconds = time.monotonic() - started
    made = f"{_counted('video', videos)}, {_counted('image', images)}"
    print(f"{options.out}: {made}, {seconds:.1f} s")
    return 0


def _counted(noun: str, by_split: dict[str, int]) -> str:
    """Such as "6 videos (train 4, validation 1, test 1)"."""
    total = sum(by_split.values())
    splits = ", ".join(f"{name} {count}" for name, count in by_split.items() if count)
    return f"{total} {noun}{'s' * (total != 1)}" + f" ({splits})" * bool(splits)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "python -m tpo_jax.data.moving_shapes",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument("--videos", type=int, default=100, help="in all splits (default 100)")
    parser.add_argument("--images", type=int, default=0, help="in all splits (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="reaches every scene (default 0)")
    parser.add_argument(
        "--splits",
        default="train:0.8,validation:0.1,test:0.1",
        help="shares that sum to 1, or numbers of videos that sum to --videos",
    )
    parser.add_argument("--processes", type=int, default=1, help="parallel renderers (default 1)")
    defaults = WorldConfig()
    types = {f.name: type(getattr(defaults, f.name)) for f in dataclasses.fields(WorldConfig)}
    for name, text in WORLD_FLAGS.items():
        value = getattr(defaults, name)
        parser.add_argument(
            f"--{name}", type=types[name], default=value, help=f"{text} (default {value})"
        )
    return parser


def parse_splits(text: str, videos: int, images: int) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of videos and of images per split.

    Shares must sum to 1. Whole numbers are numbers of videos and must sum to `videos`; images are
    divided in the same proportion. Raises ValueError.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, colon, value = part.strip().partition(":")
        if not colon or name not in SPLITS or name in shares:
            raise ValueError(
                f"--splits: {part!r}: expected NAME:NUMBER, each of {', '.join(SPLITS)} once"
            )
        try:
            shares[name] = float(value)
        except ValueError as error:
            raise ValueError(f"--splits: {part!r}: {value!r} is not a number") from error
        if shares[name] < 0:
            raise ValueError(f"--splits: {part!r}: expected 0 or more")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6 and total != videos:
        raise ValueError(
            f"--splits: {text!r} sums to {total:g}; expected shares that sum to 1, or numbers of "
            f"videos that sum to --videos={videos}"
        )
    return _divide(shares, videos), _divide(shares, images)


def _divide(shares: dict[str, float], count: int) -> dict[str, int]:
    """Whole numbers in proportion to the shares, with sum `count`: the largest remainders go up."""
    total = sum(shares.values())
    exact = {name: count * share / total for name, share in shares.items()}
    whole = {name: int(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: whole[name] - exact[name])
    for name in by_remainder[: count - sum(whole.values())]:
        whole[name] += 1
    return whole


if __name__ == "__main__":
    sys.exit(main())
