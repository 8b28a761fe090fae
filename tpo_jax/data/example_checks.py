"""What every example must satisfy, whatever format it came from.

`check_example` runs twice: when an annotation is read, and again when its video is decoded and the
true duration is known. Field names are those of the native schema (docs/own_data.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import MARKERS, MEDIA, Example, Turn, known_tasks
from tpo_jax.data.validation import (
    END_TOLERANCE,
    check_box,
    check_keys,
    check_list,
    check_number,
    check_one_of,
    check_rle,
    check_size,
    check_text,
    check_time,
    check_window,
)

ANSWER_MARKERS = {
    "temporal": "<temporal>", "region": "<region>", "mask": "<mask>", "tracking": "<mask>",
}  # fmt: skip
# Tasks whose questions may say <box>, a box that the user draws: targets.input_box, on the frame at
# targets.input_time; several are targets.input_boxes and input_times.
BOX_TASKS = ("conversation", "temporal", "region", "mask", "tracking")
DRAWN = ("input_box", "input_time", "input_boxes", "input_times")
# Tasks whose answers may have several markers: targets.each has the targets of one each.
EACH_TASKS = ("temporal", "mask", "tracking")
# Of a mask or track without labels: true, the numbers of its frames, [height, width] of its masks;
# the last may also be there with the boxes of a track, of the frames that they are on.
UNLABELLED = ("unlabelled", "frames", "size")
TARGET_KEYS = {
    "conversation": frozenset(DRAWN),
    "temporal": frozenset(
        {"windows", "saliency", "saliency_interval", "saliency_scores", "relevant_clip_ids", *DRAWN}
    ),
    "region": frozenset({"boxes", "times", *DRAWN}),
    "mask": frozenset({"times", "rles", *UNLABELLED, *DRAWN}),
    "tracking": frozenset({"times", "boxes", "rles", *UNLABELLED, *DRAWN}),
    "action": frozenset({"segments", "labels"}),
    "preference": None,  # evidence and provenance fields are the pair maker's
}


def check_example(example: Example, duration: float = math.inf) -> Example:
    """The example with its end filled in and rounding overshoot cut; raises Invalid.

    Args:
      example: as a reader made it.
      duration: of its video in seconds; 0 for an image, infinite when not known yet.
    """
    check_one_of("task", example.task, known_tasks())
    check_one_of("media", example.media, MEDIA)
    example = dataclasses.replace(example, **_check_clip(example, duration))
    _check_turns(example)
    # The targets of a task that a registered head brings are checked by the head.
    known = TARGET_KEYS.get(example.task)
    if known is not None:
        several = ("each",) if example.task in EACH_TASKS else ()
        check_keys(example.targets, {*known, *several}, required=(), field="targets")
    check = _CHECKS.get(example.task, _conversation)
    if known is not None and "unlabelled" in example.targets:
        check = _unlabelled
    if known is not None and "each" in example.targets:
        targets = _each(check, example, duration)
    else:
        if example.task in EACH_TASKS:
            _need_one_marker(example)
        targets = check(example, example.targets, duration)
    targets |= _input_boxes(example, duration)
    return dataclasses.replace(example, targets=targets)


def _check_clip(example: Example, duration: float) -> dict[str, float]:
    """`start` and `end`, with an open end closed."""
    if example.media == "image":
        if example.start or example.end not in (0, math.inf):
            raise Invalid(
                "end", [example.start, example.end], "an image has no start and end", "remove them"
            )
        return {"start": 0.0, "end": 0.0}
    if example.end == math.inf:
        start = check_number("start", example.start, 0, math.inf, "seconds")
        if start >= duration:
            raise Invalid(
                "start",
                start,
                f"it is not before the end of the video, {duration:.3f} s",
                "correct it",
            )
        return {"start": start, "end": duration}
    start, end = check_window("start, end", [example.start, example.end], duration)
    return {"start": start, "end": end}


def _check_turns(example: Example) -> None:
    if not example.turns:
        raise Invalid("turns", [], "an example needs at least one question", "add one")
    for i, turn in enumerate(example.turns):
        check_text(f"turns[{i}].question", turn.question)
        check_text(f"turns[{i}].answer", turn.answer)
        _check_options(f"turns[{i}]", turn)
        _check_markers(f"turns[{i}]", turn, example.task)


def _check_options(field: str, turn: Turn) -> None:
    if not turn.options:
        return
    for j, option in enumerate(turn.options):
        check_text(f"{field}.options[{j}]", option)
    if len(set(turn.options)) != len(turn.options) or len(turn.options) < 2:
        raise Invalid(
            f"{field}.options",
            list(turn.options),
            "expected two or more different options",
            "correct them, or leave them out for an open question",
        )
    if turn.answer not in turn.options:
        raise Invalid(
            f"{field}.answer",
            turn.answer,
            f"it is none of the options {list(turn.options)}",
            "repeat the right option word by word",
        )


def _check_markers(field: str, turn: Turn, task: str) -> None:
    allowed = {"question": {"<box>"} if task in BOX_TASKS else set(), "answer": set()}
    if task in ANSWER_MARKERS:
        allowed["answer"] = {ANSWER_MARKERS[task]}
    for name, text in (("question", turn.question), ("answer", turn.answer)):
        for marker in MARKERS:
            if marker in text and marker not in allowed[name]:
                raise Invalid(
                    f"{field}.{name}",
                    text,
                    f"{marker} has no place in the {name} of task {task!r}",
                    "remove it, or correct the task",
                )


def _count(example: Example, marker: str, part: str = "answer") -> int:
    return sum(getattr(turn, part).count(marker) for turn in example.turns)


def _need_one_marker(example: Example) -> None:
    marker = ANSWER_MARKERS[example.task]
    count = _count(example, marker)
    if count != 1:
        raise Invalid(
            "turns", [turn.answer for turn in example.turns],
            f"expected {marker} once in the answers, it is there {count} times",
            f"write {marker} where the answer points; for several give targets.each",
        )  # fmt: skip


def _each(
    check: Callable[..., dict[str, Any]], example: Example, duration: float
) -> dict[str, Any]:
    """{"each": checked}: one entry a marker, in the order of the text."""
    marker, each = ANSWER_MARKERS[example.task], check_list("targets.each", example.targets["each"])
    own = TARGET_KEYS[example.task] - {*DRAWN, "unlabelled", "frames"}
    check_keys(example.targets, {"each", *DRAWN}, (), "targets")
    count = _count(example, marker)
    if not each or len(each) != count:
        raise Invalid(
            "targets.each", each, f"{len(each)} entries for {count} {marker} in the answers",
            f"give one entry per {marker}, in the order of the text",
        )  # fmt: skip
    checked = []
    for i, part in enumerate(each):
        check_keys(part, own, (), f"targets.each[{i}]")
        try:
            checked.append(check(example, part, duration))
        except Invalid as error:
            field = error.field.replace("targets", f"targets.each[{i}]", 1)
            raise Invalid(field, error.value, error.reason, error.fix) from error
    return {"each": checked}


def _input_boxes(example: Example, duration: float) -> dict[str, Any]:
    """The boxes that the questions mean by <box>, checked, under the keys that they have."""
    targets, marks = example.targets, _count(example, "<box>", "question")
    several = "input_boxes" in targets
    box_key, time_key = ("input_boxes", "input_times") if several else ("input_box", "input_time")
    for key in DRAWN:
        if key in targets and targets[key] is not None and key not in (box_key, time_key):
            raise Invalid(
                f"targets.{key}", targets[key], "there are targets.input_boxes as well",
                "give all boxes as input_boxes and input_times",
            )  # fmt: skip
    boxes = check_list("targets.input_boxes", targets["input_boxes"]) if several else [
        targets[key] for key in ("input_box",) if key in targets]  # fmt: skip
    if marks != len(boxes):
        raise Invalid(
            "turns",
            [turn.question for turn in example.turns],
            f"<box> stands {marks} times in the questions for {len(boxes)} targets.{box_key}",
            f"write <box> where a question means targets.{box_key}; several are input_boxes",
        )
    times = targets.get(time_key)
    if times is not None and not boxes:
        raise Invalid(
            f"targets.{time_key}", times, f"there is no targets.{box_key} that it belongs to",
            "add the box, or remove the time",
        )  # fmt: skip
    if not boxes:
        return {}
    if not several:
        drawn = {box_key: check_box("targets.input_box", boxes[0])}
        return drawn if times is None else drawn | {
            time_key: check_time("targets.input_time", times, duration)}  # fmt: skip
    drawn = {box_key: [check_box(f"targets.{box_key}[{i}]", box) for i, box in enumerate(boxes)]}
    if times is not None:
        _same_length(targets, box_key, time_key)
        drawn[time_key] = [
            None if time is None else check_time(f"targets.{time_key}[{i}]", time, duration)
            for i, time in enumerate(times)]  # fmt: skip
    return drawn


def _same_length(targets: Mapping[str, Any], *keys: str) -> None:
    lengths = {key: len(check_list(f"targets.{key}", targets[key])) for key in keys}
    if len(set(lengths.values())) != 1 or not lengths[keys[0]]:
        raise Invalid("targets", lengths, f"expected as many {' as '.join(keys)}", "correct them")


def _check_times(targets: Mapping[str, Any], duration: float) -> list[float]:
    return [check_time(f"targets.times[{i}]", t, duration) for i, t in enumerate(targets["times"])]


def _conversation(example: Example, targets: Mapping[str, Any], duration: float) -> dict[str, Any]:
    return dict(targets)


def _temporal(example: Example, targets: Mapping[str, Any], duration: float) -> dict[str, Any]:
    check_keys(targets, TARGET_KEYS["temporal"], ("windows",), "targets")
    windows = check_list("targets.windows", targets["windows"])
    if not windows:
        raise Invalid("targets.windows", windows, "expected at least one window", "add it")
    checked = dict(targets)
    checked["windows"] = [
        check_window(f"targets.windows[{i}]", window, duration) for i, window in enumerate(windows)
    ]
    if targets.get("saliency"):
        check_keys(targets, TARGET_KEYS["temporal"], ("saliency_interval",), "targets")
        interval = targets["saliency_interval"]
        check_number("targets.saliency_interval", interval, 1e-6, math.inf, "seconds")
        for i, value in enumerate(check_list("targets.saliency", targets["saliency"])):
            check_number(f"targets.saliency[{i}]", value, 0, 1, "")
        if (len(targets["saliency"]) - 1) * interval >= duration + END_TOLERANCE:
            raise Invalid(
                "targets.saliency", targets["saliency"],
                f"{len(targets['saliency'])} values every {interval:g} s go beyond the duration "
                f"of the video, {duration:.3f} s", "give one value per interval of the video",
            )  # fmt: skip
    return checked


def _region(example: Example, targets: Mapping[str, Any], duration: float) -> dict[str, Any]:
    check_keys(targets, DRAWN, ("boxes", "times"), "targets")
    _same_length(targets, "boxes", "times")
    markers = _count(example, "<region>")
    if markers != len(targets["boxes"]):
        raise Invalid(
            "targets.boxes", targets["boxes"],
            f"{len(targets['boxes'])} boxes for {markers} <region> in the answers",
            "give one box and one time per <region>, in the order of the text",
        )  # fmt: skip
    boxes = [check_box(f"targets.boxes[{i}]", box) for i, box in enumerate(targets["boxes"])]
    return {"boxes": boxes, "times": _check_times(targets, duration)}


def _check_masks(example: Example, targets: Mapping[str, Any], duration: float) -> dict[str, Any]:
    _same_length(targets, "times", "rles")
    present = [i for i, rle in enumerate(targets["rles"]) if rle is not None]
    for i in present:
        check_rle(f"targets.rles[{i}]", targets["rles"][i])
    sizes = {tuple(targets["rles"][i]["size"]) for i in present}
    if len(sizes) > 1:
        raise Invalid(
            "targets.rles", sorted(sizes), "the masks have different sizes", "use one size"
        )
    return dict(targets) | {"times": _check_times(targets, duration)}


def _mask(example: Example, targets: Mapping[str, Any], duration: float) -> dict[str, Any]:
    check_keys(targets, DRAWN, ("times", "rles"), "targets")
    return _check_masks(example, targets, duration)


def _tracking(example: Example, targets: Mapping[str, Any], duration: float) -> dict[str, Any]:
    several = "each" in example.targets
    check_keys(
        targets, ("rles", "size", *DRAWN),
        ("times", "boxes", *(() if several else ("input_box",))),
        "targets",
    )  # fmt: skip
    _same_length(targets, "times", "boxes")
    _check_tracked(example, several)
    checked = dict(targets)
    checked["boxes"] = [
        None if box is None else check_box(f"targets.boxes[{i}]", box)
        for i, box in enumerate(targets["boxes"])
    ]
    checked["times"] = _check_times(targets, duration)
    if "size" in targets:
        check_size("targets.size", targets["size"])
    if targets.get("rles") is not None:
        _check_masks(example, targets, duration)
    return checked


def _check_tracked(example: Example, several: bool) -> None:
    """One <box> in the questions; of several tracks as many as <mask> in the answer of each."""
    counts = [(t.question.count("<box>"), t.answer.count("<mask>")) for t in example.turns]
    if not several and sum(boxes for boxes, _ in counts) != 1:
        raise Invalid(
            "turns[0].question", example.turns[0].question,
            "expected <box> once in the questions of a tracking example",
            "write <box> where the question means targets.input_box",
        )  # fmt: skip
    for i, (boxes, masks) in enumerate(counts if several else ()):
        if boxes != masks:
            raise Invalid(
                f"turns[{i}].question", example.turns[i].question,
                f"{boxes} <box> in the question for {masks} <mask> in its answer",
                "write one <box> per track; the answers follow the boxes in order",
            )  # fmt: skip


def _unlabelled(example: Example, targets: Mapping[str, Any], duration: float) -> dict[str, Any]:
    begin = ("input_box",) if example.task == "tracking" else ()
    check_keys(targets, DRAWN, ("times", *UNLABELLED, *begin), "targets")
    if targets["unlabelled"] is not True:
        raise Invalid("targets.unlabelled", targets["unlabelled"], "expected true", "remove it")
    _same_length(targets, "times", "frames")
    check_size("targets.size", targets["size"])
    if not all(isinstance(number, int) and number >= 0 for number in targets["frames"]):
        raise Invalid("targets.frames", targets["frames"], "expected whole numbers", "correct it")
    if example.task == "tracking":
        _check_tracked(example, several=False)
    return dict(targets) | {"times": _check_times(targets, duration)}


def _action(example: Example, targets: Mapping[str, Any], duration: float) -> dict[str, Any]:
    check_keys(targets, (), ("segments", "labels"), "targets")
    _same_length(targets, "segments", "labels")
    for i, label in enumerate(targets["labels"]):
        check_text(f"targets.labels[{i}]", label)
    segments = [
        check_window(f"targets.segments[{i}]", segment, duration)
        for i, segment in enumerate(targets["segments"])
    ]
    return {"segments": segments, "labels": list(targets["labels"])}


def _preference(example: Example, targets: Mapping[str, Any], duration: float) -> dict[str, Any]:
    check_text("targets.chosen", targets.get("chosen"))
    rejected = targets.get("rejected")
    for text in rejected if isinstance(rejected, list) and rejected else [rejected]:
        check_text("targets.rejected", text)
        if targets["chosen"] == text:
            raise Invalid(
                "targets.rejected", text, "it equals the chosen answer", "remove the pair"
            )
    kinds = ("localized", "comprehensive")
    check_one_of("targets.manipulation", targets.get("manipulation"), kinds)
    return dict(targets)


_CHECKS: dict[str, Callable[[Example, Mapping[str, Any], float], dict[str, Any]]] = {
    "conversation": _conversation, "temporal": _temporal, "region": _region, "mask": _mask,
    "tracking": _tracking, "action": _action, "preference": _preference,
}  # fmt: skip
