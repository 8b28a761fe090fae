"""Preparation: which media and annotations become one prepared folder, and how frames are kept.

python -m tpo_jax.prepare run --config=configs/prepare.py:world/train --out=prepared/train
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    """`arg` is the folder of a data set with a dataset.json; empty when `sources` are listed."""
    config = ConfigDict()
    config.manifest = arg
    # Further sources: dicts of media, format, annotations, name, ignore_keys, and frame_rate where
    # the media are folders of pictures whose annotations do not say it; unlabelled=True of a split
    # that is published without labels; split="train" of annotations that hold several.
    config.sources = ()
    config.fps = 2.0  # frames a second that are kept
    config.size = 64  # square frames of so many pixels; 0 keeps the native size
    config.encoding = "raw"  # or "jpeg": a tenth of the room, not bit-exact
    config.processes = 2
    return config
