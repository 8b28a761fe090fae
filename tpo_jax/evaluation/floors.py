"""Floors: what a prediction that does not look at the video reaches.

Every floor is chosen on the training split and then applied to the test split, never the other way
round: the constant window, clip and box that score best in training, the answer that is most
frequent there. A metric's floor is the best of its candidates. The two floors that need training
themselves (a text-only model, a single-middle-frame model) are evaluations of such models and join
by `with_trained_models`.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.data import sampling
from tpo_jax.data.records import Example, PreparedDataset
from tpo_jax.data.target_parts import about, parts
from tpo_jax.evaluation import benchmarks
from tpo_jax.evaluation.metrics import mask, qa, region, temporal, tracking

WINDOW_STEPS = 32  # the grid of constant windows, per clip length
BOX_STEPS = 16  # the grid of constant boxes, per side
MASK_BOX_STEPS = 8
CONTOUR_CANDIDATES = 32  # boxes, best by J, among which the best by F is looked for
MAX_SAMPLES = 400  # training boxes, masks or examples that constants are compared on


# Among constants that hit equally often in training, the one with the larger mean overlap is taken.
TIE = 1e-6


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A constant prediction: what it is, and what it scores on the training and the test split."""

    name: str
    train: float
    test: float


Floors = dict[str, list[Candidate]]


def constant_floors(train: PreparedDataset, test: PreparedDataset, frames: int) -> Floors:
    """Candidates per metric for the tasks that both splits have.

    Args:
      train: where the constants are chosen.
      test: where they are scored.
      frames: how many frames the model sees of a clip.
    """
    chosen, scored = _by_task(train), _by_task(test)
    floors: Floors = {}
    for task, function in _CONSTANTS.items():
        if chosen[task] and scored[task]:
            floors |= function(
                _Split(train, chosen[task], frames), _Split(test, scored[task], frames)
            )
    return floors


def with_trained_models(floors: Floors, models: Mapping[str, Mapping[str, float]]) -> Floors:
    """Adds the metrics of models that were trained without (some of) the evidence.

    Args:
      floors: from `constant_floors`.
      models: {"text-only model": metrics, "middle-frame model": metrics}, metrics of `evaluate`.
    """
    merged = {metric: list(candidates) for metric, candidates in floors.items()}
    for name, metrics in models.items():
        for metric, value in metrics.items():
            if metric.startswith("qa/"):
                candidate = Candidate(name, float("nan"), float(value))
                merged.setdefault(metric, []).append(candidate)
    return merged


def best(floors: Floors) -> dict[str, float]:
    """{metric: value}: the highest candidate of each metric on the test split.

    Taking the best of several constants that were each fixed beforehand can only raise the floor.
    """
    return {metric: max(c.test for c in candidates) for metric, candidates in floors.items()}


@dataclasses.dataclass(frozen=True)
class _Split:
    dataset: PreparedDataset
    examples: list[Example]
    frames: int

    @property
    def parts(self) -> list[Example]:
        """Of an example with several windows, masks or tracks one for each."""
        return [part for example in self.examples for part in parts(example)]

    def times(self, example: Example) -> np.ndarray:
        """float64[frames] seconds: the frames that the model would be shown."""
        timestamps = self.dataset.video_info(example.video_id).timestamps
        indices = sampling.uniform(timestamps, self.frames, example.start, example.end)
        return np.asarray(timestamps, np.float64)[np.unique(indices)]


def _by_task(dataset: PreparedDataset) -> dict[str, list[Example]]:
    """{task: examples} of a split that have labels, read once."""
    examples: dict[str, list[Example]] = collections.defaultdict(list)
    for video in dataset.videos:
        for example in dataset.examples(video):
            if example.labelled:
                examples[example.task].append(example)
    return examples


