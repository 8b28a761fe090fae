"""Times our metrics against what they must equal: programs in plain Python, and public packages.

    python -m experiments.benchmarks.metrics

Every metric and its oracle run on the same random input, one after the other, a few times; what is
reported is the CPU time of the process and the median of the ratios of such pairs. Both sides must
agree to 1e-6, or the benchmark stops. Each side starts from the arrays or objects that it takes,
but for the rows "from records", where both start from what `json.loads` made of a submission and
its annotations, and ours is what `evaluate --predictions` runs.
Needs pycocoevalcap, trackeval and got10k; nothing is downloaded. Writes metrics.json and its page,
metrics.md, which says what reaches the ratio that is promised and what misses it.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from pycocotools import mask as coco

from experiments.benchmarks import metric_oracles
from tpo_jax.evaluation import submissions
from tpo_jax.evaluation.metrics import (
    captions,
    detection,
    grounded_qa,
    mask,
    qvhighlights,
    region,
    tracking,
)

RESULTS = pathlib.Path(__file__).parents[1] / "results" / "benchmarks"
TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class Pair:
    """One metric and its oracle on the same input.

    Attributes:
      name: of the metric.
      size: what the input holds.
      oracle_name: which program is the oracle.
      ours: runs the metric and returns the numbers to compare.
      oracle: runs the oracle and returns the same numbers.
      promised: least ratio that the project promises.
    """

    name: str
    size: str
    oracle_name: str
    ours: Callable[[], Any]
    oracle: Callable[[], Any]
    promised: float


def qvhighlights_pairs(rng: np.random.Generator, queries: int) -> Iterator[Pair]:
    """Ten windows and 75 clips a query, one to three labels."""
    submission, labels = [], []
    for qid in range(queries):
        targets = np.sort(rng.integers(0, 76, (rng.choice([1, 1, 2, 3]), 2)) * 2.0, axis=1)
        targets[:, 1] += 2
        windows = np.sort(rng.random((10, 2)) * 150, axis=1)
        windows[:3] = targets[0] + rng.normal(0, 4, (3, 2))
        rows = np.column_stack([windows, np.sort(rng.random(10))[::-1]])
        clips = np.flatnonzero(rng.random(75) < 0.3)
        submission.append(
            {
                "qid": qid,
                "pred_relevant_windows": rows.tolist(),
                "pred_saliency_scores": rng.normal(size=75).tolist(),
            }
        )
        labels.append(
            {
                "qid": qid,
                "duration": 150,
                "relevant_windows": targets.tolist(),
                "relevant_clip_ids": clips.tolist(),
                "saliency_scores": rng.integers(0, 5, (len(clips), 3)).tolist(),
            }
        )

    size, records = f"{queries} queries", list(zip(submission, labels, strict=True))
    moments, highlights = (
        submissions.moment_arrays(records),
        submissions.highlight_arrays(records),
    )
    yield Pair(
        "QVHighlights moment retrieval",
        size,
        "plain Python",
        lambda: qvhighlights.moment_report(*moments),
        lambda: metric_oracles.moment_table(submission, labels),
        20,
    )
    yield Pair(
        "QVHighlights highlight detection",
        size,
        "plain Python",
        lambda: qvhighlights.highlight_report(*highlights),
        lambda: metric_oracles.highlight_table(submission, labels),
        20,
    )
    submission, labels = parsed(submission), parsed(labels)

    def ours() -> dict[str, dict]:
        report = submissions.score_qvhighlights(submission, labels)
        return {name: report[name] for name in report if name != "brief"}

    def oracle() -> dict[str, dict]:
        return metric_oracles.moment_table(
            submission, labels
        ) | metric_oracles.highlight_table(submission, labels)

    yield Pair("QVHighlights from records", size, "plain Python", ours, oracle, 20)


def detection_pairs(rng: np.random.Generator, videos: int) -> Iterator[Pair]:
    """ActivityNet's shape: 200 classes, 1.5 labels and about 20 predictions a video."""
    results, database = {}, {}
    for index in range(videos):
        label = f"class {rng.integers(0, 200)}"
        targets = np.sort(rng.random((rng.choice([1, 2]), 2)) * 120, axis=1)
        guesses = np.sort(rng.random((20, 2)) * 120, axis=1)
        guesses[:8] = targets[0] + rng.normal(0, 8, (8, 2))
        database[index] = [{"label": label, "segment": t.tolist()} for t in targets]
        results[index] = [
            {"label": label, "segment": g.tolist(), "score": float(rng.random())} for g in guesses
        ]
    classes = sorted({row["label"] for entry in database.values() for row in entry})
    columns = detection_columns(results, database, classes)

    def oracle() -> list[list[float]]:
        thresholds = detection.ACTIVITYNET_THRESHOLDS
        table = metric_oracles.detection_table(results, database, thresholds)
        return [table[label] for label in classes]

    size = f"{videos} videos, {len(columns[0])} segments"
    yield Pair(
        "ActivityNet mAP@tIoU",
        size,
        "plain Python",
        lambda: detection.average_precision(*columns),
        oracle,
        20,
    )
    submission = parsed({"results": results})
    labels = parsed({"database": {
        video: {"subset": "validation", "annotations": rows} for video, rows in database.items()
    }})  # fmt: skip
    yield Pair(
        "ActivityNet mAP@tIoU from records",
        size,
        "plain Python",
        lambda: submissions.score_detection(submission, labels, "activitynet"),
        lambda: metric_oracles.activitynet_report(submission, labels),
        20,
    )


