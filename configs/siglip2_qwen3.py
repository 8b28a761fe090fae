"""SigLIP 2 and Qwen3: a model from two published parts and a new connector, in two stages.

    C=configs/siglip2_qwen3.py
    python -m tpo_jax.convert import --source=Qwen3-8B --out=qwen3
    python -m tpo_jax.convert import --source=siglip2-so400m-patch16-naflex --into=qwen3 --out=parts
    python -m tpo_jax.train --config=$C:stage=1,init=parts --workdir=runs/sq1
    python -m tpo_jax.train --config=$C:stage=2,init=runs/sq1/model --workdir=runs/sq2

No such model is published, and so no hyper-parameters of one: stage 1 (the connector alone, at
1e-3, batch 256) and stage 2 (everything at 1e-5, the tower at 2e-6, batch 256) have those of the
LLaVA families, 3 % warm-up, cosine, one epoch. `samples` is how many it has, 0: a million, a number
of its own. A frame of 256 pixels gives 64 tokens.
"""

from ml_collections import ConfigDict

from tpo_jax.training.config import ConfigError, parse_arg
from tpo_jax.training.families import family_config, set_epochs

BATCH, SAMPLES = 256, 1_000_000
STAGES = {"1": [["connector/", 1e-3]], "2": [["vision/", 2e-6], [".*", 1e-5]]}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, stage="2", init="", data="runs/data", tiny=False, samples=0)
    if arg.stage not in STAGES:
        raise ConfigError(f"config argument stage={arg.stage}: expected one of {', '.join(STAGES)}")
    config = family_config("siglip2_qwen3", arg, frames=32, batch=BATCH, size="8b")
    config.trainable = STAGES[arg.stage]
    if arg.init and arg.stage == "1":
        config.init_missing = ["connector/"]
    set_epochs(config, arg, SAMPLES, BATCH)
    return config
