"""Slot targets: what a head is trained towards, built from the targets of an example.

One entry of TARGETS per task (and one for the box that a user draws, which `slot_target` refines
for examples whose labels follow that box): `blank` gives the arrays of an unused slot, `check`
refuses an example whose targets do not fit its markers, `fill` computes the arrays of one slot.
Boxes are [x1, y1, x2, y2] in [0, 1], times are seconds of the video.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.target_parts import part
from tpo_jax.errors import UserError
from tpo_jax.models.heads import HEADS

Arrays = dict[str, np.ndarray]


class TargetError(UserError):
    """The targets of an example do not fit its text; the message says which field and why."""


@dataclasses.dataclass(frozen=True)
class View:
    """What a row shows of its video.

    Attributes:
      start: seconds, beginning of the clip.
      end: seconds, end of the clip.
      times: float[n], times of the valid frames, n <= F.
    """

    start: float
    end: float
    times: np.ndarray


@dataclasses.dataclass(frozen=True)
class SlotTarget:
    """How the targets of one head become arrays.

    Attributes:
      blank: bucket -> arrays of one slot, as they are where the slot is not valid.
      check: (targets, number of markers in the example, view, bucket); raises TargetError.
      fill: (targets, occurrence of the marker in the example, view, bucket) -> arrays; raises
        TargetError where the view shows no frame of it (evaluation fills without a check).
    """

    blank: Callable[[Bucket], Arrays]
    check: Callable[[Mapping[str, Any], int, View, Bucket], None]
    fill: Callable[[Mapping[str, Any], int, View, Bucket], Arrays]


def area_resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mean over the area of each target pixel; float32[n, height, width, ...] of [n, h, w, ...]."""
    return _resize_axis(_resize_axis(images, height, 1), width, 2).astype(np.float32)


