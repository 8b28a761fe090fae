"""From predictions to item scores: what each task is scored on, and with which metric.

A *call* is one head call that a question asks for: a marker in its labelled answer. A prediction of
a call is what the head's `decode` returned, or None when the model did not call that head there,
which scores 0 in every metric. Nothing here knows of models: predictions come in as plain arrays.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from tpo_jax.data.records import Example
from tpo_jax.data.target_parts import about
from tpo_jax.evaluation.bootstrap import ItemScores, Weighted
from tpo_jax.evaluation.metrics import highlight, mask, region, temporal, tracking
from tpo_jax.models.heads import HEADS, task_tokens

R1_THRESHOLDS = (0.3, 0.5, 0.7)
# Those of every question of a task; `score_image` and tracks in frames of known size have more.
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "temporal": (*(f"temporal/r1@{t}" for t in R1_THRESHOLDS), "temporal/miou", "temporal/map"),
    "highlight": ("highlight/map", "highlight/hit@1"),
    "region": ("region/acc@0.5", "region/miou"),
    "mask": ("mask/j", "mask/f", "mask/j&f"),
    "tracking": (
        "tracking/auc", "tracking/ao", "tracking/sr@0.5", "tracking/sr@0.75", "tracking/lasot_auc",
        "tracking/lasot_p_norm",
    ),
    "tracked masks": ("tracking/j", "tracking/f", "tracking/j&f"),
}  # fmt: skip
SR_THRESHOLDS = (0.5, 0.75)
# Masks or distances that are looked at together: a track may have thousands of frames.
PIECE = 64
# A clip is "very good" when a rater gives 4 on the scale 0..4 (QVHighlights).
VERY_GOOD = 4
_MARKER = re.compile(r"<(\w+)>")

Prediction = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """One head call that a labelled answer makes.

    Attributes:
      example: what is asked.
      turn: index of the turn.
      head: task of the head: "region", "temporal", "mask" or what a registered head brings.
      place: how many calls the same answer makes before it.
      occurrence: how many calls of this head the example makes before it, which names its target.
    """

    example: Example
    turn: int
    head: str
    place: int
    occurrence: int

    @property
    def item(self) -> str:
        return f"{self.example.example_id}/{self.turn}/{self.place}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores by metric: {metric: [(item, video, value), ...]}."""

    rows: dict[str, list[tuple[str, str, float]]] = dataclasses.field(default_factory=dict)

    def add(self, item: str, video: str, scores: Mapping[str, float], prefix: str = "") -> None:
        for metric, value in scores.items():
            value = value if isinstance(value, Weighted) else float(value)
            self.rows.setdefault(prefix + metric, []).append((item, video, value))

    def item_scores(self) -> dict[str, ItemScores]:
        """Scores by metric, whose means are the figures of the benchmarks."""
        return {metric: ItemScores.of(rows) for metric, rows in sorted(self.rows.items())}


def find_calls(example: Example, turn: int) -> list[Call]:
    """The head calls in the labelled answer of one turn, in order."""
    before = [head for t in example.turns[:turn] for head in _called(t.answer)]
    calls: list[Call] = []
    for place, head in enumerate(_called(example.turns[turn].answer)):
        calls.append(Call(example, turn, head, place, before.count(head)))
        before.append(head)
    return calls


def _called(answer: str) -> list[str]:
    known = task_tokens()
    return [task for task in _MARKER.findall(answer) if task in known]


def match_events(calls: Sequence[Call], events: Sequence[tuple[str, Any]]) -> list[Any | None]:
    """The result that belongs to each call: of the event at its place, if that is the same head.

    Args:
      calls: of one answer, in order.
      events: (head, result) of the generated answer, in order.
    """
    return [
        events[call.place][1]
        if call.place < len(events) and events[call.place][0] == call.head
        else None
        for call in calls
    ]


def score_call(
    call: Call, prediction: Prediction | None, times: Sequence[float], *, once: bool = False
) -> dict[str, float]:
    """{metric: value} of one head call.

    Args:
      call: what was asked.
      prediction: what the head's decode returned (`models/heads`), None if it was not called.
      times: float[frames] seconds of the frames that the model saw.
      once: as of `match_times`, for a head that answers frame by frame.

    Returns: {} of an example without labels.
    """
    if not call.example.labelled:
        return {}
    example = about(call.example, call.occurrence)
    targets = example.targets
    own = next((head.score for head in HEADS.values() if head.task == call.head), None)
    if own is not None:
        return own(call.example.targets, call.occurrence, prediction)
    if call.head == "region":
        return score_region(targets["boxes"][call.occurrence], prediction)
    if call.head == "temporal":
        scores = score_windows(targets["windows"], prediction)
        return scores | (
            score_saliency(example, prediction) if targets.get("saliency") else {}
        )
    if call.example.task == "tracking":
        return score_track(targets, prediction, times, once=once)
    scores = score_masks(targets, prediction, once=once)
    image = score_image(targets, prediction) if example.media == "image" else {}
    return scores | image


