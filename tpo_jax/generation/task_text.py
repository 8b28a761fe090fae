"""Places and times that an answer gives in words (`data.task_text`), as results of the heads.

The results have the form of the heads' `decode`, so both are scored by the same metrics. Numbers
that a model makes up need not fit: boxes and windows are cut to frame and clip, corners and ends
are put in order.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tpo_jax.data.task_text import ABSENT, BOX_STEPS
from tpo_jax.generation.routing import Event, RoutedAnswer
from tpo_jax.models.heads import ClipInfo

Result = dict[str, Any]
_NUMBER = r"\d{1,6}(?:\.\d{1,3})?"
_BOX = r"\[" + ",".join([r"\s*(\d{1,4})\s*"] * 4) + r"\]"
_WINDOW = rf"({_NUMBER}) s to ({_NUMBER}) s"
_PLACE = rf"({_NUMBER}) s (?:{_BOX}|{ABSENT})"


def _list_of(item: str, separator: str) -> re.Pattern[str]:
    return re.compile(rf"{item}(?:{separator}{item})*")


_PATTERNS = {
    "region": re.compile(_BOX),
    "temporal": _list_of(_WINDOW, " and "),
    "mask": _list_of(_PLACE, ", "),
}


def read_results(text: str, tasks: Sequence[str], clip: ClipInfo) -> list[Result]:
    """The results in an answer.

    Args:
      text: the answer.
      tasks: "region", "temporal" or "mask": what the answer should give, in order.
      clip: what the question is about.

    Returns:
      One result a task, up to the first that is not there.
    """
    results, position = [], 0
    for task in tasks:
        found = _PATTERNS[task].search(text, position)
        if found is None:
            break
        results.append(_READERS[task](found[0], clip))
        position = found.end()
    return results


def read_answer(answer: RoutedAnswer, tasks: Sequence[str], clip: ClipInfo) -> RoutedAnswer:
    """The answer with what it gives in words as its events."""
    results = read_results(answer.text, tasks, clip)
    events = (Event(task, -1, result) for task, result in zip(tasks, results, strict=False))
    return dataclasses.replace(answer, events=tuple(events))


def _box(numbers: Sequence[str]) -> list[float]:
    x1, y1, x2, y2 = (min(int(number) / BOX_STEPS, 1.0) for number in numbers)
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def _region(text: str, clip: ClipInfo) -> Result:
    box = _box(re.fullmatch(_BOX, text).groups())
    return {"box": box,
            "box_pixels": [value * side
                           for value, side in zip(box, (clip.width, clip.height) * 2, strict=True)]}


def _temporal(text: str, clip: ClipInfo) -> Result:
    """Earlier named windows count as more certain. Words have no saliency: frames of a window get
    its score, falling to half of it from the middle to the ends."""
    windows = []
    for number, window in enumerate(re.findall(_WINDOW, text)):
        start, end = sorted(min(max(float(t), clip.start), clip.end) for t in window)
        windows.append([start, end, 1.0 / (1 + number)])
    times = np.asarray(clip.times, np.float64)[np.asarray(clip.frame_valid, bool)]
    saliency = np.zeros(len(times))
    for start, end, score in reversed(windows):
        inside = (start <= times) & (times <= end)
        off_middle = np.abs(times[inside] - (start + end) / 2) / max(end - start, 1e-6)
        saliency[inside] = score * (1 - off_middle)
    return {"windows": windows, "saliency": saliency.tolist(), "times": times.tolist()}


def _mask(text: str, clip: ClipInfo) -> Result:
    """Filled boxes: between two named times the box moves evenly; where one of them says that the
    object is absent, the nearer time decides."""
    named = [(float(time), _box(numbers) if numbers[0] else None)
             for time, *numbers in re.findall(_PLACE, text)]
    named.sort(key=lambda place: place[0])
    times = np.asarray(clip.times, np.float64)[np.asarray(clip.frame_valid, bool)]
    boxes = [_box_at(time, named) for time in times]
    masks = np.zeros((len(times), clip.height, clip.width), bool)
    for mask, box in zip(masks, boxes, strict=True):
        if box is not None:
            (x1, x2), (y1, y2) = (
                np.rint(np.array(box[axis::2]) * side).astype(int)
                for axis, side in enumerate((clip.width, clip.height)))
            mask[y1:y2, x1:x2] = True
    return {"masks": masks, "boxes": boxes,
            "presence": [float(box is not None) for box in boxes], "times": times.tolist()}


def _box_at(time: float, named: Sequence[tuple[float, list[float] | None]]) -> list[float] | None:
    after = next((i for i, (t, _) in enumerate(named) if t >= time), len(named))
    if after in (0, len(named)):
        return named[min(after, len(named) - 1)][1]
    (t0, box0), (t1, box1) = named[after - 1 : after + 1]
    share = (time - t0) / (t1 - t0)
    if box0 is None or box1 is None:
        return box0 if share < 0.5 else box1
    return [(1 - share) * a + share * b for a, b in zip(box0, box1, strict=True)]


_READERS: dict[str, Callable[[str, ClipInfo], Result]] = {
    "region": _region, "temporal": _temporal, "mask": _mask,
}  # fmt: skip
TEXT_TASKS = tuple(_READERS)  # of heads, that words can answer
