"""Temporal Preference Optimization of LLaVA-Video-7B-Qwen2, published numbers (arXiv 2501.13919).

    python -m tpo_jax.preferences generate --model=runs/llava_video/base --mix=0 --subset=0.5 \
        --data=runs/llava_video/data/train --out=runs/llava_video/pairs --pairs=10000 --frames=32
    python -m tpo_jax.train --config=configs/llava_video_tpo.py --workdir=runs/llava_video/tpo

As configs/longva_tpo.py (same argument, same folders, same score command) but for beta 0.2, one
whole SFT and 3e-7; its published pairs are of the comprehensive kind alone (--mix=0).
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from tpo_jax.training.config import parse_arg

_LONGVA = runpy.run_path(str(pathlib.Path(__file__).with_name("longva_tpo.py")))
ARGUMENTS = _LONGVA["ARGUMENTS"] | {"runs": "runs/llava_video"}


def get_config(arg: str | None = None) -> ConfigDict:
    return _LONGVA["make_config"](parse_arg(arg, **ARGUMENTS), beta=0.2, sft=1.0, rate=3e-7)
