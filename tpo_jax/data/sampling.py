"""Frame samplers: pure functions from frame timestamps (seconds) to sorted frame indices.

The same functions serve training, the generation of preference pairs and evaluation, so that the
frames of a stored pair can always be drawn again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# (timestamps float[n], count, start, end in seconds or None) -> int64[at most count], sorted
Sampler = Callable[..., np.ndarray]


def frames_between(timestamps: np.ndarray, start: float | None, end: float | None) -> np.ndarray:
    """Indices of the frames in [start, end].

    An interval that falls between two frames gives the one frame nearest to its middle.

    Args:
      timestamps: float[n] seconds, sorted.
      start: seconds, None for the beginning.
      end: seconds, None for the end.

    Returns:
      int64[m], m >= 1, consecutive.
    """
    timestamps = np.asarray(timestamps, np.float64)
    if timestamps.ndim != 1 or not timestamps.size:
        raise ValueError(f"timestamps: shape {timestamps.shape}, expected [n] with n >= 1.")
    start = timestamps[0] if start is None else start
    end = timestamps[-1] if end is None else end
    if not start <= end:
        raise ValueError(f"start {start} s, end {end} s: expected start <= end.")
    # Timestamps are stored as float32: an interval written in float64 must not lose its border.
    tolerance = 1e-6 * max(1.0, abs(end))
    first = np.searchsorted(timestamps, start - tolerance, "left")
    last = np.searchsorted(timestamps, end + tolerance, "right")
    if first >= last:
        return _nearest(timestamps, np.asarray([(start + end) / 2]))
    return np.arange(first, last)


def _nearest(timestamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """int64[k]: for each time the nearest frame; of two equally near the earlier."""
    right = np.clip(np.searchsorted(timestamps, times), 1, max(len(timestamps) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(timestamps) - 1)
    return np.where(times - timestamps[left] <= timestamps[right] - times, left, right)


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count: {count}, expected at least 1 frame.")


def uniform(timestamps: np.ndarray, count: int, start: float | None = None,
            end: float | None = None) -> np.ndarray:
    """Frames nearest to the middles of `count` equal parts of [start, end].

    Uniform in time, not in frame number, so a variable frame rate does no harm. Frames repeat if
    there are fewer than `count`.

    Args:
      timestamps: float[n] seconds, sorted.
      count: F.
      start: seconds, None for the beginning.
      end: seconds, None for the end: the last timestamp plus one mean frame interval.

    Returns:
      int64[F], sorted.
    """
    _check_count(count)
    inside = frames_between(timestamps, start, end)
    timestamps = np.asarray(timestamps, np.float64)
    if start is None:
        start = timestamps[0]
    if end is None:
        interval = (timestamps[-1] - timestamps[0]) / max(len(timestamps) - 1, 1)
        end = timestamps[-1] + interval
    middles = start + (np.arange(count) + 0.5) * (end - start) / count
    return inside[0] + _nearest(timestamps[inside], middles)


def frames_at_one_fps(frames: int, fps: float, most: int) -> np.ndarray:
    """int64[n]: frame numbers as LLaVA-NeXT samples them without `force_sample`.

    One frame a second; where that is more than `most`, exactly `most` spread evenly over the whole
    video, first and last included.
    """
    indices = np.arange(0, frames, max(round(fps), 1))
    return evenly(frames, most) if len(indices) > most else indices


def evenly(frames: int, count: int) -> np.ndarray:
    """int64[count]: frame numbers from the first to the last (LLaVA, LongVA)."""
    return np.linspace(0, frames - 1, count, dtype=int)


def middles(frames: int, count: int) -> np.ndarray:
    """int64[count]: the middles of `count` equal parts (VideoChat2).

    Of fewer frames all of them, and the last one again.
    """
    parts = min(count, frames)
    edges = np.linspace(0, frames, parts + 1).astype(int)
    return np.pad((edges[:-1] + edges[1:] - 1) // 2, (0, count - parts), mode="edge")


def _published(choose: Callable[[int, float, int], np.ndarray]) -> Sampler:
    """A sampler of frame numbers, (frames, frames a second, count), on the frames of an interval.

    Frames a second are those of the frames that are there, which `prepare` may have thinned out.
    """

    def sample(timestamps: np.ndarray, count: int, start: float | None = None,
               end: float | None = None) -> np.ndarray:
        _check_count(count)
        inside = frames_between(timestamps, start, end)
        length = float(timestamps[inside[-1]] - timestamps[inside[0]])
        fps = (len(inside) - 1) / length if length > 0 else 1.0
        return inside[choose(len(inside), fps, count)]

    return sample


# How a template says that its frames are chosen.
SAMPLERS: dict[str, Sampler] = {
    "uniform": uniform,
    "evenly": _published(lambda frames, fps, count: evenly(frames, count)),
    "middles": _published(lambda frames, fps, count: middles(frames, count)),
    "frames_at_one_fps": _published(frames_at_one_fps),
}


def shown(method: str, timestamps: np.ndarray, count: int, start: float | None = None,
          end: float | None = None) -> np.ndarray:
    """int64[n], n <= count, sorted: the frames of a clip that a model is shown.

    `uniform` gives fewer than `count` only if the clip has fewer; `frames_at_one_fps` if it is
    shorter than `count` seconds; the others show frames of a short clip more than once.

    Args:
      method: of the template, one of SAMPLERS.
      timestamps, count, start, end: see `uniform`.
    """
    inside = frames_between(timestamps, start, end)
    if method == "uniform" and len(inside) <= count:
        # Where times are uneven, one frame may be nearest twice, another never.
        return inside
    return SAMPLERS[method](timestamps, count, start, end)


def dense_segment(timestamps: np.ndarray, count: int, start: float, end: float) -> np.ndarray:
    """int64[F]: up to `count` distinct frames of the segment, evenly spaced.

    Unlike `uniform`, a segment with fewer frames gives all of them once.
    """
    _check_count(count)
    return _even(frames_between(timestamps, start, end), count)


def excluding(timestamps: np.ndarray, count: int, segments: Sequence[Sequence[float]],
              start: float | None = None, end: float | None = None) -> np.ndarray:
    """int64[F]: up to `count` distinct frames of [start, end] outside every segment (V minus F).

    Args:
      timestamps: float[n] seconds, sorted.
      count: F; fewer are returned when fewer remain.
      segments: [s, e] pairs in seconds, borders included.
      start: seconds, None for the beginning.
      end: seconds, None for the end.

    Raises:
      ValueError: no frame remains.
    """
    _check_count(count)
    inside = frames_between(timestamps, start, end)
    times = np.asarray(timestamps, np.float64)[inside]
    keep = np.ones(len(inside), bool)
    for first, last in segments:
        keep &= (times < first) | (times > last)
    if not keep.any():
        raise ValueError(
            f"segments {[list(s) for s in segments]} cover all {len(inside)} frames of "
            f"[{times[0]}, {times[-1]}] s; nothing is left to sample.")
    return _even(inside[keep], count)


def random_subset(indices: np.ndarray, count: int, seed: int | Sequence[int]) -> np.ndarray:
    """int64[count]: sorted subset without replacement of `indices`, a function of `seed` alone."""
    _check_count(count)
    indices = np.asarray(indices, np.int64)
    if count > len(indices):
        raise ValueError(f"count: {count}, expected at most the {len(indices)} given frames.")
    # Ranks of uniform draws: the stream of Generator.random is stable over NumPy versions.
    order = np.argsort(np.random.default_rng(seed).random(len(indices)), kind="stable")
    return indices[np.sort(order[:count])]


def _even(indices: np.ndarray, count: int) -> np.ndarray:
    """At most `count` entries, at the middles of equal parts of the list."""
    count = min(count, len(indices))
    return indices[((np.arange(count) + 0.5) * len(indices) / count).astype(np.int64)]