def detection_columns(results: dict, database: dict, classes: list[str]) -> list[np.ndarray]:
    """The arguments of `detection.average_precision`."""
    guesses = [(video, row) for video, entry in results.items() for row in entry]
    labelled = [(video, row) for video, entry in database.items() for row in entry]
    number = {label: index for index, label in enumerate(classes)}
    return [
        np.array([row["segment"] for _, row in guesses]),
        np.array([row["score"] for _, row in guesses]),
        np.array([number[row["label"]] for _, row in guesses]),
        np.array([video for video, _ in guesses]),
        np.array([row["segment"] for _, row in labelled]),
        np.array([number[row["label"]] for _, row in labelled]),
        np.array([video for video, _ in labelled]),
    ]


def grounded_qa_pairs(rng: np.random.Generator, questions: int) -> Iterator[Pair]:
    names = [f"{index // 4}_{index}" for index in range(questions)]
    counts = rng.choice([1, 1, 1, 2], questions)
    windows = np.sort(rng.random((counts.sum(), 2)) * 40, axis=1)
    spans = np.sort(rng.random((questions, 2)) * 40, axis=1)
    question = np.repeat(np.arange(questions), counts)
    correct = rng.random(questions) < 0.6
    by_name = dict(zip(names, np.split(windows, np.cumsum(counts)[:-1]), strict=True))
    locations = {name: rows.tolist() for name, rows in by_name.items()}
    given = dict(zip(names, spans.tolist(), strict=True))
    right = dict(zip(names, correct.tolist(), strict=True))
    size, python = f"{questions} questions", "plain Python"

    def oracle() -> dict:
        return metric_oracles.grounded_qa_table(given, locations, right)

    def ours() -> dict:
        return grounded_qa.report(*grounded_qa.overlaps(spans, windows, question), correct)

    yield Pair("NExT-GQA", size, python, ours, oracle, 20)
    submission, labels = parsed(given), {}
    for name, rows in locations.items():
        video, number = name.split("_")
        labels.setdefault(video, {"location": {}})["location"][number] = rows
    labels = parsed(labels)
    answers = parsed({n: {"prediction": int(yes), "answer": 1} for n, yes in right.items()})

    def from_records() -> dict:
        report = submissions.score_nextgqa(submission, labels, answers)
        return {name: value for name, value in report.items() if isinstance(value, float)}

    yield Pair(
        "NExT-GQA from records", size, python, from_records,
        lambda: metric_oracles.grounded_qa_report(submission, labels, answers), 20,
    )  # fmt: skip


def parsed(records: Any) -> Any:
    """What a file that holds the records is read as: no object is shared with another file's."""
    return json.loads(json.dumps(records))


def box_pairs(rng: np.random.Generator, count: int) -> Iterator[Pair]:
    target = np.sort(rng.random((count, 2, 2)) * 200, axis=1).reshape(count, 4)
    predicted = target + rng.normal(0, 10, target.shape)
    lists = predicted.tolist(), target.tolist()
    yield Pair(
        "RefCOCO Acc@0.5", f"{count} boxes", "plain Python",
        lambda: float(region.region_accuracy(predicted, target).mean()),
        lambda: metric_oracles.box_accuracy(*lists), 1,
    )  # fmt: skip