def _resize_axis(images: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Means along one axis; no BLAS, whose threads would fight those of the reader."""
    source = images.shape[axis]
    lines = np.moveaxis(images, axis, 0)
    if source % size == 0:
        factor = source // size
        total = sum(lines[i::factor].astype(np.float32) for i in range(factor))
        return np.moveaxis(total / factor, 0, axis)
    # Differences of the running integral, interpolated inside the pixels that an edge cuts.
    integral = np.cumsum(lines, axis=0, dtype=np.float64)
    integral = np.concatenate([np.zeros_like(integral[:1]), integral])
    edges = np.arange(size + 1) * source / size
    whole = np.minimum(edges.astype(np.int64), source - 1)
    part = (edges - whole).reshape(-1, *[1] * (images.ndim - 1))
    values = integral[whole] + part * (integral[whole + 1] - integral[whole])
    return np.moveaxis(np.diff(values, axis=0) * (size / source), 0, axis)


def _require(targets: Mapping[str, Any], marker: str, *keys: str) -> None:
    for key in keys:
        if targets.get(key) is None:
            raise TargetError(
                f"targets.{key}: missing, but the text has {marker}; targets has "
                f"{sorted(targets)}.")


def _parts(targets: Mapping[str, Any], markers: int, marker: str, each: str) -> list[
        Mapping[str, Any]]:
    """The targets of each marker; `each` is the key that several of them are under."""
    if each not in targets:
        if markers > 1:
            raise TargetError(
                f"turns: {markers} markers {marker}, expected one, as the targets are of one. Give "
                f"targets.{each}, one entry per marker.")
        return [targets]
    if len(targets[each]) != markers:
        raise TargetError(
            f"targets.{each}: {len(targets[each])} entries for {markers} {marker} markers.")
    return [part(targets, i) for i in range(markers)]


def _require_same_length(targets: Mapping[str, Any], *keys: str) -> None:
    lengths = {key: len(targets[key]) for key in keys}
    if len(set(lengths.values())) != 1 or not lengths[keys[0]]:
        raise TargetError(f"targets: lengths {lengths}, expected equal and not 0.")


def _check_box(box: Sequence[float], field: str) -> None:
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1):
        raise TargetError(
            f"targets.{field}: {list(box)}, expected normalised [x1, y1, x2, y2] with "
            "0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1.")


# Region: one box in one frame per marker.


def _region_blank(bucket: Bucket) -> Arrays:
    return {"boxes": np.zeros(4, np.float32), "frame": np.zeros((), np.int32)}


def _region_check(targets: Mapping[str, Any], markers: int, view: View, bucket: Bucket) -> None:
    _require(targets, "<region>", "boxes", "times")
    _require_same_length(targets, "boxes", "times")
    if len(targets["boxes"]) != markers:
        raise TargetError(
            f"targets.boxes: {len(targets['boxes'])} boxes for {markers} <region> markers.")
    for i, box in enumerate(targets["boxes"]):
        _check_box(box, f"boxes[{i}]")
        _region_frame(targets, i, view)


def _region_fill(targets: Mapping[str, Any], occurrence: int, view: View, bucket: Bucket) -> Arrays:
    return _drawn(targets["boxes"][occurrence], _region_frame(targets, occurrence, view))


def _region_frame(targets: Mapping[str, Any], i: int, view: View) -> int:
    """The shown frame nearest to the time of box i; raises TargetError outside of the clip."""
    time, reach = targets["times"][i], _reach(view) + 1e-3
    first, last = view.times.min(), view.times.max()
    if not first - reach <= time <= last + reach:
        raise TargetError(
            f"targets.times[{i}]: {time} s, but of the clip [{view.start}, {view.end}] s frames "
            f"from {first:.3f} to {last:.3f} s are shown, expected at most {reach:.3f} s before or "
            "behind these. Correct the time or the clip, or remove the example.")
    return int(np.abs(view.times - time).argmin())


def _reach(view: View) -> float:
    """Seconds that a box may be before the first shown frame or behind the last.

    As many as shown frames are apart, and to the ends of the clip, of which a choice of frames may
    leave out more.
    """
    times = np.unique(view.times)  # short clips may show a frame several times
    ends = float(max(times[0] - view.start, view.end - times[-1]))
    if len(times) == 1:
        return ends
    return max(_spacing(times), (view.end - view.start) / len(times), ends)


# Temporal: windows relative to the clip, and a saliency per sampled frame.


def _temporal_blank(bucket: Bucket) -> Arrays:
    return {"windows": np.zeros((bucket.windows, 2), np.float32),
            "window_valid": np.zeros(bucket.windows, bool),
            "saliency": np.full(bucket.frames, -1, np.float32)}


def _clipped_windows(targets: Mapping[str, Any], view: View) -> np.ndarray:
    """float32[n, 2]: the windows that meet the clip, clipped to it and normalised to [0, 1]."""
    windows = np.asarray(targets["windows"], np.float64).reshape(-1, 2)
    windows = (windows - view.start) / (view.end - view.start)
    windows = np.clip(windows, 0, 1)
    return windows[windows[:, 1] > windows[:, 0]].astype(np.float32)


def _temporal_check(targets: Mapping[str, Any], markers: int, view: View, bucket: Bucket) -> None:
    if not view.end > view.start:
        raise TargetError(f"start {view.start} s, end {view.end} s: a clip of no length has no "
                          "windows.")
    for one in _parts(targets, markers, "<temporal>", "each"):
        _windows_check(one, view, bucket)


def _windows_check(targets: Mapping[str, Any], view: View, bucket: Bucket) -> None:
    _require(targets, "<temporal>", "windows")
    inside = _clipped_windows(targets, view)
    if not len(inside):
        raise TargetError(
            f"targets.windows: none of {targets['windows']} meets the clip "
            f"[{view.start}, {view.end}] s.")
    if len(inside) > bucket.windows:
        raise TargetError(
            f"targets.windows: {len(inside)} windows in the clip, but the bucket has windows = "
            f"{bucket.windows}. Raise buckets.{bucket.name}.windows.")
    if targets.get("saliency") is not None:
        _require(targets, "<temporal>", "saliency_interval")


def _temporal_fill(targets: Mapping[str, Any], occurrence: int, view: View,
                   bucket: Bucket) -> Arrays:
    targets = part(targets, occurrence)
    arrays = _temporal_blank(bucket)
    inside = _clipped_windows(targets, view)
    arrays["windows"][: len(inside)] = inside
    arrays["window_valid"][: len(inside)] = True
    if targets.get("saliency"):
        saliency = np.asarray(targets["saliency"], np.float32)
        piece = np.floor(view.times / targets["saliency_interval"]).astype(np.int64)
        labelled = (piece >= 0) & (piece < len(saliency))
        frames = np.flatnonzero(labelled)
        arrays["saliency"][frames] = saliency[piece[labelled]]
    return arrays


# Mask: a mask per frame for referring segmentation and for tracking.


def _mask_blank(bucket: Bucket) -> Arrays:
    size = bucket.mask_size
    return {"masks": np.zeros((bucket.frames, size, size), np.uint8),
            "labelled": np.zeros(bucket.frames, bool)}


def _mask_check(targets: Mapping[str, Any], markers: int, view: View, bucket: Bucket) -> None:
    if targets.get("unlabelled"):
        raise TargetError(
            "targets.unlabelled: the example has no labels to learn from: its split is published "
            "without. Leave its task out of the weights of the source, or name another split.")
    for one in _parts(targets, markers, "<mask>", "each"):
        _track_check(one)


def _track_check(targets: Mapping[str, Any]) -> None:
    _require(targets, "<mask>", "times")
    kind = "rles" if targets.get("rles") is not None else "boxes"
    _require(targets, "<mask>", kind)
    _require_same_length(targets, "times", kind)
    if kind == "boxes":
        for i, box in enumerate(targets["boxes"]):
            if box is not None:
                _check_box(box, f"boxes[{i}]")


def _mask_fill(targets: Mapping[str, Any], occurrence: int, view: View, bucket: Bucket) -> Arrays:
    """Masks at the nearest annotated time; boxes stand in, filled, where there are no RLEs.

    A frame further from every annotation than half the larger of both spacings is not labelled; an
    annotation of null says that the object is absent there: labelled, empty. Without labels, which
    `_mask_check` refuses and evaluation asks about, no frame is labelled.
    """
    targets = part(targets, occurrence)
    arrays = _mask_blank(bucket)
    if targets.get("unlabelled"):
        return arrays
    nearest, close = _nearest_labels(targets["times"], view)
    arrays["labelled"][close] = True
    annotations = targets["rles"] if targets.get("rles") is not None else targets["boxes"]
    decode = _decode_rles if targets.get("rles") is not None else _fill_boxes
    wanted = [i for i in np.unique(nearest[close]) if annotations[i] is not None]
    if wanted:
        masks = decode([annotations[i] for i in wanted], bucket.mask_size)
        for i, mask in zip(wanted, masks, strict=True):
            arrays["masks"][close[nearest[close] == i]] = mask
    return arrays


def _nearest_labels(times: Sequence[float], view: View) -> tuple[np.ndarray, np.ndarray]:
    """int64[n], the annotation nearest to each frame, and the numbers of the frames near enough."""
    labels = np.asarray(times, np.float64)
    distance = np.abs(view.times[:, None] - labels[None])
    spacing = max(_spacing(np.sort(labels)), _spacing(view.times))
    return distance.argmin(1), np.flatnonzero(distance.min(1) <= spacing / 2 + 1e-3)


def _spacing(times: np.ndarray) -> float:
    """Median distance of consecutive times, 0 for a single one."""
    gaps = np.sort(np.diff(times))
    return float(gaps[len(gaps) // 2]) if len(gaps) else 0.0


def _decode_rles(rles: Sequence[Mapping[str, Any]], size: int) -> np.ndarray:
    """uint8[n, size, size] of COCO RLEs of one image size (at least half of the area covered)."""
    masks = coco_mask.decode([dict(rle) for rle in rles])  # uint8[h, w, n]
    masks = np.moveaxis(masks, 2, 0)
    if masks.shape[1:] == (size, size):
        return masks
    return (area_resize(masks, size, size) >= 0.5).astype(np.uint8)


def _fill_boxes(boxes: Sequence[Sequence[float]], size: int) -> np.ndarray:
    """uint8[n, size, size]: pixels whose centre lies in the box; a tiny box keeps one pixel."""
    centres = (np.arange(size) + 0.5) / size
    x1, y1, x2, y2 = np.asarray(boxes, np.float64).T[:, :, None]
    inside_x = (centres >= x1) & (centres <= x2)
    inside_y = (centres >= y1) & (centres <= y2)
    for inside, low, high in ((inside_x, x1, x2), (inside_y, y1, y2)):
        middle = np.minimum(((low + high) / 2 * size).astype(np.int64), size - 1)
        np.put_along_axis(inside, middle, True, axis=1)
    return (inside_y[:, :, None] & inside_x[:, None, :]).astype(np.uint8)


# Box: each box that a user drew, an input, and the frame that it was drawn on.


def _box_blank(bucket: Bucket) -> Arrays:
    return {"boxes": np.zeros(4, np.float32), "frame": np.zeros((), np.int32)}


def _box_check(targets: Mapping[str, Any], markers: int, view: View, bucket: Bucket) -> None:
    for one in _parts(targets, markers, "<box>", "input_boxes"):
        _require(one, "<box>", "input_box")
        _check_box(one["input_box"], "input_box")


def _box_fill(targets: Mapping[str, Any], occurrence: int, view: View, bucket: Bucket) -> Arrays:
    """The box on the shown frame nearest to its time; on the first where it has none."""
    targets = part(targets, occurrence)
    time = targets.get("input_time")
    frame = 0 if time is None else int(np.abs(view.times - time).argmin())
    return _drawn(targets["input_box"], frame)


def _drawn(box: Sequence[float], frame: int) -> Arrays:
    return {"boxes": np.asarray(box, np.float32), "frame": np.asarray(frame, np.int32)}


def _followed_fill(targets: Mapping[str, Any], occurrence: int, view: View,
                   bucket: Bucket) -> Arrays:
    """A box whose object is labelled over time, on a frame that shows the object.

    As it was drawn, where that frame is shown (without a time, it is that of the first label);
    else the label of the first shown frame that has one. Where no shown frame has any, the nearest;
    so too without labels, where a track begins at the first frame.
    """
    targets = part(targets, occurrence)
    if targets.get("unlabelled"):
        return _box_fill({"input_time": targets["times"][0]} | targets, 0, view, bucket)
    times, boxes = np.asarray(targets["times"], np.float64), targets["boxes"]
    time = targets.get("input_time")
    if time is None:
        time = next((t for t, box in zip(times, boxes, strict=True) if box is not None), times[0])
    own = int(np.abs(times - time).argmin())
    nearest, close = _nearest_labels(times, view)
    shown = [int(nearest[f]) for f in close if boxes[nearest[f]] is not None]
    if not shown:
        return _box_fill(dict(targets) | {"input_time": time}, occurrence, view, bucket)
    label = own if own in shown else shown[0]
    frame = int(np.abs(view.times - times[label]).argmin())
    return _drawn(targets["input_box"] if label == own else boxes[label], frame)


_BUILT_IN: dict[str, SlotTarget] = {
    "region": SlotTarget(_region_blank, _region_check, _region_fill),
    "temporal": SlotTarget(_temporal_blank, _temporal_check, _temporal_fill),
    "mask": SlotTarget(_mask_blank, _mask_check, _mask_fill),
    "box": SlotTarget(_box_blank, _box_check, _box_fill),
}
# The box of a tracking example: its labels are of what is in the box.
_FOLLOWED_BOX = SlotTarget(_box_blank, _box_check, _followed_fill)


class _Targets(Mapping):
    """{task: SlotTarget}: the built-in ones, and those that registered heads bring."""

    def __getitem__(self, task: str) -> SlotTarget:
        return self._now()[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._now())

    def __len__(self) -> int:
        return len(self._now())

    def _now(self) -> dict[str, SlotTarget]:
        return _BUILT_IN | {head.task: head.target for head in HEADS.values() if head.target}


TARGETS: Mapping[str, SlotTarget] = _Targets()


def slot_target(slot: str, task: str) -> SlotTarget:
    """The entry of TARGETS for a slot of an example of some task."""
    return _FOLLOWED_BOX if (slot, task) == ("box", "tracking") else TARGETS[slot]
