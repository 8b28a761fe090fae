"""experiments/results/plans/README.md from plans.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from tpo_jax.parallel.topologies import GIB

_HEAD = """# What full-size configs need on TPU pods

    nice -n 15 python -m experiments.plans --out experiments/results/plans

Every config of full size has rows: the published families with videos and with images in `tiles`,
the preference configs of LongVA (recipe `tpo` with 32 to 512 frames, `hound`, `realign`, `mdpo`)
and of LLaVA-Video (`tpo` with 32 to 512 frames), the stages of Task Preference Optimization with
their heads, a model of parts (SigLIP 2, Qwen3) and one of our own design (`seven_b`). Stage
`3_tasks` has the programs of `3`. Not every argument of a config has one. Not planned are:

- `recipe=rrpo` of either preference config, whose step runs the reference beside the policy and has
  the distributions of both over the vocabulary;
- `hound`, `realign` and `mdpo` of LLaVA-Video;
- clips of several lengths in one preference config (`frames=8+16+32`);
- other `frames` and `tiles` than those of the rows, VideoChat2's `media` alone, and the other
  `numbers`, `sets`, `media` and `mask_loss` of the stages of Task Preference Optimization.

Where the steps of a config are of several buckets, a row is the one whose step needs most memory by
the estimate. `python -m tpo_jax.plan` does one config, and every bucket of it.

No TPU was used. Memory is that of the program that `train` runs, by libtpu's compiler for that
topology: of a row marked `compiled` from the finished program, the most that is held at one time;
of a row marked `refused by the compiler`, which ended for want of memory, from its error; of a row
marked `assigned` from its log, once every buffer had its place and before code was generated, which
is nearly all of the time (`experiments/assigned_memory.py`): the total of all places, those in the
memory of the core too. How far that was from `compiled` is told at the end of this page. A row
marked `estimated` has it from the traced program (`tpo_jax/training/estimate.py`). Everything else
is arithmetic:

- **compiled in**: seconds that libtpu's compiler took for the gradient, or until it refused it;
  empty where it was ended, or had refused, before any code.
- **mesh**: in preference configs the fewest chips that let a row fit share it (`context`, see
  docs/preferences.md); where `context` is not named, a chip has its rows for itself.
- **rows a step** are those of the config; `x n` micro-batches, as few as the estimate lets fit, of
  all buckets of the config, and more where the compiler then found no room.
- **largest**: rows of one micro-batch over all chips that fit by the estimate, and at least those
  of a program that was made and fits; 0 where one row a chip is too much.
- **sent**: bytes that one chip sends in a step, by the estimate: programs for TPU do not tell how
  often a loop runs, and repeat what is fused. **collectives**: in the text of that program.
- **FLOPs** that a step needs (`tpo_jax/training/flops.py`: forward, and the gradients of what is
  trained and of what lies behind it, 3 x forward where that is all; no recomputation).
- **at least**: seconds a step, the largest of three: matrix products (recomputed ones too) at the
  chip's peak, their operands and the optimizer's state through HBM once, bytes sent over all links
  at once. It is a bound and no prediction; the word says which of the three.
- **MFU at most**: FLOPs / (peak x that time).
- **chip-hours** at that time, for the steps in brackets; of several buckets, those of the row's
  bucket first, then of each other with its own least seconds. {steps}
- **flags**: those with which a config is the program of its row, for `train` as for
  `python -m tpo_jax.plan --config=configs/CONFIG.py:ARGUMENT --topology=TOPOLOGY FLAGS`.
  Preference configs start from a folder, for which random weights of its shapes stood here; of
  stages with `random` it is left out to train.

