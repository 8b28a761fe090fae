"""What the benchmarks' official programs compute, written straight from their definitions.

Plain loops over records, one query, segment or frame at a time, in double precision: slow and
obvious on purpose. The tests hold `tpo_jax.evaluation.metrics` to these to 1e-6; the benchmark
times both. No line is taken from the official programs. Where they leave the order of ties to the
sort of the day, a stable sort is meant (reversed, where they reverse it).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

AP_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
R1_THRESHOLDS = (0.3, 0.35, 0.4, 0.45, *AP_THRESHOLDS)

Record = Mapping[str, Any]
Window = Sequence[float]


def tiou(first: Window, second: Window) -> float:
    """Intersection over union; NaN where 0/0, which fails no comparison `iou < threshold`."""
    shared = max(min(first[1], second[1]) - max(first[0], second[0]), 0.0)
    union = (first[1] - first[0]) + (second[1] - second[0]) - shared
    return shared / union if union else math.nan


def rising(ious: Sequence[float]) -> list[int]:
    """Indices from the smallest to the largest overlap, NaN last, stable."""
    return sorted(range(len(ious)), key=lambda i: (math.isnan(ious[i]), ious[i]))


def interpolated_ap(hits: Sequence[bool], positives: int) -> float:
    """Area under the curve of (recall, best precision at this recall or a higher one)."""
    precision, found = [], 0
    for place, hit in enumerate(hits):
        found += hit
        precision.append(found / (place + 1))
    area, best = 0.0, 0.0
    for place in reversed(range(len(hits))):
        best = max(best, precision[place])
        if hits[place]:
            area += best / positives
    return area


def detection_ap(
    segments: Sequence[tuple[Any, float, float, float]],
    targets: Sequence[tuple[Any, float, float]],
    threshold: float,
) -> float:
    """AP of one class: (video, start, end, score) against (video, start, end)."""
    by_video: dict[Any, list[int]] = {}
    for index, (video, _, _) in enumerate(targets):
        by_video.setdefault(video, []).append(index)
    taken, hits = set(), []
    order = sorted(range(len(segments)), key=lambda i: segments[i][3])[::-1]
    for row in order:
        video, start, end, _ = segments[row]
        labels = by_video.get(video, [])
        ious = [tiou((start, end), targets[index][1:]) for index in labels]
        hit = False
        for place in rising(ious)[::-1]:
            if ious[place] < threshold:
                break
            if labels[place] not in taken:
                taken.add(labels[place])
                hit = True
                break
        hits.append(hit)
    return interpolated_ap(hits, len(targets))


def detection_table(
    results: Mapping[Any, Sequence[Record]],
    database: Mapping[Any, Sequence[Record]],
    thresholds: Sequence[float],
) -> dict[Any, list[float]]:
    """{label: [AP at each threshold]} of {video: [{"label", "segment", "score"}]}."""
    targets: dict[Any, list] = {}
    segments: dict[Any, list] = {}
    for video, rows in database.items():
        for row in rows:
            targets.setdefault(row["label"], []).append((video, *row["segment"]))
    for video, rows in results.items():
        for row in rows:
            segments.setdefault(row["label"], []).append((video, *row["segment"], row["score"]))
    return {
        label: [detection_ap(segments.get(label, []), rows, t) for t in thresholds]
        for label, rows in targets.items()
    }


def activitynet_report(submission: Record, labels: Record) -> dict[str, float]:
    """mAP in percent, of the files of the benchmark, subset `validation`."""
    database = {
        video: entry["annotations"]
        for video, entry in labels["database"].items()
        if entry["subset"] == "validation"
    }
    table = detection_table(submission["results"], database, AP_THRESHOLDS)
    columns = zip(*table.values(), strict=True)
    means = [100 * sum(column) / len(table) for column in columns]
    report = {f"mAP@{t:g}": mean for t, mean in zip(AP_THRESHOLDS, means, strict=True)}
    return report | {"mAP@0.5:0.95": sum(means) / len(means)}


def moment_ap(predicted: Sequence[Window], targets: Sequence[Window], threshold: float) -> float:
    """AP of one query: at most ten (start, end, score), the first of equal scores first."""
    order = sorted(predicted[:10], key=lambda window: -window[2])
    # `detection_ap` takes the last of equal scores first.
    segments = [(0, start, end, -place) for place, (start, end, _) in enumerate(order)]
    return detection_ap(segments, [(0, *target) for target in targets], threshold)


def hull_iou(first: Window, second: Window) -> float:
    shared = max(min(first[1], second[1]) - max(first[0], second[0]), 0.0)
    hull = max(first[1], second[1]) - min(first[0], second[0])
    return shared / hull if hull else 0.0


def moment_table(submission: Sequence[Record], labels: Sequence[Record]) -> dict[str, dict]:
    """Moment retrieval by window length, in percent, as in `metrics.qvhighlights`."""
    windows = {record["qid"]: record["pred_relevant_windows"] for record in submission}
    ranges = {"short": (0, 10), "middle": (10, 30), "long": (30, 150), "full": None}
    found = {}
    for name, bounds in ranges.items():
        ious, precision = [], []
        for record in labels:
            targets = record["relevant_windows"]
            if bounds:
                targets = [t for t in targets if bounds[0] < t[1] - t[0] <= bounds[1]]
            if not targets:
                continue
            predicted = windows[record["qid"]]
            ious.append(max(hull_iou(predicted[0], t) for t in targets) if predicted else 0.0)
            precision.append([moment_ap(predicted, targets, t) for t in AP_THRESHOLDS])
        count = max(len(ious), 1)
        columns = [100 * sum(row[i] for row in precision) / count for i in range(10)]
        average = {str(t): value for t, value in zip(AP_THRESHOLDS, columns, strict=True)}
        found[name] = {
            "MR-mAP": average | {"average": sum(columns) / 10},
            "MR-R1": {str(t): 100 * sum(i >= t for i in ious) / count for t in R1_THRESHOLDS},
            "MR-mIoU": 100 * sum(ious) / count,
        }
    return found


def highlight_ap(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Mean, over the thresholds at which recall grows, of the best precision from there on."""
    if all(positive) or not any(positive):
        return float(all(positive))
    curve = []  # (found, precision), from the highest threshold to the lowest
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    found = 0
    for place, clip in enumerate(order):
        found += positive[clip]
        if place + 1 == len(order) or scores[order[place + 1]] != scores[clip]:
            curve.append((found, found / (place + 1)))
    best, kept = 0.0, []
    for place in reversed(range(len(curve))):
        best = max(best, curve[place][1])
        if curve[place][0] > (curve[place - 1][0] if place else 0):
            kept.append(best)
    return sum(kept) / len(kept)


