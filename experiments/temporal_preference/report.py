"""From evaluations to figures: pooled over seeds, paired by item, drawn and written down.

RESULTS/STUDY.json has everything that README.md and STUDY.png show; README.md is written from all
of those that are there.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments.temporal_preference.runs import best
from experiments.temporal_preference.studies import (
    BLIND,
    HIDDEN,
    PREFERENCE,
    QA,
    STUDIES,
    Claim,
    hidden_condition,
)
from tpo_jax.evaluation import results
from tpo_jax.evaluation.bootstrap import ItemScores, interval, paired_difference

# {(model, condition): {seed: file that `evaluate` wrote}}
Files = Mapping[tuple[str, str], Mapping[int, pathlib.Path]]
DEPTH = "qa/accuracy/depth_"
AGREES, UNDECIDED, DISAGREES = "agrees", "not decided", "**disagrees**"


def pool(by_seed: Mapping[int, ItemScores]) -> ItemScores:
    """One score an item and seed; all about one video stay together, because seeds share videos."""
    return ItemScores.of(
        (f"{seed}/{item}", video, value)
        for seed, scores in by_seed.items()
        for item, video, value in scores.rows()
    )


def read(files: Files) -> dict[tuple[str, str, str], dict[int, ItemScores]]:
    """{(model, condition, metric): {seed: scores}}."""
    found: dict[tuple[str, str, str], dict[int, ItemScores]] = {}
    for (model, condition), by_seed in files.items():
        for seed, file in by_seed.items():
            for metric, scores in results.read_json(file)["items"].items():
                key = (model, condition, metric)
                found.setdefault(key, {})[seed] = ItemScores.from_json(scores)
    return found


def figures(
    name: str, files: Files, scale: Any, pairs: Mapping[str, list[int]],
    search: Mapping[str, Mapping[float, float]],
) -> dict[str, Any]:  # fmt: skip
    """Everything about one study, as JSON.

    Args:
      scale: of the runs; its fields are kept, and claims read what they need.
      pairs: model -> number of training pairs by seed.
      search: objective -> rate -> accuracy on validation.
    """
    study, scores = STUDIES[name], read(files)
    first = study.models[0]
    rows = []
    for (model, condition, metric), by_seed in scores.items():
        pooled = pool(by_seed)
        row = {
            "model": model, "condition": condition, "metric": metric, "value": pooled.mean(),
            "interval": interval(pooled), "by_seed": [one.mean() for one in by_seed.values()],
            "items": len(pooled), "videos": len(set(pooled.videos)),
        }  # fmt: skip
        if model != first:
            row["difference"] = _difference(scores[first, condition, metric], by_seed)
        rows.append(row)
    return {
        "format_version": 1, "study": name, "scale": dataclasses.asdict(scale),
        "seeds": sorted({seed for by_seed in files.values() for seed in by_seed}),
        "pairs": dict(pairs), "rows": rows,
        "search": {
            objective: {"chosen": best(of), "accuracy": {f"{rate:g}": of[rate] for rate in of}}
            for objective, of in search.items()
        },
        "claims": [_judge(claim, scores, scale) for claim in study.claims],
    }  # fmt: skip


def _difference(
    before: Mapping[int, ItemScores], after: Mapping[int, ItemScores]
) -> dict[str, Any]:
    """after - before on the same items of the same seeds, with its interval over videos."""
    whole = paired_difference(pool(before), pool(after))
    by_seed = [after[seed].mean() - before[seed].mean() for seed in after]
    return {"value": whole.value, "interval": [whole.low, whole.high], "by_seed": by_seed}


def _judge(claim: Claim, scores: Mapping[Any, Any], scale: Any) -> dict[str, Any]:
    more, less = (scores[dataclasses.astuple(of(scale))] for of in (claim.more, claim.less))
    difference = _difference(less, more)
    low, high = difference["interval"]
    verdict = AGREES if low > 0 else DISAGREES if high < 0 else UNDECIDED
    return {
        "text": claim.text, "published": claim.published, "difference": difference,
        "verdict": verdict,
    }  # fmt: skip


def write(folder: pathlib.Path, record: Mapping[str, Any]) -> pathlib.Path:
    """Writes a study's figures and plot, and README.md anew; returns README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    results.write_json(folder / f"{record['study']}.json", record)
    draw(record).savefig(folder / f"{record['study']}.png", dpi=110, bbox_inches="tight")
    found = {name: folder / f"{name}.json" for name in STUDIES}
    records = [json.loads(file.read_text()) for file in found.values() if file.exists()]
    page = folder / "README.md"
    temporary = folder / "README.md.tmp"
    temporary.write_text(render(records))
    temporary.replace(page)
    return page


# The page.


