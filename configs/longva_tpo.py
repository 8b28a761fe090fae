"""Temporal Preference Optimization of LongVA-7B, with the published numbers (arXiv 2501.13919).

    python -m tpo_jax.preferences generate --model=runs/longva/base --subset=0.5 \
        --data=runs/longva/data/train --out=runs/longva/pairs --pairs=10000 --frames=32
    python -m tpo_jax.preferences score --model=runs/longva/base --data=runs/longva/data/train \
        --pairs=runs/longva/pairs/pairs.jsonl --out=runs/longva/pairs/reference.npz --frames=32
    python -m tpo_jax.train --config=configs/longva_tpo.py --workdir=runs/longva/tpo

`runs` holds base/ (the model folder to start from), data/train and pairs/. `recipe` is one of

  tpo      DPO + 0.5 SFT, beta 0.3, 4e-6, 64 pairs a step, one epoch, language model and projector
  hound    LLaVA-Hound-DPO (2404.01258): beta 0.1, no SFT, 5e-7 falling linearly, 128 pairs, 3
           epochs, language model, 10 frames (published: 8 to 10)
  realign  Re-Align's rDPO (2502.13146): beta 0.1, DPO + the conditional term, whose contrast here
           is the pair's manipulated frames; LoRA of rank 128 on the kernels of attention, 1e-6.
           Score with --contrast
  mdpo     mDPO (2406.11839): as realign with the anchor term, LoRA of rank 64 on all kernels, 1e-5,
           weight decay 0.05, Adam's b2 0.98, 3 epochs, 32 pairs
  rrpo     RRPO (2504.12083) as released for LLaVA-Video: beta 0.1, DPO + 0.01 times the KL over the
           vocabulary, LoRA of rank 128 on all kernels, 5e-6, 32 pairs, 16 frames. Score nothing:
           the reference is in the step. Rewards are of whole answers; RRPO's are of the phrases
           that differ

Every LoRA is of the language model and has dropout 0.05. docs/preferences.md has the files that the
numbers are from, and where these recipes depart from them.

`pairs` is how many the manifest holds, from which steps follow: where `generate` ended with fewer,
give their number, or training shows them more often and warns; `frames` those of a clip, 8 to 512,
without it the recipe's (32, of hound 10, of rrpo 16); several make a bucket each (frames=8+16+32;
weights and `--frames` of the other commands: docs/preferences.md, "Clips of several lengths");
`context` the devices that share a row, for long ones (docs/preferences.md); `tiny` a few steps on
small shapes, for tests, of at most 8 frames.
"""

from ml_collections import ConfigDict

from tpo_jax.training.config import (
    ConfigError,
    bucket_config,
    default_config,
    parse_arg,
    source_config,
)
from tpo_jax.training.families import run_large

ARGUMENTS = {
    "recipe": "tpo", "runs": "runs/longva", "init": "", "pairs": 10_000, "frames": (),
    "context": 1, "tiny": False,
}  # fmt: skip
# Where the argument names none. Re-Align and mDPO were published on images: theirs are tpo's.
FRAMES = {"tpo": 32, "hound": 10, "realign": 32, "mdpo": 32, "rrpo": 16}
# The eight kinds of the published questions.
KINDS = [
    "temporal", "action", "causal", "information_extraction", "descriptive", "summarization",
    "object", "spatial",
]  # fmt: skip
LANGUAGE_KERNELS = "language/layers/.*kernel"
ATTENTION_KERNELS = "language/layers/.*[qkvo]_proj/kernel"
LORA_DROPOUT = 0.05  # of all the published ones


def get_config(arg: str | None = None) -> ConfigDict:
    return make_config(parse_arg(arg, **ARGUMENTS), beta=0.3, sft=0.5, rate=4e-6)