def highlight_table(submission: Sequence[Record], labels: Sequence[Record]) -> dict[str, dict]:
    """Highlight detection at the three least ratings, in percent."""
    predicted = {record["qid"]: record["pred_saliency_scores"] for record in submission}
    found = {}
    for name, least in {"Fair": 2, "Good": 3, "VeryGood": 4}.items():
        precision, hits = [], []
        for record in labels:
            clips = int(record["duration"] / 2)
            scores = list(predicted[record["qid"]])
            best = scores.index(max(scores))
            rated = dict(zip(record["relevant_clip_ids"], record["saliency_scores"], strict=True))
            hits.append(best < clips and max(rated.get(best, [0])) >= least)
            scores = (scores + [0.0] * clips)[:clips]
            for rater in range(3):
                marks = [clip in rated and rated[clip][rater] >= least for clip in range(clips)]
                precision.append(highlight_ap(scores, marks))
        found[f"HL-min-{name}"] = {
            "HL-mAP": 100 * sum(precision) / len(precision),
            "HL-Hit1": 100 * sum(hits) / len(hits),
        }
    return found


def grounded_qa_table(
    spans: Mapping[str, Window],
    locations: Mapping[str, Sequence[Window]],
    correct: Mapping[str, bool],
) -> dict[str, float]:
    """NExT-GQA over the questions that have a span, in percent."""
    rows = []
    for name, windows in locations.items():
        if name not in spans:
            continue
        start, end = spans[name]
        best_iop, best_iou = 0.0, 0.0
        for low, high in windows:
            shared = min(high, end) - max(low, start)
            if start == end:
                best_iop = max(best_iop, float(low <= start <= high))
                continue
            hull = max(high, end) - min(low, start)
            if hull > 0:
                best_iou = max(best_iou, shared / hull)
            if end > start:
                best_iop = max(best_iop, shared / (end - start))
        rows.append((best_iop, best_iou, correct[name]))
    columns: dict[str, Callable] = {
        "Acc@QA": lambda iop, iou, right: right,
        "Acc@GQA": lambda iop, iou, right: right and iop >= 0.5,
        "mIoP": lambda iop, iou, right: iop,
        "IoP@0.3": lambda iop, iou, right: iop >= 0.3,
        "IoP@0.5": lambda iop, iou, right: iop >= 0.5,
        "mIoU": lambda iop, iou, right: iou,
        "IoU@0.3": lambda iop, iou, right: iou >= 0.3,
        "IoU@0.5": lambda iop, iou, right: iou >= 0.5,
    }
    return {
        name: 100 * sum(value(*row) for row in rows) / len(rows) for name, value in columns.items()
    }