def render(records: list[Mapping[str, Any]]) -> str:
    """README.md of the studies that have been run."""
    lines = [
        "# Temporal Preference Optimization on long videos of moving shapes", "",
        "Written by `python -m experiments.temporal_preference "
        + " ".join(record["study"] for record in records)
        + "` from the JSON files beside it. Every model starts from the shipped base, which has "
        "seen neither videos of this length nor these. The base answers questions about training "
        "videos with right and with manipulated frames; a rule keeps the pairs whose preferred "
        "answer is the known one and whose other is not. Published (arXiv 2501.13919) are LongVA "
        "of 7 billion parameters on 10,000 pairs and benchmarks of real videos: only the sign of "
        "a difference can be compared.", "",
        "**What pairs are left, the held-out ones too:** before that rule they passed the filters "
        "of `preferences generate` (docs/preferences.md). One of them is the base's own likelihood "
        "gap: it finds the preferred answer likelier with the right frames than with the "
        "manipulated ones (`--gap` is 0). So `preferred answer likelier` is counted on pairs that "
        "the base chose. Comprehensive pairs keep an eighth of the frames (`--subset 0.125`).", "",
        "In brackets are 95 % intervals of a bootstrap over videos, of differences paired by "
        "question and seed. `hidden` is the same figure with the video hidden: what the text alone "
        "gives. Of questions it was measured with all frames and with needles in the longest "
        "videos; for fewer frames and shorter videos it was not, which is —. The plots show the "
        f"one that was measured. An interval above 0 {AGREES}, one below 0 {DISAGREES} with what "
        f"was published, one that holds 0 is {UNDECIDED}.", "",
    ]  # fmt: skip
    lines += ["| study | published | here | hidden | |", "|---|---|---|---|---|"]
    for record in records:
        for claim, hidden in zip(record["claims"], _hidden_differences(record), strict=True):
            lines.append(
                f"| {record['study']}: {claim['text']} | {claim['published']} | "
                f"{_signed(claim['difference'])} | {_measured(hidden, '+.3f')} | "
                f"{claim['verdict']} |"
            )
    for note in (note for record in records for note in _untrained(record)):
        lines += ["", note]
    for record in records:
        lines += ["", *_section(record)]
    return "\n".join(lines) + "\n"


def _hidden_differences(record: Mapping[str, Any]) -> list[float | None]:
    """Of each claim, the same difference with the video hidden; None where it was not measured."""
    rows, scale = _by_place(record["rows"]), types.SimpleNamespace(**record["scale"])
    sides = [
        [_hidden(rows, *dataclasses.astuple(of(scale))) for of in (claim.more, claim.less)]
        for claim in STUDIES[record["study"]].claims
    ]
    return [None if None in (more, less) else more - less for more, less in sides]