def make_config(arg: ConfigDict, *, beta: float, sft: float, rate: float) -> ConfigDict:
    """The config of `arg`; beta, sft and rate (learning) are those of the tpo recipe."""
    recipes = {"tpo": _tpo, "hound": _hound, "realign": _realign, "mdpo": _mdpo, "rrpo": _rrpo}
    if arg.recipe not in recipes:
        raise ConfigError(f"config argument recipe={arg.recipe}: expected {', '.join(recipes)}")
    config = default_config()
    config.objective = "preference"
    config.model.preset = ""
    if not arg.tiny:
        run_large(config)
    config.init_from = arg.init or f"{arg.runs}/base"
    pairs = f"{arg.runs}/pairs"
    config.data.train = [
        source_config(
            f"{arg.runs}/data/train", tasks={"preference": 1.0}, pairs=f"{pairs}/pairs.jsonl"
        )
    ]
    config.data.references = [f"{pairs}/reference.npz"]
    config.preference.kinds = KINDS
    config.optimizer.update(
        name="adamw", warmup=0.1, weight_decay=0.0, clip=1.0, min_lr_ratio=0.0
    )
    config.preference.update(beta=beta, sft=sft)
    config.trainable = [["language/|connector/", rate]]
    batch_size, epochs = recipes[arg.recipe](config)
    config.steps = max(-(-arg.pairs * epochs // batch_size), 1)
    config.data.epochs = float(epochs)
    if arg.tiny:
        batch_size, config.steps, config.data.epochs = 4, 4, 0.0
        config.lora.rank = min(config.lora.rank, 2)
    frames = arg.frames or (FRAMES[arg.recipe],)
    config.buckets = _buckets(batch_size, frames, arg.tiny)
    config.mesh = {"data": 1, "fsdp": -1, "context": arg.context, "tensor": 1}
    config.checkpoint.update(every=50, keep=1)
    config.log_every = 1 if arg.tiny else 5
    config.eval_every = 0
    return config


def _buckets(batch_size: int, frames: tuple[int, ...], tiny: bool) -> dict[str, dict]:
    """One of pairs for each number of frames, all of one weight."""
    sizes = sorted({min(count, 8) for count in frames} if tiny else frames)
    return {
        "pairs" if len(sizes) == 1 else f"pairs{count}": bucket_config(
            media="video", batch_size=batch_size, frames=count, question=48 if tiny else 256,
            branches=2, branch_tokens=64 if tiny else 320, answers=48 if tiny else 256, windows=1,
        )
        for count in sizes
    }  # fmt: skip


def _tpo(config: ConfigDict) -> tuple[int, int]:
    """The vision encoder is frozen. Returns pairs a step and epochs, as all recipes do."""
    del config
    return 64, 1


def _hound(config: ConfigDict) -> tuple[int, int]:
    config.preference.update(beta=0.1, sft=0.0)
    config.trainable = [["language/", 5e-7]]
    config.optimizer.schedule = "linear"
    return 128, 3


def _realign(config: ConfigDict) -> tuple[int, int]:
    config.optimizer.warmup = 0.03
    _with_lora(config, ATTENTION_KERNELS, rank=128, alpha=256.0, rate=1e-6)
    _several_losses(config, ["sigmoid", "conditional"])
    return 64, 1


def _mdpo(config: ConfigDict) -> tuple[int, int]:
    config.optimizer.update(weight_decay=0.05, b2=0.98)
    _with_lora(config, LANGUAGE_KERNELS, rank=64, alpha=128.0, rate=1e-5)
    _several_losses(config, ["sigmoid", "conditional", "anchor"])
    return 32, 3


def _rrpo(config: ConfigDict) -> tuple[int, int]:
    config.optimizer.warmup = 0.03
    _with_lora(config, LANGUAGE_KERNELS, rank=128, alpha=256.0, rate=5e-6)
    _several_losses(config, {"sigmoid": 1.0, "vocabulary_kl": 0.01})
    config.preference.reference, config.data.references = "adapters_off", []
    return 32, 1


def _with_lora(config: ConfigDict, pattern: str, rank: int, alpha: float, rate: float) -> None:
    config.lora.update(pattern=pattern, rank=rank, alpha=alpha, dropout=LORA_DROPOUT)
    config.trainable = [[".*lora_[ab]$", rate]]


def _several_losses(config: ConfigDict, losses: list[str] | dict[str, float]) -> None:
    config.preference.update(beta=0.1, sft=0.0)
    with config.ignore_type():  # one name, a list or {name: weight}
        config.preference.loss = losses
