r"""LLaVA-OneVision-TPO: Task Preference Optimization of LLaVA-OneVision-7B (arXiv 2412.19326).

    python -m tpo_jax.convert import --source=llava-onevision-qwen2-7b-ov-hf --out=onevision \
        --set frames_upbound=32
    python -m tpo_jax.convert import --source=sam2-hiera-large --into=onevision \
        --out=runs/llava_onevision_tpo/base
    python -m tpo_jax.train --config=configs/llava_onevision_tpo.py:stage=1,data=DIR \
        --workdir=runs/llava_onevision_tpo/1

As configs/videochat_tpo.py: the same stages, arguments and data, and `frames` of a video. The paper
has results of this model and no number of its own for it, so all are those of VideoChat-TPO, frames
included; numbers=run is not there, because no such run is published. The language model gets new
adapters in stage 1.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from tpo_jax.training.config import ConfigError, parse_arg

_VIDEOCHAT = runpy.run_path(str(pathlib.Path(__file__).with_name("videochat_tpo.py")))
ARGUMENTS = _VIDEOCHAT["ARGUMENTS"] | {
    "runs": "runs/llava_onevision_tpo", "frames": _VIDEOCHAT["FRAMES"],
}  # fmt: skip


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, **ARGUMENTS)
    if arg.numbers == "run":
        raise ConfigError("config argument numbers=run: of this model, expected table or text")
    return _VIDEOCHAT["make_config"]("llava_onevision", arg, arg.frames)