def tracking_pairs(rng: np.random.Generator, frames: int) -> Iterator[Pair]:
    from got10k.experiments import ExperimentGOT10k
    from got10k.utils.metrics import rect_iou

    target = rng.random((frames, 4)) * [300, 200, 90, 90] + 1
    predicted = target + rng.normal(0, 10, target.shape)
    absent = rng.random(frames) < 0.1
    lists = predicted.tolist(), target.tolist(), absent.tolist()
    yield Pair(
        "LaSOT success, precision, normalised precision", f"{frames} frames", "plain Python",
        lambda: tracking.lasot_scores(predicted, target, absent),
        lambda: metric_oracles.lasot(*lists), 1,
    )  # fmt: skip
    bound = (320, 240)

    def ours() -> list[float]:
        ious = tracking.got10k_ious(predicted, target, ~absent, bound)
        return [tracking.average_overlap(ious), tracking.success_rate(ious)]

    def oracle() -> list[float]:
        # The toolkit clips its arguments in place.
        ious = rect_iou(predicted[1:].copy(), target[1:].copy(), bound=bound)[~absent[1:]]
        return [float(value) for value in ExperimentGOT10k._evaluate(None, ious, [])[:2]]

    yield Pair("GOT-10k AO, SR", f"{frames} frames", "got10k", ours, oracle, 1)


def mask_pairs(rng: np.random.Generator, frames: int) -> Iterator[Pair]:
    from trackeval.metrics import JAndF

    ids = [np.array([0])] * frames
    for height, width in ((480, 854), (64, 64)):
        y, x = np.mgrid[:height, :width]
        masks = np.zeros((2, frames, height, width), bool)
        for side, frame in np.ndindex(2, frames):
            cy, cx = height / 2 + frame + 4 * side, width / 2 + rng.normal()
            masks[side, frame] = ((y - cy) / height) ** 2 + ((x - cx) / width) ** 2 < 0.04
        predicted, target = masks
        codes = [encode(side) for side in masks]

        def oracle(codes: list = codes) -> list[float]:
            data = {"num_timesteps": frames, "num_gt_ids": 1, "num_tracker_ids": 1}
            data |= {"gt_ids": ids, "tracker_ids": ids}
            data |= {"gt_dets": [[c] for c in codes[1]], "tracker_dets": [[c] for c in codes[0]]}
            found = JAndF().eval_sequence(data)
            return [found["J-Mean"], found["F-Mean"]]

        def ours(codes: list = codes) -> list[float]:
            pair = [np.moveaxis(coco.decode(side), 2, 0) for side in codes]
            return [
                float(mask.region_similarity(*pair).mean()),
                float(mask.boundary_accuracy(*pair).mean()),
            ]

        size = f"{frames} masks of {height} x {width}"
        yield Pair("J and F, from RLE", size, "trackeval", ours, oracle, 1)

        def iou_oracle(predicted: np.ndarray = predicted, target: np.ndarray = target) -> list:
            first, second = encode(predicted), encode(target)
            parts = [
                coco.area(coco.merge(list(c), intersect=True))
                for c in zip(first, second, strict=True)
            ]
            wholes = [coco.area(coco.merge(list(c))) for c in zip(first, second, strict=True)]
            ious = [part / whole for part, whole in zip(parts, wholes, strict=True)]
            return [sum(ious) / frames, sum(map(int, parts)) / sum(map(int, wholes))]

        def ious(predicted: np.ndarray = predicted, target: np.ndarray = target) -> list[float]:
            both = mask.areas(predicted, target)
            return [mask.mean_iou(*both), mask.cumulative_iou(*both)]

        yield Pair("gIoU and cIoU, from arrays", size, "pycocotools", ious, iou_oracle, 1)


def encode(masks: np.ndarray) -> list:
    return [coco.encode(np.asfortranarray(frame.astype(np.uint8))) for frame in masks]


def caption_pairs(rng: np.random.Generator, items: int) -> Iterator[Pair]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    chance = 1 / np.arange(1, 3001)
    words = rng.choice(3000, (items, 6, 12), p=chance / chance.sum())
    texts = [[" ".join(f"w{word}" for word in row) for row in item] for item in words]
    candidates, references = [item[0] for item in texts], [item[1:] for item in texts]
    given = dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)}
    size = f"{items} captions, five references"

    def bleu() -> list[float]:
        return captions.bleu(captions.read_corpus(candidates, references))[0].tolist()

    def cider() -> float:
        return captions.cider(captions.read_corpus(candidates, references))[0]

    yield Pair(
        "BLEU-1 ... 4", size, "pycocoevalcap",
        bleu, lambda: Bleu(4).compute_score(*given, verbose=0)[0], 1,
    )  # fmt: skip
    yield Pair(
        "CIDEr", size, "pycocoevalcap", cider, lambda: float(Cider().compute_score(*given)[0]), 1
    )


