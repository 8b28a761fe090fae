"""The results folder: one JSON and one plot a study, and a page made from all that are there."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.task_preference.claims import CLAIMS, Claim, Estimate, difference, verdict
from experiments.task_preference.notes import notes, spent, trained_table
from tpo_jax.data import files

METRICS = (
    "qa/accuracy", "temporal/r1@0.5", "temporal/miou", "highlight/hit@1", "region/acc@0.5",
    "region/miou", "mask/j&f", "mask/j", "tracking/auc",
)  # fmt: skip
TITLES = {
    "central": "Conversation, targets in words, task heads",
    "temporal_head": "Temporal heads",
    "mask_loss": "Objectives of the mask head",
}
COST = "cost"
COST_COMMAND = f"python -m experiments.task_preference.{COST}"

HEADER = """# Task Preference Optimization, from the shipped base on moving shapes

Made by the commands that are named below, from the JSON files beside this page; do not edit. Where
part of a record came about otherwise, its section says so.
Means over seeds ± standard errors, in percent; a seed has its own videos, weights of new parts and
order of the data. A difference is taken seed by seed. It *agrees* or *does not agree* with the
published direction where it is larger than two of its standard errors, else it is *undecided*; with
three seeds that is a weak test. The figures of both sides come from different models and data: only
directions can be compared.
"""


def write(folder: pathlib.Path, name: str, record: Mapping[str, Any]) -> None:
    """Writes the record and plot of a study and the page anew."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    if name in CLAIMS:
        plot(record, CLAIMS[name]).savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
    files.write(folder / "README.md", page(folder))


def page(folder: pathlib.Path) -> str:
    parts = [HEADER]
    for name, title in TITLES.items():
        file = folder / f"{name}.json"
        if file.exists():
            parts.append(section(name, title, json.loads(file.read_text())))
        else:
            parts.append(
                f"## {title}\n\nNot run: `python -m experiments.task_preference.{name}`.\n"
            )
    if (file := folder / f"{COST}.json").exists():
        parts.append(cost_section(json.loads(file.read_text())))
    return "\n".join(parts)


def section(name: str, title: str, record: Mapping[str, Any]) -> str:
    """Tables of one study."""
    seeds = f"`{record['command']}`; seeds: {len(record['seeds'])}."
    paragraphs = [f"## {title}", seeds, *notes(name, record)]
    if record["tiny"]:
        paragraphs.append(
            "**A test of the command on a handful of videos: these figures mean nothing.**"
        )
    if "tracker" in record:
        followed = 100 * record["tracker"]["forced/tracking/auc"]
        paragraphs.append(f"SAM 2 itself, by a drawn box: tracking AUC {followed:.1f}.")
    lines = ["\n\n".join(paragraphs)]
    lines += ["", *_claims_table(CLAIMS[name], record), "", *_arms_table(record), ""]
    lines += [
        *trained_table(record), "", spent(record),
        "", f"![{title}]({name}.png)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _claims_table(claims: Sequence[Claim], record: Mapping[str, Any]) -> list[str]:
    arms, floors = record["arms"], record["floors"]
    rows = [
        "| metric | from | to | difference | floor | published | |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in claims:
        found = difference(claim, arms)
        worse, better = (
            f"{arm} {Estimate.of(arms[arm][claim.metric]).percent()}"
            for arm in (claim.worse, claim.better)
        )
        published, said = "none", "no published direction"
        if claim.published:
            low, high = claim.published
            published, said = f"{claim.where} {low} -> {high}", verdict(found)
        rows.append(
            f"| {claim.metric} | {worse} | {better} | {found.percent(sign=True)} "
            f"| {Estimate.of(floors[claim.metric]).percent()} | {published} | {said} |"
        )
    return rows


def _arms_table(record: Mapping[str, Any]) -> list[str]:
    arms = record["arms"]
    shown = [metric for metric in METRICS if any(metric in found for found in arms.values())]
    rows = ["| | " + " | ".join(shown) + " |", "|---" * (1 + len(shown)) + "|"]
    ends = {"floor": record["floors"]}
    if "words_at_best" in record:
        ends["words at best"] = record["words_at_best"]
    for arm, found in [*arms.items(), *ends.items()]:
        cells = (Estimate.of(found[m]).percent() if m in found else "" for m in shown)
        rows.append(f"| {arm} | " + " | ".join(cells) + " |")
    return rows


def cost_section(record: Mapping[str, Any]) -> str:
    lines = [
        "## Cost of training heads together with conversation", "", f"`{record['command']}`", "",
        record["about"], "",
        "| | vision | language | lm_head | heads | sum | over conversation | over one question |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in record["analytic"].items():
        parts = " | ".join(f"{row[part]:.1f}" for part in (*PARTS, "sum"))
        lines.append(f"| {name} | {parts} | {_over(row)} |")
    lines.append("")
    if measured := record.get("measured"):
        lines += [
            f"Measured on {measured['device']}, {measured['model']}: median of "
            f"{measured['steps']} steps, seconds on the clock.", "",
            "| | seconds a step | over conversation | over one question |", "|---|---|---|---|",
        ]  # fmt: skip
        for name, row in measured["rows"].items():
            lines.append(f"| {name} | {row['seconds']:.3f} | {_over(row)} |")
    else:
        lines.append(f"Not measured: `{COST_COMMAND} --measure`.")
    lines.append("")
    return "\n".join(lines)


def _over(row: Mapping[str, float]) -> str:
    return f"{100 * row['over']:+.1f} % | {100 * row['over_one']:+.1f} %"


PARTS = ("vision", "language", "lm_head", "heads")


def plot(record: Mapping[str, Any], claims: Sequence[Claim]) -> Figure:
    """One small axes a metric: a bar an arm with its standard error, a dot a seed, the floor."""
    metrics = list(dict.fromkeys(claim.metric for claim in claims))
    figure = Figure(figsize=(3.6 * len(metrics), 3.4), layout="constrained")
    for ax, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        arms = {arm: found[metric] for arm, found in record["arms"].items() if metric in found}
        for place, values in enumerate(arms.values()):
            estimate = Estimate.of(values)
            ax.bar(place, estimate.mean, yerr=estimate.error, capsize=3, color="#0072b2", alpha=0.6)
            ax.plot([place] * len(values), values, ".", color="#1d2733", markersize=4)
        if metric in record["floors"]:
            ax.axhline(Estimate.of(record["floors"][metric]).mean, color="#d55e00", linestyle=":")
            ax.plot([], [], color="#d55e00", linestyle=":", label="floor")
            ax.legend()
        ax.set_ylim(0, max(0.1, ax.get_ylim()[1]))
        ax.set_xticks(range(len(arms)), list(arms), rotation=60, ha="right")
        ax.set_title(metric)
    return figure
