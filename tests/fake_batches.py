"""Random batches of the right shapes and a training config for the micro model."""

import jax
import numpy as np

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import BOX_TOKEN, task_tokens
from tpo_jax.models.heads.cg_detr import published_weights
from tpo_jax.models.presets import PRESETS
from tpo_jax.parallel.paths import map_with_path
from tpo_jax.training.config import default_config

# Adam divides by |gradient|; a larger eps keeps round-off in small gradients small in parameters.
SMOOTH = {
    "name": "adamw", "warmup": 0.1, "weight_decay": 0.05, "clip": 1.0, "min_lr_ratio": 0.1,
    "eps": 1e-3,
}  # fmt: skip

HEADS = ("region", "temporal", "mask")
HEAD_TERMS = (
    "region/l1", "region/giou", "region/cells", "temporal/foreground", "temporal/l1",
    "temporal/giou", "temporal/saliency", "mask/focal", "mask/dice", "mask/cells",
    "mask/presence",
)  # fmt: skip


def micro(heads: tuple[str, ...] = ()) -> ModelConfig:
    return PRESETS["micro"](heads)


def bucket(batch_size: int = 8, **changes) -> Bucket:
    fields = {
        "name": "video", "media": "video", "batch_size": batch_size, "frames": 4, "branches": 2,
        "branch_tokens": 10, "answers": 5, "windows": 2, "mask_size": 16,
        "slots": {"region": 2, "temporal": 1, "mask": 1, "box": 1},
    }  # fmt: skip
    return Bucket(**fields | changes)


def pair_bucket(batch_size: int = 8) -> Bucket:
    return bucket(batch_size, name="pairs", question=4)


def random_batch(bucket: Bucket, config: ModelConfig, seed: int = 0) -> dict:
    """Numbers of the right kind everywhere; rows and slots of unequal weight, some of weight 0."""
    rng = np.random.default_rng(seed)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch_spec(bucket, config))
    B, K, R, A = bucket.batch_size, bucket.branches, bucket.branch_tokens, bucket.answers
    batch["example_ids"][:] = rng.integers(0, 2**32, B)
    batch["video_ids"][:] = np.arange(B) // 2
    batch["frames"][:] = rng.integers(0, 256, batch["frames"].shape)
    batch["frame_times"][:] = np.arange(bucket.frames) / 2
    batch["frame_valid"][:] = np.arange(bucket.frames) < rng.integers(2, bucket.frames + 1, (B, 1))
    for side, length in (("prefix", batch["prefix_tokens"].shape[1]), ("branch", R)):
        shape = batch[f"{side}_tokens"].shape
        batch[f"{side}_tokens"][:] = rng.integers(9, 900, shape)
        batch[f"{side}_positions"][:] = np.arange(length) + (side == "branch") * 20
        batch[f"{side}_segments"][:] = 1
    batch["branch_tasks"][:] = np.arange(B * K).reshape(B, K) % 4
    batch["answer_positions"][:] = np.arange(R - A - 1, R - 1)
    batch["answer_tokens"][:] = batch["branch_tokens"][:, :, R - A :]
    lengths = rng.integers(1, A + 1, (B, K, 1))
    batch["answer_weights"][:] = np.arange(A) < lengths
    if bucket.kind == "preference":
        batch["pair_valid"][:] = np.arange(B) != 1
        batch["reference_logps"][:] = -rng.uniform(1, 9, (B, K, A))
    else:
        batch["answer_weights"][1, 1] = 0
    for name, slots in batch["slots"].items():
        _fill_slots(rng, name, slots, bucket)
        token = BOX_TOKEN if name == "box" else task_tokens()[name][1]
        rows, number = np.nonzero(slots["valid"])
        at = rows, slots["branch"][rows, number], slots["index"][rows, number]
        batch["branch_tokens"][at] = config.tokens[token]
    return batch


def _fill_slots(rng: np.random.Generator, name: str, slots: dict, bucket: Bucket) -> None:
    shape = slots["valid"].shape
    slots["branch"][:] = rng.integers(0, bucket.branches, shape)
    slots["index"][:] = rng.integers(0, bucket.branch_tokens, shape)
    slots["valid"][:] = rng.random(shape) < 0.6
    slots["valid"][0] = True
    if "boxes" in slots:
        corner = rng.uniform(0, 0.5, (*shape, 2))
        slots["boxes"][:] = np.concatenate([corner, corner + 0.3], -1)
    if name == "region":
        slots["frame"][:] = rng.integers(0, 2, shape)
    if name == "temporal":
        start = rng.uniform(0, 0.6, slots["windows"].shape[:-1])
        slots["windows"][:] = np.stack([start, start + 0.3], -1)
        slots["window_valid"][:] = np.arange(bucket.windows) == 0
        slots["saliency"][:] = rng.uniform(-0.3, 1, slots["saliency"].shape)
    if name == "mask":
        slots["masks"][:] = rng.integers(0, 2, slots["masks"].shape)
        slots["labelled"][:] = rng.random(slots["labelled"].shape) < 0.7


def train_config(heads: tuple[str, ...] = (), **changes):
    """Config that trains everything at 1e-2 without dropout; changes by dotted key."""
    config = default_config()
    config.steps = 20
    config.model.update(preset="micro", heads=list(heads))
    terms = (*HEAD_TERMS, *published_weights())
    config.losses = {"language": 1.0} | {t: 0.5 for t in terms if t.split("/")[0] in heads}
    config.trainable = [[".*", 1e-2]]
    for key, value in changes.items():
        config[key] = value
    return config


def small_params(abstract, size: float = 0.05):
    """Small random numbers, norms of one; nothing is compiled or drawn on a device."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path.endswith("scale"):
            return np.ones(leaf.shape, np.float32)
        return (size * rng.normal(size=leaf.shape)).astype(np.float32)

    return map_with_path(draw, abstract)


def means(metrics) -> dict[str, float]:
    """The means of a train step's metrics, without its gradient norms by leaf and its counts."""
    named = {n: value for n, value in metrics.items() if n not in ("grad_norms", "examples")}
    return {name: float(value.mean()) for name, value in named.items()}