def measure(pair: Pair, pairs: int, seconds_enough: float) -> dict[str, Any]:
    """CPU seconds of both and the median ratio of the pairs."""
    ours, oracle = [], []
    while len(ours) < pairs and sum(oracle) < seconds_enough:
        results = []
        for seconds, function in ((ours, pair.ours), (oracle, pair.oracle)):
            started = time.process_time()
            results.append(function())
            seconds.append(time.process_time() - started)
        worst = difference(*results)
        if not worst <= TOLERANCE:
            raise ValueError(f"{pair.name}: differs from {pair.oracle_name} by {worst:g}")
    ratios = sorted(o / s for s, o in zip(ours, oracle, strict=True))
    return {
        "metric": pair.name,
        "input": pair.size,
        "oracle": pair.oracle_name,
        "seconds": statistics.median(ours),
        "oracle_seconds": statistics.median(oracle),
        "pairs": len(ratios),
        "ratio": statistics.median(ratios),
        "least_ratio": ratios[0],
        "promised_ratio": pair.promised,
        "largest_difference": worst,
    }


def difference(first: Any, second: Any) -> float:
    """Largest absolute difference of two equally nested results."""
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return float("inf")
        return max(difference(first[key], second[key]) for key in first)
    return float(np.max(np.abs(np.asarray(first, float) - np.asarray(second, float))))


def page(record: dict[str, Any]) -> str:
    """The table of a record; a promise is kept or missed by the median ratio."""
    kept = [row["ratio"] >= row["promised_ratio"] for row in record["rows"]]
    lines = [
        "# Metrics: time against their oracles",
        "",
        f"    {record['command']}",
        "",
        f"CPU seconds on {record['machine']}. Ratio: the oracle's time over ours, the median of "
        "the pairs (the least, and their number, in brackets). Both agree to 1e-6 in every pair.",
        "Plain Python: `experiments/benchmarks/metric_oracles.py`, loops without NumPy or pandas. "
        "Inputs are random. From records: both sides start from parsed JSON; in all other rows "
        "each starts from the arrays or objects that it takes, ours mostly from arrays.",
        "",
        f"{sum(kept)} of {len(kept)} reach the ratio that is promised.",
        "",
        "| metric | input | oracle | oracle, s | ours, s | ratio | promised |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, met in zip(record["rows"], kept, strict=True):
        seconds = f"{row['oracle_seconds']:.3g} | {row['seconds']:.3g}"
        ratio = f"{row['ratio']:.3g} ({row['least_ratio']:.3g}, {row['pairs']})"
        lines.append(
            f"| {row['metric']} | {row['input']} | {row['oracle']} | {seconds} | {ratio} | "
            f"≥ {row['promised_ratio']:g} {'met' if met else 'MISSED'} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.metrics")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--pairs", type=int, default=5, help="most runs of a metric and its oracle")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="no further pair once the oracle has run so long"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    rng = np.random.default_rng(flags.seed)
    rows = []
    for make, size in (
        (qvhighlights_pairs, flags.queries),
        (detection_pairs, flags.queries),
        (grounded_qa_pairs, flags.queries),
        (box_pairs, flags.queries),
        (tracking_pairs, 2000),
        (mask_pairs, 20),
        (caption_pairs, 2000),
    ):
        for pair in make(rng, size):
            rows.append(measure(pair, flags.pairs, flags.seconds))
            row = rows[-1]
            print(f"{row['metric']:50} {row['ratio']:8.1f} x  ({row['seconds']:.3g} s)", flush=True)
    record = {
        "command": f"python -m experiments.benchmarks.metrics --queries={flags.queries} "
        f"--pairs={flags.pairs} --seconds={flags.seconds:g} --seed={flags.seed}",
        "machine": f"{platform.machine()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}",
        "rows": rows,
    }
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "metrics.json").write_text(json.dumps(record, indent=2) + "\n")
    (flags.out / "metrics.md").write_text(page(record))
    print(flags.out / "metrics.md")


if __name__ == "__main__":
    main()
