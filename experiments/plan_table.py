"""experiments/results/plans/README.md from plans.json."""

from __future__ import annotations

import statistics
from typing import Any

from tpo_jax.parallel.topologies import GIB

_HEAD = """# What the full-size configs need on TPU pods

    nice -n 15 python -m experiments.plans --out experiments/results/plans

No TPU was used. Memory and collectives of a row marked `compiled` are those of the program that
`train` runs, by libtpu's compiler for that topology; a row marked `estimated` has them from the
traced program (`tpo_jax/training/estimate.py`). Everything else is arithmetic:

- **compiled in**: seconds that libtpu's compiler took for the gradient where this was made.
- **mesh**: in TPO configs the fewest chips that let a row fit share it (`context`, see
  docs/preferences.md); where `context` is not named, a chip has its rows for itself.
- **rows a step** are those of the config; `x n` micro-batches, as few as the estimate lets fit.
- **largest**: rows of one micro-batch over all chips that fit; 0 where one row a chip is too much.
- **sent**: bytes that one chip sends in a step, times in the program text in brackets if compiled.
- **FLOPs** that a step needs (`tpo_jax/training/flops.py`: forward, and the gradients of what is
  trained and of what lies behind it, 3 x forward where that is all; no recomputation).
- **at least**: seconds a step, the largest of three: matrix products (recomputed ones too) at the
  chip's peak, their operands and the optimizer's state through HBM once, bytes sent over all links
  at once. It is a bound and no prediction; the word says which of the three.
- **MFU at most**: FLOPs / (peak x that time).
- **chip-hours** at that time, for the steps of the config in brackets. {steps}

`lora`: rank 128 on every matrix of the language model, all else frozen (VideoChat2: rank 16, its
own). `published`: what the config trains. `full`: every leaf. Frozen parameters are float32, as all
are.
"""
_STEPS = (
    "They are those of the published epochs, but for LongVA, whose number of samples is not "
    "published: its figure is for 1,000 steps."
)
_COLUMNS = (
    "config", "trained", "topology, mesh", "rows a step", "GiB a chip", "fits", "by",
    "compiled in, s", "largest", "sent, GB", "FLOPs", "at least, s", "MFU at most", "chip-hours",
)  # fmt: skip


def page(results: dict[str, dict]) -> str:
    lines = [_HEAD.format(steps=_STEPS), *_summary(results), "", *_row(_COLUMNS)]
    lines.append("|" + "---|" * len(_COLUMNS))
    for name, result in results.items():
        lines += _row(_cells(name, result))
    return "\n".join([*lines, "", *errors(results)]) + "\n"


def _summary(results: dict[str, dict]) -> list[str]:
    found = [r for r in results.values() if "compiled" in r]
    lines = [f"{len(results)} cells, {len(found)} of them compiled."]
    over = [name for name, r in results.items() if not fits(r)]
    lines += ["", f"{len(over)} do not fit; the table says which."] if over else []
    return lines


def errors(results: dict[str, dict]) -> list[str]:
    """Estimated over compiled memory, where both are known."""
    both = {n: r["estimate"]["memory"] / r["compiled"]["memory"] for n, r in results.items()
            if "compiled" in r}  # fmt: skip
    if not both:
        return ["No cell is compiled yet, so the error of the estimates is not known."]
    lines = ["## Estimated against compiled memory", ""]
    lines += _row(("cell", "estimated, GiB", "compiled, GiB", "ratio"))
    lines.append("|---|---|---|---|")
    for name, ratio in both.items():
        made = results[name]["compiled"]
        lines += _row((
            name, f"{results[name]['estimate']['memory'] / GIB:.2f}", f"{made['memory'] / GIB:.2f}",
            f"{ratio:.2f}",
        ))  # fmt: skip
    worst = max(abs(ratio - 1) for ratio in both.values())
    middle = statistics.median(both.values())
    wrong = sum((r["estimate"]["memory"] <= r["estimate"]["hbm"]) != fits(r)
                for r in results.values() if "compiled" in r)  # fmt: skip
    return [
        *lines, "",
        f"Median ratio {middle:.2f}, largest error {100 * worst:.0f} %; of {len(both)} verdicts "
        f"{wrong} were wrong. Estimated rows within that error of the chip's memory are uncertain.",
    ]  # fmt: skip


def fits(result: dict[str, Any]) -> bool:
    made = result.get("compiled")
    if made and made["ran_out"]:
        return False
    return (made or result["estimate"])["memory"] <= result["estimate"]["hbm"]


def _cells(name: str, result: dict[str, Any]) -> tuple[str, ...]:
    config, trained, topology = name.split()
    estimate, made = result["estimate"], result.get("compiled")
    mesh = " ".join(f"{axis} {size}" for axis, size in estimate["mesh"].items())
    times = estimate["roofline"]
    seconds = max(times[part] for part in ("compute", "hbm", "ici"))
    limit = next(part for part in ("compute", "hbm", "ici") if times[part] == seconds)
    hours = estimate["steps"] * seconds * estimate["chips"] / 3600
    memory = (made or estimate)["memory"] / GIB
    return (
        config, trained, f"{topology}, {mesh}", f"{estimate['batch']} x {estimate['accumulation']}",
        f"{memory:.1f} of {estimate['hbm'] / GIB:.0f}", "yes" if fits(result) else "**no**",
        "compiled" if made else "estimated", str(made["seconds"]) if made else "",
        str(estimate["largest_batch"]), _sent(estimate, made),
        f"{estimate['flops']:.2e}", f"{seconds:.2f} {limit}", f"{100 * times['bound']:.0f} %",
        f"{hours:,.0f} ({estimate['steps']:,})",
    )  # fmt: skip


def _sent(estimate: dict, made: dict | None) -> str:
    if made and made["collectives"]:
        parts = [f"{kind} {c['bytes'] / 1e9:.1f} ({c['count']})"
                 for kind, c in sorted(made["collectives"].items())]  # fmt: skip
    else:
        parts = [f"{kind} {size / 1e9:.1f}" for kind, size in sorted(estimate["sent"].items())
                 if size >= 5e7]  # fmt: skip
    return ", ".join(parts)


def _row(values: tuple[str, ...]) -> list[str]:
    return ["| " + " | ".join(values) + " |"]
