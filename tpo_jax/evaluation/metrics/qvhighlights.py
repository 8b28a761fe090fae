"""The QVHighlights table: moment retrieval by window length and highlight detection, all its keys.

Percentages under the names of the benchmark's result files ("brief", "full", "short", "middle",
"long", "HL-min-Fair", ...), not rounded; the official program rounds each to two decimals. The
mIoU and the R1 below IoU 0.5 are those that CG-DETR's copy of the program adds.
"""

import numpy as np

from tpo_jax.evaluation.metrics import detection, highlight, temporal

# Label windows of length in (low, high]; "full" keeps all.
LENGTHS = {"short": (0, 10), "middle": (10, 30), "long": (30, 150), "full": None}
# A clip is positive for a rater who gives at least this, on the scale 0..4.
LEAST_RATING = {"Fair": 2, "Good": 3, "VeryGood": 4}
_BRIEF = {
    "full-mAP": ("full", "MR-mAP", "average"),
    "full-mAP@0.5": ("full", "MR-mAP", "0.5"),
    "full-mAP@0.75": ("full", "MR-mAP", "0.75"),
    "short-mAP": ("short", "MR-mAP", "average"),
    "middle-mAP": ("middle", "MR-mAP", "average"),
    "long-mAP": ("long", "MR-mAP", "average"),
    "full-R1@0.3": ("full", "MR-R1", "0.3"),
    "full-R1@0.5": ("full", "MR-R1", "0.5"),
    "full-R1@0.7": ("full", "MR-R1", "0.7"),
}


def moment_report(
    windows: np.ndarray,
    scores: np.ndarray,
    query: np.ndarray,
    targets: np.ndarray,
    target_query: np.ndarray,
) -> dict[str, dict]:
    """{"full": {"MR-mAP": {...}, "MR-R1": {...}, "MR-mIoU": ...}, "short": ..., ...} in percent.

    A length group keeps the label windows in its range, the queries that have one, and all their
    predictions; a group without any scores 0.

    Args:
      windows: float[n, 2] seconds, those of one query in the order of the submission.
      scores: float[n].
      query: int[n] query of each window.
      targets: float[m, 2] seconds.
      target_query: int[m]; every query from 0 to the largest has a label.
    """
    windows, targets = detection.as_windows(windows, "windows"), np.asarray(targets, np.float64)
    scores, query = np.asarray(scores, np.float64), np.asarray(query, np.int64)
    target_query = np.asarray(target_query, np.int64)
    length = targets[:, 1] - targets[:, 0]
    found = {}
    for name, bounds in LENGTHS.items():
        kept = np.ones(len(targets), bool)
        if bounds is not None:
            kept = (length > bounds[0]) & (length <= bounds[1])
        number = np.full(target_query.max(initial=-1) + 1, -1)
        of_kept, renumbered = np.unique(target_query[kept], return_inverse=True)
        number[of_kept] = np.arange(len(of_kept))
        rows = np.flatnonzero(number[query] >= 0)
        labelled = (number[query[rows]], targets[kept], renumbered)
        ious, precision = np.zeros(1), np.zeros((1, len(temporal.MAP_THRESHOLDS)))
        if kept.any():
            ious = temporal.first_window_ious(windows[rows], *labelled)
            precision = temporal.average_precisions(windows[rows], scores[rows], *labelled)
        found[name] = _moment_scores(ious, precision.mean(axis=0))
    return found


def highlight_report(
    saliency: np.ndarray, best: np.ndarray, clips: np.ndarray, ratings: np.ndarray
) -> dict[str, dict]:
    """{"HL-min-Fair": {"HL-mAP": ..., "HL-Hit1": ...}, ...} in percent.

    Args:
      saliency: float[queries, width] of the predictions, cut or padded with zeros to each
        query's clips.
      best: int[queries] clip of the highest saliency before it was cut.
      clips: int[queries] number of clips of each video.
      ratings: float[queries, width, raters] on the scale 0..4, 0 for irrelevant clips.
    """
    ratings = np.asarray(ratings)
    positive = [ratings >= least for least in LEAST_RATING.values()]
    precision = highlight.average_precisions(saliency, clips, np.concatenate(positive, axis=2))
    precision = precision.reshape(len(ratings), len(positive), -1).mean(axis=(0, 2))
    return {
        f"HL-min-{name}": {
            "HL-mAP": 100 * float(precision[index]),
            "HL-Hit1": 100 * float(highlight.hits(best, clips, positive[index]).mean()),
        }
        for index, name in enumerate(LEAST_RATING)
    }


def with_brief(report: dict[str, dict]) -> dict[str, dict]:
    """The report with the line of a paper's table as its first entry."""
    brief = {}
    if "full" in report:
        for name, (group, metric, key) in sorted(_BRIEF.items()):
            brief[f"MR-{name}"] = report[group][metric][key]
        brief["MR-full-mIoU"] = report["full"]["MR-mIoU"]
    for name in LEAST_RATING:
        for metric, value in report.get(f"HL-min-{name}", {}).items():
            brief[f"HL-min-{name}-{metric.removeprefix('HL-')}"] = value
    return {"brief": brief, **dict(sorted(report.items()))}


def _moment_scores(ious: np.ndarray, precision: np.ndarray) -> dict:
    by_threshold = zip(temporal.MAP_THRESHOLDS, precision, strict=True)
    average = {str(threshold): 100 * float(value) for threshold, value in by_threshold}
    return {
        "MR-mIoU": 100 * float(ious.mean()),
        "MR-mAP": average | {"average": 100 * float(precision.mean())},
        "MR-R1": {str(t): 100 * float((ious >= t).mean()) for t in temporal.R1_THRESHOLDS},
    }