def grounded_qa_report(submission: Record, labels: Record, answers: Record) -> dict[str, float]:
    """`grounded_qa_table` of the files of the benchmark: labels by video, answers by question."""
    locations = {
        f"{video}_{question}": windows
        for video, entry in labels.items()
        for question, windows in entry["location"].items()
    }
    correct = {
        name: answers[name]["prediction"] == answers[name]["answer"]
        for name in locations
        if name in submission
    }
    return grounded_qa_table(submission, locations, correct)


def lasot(
    predicted: Sequence[Window], target: Sequence[Window], absent: Sequence[bool]
) -> dict[str, float]:
    """One LaSOT sequence of (x, y, width, height), frame by frame."""
    boxes = [list(box) for box in predicted]
    for frame in range(1, len(target)):
        bad = any(math.isnan(v) for v in boxes[frame]) or min(boxes[frame][2:]) <= 0
        if bad and not any(math.isnan(v) for v in target[frame]):
            boxes[frame] = boxes[frame - 1]
    boxes[0] = list(target[0])
    success, near, near_relative = 0.0, 0, 0
    for (x, y, w, h), (tx, ty, tw, th), gone in zip(boxes, target, absent, strict=False):
        if gone:
            continue
        if min(tx, ty, tw, th) <= 0:
            near, near_relative = near + 1, near_relative + 1
            continue
        width = max(min(x + w, tx + tw) - max(x, tx), 0)
        height = max(min(y + h, ty + th) - max(y, ty), 0)
        # Rounding must not lift the IoU of equal boxes above the last threshold, 1.
        iou = min(width * height / (w * h + tw * th - width * height), 1.0)
        success += sum(iou > step / 20 for step in range(21)) / 21
        dx = (x + (w - 1) / 2) - (tx + (tw - 1) / 2)
        dy = (y + (h - 1) / 2) - (ty + (th - 1) / 2)
        near += math.hypot(dx, dy) <= 20
        near_relative += math.hypot(dx / tw, dy / th) <= 0.2
    frames = len(target)
    return {
        "success": success / frames,
        "precision": near / frames,
        "normalised_precision": near_relative / frames,
    }


def box_accuracy(predicted: Sequence[Window], target: Sequence[Window]) -> float:
    """Acc@0.5 of boxes (x1, y1, x2, y2)."""
    right = 0
    for (x1, y1, x2, y2), (u1, v1, u2, v2) in zip(predicted, target, strict=True):
        width, height = max(min(x2, u2) - max(x1, u1), 0), max(min(y2, v2) - max(y1, v1), 0)
        shared = width * height
        union = max(x2 - x1, 0) * max(y2 - y1, 0) + max(u2 - u1, 0) * max(v2 - v1, 0) - shared
        right += union > 0 and shared / union >= 0.5
    return right / len(target)