def annotated_frames(call: Call, times: Sequence[float], *, once: bool) -> tuple[int, int]:
    """How many frames of the part that a call is about are annotated, and how many are scored.

    Args:
      call: of a head that answers frame by frame, with targets at "times".
      times, once: as of `score_call`.
    """
    example = about(call.example, call.occurrence)
    labels = np.asarray(example.targets["times"], np.float64)
    inside = (labels >= example.start - 1e-3) & (labels <= example.end + 1e-3)
    _, matched = _match(times, labels, once)
    inside[matched] = True
    return int(inside.sum()), len(np.unique(matched))


def score_region(target: Sequence[float], prediction: Prediction | None) -> dict[str, float]:
    """Acc@0.5 and IoU of a box; both normalised xyxy."""
    if prediction is None:
        return zeros("region")
    box = np.asarray(prediction["box"], np.float64)
    target = np.asarray(target, np.float64)
    return {
        "region/acc@0.5": float(region.region_accuracy(box, target)),
        "region/miou": float(region.box_iou(box, target)),
    }


def score_windows(
    targets: Sequence[Sequence[float]], prediction: Prediction | None
) -> dict[str, float]:
    """R1, mIoU and mAP of predicted windows [[start, end, score], ...] in seconds."""
    if prediction is None or not len(prediction["windows"]):
        return zeros("temporal")
    predicted = np.asarray(prediction["windows"], np.float64)
    windows, scores = predicted[:, :2], predicted[:, 2]
    iou = temporal.top1_iou(windows, scores, targets)
    hits = {f"temporal/r1@{threshold}": float(iou >= threshold) for threshold in R1_THRESHOLDS}
    precision = temporal.query_average_precision(windows, scores, targets)
    return hits | {"temporal/miou": iou, "temporal/map": float(precision.mean())}


def score_saliency(example: Example, prediction: Prediction | None) -> dict[str, float]:
    """HIT@1 and mAP of a saliency curve, over the clips inside the example's bounds."""
    if prediction is None:
        return zeros("highlight")
    positive, first, interval = positive_clips(example)
    scores = highlight.clip_scores(
        np.asarray(prediction["times"]),
        np.asarray(prediction["saliency"]),
        first * interval,
        len(positive),
        interval,
    )
    return {
        "highlight/map": highlight.highlight_average_precision(scores, positive),
        "highlight/hit@1": highlight.highlight_hit(scores, positive),
    }


def positive_clips(example: Example) -> tuple[np.ndarray, int, float]:
    """Which 2-second clips are highlights, of those that the labels have.

    With the ratings of several people, each is one column; a single saliency in [0, 1] is read on
    the same scale 0..4, rounded.

    Returns:
      bool[clips, raters] of the clips inside [start, end], the index of the first of them in the
      video, and the length of a clip in seconds.
    """
    targets = example.targets
    saliency, interval = np.asarray(targets["saliency"]), float(targets["saliency_interval"])
    if targets.get("saliency_scores"):
        ratings = np.zeros((len(saliency), len(targets["saliency_scores"][0])))
        ratings[list(targets["relevant_clip_ids"])] = targets["saliency_scores"]
    else:
        ratings = np.rint(saliency * VERY_GOOD)[:, None]
    first = int(np.floor(example.start / interval + 1e-6))
    last = min(int(np.ceil(example.end / interval - 1e-6)), len(saliency))
    return ratings[first:last] >= VERY_GOOD, first, interval


def score_masks(
    targets: Mapping[str, Any], prediction: Prediction | None, *, once: bool = False
) -> dict[str, float]:
    """J, F and J&F of a track, means over the predicted frames that are labelled."""
    if prediction is None:
        return zeros("mask")
    frames, labels = match_times(prediction["times"], targets["times"], once=once)
    rles = [targets["rles"][label] for label in labels]
    scores = _j_and_f(rles, prediction["masks"], frames)
    return dict(zip(TASK_METRICS["mask"], scores, strict=True))


