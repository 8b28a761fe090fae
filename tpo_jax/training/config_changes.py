"""What of a config may change when a run goes on."""

from collections.abc import Mapping, Sequence
from typing import Any

from tpo_jax.training.config import from_dict, to_dict

# Options that do not change what is learnt: a run may resume with other values.
FREE_ON_RESUME = (
    "mesh", "checkpoint", "divergence", "log_every", "compile_cache", "data.threads",
    "data.epochs", "profile", "task_gradients_every", "wandb", "model.attention", "model.remat",
)  # fmt: skip


def changed_since(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Options that differ between a checkpoint's config and ours and would change the run.

    Returns:
      "option: checkpoint has X, this command has Y" lines; options in FREE_ON_RESUME may differ.
      An option that is younger than the checkpoint had its default.
    """
    lines = []

    def compare(a: Any, b: Any, option: str) -> None:
        if option in FREE_ON_RESUME or a == b:
            return
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in {**a, **b}:
                compare(a.get(key), b.get(key), f"{option}.{key}" if option else key)
        elif _is_list(a) and _is_list(b) and len(a) == len(b):
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{option}[{index}]")
        else:
            lines.append(f"{option}: checkpoint has {a!r}, this command has {b!r}")

    compare(to_dict(from_dict(saved)), current, "")
    return lines


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