def _thin(items: Sequence[Any], most: int) -> Sequence[Any]:
    """At most about `most` of the items, evenly spread."""
    return items[:: max(1, -(-len(items) // most))]


def _candidates(
    name: str, predict: Callable[[Example, np.ndarray], Any], train: _Split, test: _Split
) -> Floors:
    """Scores one way of predicting on both splits with the scoring that models get.

    The training figure is for information; it is measured on some of the examples.
    """
    means = []
    for split, examples in ((train, _thin(train.examples, MAX_SAMPLES)), (test, test.examples)):
        table = benchmarks.Table()
        for example in examples:
            times = split.times(example)
            for turn in range(len(example.turns)):
                for call in benchmarks.find_calls(example, turn):
                    one = predict(about(example, call.occurrence), times)
                    scores = benchmarks.score_call(call, one, times)
                    table.add(call.item, example.video_id, scores)
        means.append({metric: scores.mean() for metric, scores in table.item_scores().items()})
    return {
        metric: [Candidate(name, means[0].get(metric, float("nan")), value)]
        for metric, value in means[1].items()
    }


# Temporal and highlight: one window, one saliency curve, in fractions of the clip.


def _temporal(train: _Split, test: _Split) -> Floors:
    grid = _windows(WINDOW_STEPS)
    ious = np.stack([_grid_ious(example, grid) for example in train.parts])
    mean = ious.mean(0)
    goals = {f"temporal/r1@{t}": (ious >= t).mean(0) + TIE * mean for t in benchmarks.R1_THRESHOLDS}
    goals["temporal/miou"] = mean
    # One window with one label is found or not, so the mean over thresholds decides its mAP.
    goals["temporal/map"] = (ious[..., None] >= temporal.MAP_THRESHOLDS).mean((0, 2))
    hits, rates = _clip_rates(train, any), _clip_rates(train, np.mean)
    floors: Floors = {}
    for metric, goal in goals.items():
        window = grid[int(np.argmax(goal))]
        name = f"constant window {window[0]:.2f}-{window[1]:.2f} of the clip"
        floors[metric] = _candidates(name, _constant_window(window, hits), train, test)[metric]
    for metric, curve, name in (
        ("highlight/hit@1", hits, f"clip number {int(np.argmax(hits))}"),
        ("highlight/map", rates, "mean saliency of training clips"),
    ):
        scored = _candidates(name, _constant_window(np.array([0.0, 1.0]), curve), train, test)
        floors |= {key: value for key, value in scored.items() if key == metric}
    return floors


def _windows(steps: int) -> np.ndarray:
    """float64[n, 2]: every window of the grid, as fractions of the clip."""
    first, last = np.triu_indices(steps + 1, k=1)
    return np.stack([first, last], axis=1) / steps


def _grid_ious(example: Example, grid: np.ndarray) -> np.ndarray:
    """float64[n]: overlap of every grid window with the label window that it overlaps best."""
    seconds = example.start + grid * (example.end - example.start)
    targets = np.asarray(example.targets["windows"], np.float64)
    return temporal.window_iou(seconds[:, None], targets[None]).max(axis=1)


def _constant_window(window: np.ndarray, curve: np.ndarray) -> Callable[..., Any]:
    def predict(example: Example, times: np.ndarray) -> dict[str, Any]:
        length = example.end - example.start
        start, end = (float(example.start + edge * length) for edge in window)
        place = ((times - example.start) / length * len(curve)).astype(int)
        saliency = curve[np.clip(place, 0, len(curve) - 1)]
        return {"windows": [[start, end, 1.0]], "times": times, "saliency": saliency}

    return predict


def _clip_rates(train: _Split, over_raters: Callable[[np.ndarray], Any]) -> np.ndarray:
    """float64[clips]: how often each clip, by its place, is a highlight in training."""
    labelled = [e for e in train.parts if e.targets.get("saliency")]
    rates = [
        np.array([float(over_raters(clip)) for clip in benchmarks.positive_clips(e)[0]])
        for e in labelled
    ]
    if not rates:
        return np.zeros(1)
    length = collections.Counter(len(rate) for rate in rates).most_common(1)[0][0]
    return np.mean([_stretch(rate, length) for rate in rates], axis=0)


def _stretch(values: np.ndarray, length: int) -> np.ndarray:
    index = ((np.arange(length) + 0.5) * len(values) / length).astype(int)
    return values[index]


# Boxes: one box for every question.


def _boxes(steps: int) -> np.ndarray:
    """float64[n, 4]: every box of the grid, normalised."""
    spans = _windows(steps)
    x, y = np.meshgrid(np.arange(len(spans)), np.arange(len(spans)))
    x, y = spans[x.ravel()], spans[y.ravel()]
    return np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)


def _region(train: _Split, test: _Split) -> Floors:
    boxes = [box for example in train.examples for box in example.targets["boxes"]]
    grid = _boxes(BOX_STEPS)
    iou = _iou_table(grid, _thin(boxes, MAX_SAMPLES))
    mean = iou.mean(axis=1)
    goals = {"region/acc@0.5": (iou >= 0.5).mean(axis=1) + TIE * mean, "region/miou": mean}
    floors: Floors = {}
    for metric, goal in goals.items():
        box = grid[int(np.argmax(goal))].tolist()
        name = f"constant box {_format(box)}"
        floors[metric] = _candidates(name, lambda e, t, box=box: {"box": box}, train, test)[metric]
    return floors


def _iou_table(grid: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """float32[grid, boxes]"""
    targets = np.asarray(boxes, np.float64)
    return np.stack([region.box_iou(grid, t) for t in targets], axis=1).astype(np.float32)


def _mask(train: _Split, test: _Split) -> Floors:
    """A filled box in every frame; also no mask at all, which is right where nothing is visible."""
    masks = _training_masks(train)
    height, width = masks.shape[1:]
    boxes = (*_boxes(MASK_BOX_STEPS), None)
    filled = np.stack(
        [np.zeros((height, width), bool) if b is None else mask.box_mask(b, height, width)
         for b in boxes]
    )  # fmt: skip
    j = _mean_jaccard(filled, masks)
    likely = np.argsort(-j, kind="stable")[:CONTOUR_CANDIDATES]
    f = np.array(
        [mask.boundary_accuracy(np.broadcast_to(filled[i], masks.shape), masks).mean()
         for i in likely]
    )  # fmt: skip
    chosen = {
        "mask/j": int(likely[0]),
        "mask/f": int(likely[np.argmax(f)]),
        "mask/j&f": int(likely[np.argmax(j[likely] + f)]),
    }
    scored: dict[int, Floors] = {}
    for index in set(chosen.values()):
        box = boxes[index]
        name = "empty mask" if box is None else f"constant filled box {_format(box)}"
        scored[index] = _candidates(name, _constant_mask(filled[index]), train, test)
    return {metric: scored[index][metric] for metric, index in chosen.items()}


def _mean_jaccard(filled: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """float64[n]: mean J of each constant mask bool[n, h, w] with labels bool[m, h, w]."""
    one, two = (m.reshape(len(m), -1).astype(np.float32) for m in (filled, masks))
    intersection = one @ two.T
    union = one.sum(axis=1)[:, None] + two.sum(axis=1)[None] - intersection
    jaccard = np.divide(intersection, union, out=np.ones_like(union), where=union > 0)
    return jaccard.mean(axis=1).astype(np.float64)


def _training_masks(train: _Split) -> np.ndarray:
    """bool[n, h, w]: labelled masks spread evenly over the training tracks, empty ones included."""
    labels = [rle for example in train.parts for rle in example.targets["rles"]]
    size = next((tuple(rle["size"]) for rle in labels if rle is not None), (1, 1))
    masks = [benchmarks.decode_rles([rle], size) for rle in _thin(labels, MAX_SAMPLES)]
    return np.concatenate([benchmarks.resize_nearest(m, *size) for m in masks])


def _constant_mask(picture: np.ndarray) -> Callable[..., Any]:
    def predict(example: Example, times: np.ndarray) -> dict[str, Any]:
        return {"times": times, "masks": np.broadcast_to(picture, (len(times), *picture.shape))}

    return predict


def _tracking(train: _Split, test: _Split) -> Floors:
    visible = [box for example in train.parts for box in example.targets["boxes"] if box]
    grid = _boxes(BOX_STEPS)
    iou = _iou_table(grid, _thin(visible, MAX_SAMPLES))
    # The constant box is the best by this AUC, whichever metric it is a floor of.
    auc = np.mean([(iou > threshold).mean(axis=1) for threshold in tracking.THRESHOLDS], axis=0)
    box = grid[int(np.argmax(auc))].tolist()
    ways = {
        f"constant box {_format(box)}": lambda e: box,
        "input box held still": lambda e: e.targets["input_box"],
    }
    floors: Floors = collections.defaultdict(list)
    for name, choose in ways.items():

        def predict(
            example: Example, times: np.ndarray,
            choose: Callable[[Example], Sequence[float]] = choose,
        ) -> dict[str, Any]:  # fmt: skip
            return _held(choose(example), example, times)

        for metric, found in _candidates(name, predict, train, test).items():
            floors[metric] += found
    return dict(floors)


def _held(box: Sequence[float], example: Example, times: np.ndarray) -> dict[str, Any]:
    """One box on every frame; where the track has masks, also as a filled one."""
    found = {"times": times, "boxes": [box] * len(times)}
    if rles := example.targets.get("rles"):
        filled = mask.box_mask(box, *(benchmarks.rle_size(rles) or (1, 1)))
        found["masks"] = np.broadcast_to(filled, (len(times), *filled.shape))
    return found


# Questions: the option that is most frequent among the training answers of its kind.


def _conversation(train: _Split, test: _Split) -> Floors:
    seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for _, kind, _, answer in _choices(train):
        seen[kind][answer] += 1
    correct: list[dict[str, list[float]]] = []
    for split in (train, test):
        scores: dict[str, list[float]] = collections.defaultdict(list)
        for media, kind, options, answer in _choices(split):
            frequency = [float(seen[kind][option]) for option in options]
            value = qa.option_correct(np.array(frequency), options.index(answer))
            for metric in qa.scores(value, kind, media):
                scores[metric].append(value)
        correct.append(scores)
    name = "most frequent training answer"
    return {
        metric: [Candidate(name, _mean(correct[0][metric]), _mean(values))]
        for metric, values in correct[1].items()
    }


def _choices(split: _Split) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """(media, kind, options, answer) of every multiple-choice turn."""
    for example in split.examples:
        for turn in example.turns:
            if turn.options:
                yield example.media, turn.kind, turn.options, turn.answer


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _format(box: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in box) + ")"


_CONSTANTS: dict[str, Callable[[_Split, _Split], Floors]] = {
    "conversation": _conversation,
    "temporal": _temporal,
    "region": _region,
    "mask": _mask,
    "tracking": _tracking,
}