`lora`: rank 128 on every matrix of the language model, all else frozen (VideoChat2: rank 16, its
own). `published`: what the config trains. `full`: every leaf. Frozen parameters are float32, as all
are. The flags of `lora` and `full` are in docs/families.md, "What they need on a pod".
"""
_STEPS = (
    "They are those of the published epochs, but for LongVA, whose number of samples is not "
    "published (1,000 steps), `siglip2_qwen3` (a million samples) and `seven_b` (5,000 steps), "
    "whose figures are their own. Without `tiles` every step is of videos, with it half of them: "
    "of the published samples images are 1.25 of 1.6 million (LLaVA-OneVision) and 1.1 of 2.7 "
    "(LLaVA-Video). Video-LLaVA's step has its images in it."
)
REFUSED = "refused by the compiler"
BY = ("compiled", REFUSED, "assigned", "estimated")  # the best first
_COLUMNS = (
    "config", "trained", "topology, mesh", "rows a step", "GiB a chip", "fits", "by",
    "compiled in, s", "largest", "sent, GB", "collectives", "FLOPs", "at least, s", "MFU at most",
    "chip-hours", "flags",
)  # fmt: skip


def page(results: dict[str, dict]) -> str:
    lines = [_HEAD.format(steps=_STEPS), *_summary(results), "", *_row(_COLUMNS)]
    lines.append("|" + "---|" * len(_COLUMNS))
    for name, result in results.items():
        lines += _row(_cells(name, result))
    return "\n".join([*lines, "", *errors(results)]) + "\n"


def _summary(results: dict[str, dict]) -> list[str]:
    counts = {by: sum(_by(r) == by for r in results.values()) for by in BY}
    lines = [f"{len(results)} cells: " + ", ".join(f"{n} {by}" for by, n in counts.items()) + "."]
    over = [name for name, r in results.items() if not fits(r)]
    lines += ["", f"{len(over)} do not fit; the table says which."] if over else []
    return lines


def errors(results: dict[str, dict]) -> list[str]:
    """Estimated and assigned memory over what is known better, by a refusal too."""
    lines = ["## Estimated against assigned or compiled memory", "", *_estimates(results)]
    both = _assigned_and_compiled(results)
    if not both:
        return [*lines, "", "No cell is assigned and compiled, so how near they are is not known."]
    lines += ["", "## Assigned against compiled memory", "", *_assignments(both), ""]
    lines += _row(("cell", "assigned, GiB", "compiled, GiB", "ratio", "same collectives"))
    lines.append("|---|---|---|---|---|")
    for name, result in both.items():
        one, other = (result[by]["memory"] for by in ("assigned", "compiled"))
        figures = f"{one / GIB:.2f}", f"{other / GIB:.2f}", f"{one / other:.3f}"
        lines += _row((name, *figures, _same_collectives(result)))
    return [*lines, "", *_unsure(results)]


def _assigned_and_compiled(results: dict[str, dict]) -> dict[str, dict]:
    """Without those whose buffers found no places: they are refused with one error both times."""
    return {
        name: r for name, r in results.items()
        if "compiled" in r and "assigned" in r and not r["assigned"]["ran_out"]
    }  # fmt: skip


def _same_collectives(result: dict[str, Any]) -> str:
    """Whether assigned and compiled may be of one program: yes or no; what was refused has none to
    compare."""
    if result["compiled"]["ran_out"]:
        return "refused"
    return "yes" if result["assigned"]["collectives"] == result["compiled"]["collectives"] else "no"


def _assignments(both: dict[str, dict]) -> list[str]:
    """What is known of the error of `assigned`."""
    alike = {kind: [r for r in both.values() if _same_collectives(r) == kind]
             for kind in ("yes", "no")}  # fmt: skip
    lines = [f"Of {len(both)} cells that are both, assigned less compiled is "
             f"{_differences(both.values())}; cells whose buffers found no places, refused with "
             "one error both times, are left out."]  # fmt: skip
    if alike["no"]:
        lines += [
            f"{len(alike['no'])} of them have other collectives compiled than assigned: they are "
            "two programs, for the model or the compiler was changed between the two. Cells that "
            "are assigned alone may be as old; `--fresh` plans all anew."
        ]
        if alike["yes"]:
            lines.append(f"With the same collectives it is {_differences(alike['yes'])}.")
    return [" ".join(lines)]


def _differences(results: Iterable[dict]) -> str:
    """The least and the most that assigned is more than compiled."""
    more = [(r["assigned"]["memory"] - r["compiled"]["memory"]) / GIB for r in results]
    return f"{min(more):+.2f} to {max(more):+.2f} GiB"


def sure_share(results: dict[str, dict]) -> float:
    """Share of memory up to which an assigned program is taken to fit, at most 1: its compiled
    memory may be as much above, in proportion, as it was at the worst."""
    both = _assigned_and_compiled(results).values()
    ratios = (r["assigned"]["memory"] / r["compiled"]["memory"] for r in both)
    return min([1.0, *ratios])


def unsure(result: dict[str, Any], share: float) -> bool:
    """Whether a cell fits by an assigned program that takes more than `share` of memory."""
    return (
        _by(result) == "assigned" and fits(result)
        and memory_of(result) > share * result["estimate"]["hbm"]
    )  # fmt: skip


def _unsure(results: dict[str, dict]) -> list[str]:
    share = sure_share(results)
    if share == 1:
        return ["Assigned was never less than compiled: what fits by it is taken to fit."]
    names = [name for name, r in results.items() if unsure(r, share)]
    told = f": {', '.join(names)}" if names else ""
    return [
        f"By the least ratio an assigned program that takes more than {100 * share:.1f} % of "
        f"memory may not fit. {len(names)} cells of which the table says `yes` are such{told}."
    ]


def _estimates(results: dict[str, dict]) -> list[str]:
    better = {n: r for n, r in results.items() if _by(r) != "estimated"}
    if not better:
        return ["No cell is assigned or compiled, so the error of the estimates is not known."]
    ratios = [r["estimate"]["memory"] / memory_of(r) for r in better.values()]
    worst = max(abs(ratio - 1) for ratio in ratios)
    wrong = [n for n, r in better.items()
             if (r["estimate"]["memory"] <= r["estimate"]["hbm"]) != fits(r)]  # fmt: skip
    names = f" ({', '.join(wrong)})" if wrong else ""
    return [
        f"Median ratio {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}, "
        f"largest error {100 * worst:.0f} %; of {len(ratios)} verdicts {len(wrong)} were "
        f"wrong{names}."
    ]


def _by(result: dict[str, Any]) -> str:
    """What the memory of a cell is known by: one of BY."""
    made = _made(result)
    if made and made["ran_out"]:
        return REFUSED
    return next((by for by in ("compiled", "assigned") if by in result), "estimated")


def _made(result: dict[str, Any]) -> dict[str, Any] | None:
    """What the compiler said, or None where it was not asked."""
    return result.get("compiled") or result.get("assigned")


def memory_of(result: dict[str, Any]) -> int:
    """Bytes of a chip, as well as they are known."""
    return (_made(result) or result["estimate"])["memory"]


def fits(result: dict[str, Any]) -> bool:
    made = _made(result)
    if made and made["ran_out"]:
        return False
    return memory_of(result) <= result["estimate"]["hbm"]


def _largest_batch(result: dict[str, Any]) -> int:
    """Rows of a micro-batch by the estimate, and at least those of a made program that fits."""
    estimate = result["estimate"]
    known = estimate["batch"] // estimate["accumulation"] if _made(result) and fits(result) else 0
    return max(estimate["largest_batch"], known)


def _cells(name: str, result: dict[str, Any]) -> tuple[str, ...]:
    config, trained, topology = name.split()
    estimate, made = result["estimate"], _made(result)
    seconds_taken = str(made["seconds"]) if "compiled" in result else ""
    mesh = " ".join(f"{axis} {size}" for axis, size in estimate["mesh"].items())
    times = estimate["roofline"]
    seconds = max(times[part] for part in ("compute", "hbm", "ici"))
    limit = next(part for part in ("compute", "hbm", "ici") if times[part] == seconds)
    memory = memory_of(result) / GIB
    return (
        config, trained, f"{topology}, {mesh}", f"{estimate['batch']} x {estimate['accumulation']}",
        f"{memory:.1f} of {estimate['hbm'] / GIB:.0f}", "yes" if fits(result) else "**no**",
        _by(result), seconds_taken,
        str(_largest_batch(result)), _sent(estimate), _counts(made),
        f"{estimate['flops']:.2e}", f"{seconds:.2f} {limit}", f"{100 * times['bound']:.0f} %",
        _chip_hours(estimate, seconds), f"`{' '.join(planned_flags(estimate))}`",
    )  # fmt: skip


def _chip_hours(estimate: dict[str, Any], seconds: float) -> str:
    """Of all steps, those of the row's own bucket at `seconds` each."""
    steps, others = estimate["steps"], estimate["others"]
    total = steps * seconds + sum(o["steps"] * o["seconds"] for o in others.values())
    told = [f"{steps:,}" + (f" {estimate['bucket']}" if others else "")]
    told += [f"{o['steps']:,} {name} at {o['seconds']:.2f} s" for name, o in others.items()]
    return f"{total * estimate['chips'] / 3600:,.0f} ({', '.join(told)})"


def planned_flags(estimate: dict[str, Any]) -> list[str]:
    """What the command line says of the mesh and the micro-batches that a cell was planned with;
    axes that are not named have one chip in the configs, or what is left."""
    flags = [f"--config.mesh.{axis}={size}" for axis, size in estimate["mesh"].items()]
    micro_batches = estimate["accumulation"]
    return flags + [f"--config.accumulation={micro_batches}"] * (micro_batches > 1)


def _sent(estimate: dict) -> str:
    return ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in sorted(estimate["sent"].items())
                     if size >= 5e7)  # fmt: skip


def _counts(made: dict | None) -> str:
    kinds = made["collectives"] if made else {}
    return ", ".join(f"{found['count']} {kind}" for kind, found in sorted(kinds.items()))


def _row(values: tuple[str, ...]) -> list[str]:
    return ["| " + " | ".join(values) + " |"]
