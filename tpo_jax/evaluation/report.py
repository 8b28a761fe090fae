"""One self-contained HTML page about a run: no script, no network, pictures and charts inline.

It reads what the commands left in the run folder (see `summary`), and besides
`<stage>/metrics.jsonl`, `eval/<stage>.samples.jsonl`, `steps.jsonl` and the frames of `data/test`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from tpo_jax.data import files
from tpo_jax.data.records import Example, PreparedDataset
from tpo_jax.data.target_parts import about
from tpo_jax.evaluation import benchmarks, charts, pictures, results
from tpo_jax.evaluation.page import CSS
from tpo_jax.evaluation.summary import LEARNT, QUESTIONS, SHOWN, STAGES

# Task, the metric that its cases are sorted by, and the words above them.
CASES = (
    ("temporal", "temporal/miou", "When: windows and saliency"),
    ("region", "region/miou", "Where: referring boxes"),
    ("mask", "mask/j&f", "Where, over time: referring masks"),
    ("tracking", "tracking/auc", "Tracking a given box"),
    ("qa", "qa/accuracy", "Multiple choice"),
)
LAST_STAGES = ("dpo", "stage3", "stage2", "stage1", "base")


def build_report(run_dir: epath.PathLike) -> epath.Path:
    """Writes run_dir/report.html and returns its path."""
    run_dir = epath.Path(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    sections = [
        ("What it reached", _targets(summary)),
        ("Stage by stage", _table(summary)),
        ("Drawn predictions", _cases(run_dir, summary)),
        ("Training", _curves(run_dir)),
        ("Data", _data(summary)),
        ("Time and commands", _time(run_dir, summary)),
        ("Versions", _versions(summary)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{part}</section>" for title, part in sections if part)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tpo_jax, seed {summary['seed']}</title><style>{CSS}</style></head>"
        f"<body><main>{_header(summary)}{body}</main></body></html>\n"
    )
    path = run_dir / "report.html"
    files.write(path, page)
    return path


def _header(summary: Mapping[str, Any]) -> str:
    hits = sum(target["hit"] is True for target in summary["targets"])
    test = summary["counts"]["test"]
    facts = (
        f"{test['questions']} questions with options on {test['videos']} held-out videos and "
        f"{test['images']} images",
        f"{hits} of {len(summary['targets'])} targets",
        f"{summary['wall_seconds'] / 60:.1f} minutes of commands "
        f"({sum(summary['cpu_seconds'].values()) / 60:.1f} of processor time) "
        f"on {_escape(summary['device'])}",
        f"seed {summary['seed']}",
    )
    return (
        "<header><h1>A video-language model that knows where and when</h1>"
        f"<p class='facts'>{' · '.join(facts)}</p></header>"
    )


def _targets(summary: Mapping[str, Any]) -> str:
    rows = []
    for target in summary["targets"]:
        word, kind = {
            True: ("hit", "hit"), False: ("missed", "missed"), None: ("not measured", "unknown"),
        }[target["hit"]]  # fmt: skip
        rows.append(
            f"<tr class='{kind}'><td><span class='badge'>{word}</span></td>"
            f"<td>{_escape(target['name'])}</td><td class='n'>{_figure(target['value'])}</td>"
            f"<td class='n faint'>{_sign(target['sign'])} {_figure(target['bound'])}</td></tr>"
        )
    head = "<tr><th></th><th>target</th><th class='n'>measured</th><th class='n'>bound</th></tr>"
    return f"<table class='targets'>{head}{''.join(rows)}</table>"


def _table(summary: Mapping[str, Any]) -> str:
    stages = [stage for stage in STAGES if stage in summary["eval"]]
    head = "".join(f"<th class='n'>{stage}</th>" for stage in ("floor", *stages))
    kinds = sorted({m for s in stages for m in summary["eval"][s] if m.startswith("qa/accuracy/")})
    free = _rows(summary, stages, (*QUESTIONS, *kinds, *SHOWN[len(QUESTIONS) :]))
    forced = _rows(summary, stages, [f"forced/{metric}" for metric in SHOWN])
    out = (
        "<p>Mean over items, with 95 % bootstrap intervals over videos. Head metrics come from "
        "free generation: a head that the answer does not call scores 0. Floors are constants "
        "chosen on the training split, and models trained without the video or with its middle "
        "frame alone.</p>"
        f"<div class='wide'><table><tr><th>metric</th>{head}</tr>{free}</table></div>"
    )
    if forced:
        out += (
            "<h3>With forced routing</h3><p>The head reads its slot in the labelled answer, "
            "whatever the model would have said.</p>"
            f"<div class='wide'><table><tr><th>metric</th>{head}</tr>{forced}</table></div>"
        )
    return out + _floor_candidates(summary) + _floor_training(summary)


def _rows(summary: Mapping[str, Any], stages: Sequence[str], metrics: Iterable[str]) -> str:
    rows = []
    for metric in metrics:
        values = [summary["eval"][stage].get(metric) for stage in stages]
        if all(value is None for value in values):
            continue
        floor = summary["floors"].get(metric.removeprefix("forced/"))
        best = max(value for value in values if value is not None)
        compared = len(stages) > 1 and not metric.endswith("_blind")  # of a floor none is best
        cells = [f"<td class='n faint'>{_figure(floor)}</td>"]
        for stage, value in zip(stages, values, strict=True):
            low_high = summary["intervals"][stage].get(metric)
            note = f"<small>{low_high[0]:.2f}–{low_high[1]:.2f}</small>" if low_high else ""
            strong = " best" if value == best and compared else ""
            cells.append(f"<td class='n{strong}'>{_figure(value)}{note}</td>")
        name = "&ensp;" + metric.split("/")[-1] if metric.startswith("qa/accuracy/") else metric
        rows.append(f"<tr><td>{name}</td>{''.join(cells)}</tr>")
    return "".join(rows)


def _floor_candidates(summary: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{metric}</td><td>{_escape(candidate['name'])}</td>"
        f"<td class='n'>{_figure(candidate['test'])}</td></tr>"
        for metric, candidates in summary["floor_candidates"].items()
        for candidate in sorted(candidates, key=lambda c: -c["test"])
    )
    return (
        "<details><summary>What each floor is</summary><table><tr><th>metric</th>"
        f"<th>without looking</th><th class='n'>test</th></tr>{rows}</table></details>"
    )


def _floor_training(summary: Mapping[str, Any]) -> str:
    """How far the floors that are models were trained; their curves stand with the others."""
    rows = "".join(
        f"<tr><td>{_escape(name)}</td><td class='n'>{at['step']}</td>"
        + "".join(f"<td class='n'>{_figure(at[figure])}</td>" for figure in LEARNT)
        + f"<td>{'&ensp;chosen' if at['step'] == trained['chosen_step'] else ''}</td></tr>"
        for name, trained in summary["floor_training"].items()
        for at in trained["validations"]
    )
    if not rows:
        return ""
    head = "".join(f"<th class='n'>{name}</th>" for name in LEARNT)
    return (
        "<details open><summary>Had the floors that are models learnt what they can?</summary>"
        "<p>On the validation split, questions with options: a floor whose figures still improve "
        "at the end is too low. Accuracy is that of whole answers, word for word. The weights of "
        "the lowest validation loss are the floor. Their curves: “Training”.</p>"
        f"<table><tr><th>model</th><th class='n'>step</th>{head}<th></th></tr>{rows}</table>"
        "</details>"
    )


# Drawn predictions.


def _cases(run_dir: epath.Path, summary: Mapping[str, Any]) -> str:
    stage = next((s for s in LAST_STAGES if results.samples_path(_eval(run_dir, s)).exists()), None)
    if stage is None:
        return ""
    samples = results.read_samples(_eval(run_dir, stage))
    dataset = PreparedDataset(run_dir / "data" / "test")
    parts = [
        f"<p>From the evaluation of <b>{stage}</b>: the best and the worst of each task. "
        "<span class='label'>Green</span> is the label, "
        "<span class='predicted'>orange</span> the prediction.</p>"
    ]
    for task, metric, title in CASES:
        of_task = [s for s in samples if s["task"] == task and metric in s["scores"]]
        if of_task:
            figures = "".join(
                _case(dataset, sample, word) for sample, word in _choose(of_task, metric)
            )
            parts.append(f"<h3>{title}</h3><div class='cases {task}'>{figures}</div>")
    return "".join(parts)


def _choose(samples: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[Any, str]]:
    """The two best samples, the worst where the head was called, and the worst of the rest."""
    ranked = sorted(samples, key=lambda s: (-s["scores"][metric], s["item"]))
    called = [s for s in ranked if s["task"] == "qa" or s["answer"]["events"]]
    chosen: list[tuple[Any, str]] = []
    orders = ((ranked, "good"), (ranked, "good"), (called[::-1], "bad"), (ranked[::-1], "bad"))
    for order, word in orders:
        videos = {sample["video"] for sample, _ in chosen}
        fresh = next((sample for sample in order if sample["video"] not in videos), None)
        if fresh is not None:
            chosen.append((fresh, word))
    return chosen


def _case(dataset: PreparedDataset, sample: Mapping[str, Any], word: str) -> str:
    example = _find(dataset, sample)
    scores = ", ".join(f"{name} {value:.2f}" for name, value in sample["scores"].items())
    turn = example.turns[sample["turn"]]
    if sample["task"] == "qa":
        answer = _options(turn, sample)
    else:
        missed = "" if _result(sample, example) is not None else " — the head was not called"
        answer = f"<p class='answer'>“{_escape(sample['answer']['text'])}”{missed}</p>"
    return (
        f"<figure class='{word}'><figcaption><span class='badge'>{word}</span> "
        f"<b>{_escape(turn.question)}</b> <span class='faint'>{_escape(sample['video'])}</span>"
        f"</figcaption>{_DRAW[sample['task']](dataset, example, sample)}{answer}"
        f"<p class='faint'>{scores}</p></figure>"
    )


def _find(dataset: PreparedDataset, sample: Mapping[str, Any]) -> Example:
    every = dataset.examples(sample["video"])
    return next(example for example in every if example.example_id == sample["example"])


def _result(sample: Mapping[str, Any], example: Example) -> Mapping[str, Any] | None:
    """What the head said at the place of the call; None where it was not called."""
    calls = benchmarks.find_calls(example, sample["turn"])
    events = [(event["task"], event["result"]) for event in sample["answer"]["events"]]
    return benchmarks.match_events(calls, events)[sample["place"]]


def _draw_temporal(dataset: PreparedDataset, example: Example, sample: Mapping[str, Any]) -> str:
    result = _result(sample, example)
    targets = about(example, sample["occurrence"]).targets
    steps: list[tuple[float, float]] = []
    if targets.get("saliency"):
        interval = targets["saliency_interval"]
        for index, value in enumerate(targets["saliency"]):
            steps += [(index * interval, value), ((index + 1) * interval, value)]
    curve = [] if result is None else list(zip(result["times"], result["saliency"], strict=True))
    drawn = charts.timeline(
        example.start,
        example.end,
        labels=targets["windows"],
        predictions=[] if result is None else result["windows"],
        curve=curve,
        label_steps=steps,
        width=pictures.STRIP * (pictures.SIDE + 4),
    )
    return pictures.strip(dataset, example) + drawn


def _draw_region(dataset: PreparedDataset, example: Example, sample: Mapping[str, Any]) -> str:
    return pictures.region(dataset, example, sample["occurrence"], _result(sample, example))


def _draw_mask(dataset: PreparedDataset, example: Example, sample: Mapping[str, Any]) -> str:
    return pictures.masks(
        dataset, about(example, sample["occurrence"]), _result(sample, example)
    )


def _draw_track(dataset: PreparedDataset, example: Example, sample: Mapping[str, Any]) -> str:
    return pictures.track(
        dataset, about(example, sample["occurrence"]), _result(sample, example)
    )


def _draw_qa(dataset: PreparedDataset, example: Example, sample: Mapping[str, Any]) -> str:
    return pictures.strip(dataset, example)


_DRAW: dict[str, Callable[[PreparedDataset, Example, Mapping[str, Any]], str]] = {
    "temporal": _draw_temporal,
    "region": _draw_region,
    "mask": _draw_mask,
    "tracking": _draw_track,
    "qa": _draw_qa,
}


def _options(turn: Any, sample: Mapping[str, Any]) -> str:
    """The options with their log-probabilities; the label and the choice are marked."""
    lines = []
    for index, (option, logp) in enumerate(zip(turn.options, sample["option_logps"], strict=True)):
        marks = [
            "<span class='label'>label</span>" if option == turn.answer else "",
            "<span class='predicted'>chosen</span>" if index == sample["chosen"] else "",
        ]
        lines.append(f"<li>{_escape(option)} <small>{logp:.2f}</small> {' '.join(marks)}</li>")
    return f"<ul class='options'>{''.join(lines)}</ul>"


# Curves, data, time.


def _curves(run_dir: epath.Path) -> str:
    parts = []
    for file in sorted(run_dir.glob("*/metrics.jsonl"), key=_stage_order):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        losses = {group: _series(records, f"{group}/loss") for group in ("train", "validation")}
        drawn = [charts.line_chart(losses, title=f"{file.parent.name}: loss")]
        for group, title in (("train", "training terms"), ("validation", "validation terms")):
            names = sorted({n for r in records for n in r if _is_term(n, group)})
            for first in range(0, len(names), 4):
                terms = {
                    n.removeprefix(f"{group}/"): _series(records, n)
                    for n in names[first : first + 4]
                }
                drawn.append(charts.line_chart(terms, title=f"{file.parent.name}: {title}"))
        parts.append(f"<div class='charts'>{''.join(drawn)}</div>")
    return "".join(parts)


def _stage_order(file: epath.Path) -> tuple[int, str]:
    name = file.parent.name
    return (STAGES.index(name) if name in STAGES else len(STAGES), name)


def _is_term(name: str, group: str) -> bool:
    """Loss terms and preference figures; not the loss itself, which has its own chart."""
    skipped = ("loss", "nonfinite", "learning_rate", "gradient_norm", "weight")
    return name.startswith(f"{group}/") and not any(
        word in name.split("/", 1)[1] for word in skipped
    )


def _series(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(r["step"], float(r[name])) for r in records if isinstance(r.get(name), int | float)]


def _data(summary: Mapping[str, Any]) -> str:
    counts = summary["counts"]
    parts = []
    for title, splits in (
        ("Prepared videos", counts["data"]),
        ("Preference pairs", counts["pairs"]),
    ):
        if not splits:
            continue
        rows: dict[str, dict[str, Any]] = {}
        for split, figures in splits.items():
            for name, value in _flatten(figures):
                rows.setdefault(name, {})[split] = value
        head = "".join(f"<th class='n'>{split}</th>" for split in splits)
        body = "".join(
            f"<tr><td>{_escape(name)}</td>"
            + "".join(f"<td class='n'>{_figure(row.get(split))}</td>" for split in splits)
            + "</tr>"
            for name, row in rows.items()
        )
        parts.append(f"<div><h3>{title}</h3><table><tr><th></th>{head}</tr>{body}</table></div>")
    return f"<div class='columns'>{''.join(parts)}</div>" if parts else ""


def _flatten(figures: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}: ")
        elif isinstance(value, int | float):
            yield prefix + name.replace("_", " "), value


def _time(run_dir: epath.Path, summary: Mapping[str, Any]) -> str:
    drawn = charts.bars({step: s for step, s in summary["seconds"].items()}, unit="s", width=760)
    steps = run_dir / "steps.jsonl"
    if not steps.exists():
        return drawn
    commands = [json.loads(line)["command"] for line in steps.read_text().splitlines()]
    return drawn + f"<pre>{_escape(chr(10).join(commands))}</pre>"


def _versions(summary: Mapping[str, Any]) -> str:
    found = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    difference = summary["export"]["max_abs_difference"]
    exported = "" if difference is None else (
        f"<p>import(export(model)) differs from the model by at most {difference:g}.</p>"
    )  # fmt: skip
    return f"<p>{_escape(found)}</p>{exported}"


def _eval(run_dir: epath.Path, stage: str) -> epath.Path:
    return run_dir / "eval" / f"{stage}.json"


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _sign(sign: str) -> str:
    return {">=": "≥", "<=": "≤"}[sign]


def _escape(text: Any) -> str:
    return html.escape(str(text))
