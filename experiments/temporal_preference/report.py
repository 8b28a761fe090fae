"""From evaluations to figures: pooled over seeds, paired by item, drawn and written down.

RESULTS/STUDY.json has everything that README.md and STUDY.png show, and RESULTS/steps.jsonl what
every command took; README.md is written from all of those that are there.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.steps import read_journal, wall_seconds
from experiments.temporal_preference.runs import Searched, best
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
FORMAT_VERSION = 2  # 1: not every figure was measured hidden
STEPS = "steps.jsonl"
MINUTES, CORES = 90, 2  # of the whole set, as was wanted
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
    search: Mapping[str, Mapping[float, Searched]],
) -> dict[str, Any]:  # fmt: skip
    """Everything about one study, as JSON.

    Args:
      scale: of the runs; its fields are kept, and claims read what they need.
      pairs: model -> number of training pairs by seed.
      search: objective -> rate -> accuracy on validation, seen and hidden.
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
        "format_version": FORMAT_VERSION, "study": name, "scale": dataclasses.asdict(scale),
        "seeds": sorted({seed for by_seed in files.values() for seed in by_seed}),
        "pairs": dict(pairs), "rows": rows,
        "search": {
            objective: {
                "chosen": best(of),
                "rates": {f"{rate:g}": dataclasses.asdict(found) for rate, found in of.items()},
            }
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


def write(
    folder: pathlib.Path, record: Mapping[str, Any], journal: pathlib.Path
) -> pathlib.Path:
    """Writes a study's figures and plot, a copy of the journal of `Steps`, and README.md anew;
    returns README.md."""
    folder.mkdir(parents=True, exist_ok=True)
    results.write_json(folder / f"{record['study']}.json", record)
    draw(record).savefig(folder / f"{record['study']}.png", dpi=110, bbox_inches="tight")
    _replace(folder / STEPS, journal.read_text())
    page = folder / "README.md"
    _replace(page, render(read_records(folder), read_journal(folder / STEPS)))
    return page


def _replace(file: pathlib.Path, text: str) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(text)
    temporary.replace(file)


def read_records(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Of the studies that were written in this format; others are left out of the page."""
    files = (folder / f"{name}.json" for name in STUDIES)
    records = [json.loads(file.read_text()) for file in files if file.exists()]
    return [record for record in records if record["format_version"] == FORMAT_VERSION]


# The page.


def render(records: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> str:
    """README.md of the studies that have been run.

    Args:
      steps: of `read_journal`.
    """
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
        "gives, measured on the same questions, needles of each length by themselves. The number "
        "of frames makes no difference to it: of a hidden video `evaluate` takes one frame, "
        "whatever `--frames` says, so one measurement stands beside all numbers. An interval above "
        f"0 {AGREES}, one below 0 {DISAGREES} with what was published, one that holds 0 is "
        f"{UNDECIDED}.", "",
        _time(steps), "",
    ]  # fmt: skip
    lines += ["| study | published | here | hidden | |", "|---|---|---|---|---|"]
    for record in records:
        for claim, hidden in zip(record["claims"], _hidden_differences(record), strict=True):
            lines.append(
                f"| {record['study']}: {claim['text']} | {claim['published']} | "
                f"{_signed(claim['difference'])} | {hidden:+.3f} | {claim['verdict']} |"
            )
    for note in (note for record in records for note in _untrained(record)):
        lines += ["", note]
    for record in records:
        lines += ["", *_section(record)]
    return "\n".join(lines) + "\n"


def _time(steps: Sequence[Mapping[str, Any]]) -> str:
    cpu, clock = sum(step["cpu_seconds"] for step in steps) / 60, wall_seconds(steps) / 60
    return (
        f"The {len(steps)} commands of these studies are in `{STEPS}`, with what each took: "
        f"{cpu:.0f} minutes of processor time in all, and {clock:.0f} minutes in which one or more "
        "were running, whatever else the machine did then. Of a command that was interrupted only "
        f"the last call is counted. The whole set should take about {MINUTES} minutes on {CORES} "
        f"cores, which is {MINUTES * CORES} of processor time where both are always busy."
    )


def _hidden_differences(record: Mapping[str, Any]) -> list[float]:
    """Of each claim, the same difference with the video hidden."""
    rows, scale = _by_place(record["rows"]), types.SimpleNamespace(**record["scale"])
    return [
        _hidden(rows, *dataclasses.astuple(claim.more(scale)))
        - _hidden(rows, *dataclasses.astuple(claim.less(scale)))
        for claim in STUDIES[record["study"]].claims
    ]


def _by_place(rows: list[Mapping[str, Any]]) -> dict[tuple[str, str, str], Mapping[str, Any]]:
    return {(row["model"], row["condition"], row["metric"]): row for row in rows}


def _hidden(rows: Mapping[Any, Any], model: str, condition: str, metric: str) -> float:
    """What is left of a figure without the video."""
    if metric == PREFERENCE:
        return rows[model, condition, HIDDEN]["value"]
    return rows[model, hidden_condition(condition), metric]["value"]


def _untrained(record: Mapping[str, Any]) -> list[str]:
    """What the untrained base does between the conditions of each claim that compares one trained
    model under two of them: a gain that it has as well is none of training."""
    study, scale = STUDIES[record["study"]], types.SimpleNamespace(**record["scale"])
    rows, base = _by_place(record["rows"]), study.models[0]
    notes = []
    for claim, judged in zip(study.claims, record["claims"], strict=True):
        more, less = claim.more(scale), claim.less(scale)
        if more.model != less.model:
            continue
        places = [(base, at.condition, at.metric) for at in (less, more)]
        low, high = (rows[place]["value"] for place in places)
        hidden = " to ".join(f"{_hidden(rows, *place):.3f}" for place in places)
        gain = judged["difference"]["value"]
        means = (
            "no less: this comparison **says nothing about preferences**"
            if high - low >= gain else "less"
        )  # fmt: skip
        notes.append(
            f"`{record['study']}: {claim.text}` compares one model under two conditions and gives "
            f"{gain:+.3f}. Between the same two the {base}, which no pair trained, "
            f"gains {high - low:+.3f} ({low:.3f} to {high:.3f}, hidden {hidden}), {means}."
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
        f"{objective} {of['chosen']:g} of "
        + ", ".join(
            f"{rate} ({tried['accuracy']:.3f}, hidden {tried['hidden']:.3f})"
            for rate, tried in of["rates"].items()
        )
        for objective, of in search.items()
    )
    return f"Learning rates, by the accuracy of questions on validation with seed 0: {found}."


def _table(rows: Mapping[Any, Any], models: tuple[str, ...], metric: str, title: str) -> list[str]:
    """A line a model and condition; the last column is what is left without the video."""
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
                f"{_hidden(rows, model, condition, metric):.3f} |"
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
    """Questions over the frames that are shown; dotted, with the video hidden."""
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
        line = _error_bars(ax, frames, of, f"{model} (hidden {hidden:.2f})", fmt="o-")
        ax.axhline(hidden, color=line.get_color(), linestyle=":")
    ax.set(title="questions", xlabel="frames shown", xscale="log")
    ax.set_xticks(frames, [str(count) for count in frames])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def _error_bars(ax: Any, xs: Any, rows: list[Mapping[str, Any]], label: str, fmt: str) -> Any:
    """Returns the line through the values."""
    values = [row["value"] for row in rows]
    below = [row["value"] - row["interval"][0] for row in rows]
    above = [row["interval"][1] - row["value"] for row in rows]
    return ax.errorbar(list(xs), values, yerr=[below, above], fmt=fmt, capsize=3, label=label)[0]


def _maps(rows: list[Mapping[str, Any]], models: tuple[str, ...]) -> Figure:
    """A map a model: depth of the needle by length of the video; below each, with it hidden."""
    places = _by_place(rows)
    seen = [r for r in rows if r["metric"].startswith(DEPTH) and "hidden" not in r["condition"]]
    conditions = list(dict.fromkeys(row["condition"] for row in seen))
    metrics = sorted({row["metric"] for row in seen}, key=_depth)
    figure = Figure(figsize=(3.2 * len(models), 4.2))
    for ax, model in zip(figure.subplots(1, len(models)), models, strict=True):
        values = [[places[model, c, metric]["value"] for c in conditions] for metric in metrics]
        ax.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, metric in enumerate(metrics):
            for x, condition in enumerate(conditions):
                hidden = _hidden(places, model, condition, metric)
                text = f"{values[y][x]:.2f}\n({hidden:.2f})"
                ax.text(x, y, text, ha="center", va="center", fontsize=8)
        ax.set(
            title=f"{model} (hidden)", xlabel="video", ylabel="depth",
            yticks=range(len(metrics)), yticklabels=[f"{_depth(metric):g}" for metric in metrics],
            xticks=range(len(conditions)),
            xticklabels=[condition.removeprefix("needles in ") for condition in conditions],
        )  # fmt: skip
    figure.tight_layout()
    return figure


def _depth(metric: str) -> float:
    return float(metric.removeprefix(DEPTH))