def _j_and_f(
    rles: Sequence[Mapping[str, Any] | None], masks: Sequence[np.ndarray], frames: np.ndarray
) -> tuple[float, float, float]:
    """J, F and J&F, means over the n `frames` of the predicted `masks`, whose labels are `rles`."""
    size = rle_size(rles) or np.shape(masks[0])
    similarity, accuracy = [], []
    for first in range(0, len(frames), PIECE):
        now = slice(first, first + PIECE)
        predicted = resize_nearest(np.stack([masks[frame] for frame in frames[now]]), *size)
        wanted = decode_rles(rles[now], size)
        similarity.append(mask.region_similarity(predicted, wanted))
        accuracy.append(mask.boundary_accuracy(predicted, wanted))
    j, f = (float(np.concatenate(values).mean()) for values in (similarity, accuracy))
    return j, f, (j + f) / 2


def score_image(targets: Mapping[str, Any], prediction: Prediction | None) -> dict[str, float]:
    """IoU of the mask of an image, whose mean is gIoU, and as the share of the area that cIoU sums.

    Areas are in pixels of the label; without one, in those of the prediction.
    """
    rles = targets["rles"][:1]
    if prediction is None:
        area = sum(float(coco_mask.area(dict(rle))) for rle in rles if rle is not None)
        return {"mask/giou": 0.0, "mask/ciou": Weighted(0.0, area)}
    predicted = np.asarray(prediction["masks"][0], bool)
    size = rle_size(rles) or predicted.shape
    both = mask.areas(resize_nearest(predicted[None], *size), decode_rles(rles, size))
    iou, union = mask.mean_iou(*both), float(both[1].sum())
    return {"mask/giou": iou, "mask/ciou": Weighted(iou, union)}


def score_track(
    targets: Mapping[str, Any],
    prediction: Prediction | None,
    times: Sequence[float],
    *,
    once: bool = False,
) -> dict[str, float]:
    """Figures of a track over the frames that are labelled, as LaSOT, GOT-10k and DAVIS count.

    All begin at the first frame that shows the object, where the tracker is told its box. Distances
    in pixels need the size of the frames (targets "size", or that of the masks), J and F masks.

    Returns {} where nothing can be scored: no labelled frame shows the object after the first.
    """
    given = prediction
    if given is None:
        given = {"times": times, "boxes": [None] * len(times)}
    frames, labels = match_times(given["times"], targets["times"], once=once)
    visible = np.array([targets["boxes"][label] is not None for label in labels])
    begin = int(visible.argmax())
    frames, labels, visible = frames[begin:], labels[begin:], visible[begin:]
    boxes = [given["boxes"][frame] for frame in frames]
    wanted = [targets["boxes"][label] for label in labels]
    ious = tracking.track_ious(boxes, wanted)
    if not ious.size:
        return {}
    size = targets.get("size") or rle_size(targets.get("rles") or ())
    scores = {"tracking/auc": tracking.success_auc(ious)}
    scores |= _toolkit_scores(boxes, wanted, visible, size)
    # DAVIS scores neither the frame that is given nor the last annotated one.
    between = (labels > labels[0]) & (labels < len(targets["times"]) - 1)
    masks = {}
    if targets.get("rles") and between.any():
        masks = zeros("tracked masks")
        if prediction is not None:
            rles = [targets["rles"][label] for label in labels[between]]
            values = _j_and_f(rles, prediction["masks"], frames[between])
            masks = dict(zip(masks, values, strict=True))
    if prediction is None:
        scores = {metric: _nothing(value) for metric, value in scores.items()}
    return scores | masks


def _toolkit_scores(
    boxes: Sequence[tracking.Box | None],
    wanted: Sequence[tracking.Box | None],
    visible: np.ndarray,
    size: tuple[int, int] | None,
) -> dict[str, float]:
    """GOT-10k's AO and SR, and LaSOT's three figures, of what a submission would say.

    Args:
      boxes, wanted: n predicted and labelled ones, normalised; the first label is there.
      visible: bool[n] whether the object is.
      size: (height, width) of the frames, if it is known; but for `lasot_p` any does.
    """
    height, width = size or (1, 1)
    predicted, target = (
        tracking.pixel_boxes(tracking.hold_last(track, wanted[0]), width, height)
        for track in (boxes, wanted)
    )  # labels of frames without the object stand, too: these are not compared
    ious = tracking.got10k_ious(predicted, target, visible, bound=(width, height))
    lasot = tracking.lasot_scores(predicted, target, ~visible)
    scores = {"tracking/ao": Weighted(tracking.average_overlap(ious), len(ious))}
    for threshold in SR_THRESHOLDS:
        rate = tracking.success_rate(ious, threshold)
        scores[f"tracking/sr@{threshold}"] = Weighted(rate, len(ious))
    scores["tracking/lasot_auc"] = lasot["success"]
    scores["tracking/lasot_p_norm"] = lasot["normalised_precision"]
    return scores | ({"tracking/lasot_p": lasot["precision"]} if size else {})