def _by_place(rows: list[Mapping[str, Any]]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {(row["model"], row["condition"], row["metric"]): row for row in rows}


def _hidden(rows: Mapping[Any, Any], model: str, condition: str, metric: str) -> float | None:
    """What is left of a figure without the video; None where that was not measured."""
    if metric == PREFERENCE:
        return rows[model, condition, HIDDEN]["value"]
    under = hidden_condition(condition)
    return rows[model, under, metric]["value"] if (model, under, metric) in rows else None


def _measured(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def _untrained(record: Mapping[str, Any]) -> list[str]:
    """What the untrained base does between the conditions of each claim that compares one trained
    model under two of them: a gain that it has as well is none of training."""
    study, scale = STUDIES[record["study"]], types.SimpleNamespace(**record["scale"])
    values = {place: row["value"] for place, row in _by_place(record["rows"]).items()}
    notes = []
    for claim, judged in zip(study.claims, record["claims"], strict=True):
        more, less = claim.more(scale), claim.less(scale)
        if more.model != less.model:
            continue
        low, high = (values[study.models[0], at.condition, at.metric] for at in (less, more))
        gain = judged["difference"]["value"]
        means = (
            "no less: this comparison **says nothing about preferences**"
            if high - low >= gain else "less"
        )  # fmt: skip
        notes.append(
            f"`{record['study']}: {claim.text}` compares one model under two conditions and gives "
            f"{gain:+.3f}. Between the same two the {study.models[0]}, which no pair trained, "
            f"gains {high - low:+.3f} ({low:.3f} to {high:.3f}), {means}."
        )
    return notes


def _section(record: Mapping[str, Any]) -> list[str]:
    scale, study = record["scale"], STUDIES[record["study"]]
    pairs = "; ".join(
        f"{model} {', '.join(map(str, counts))}" for model, counts in record["pairs"].items()
    )
    lines = [
        f"## {study.title}", "", f"![{record['study']}]({record['study']}.png)", "",
        f"{scale['train']} training and {scale['test']} test videos of {scale['seconds']} s, of "
        f"which {scale['frames']} frames are shown; seeds {', '.join(map(str, record['seeds']))}. "
        f"Training pairs by seed: {pairs}.", "", _search(record["search"]), "",
    ]  # fmt: skip
    rows = _by_place(record["rows"])
    lines += _table(rows, study.models, QA, "questions")
    if (study.models[0], "test", PREFERENCE) in rows:
        lines += ["", *_table(rows, study.models, PREFERENCE, "preferred answer likelier")]
    return lines


def _search(search: Mapping[str, Any]) -> str:
    found = "; ".join(
        f"{objective} {of['chosen']:g} ("
        + ", ".join(f"{rate}: {accuracy:.3f}" for rate, accuracy in of["accuracy"].items())
        + ")"
        for objective, of in search.items()
    )
    return f"Learning rates, by the accuracy of questions on validation with seed 0: {found}."


def _table(rows: Mapping[Any, Any], models: tuple[str, ...], metric: str, title: str) -> list[str]:
    """A line a model and condition; the last column is what is left without the video, or —."""
    lines = [
        f"| {title} | model | value | by seed | minus {models[0]} | hidden |",
        "|---|---|---|---|---|---|",
    ]
    conditions = dict.fromkeys(c for _, c, m in rows if m == metric and "hidden" not in c)
    for condition in conditions:
        for model in models:
            row = rows[model, condition, metric]
            difference = _signed(row["difference"]) if "difference" in row else ""
            lines.append(
                f"| {condition} | {model} | {_value(row)} | "
                f"{', '.join(f'{v:.3f}' for v in row['by_seed'])} | {difference} | "
                f"{_measured(_hidden(rows, model, condition, metric), '.3f')} |"
            )
    return lines


def _value(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['value']:.3f} [{low:.3f}, {high:.3f}]"


def _signed(difference: Mapping[str, Any]) -> str:
    low, high = difference["interval"]
    return f"{difference['value']:+.3f} [{low:+.3f}, {high:+.3f}]"


# The plots.


def draw(record: Mapping[str, Any]) -> Figure:
    rows, models = record["rows"], STUDIES[record["study"]].models
    if any(row["metric"].startswith(DEPTH) for row in rows):
        return _maps(rows, models)
    if record["study"] == "frames":
        return _curves(rows, models, record["scale"])
    return _points(rows, models)


def _points(rows: list[Mapping[str, Any]], models: tuple[str, ...]) -> Figure:
    """Questions and preferences of every model, with and without the video."""
    figure = Figure(figsize=(9, 3.2))
    panels = {
        "questions": (("test", QA), (BLIND, QA)),
        "preferred answer likelier": (("test", PREFERENCE), ("test", HIDDEN)),
    }
    for ax, (title, shown) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for (condition, metric), label in zip(shown, ("with the video", "hidden"), strict=True):
            wanted = (condition, metric)
            of = {r["model"]: r for r in rows if (r["condition"], r["metric"]) == wanted}
            _error_bars(ax, range(len(models)), [of[model] for model in models], label, fmt="o")
        ax.set(title=title, ylim=(0, 1), xticks=range(len(models)), xticklabels=models)
        ax.grid(alpha=0.3)
        ax.legend()
    return figure


def _curves(
    rows: list[Mapping[str, Any]], models: tuple[str, ...], scale: Mapping[str, Any]
) -> Figure:
    """Questions over the frames that are shown."""
    figure = Figure(figsize=(5, 3.2))
    ax, places = figure.subplots(), _by_place(rows)
    seen = [row for row in rows if row["metric"] == QA and row["condition"] != BLIND]
    for model in models:
        of = [row for row in seen if row["model"] == model]
        frames = [
            scale["frames"] if row["condition"] == "test" else int(row["condition"].split()[0])
            for row in of
        ]
        hidden = places[model, BLIND, QA]["value"]
        _error_bars(ax, frames, of, f"{model} (hidden {hidden:.2f})", fmt="o-")
    ax.set(title="questions", xlabel="frames shown", xscale="log")
    ax.set_xticks(frames, [str(count) for count in frames])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def _error_bars(ax: Any, xs: Any, rows: list[Mapping[str, Any]], label: str, fmt: str) -> None:
    values = [row["value"] for row in rows]
    below = [row["value"] - row["interval"][0] for row in rows]
    above = [row["interval"][1] - row["value"] for row in rows]
    ax.errorbar(list(xs), values, yerr=[below, above], fmt=fmt, capsize=3, label=label)


def _maps(rows: list[Mapping[str, Any]], models: tuple[str, ...]) -> Figure:
    """A map a model: depth of the needle by length of the video; all depths of the longest with it
    hidden."""
    places = _by_place(rows)
    cells = {
        (row["model"], row["condition"], row["metric"].removeprefix(DEPTH)): row["value"]
        for row in rows
        if row["metric"].startswith(DEPTH) and "hidden" not in row["condition"]
    }
    conditions = list(dict.fromkeys(condition for _, condition, _ in cells))
    depths = sorted({depth for _, _, depth in cells}, key=float)
    figure = Figure(figsize=(3.2 * len(models), 3.4))
    for ax, model in zip(figure.subplots(1, len(models)), models, strict=True):
        values = [[cells[model, c, depth] for c in conditions] for depth in depths]
        ax.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                ax.text(x, y, f"{value:.2f}", ha="center", va="center")
        hidden = _hidden(places, model, conditions[-1], QA)
        ax.set(
            title=f"{model} (hidden {hidden:.2f})", xlabel="video",
            yticks=range(len(depths)), yticklabels=depths,
            xticks=range(len(conditions)), ylabel="depth",
            xticklabels=[condition.removeprefix("needles in ") for condition in conditions],
        )  # fmt: skip
    figure.tight_layout()
    return figure