def zeros(task: str) -> dict[str, float]:
    """The scores of a head that was not called."""
    return dict.fromkeys(TASK_METRICS[task], 0.0)


def _nothing(value: float) -> float:
    """0, of as many frames."""
    return Weighted(0.0, value.weight) if isinstance(value, Weighted) else 0.0


def match_times(
    times: Sequence[float], label_times: Sequence[float], *, once: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Frames that have a label, and which: (int64[n], int64[n]).

    A frame takes the label nearest in time, if that is not further than half the larger of the two
    spacings; the rule that training targets are made by. With `once` a label counts for the nearest
    of its frames alone, as benchmarks count: frames between two annotations are not scored.
    """
    frames, labels = _match(times, np.asarray(label_times, np.float64), once)
    if not frames.size:
        raise ValueError(
            f"times: no frame of {np.asarray(times).tolist()} s has a label; labels are at "
            f"{np.asarray(label_times).tolist()} s"
        )
    return frames, labels


def _match(
    times: Sequence[float], label_times: np.ndarray, once: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What `match_times` says; empty where no frame has a label."""
    times = np.asarray(times, np.float64)
    nearest, distance = np.zeros(len(times), np.int64), np.zeros(len(times))
    for first in range(0, len(times), PIECE):
        now = slice(first, first + PIECE)
        apart = np.abs(times[now, None] - label_times[None])
        nearest[now], distance[now] = apart.argmin(axis=1), apart.min(axis=1)
    spacing = max((_spacing(t) for t in (times, label_times) if len(t) > 1), default=0.0)
    frames = np.flatnonzero(distance <= spacing / 2 + 1e-3)
    if once:
        closest = frames[np.lexsort((frames, distance[frames], nearest[frames]))]
        _, first_of_label = np.unique(nearest[closest], return_index=True)
        frames = np.sort(closest[first_of_label])
    return frames, nearest[frames]


def decode_rles(
    rles: Sequence[Mapping[str, Any] | None], default_size: tuple[int, ...]
) -> np.ndarray:
    """bool[n, h, w] of COCO RLEs; None is an empty mask, of the default size if all are."""
    masks = np.zeros((len(rles), *(rle_size(rles) or default_size)), bool)
    given = [index for index, rle in enumerate(rles) if rle is not None]
    if given:
        masks[given] = np.moveaxis(coco_mask.decode([dict(rles[index]) for index in given]), 2, 0)
    return masks


def rle_size(rles: Sequence[Mapping[str, Any] | None]) -> tuple[int, int] | None:
    """(height, width) of COCO RLEs of one track; None where all are empty."""
    sizes = {tuple(rle["size"]) for rle in rles if rle is not None}
    if len(sizes) > 1:
        raise ValueError(f"rles: masks of one track have different sizes {sorted(sizes)}")
    return sizes.pop() if sizes else None


def resize_nearest(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool[n, height, width] of masks bool[n, h, w]."""
    masks = np.asarray(masks, bool)
    rows = (np.arange(height) + 0.5) * masks.shape[1] / height
    columns = (np.arange(width) + 0.5) * masks.shape[2] / width
    return masks[:, rows.astype(int)][:, :, columns.astype(int)]


def routing_counts(
    pairs: Iterable[tuple[Sequence[Call], Sequence[tuple[str, Any]]]],
) -> dict[str, dict[str, int]]:
    """{task: {"correct", "missing", "wrong"}} over answers and the events that were generated."""
    counts: dict[str, dict[str, int]] = {}
    for calls, events in pairs:
        for call in calls:
            row = counts.setdefault(call.example.task, {"correct": 0, "missing": 0, "wrong": 0})
            if call.place >= len(events):
                row["missing"] += 1
            else:
                row["correct" if events[call.place][0] == call.head else "wrong"] += 1
    return counts


def _spacing(times: np.ndarray) -> float:
    return float(np.median(np.diff(np.sort(times))))
