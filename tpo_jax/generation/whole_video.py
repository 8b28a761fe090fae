"""Mask heads over every frame of a video, not only over those that the language model is shown.

What a head is told (the state of its slot, its question, a box that the user drew) does not change;
frames are read, shown to it and forgotten, in programs of one shape, so that memory does not grow
with the video. Only results do, as RLEs. Frames come from a file (`Film`) or from the table of a
prepared folder (`StoredFilm`).

"spread": the head sees the clip as it was trained to, one frame for every part of it. The frames of
the video are cut into as many runs as there are places; in each round every place shows the next
frame of its run. A frame that a box is drawn on keeps its place, and its share of frames goes to
the others. One decoder, or one record of a table, is open for each place.

"follow": the head chooses a frame of each object among those shown (`begin`), and follows all
objects from there to the end and then back to the start, WINDOW frames a program (`go_on`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tpo_jax.data import sampling, video
from tpo_jax.data.records import CLIP_FRAMES
from tpo_jax.errors import UserError
from tpo_jax.generation.rles import Rles
from tpo_jax.models.heads import HEADS, ClipInfo
from tpo_jax.models.video_language import FunctionalModel, VideoLanguageModel, normalise

WINDOW = 8  # frames that a program follows objects through
BLOCK = 64  # frames read at a time on the way back, at the size that the model sees


class Frames(Protocol):
    """What a head is taken over.

    Attributes:
      fps: frames a second that results are wanted of; None: every frame.
    """

    @property
    def fps(self) -> float | None: ...

    def times(self, fps: float | None) -> np.ndarray:
        """float64[n]: rising seconds of the frames that there are, or of those at a rate."""

    def play(self, times: Sequence[float]) -> Iterator[np.ndarray]:
        """uint8[S, S, 3] of the frames at these rising times."""


@dataclasses.dataclass(frozen=True)
class Film:
    """A video file as a model is shown it.

    Attributes:
      path: the file.
      size: (height, width) that its frames are read at.
      start, end: seconds, the part of it that a question is about.
      fps: frames a second that results are wanted of; None: every frame.
      prepare: uint8[n, height, width, 3] -> uint8[n, S, S, 3], as the shown frames were.
    """

    path: pathlib.Path
    size: tuple[int, int]
    start: float
    end: float
    fps: float | None
    prepare: Callable[[np.ndarray], np.ndarray]

    def times(self, fps: float | None) -> np.ndarray:
        """float64[n]: seconds of the frames that there are, or of those on screen at ticks."""
        decoder = video.Decoder(self.path, fps, self.start, self.end)
        return np.array([time for time, _ in decoder.lazily()])

    def play(self, times: Sequence[float]) -> Iterator[np.ndarray]:
        """uint8[S, S, 3] of the frames at these rising times."""
        if not len(times):
            return
        left = iter(times)
        wanted = next(left)
        # The end is not in the part that is read.
        past = float(times[-1]) + video.TICK_TOLERANCE
        decoder = video.Decoder(self.path, None, float(times[0]), past, self.size)
        for time, picture in decoder.lazily():
            if time == wanted:
                yield self.prepare(picture()[None])[0]
                wanted = next(left, None)
        if wanted is not None:
            raise video.VideoError(
                self.path, f"the frame at {wanted:.3f} s is not found again when the file is read "
                "from its middle", "convert it to H.264 in mp4")  # fmt: skip

    def pictures(self) -> Iterator[np.ndarray]:
        """uint8[height, width, 3] of the frames that results are of."""
        decoder = video.Decoder(self.path, self.fps, self.start, self.end, self.size)
        return (frame for _, frame in decoder)


@dataclasses.dataclass(frozen=True)
class StoredFilm:
    """The frames that a prepared folder stores of a video; results are of every one.

    Attributes:
      dataset: with the interface of `records.PreparedDataset`.
      video_id: of one of its videos.
      start, end: seconds, the part of it that a question is about.
      prepare: as of `Film`.
    """

    dataset: Any
    video_id: str
    start: float
    end: float
    prepare: Callable[[np.ndarray], np.ndarray]
    fps: ClassVar[None] = None

    def times(self, fps: None = None) -> np.ndarray:
        """float64[n]: seconds of the stored frames of the part."""
        stored = self._stored()
        return stored[sampling.frames_between(stored, self.start, self.end)]

    def play(self, times: Sequence[float]) -> Iterator[np.ndarray]:
        """uint8[S, S, 3] of the frames at these of `times`; a record is read at a time."""
        numbers = np.searchsorted(self._stored(), np.asarray(times, np.float64))
        chunks = numbers // CLIP_FRAMES
        for chunk in np.unique(chunks):
            yield from self.prepare(self.dataset.frames(self.video_id, numbers[chunks == chunk]))

    def _stored(self) -> np.ndarray:
        """float64[n]: seconds of all stored frames of the video."""
        return np.asarray(self.dataset.video_info(self.video_id).timestamps, np.float64)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Predictions [1, S, n, ...] of frames at `times` float64[n]; `said` bool[S, n]: which of them
    count for which slot."""

    predictions: Mapping[str, np.ndarray]
    times: np.ndarray
    said: np.ndarray


def slot_inputs(model: VideoLanguageModel, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What heads read of the questions of slots, as `head_inputs` takes it.

    Args:
      asked: "branch" int32[B, S] of the slots, and "order", how many calls of this head come before
        them there; "prompts": {} or states, valid and tokens of the branches; "texts": {} or text
        features; "box": the box slots of the batch or None; "points": of `route`, or None.
    """
    prompts, branch, box = asked["prompts"], asked["branch"], asked["box"]
    more: dict[str, Any] = {"clip_features": asked["clip_features"]}
    if prompts:
        slots = {} if box is None else {"box": box}
        prompts = prompts | {"embeds": model.embed_branches(prompts["tokens"], slots)}
        rows = jnp.arange(len(branch))[:, None]
        for key, entry in (("prompt", "states"), ("prompt_embeds", "embeds"),
                           ("prompt_valid", "valid")):  # fmt: skip
            more[key] = prompts[entry][rows, branch]
    if asked["texts"]:
        more |= model.texts(asked["texts"], {"branch": branch})
    if box is not None:
        slots = {"branch": branch, "order": asked["order"]}
        more |= model.drawn_boxes({"slots": {"box": box}}, slots)
    if asked["points"] is not None:
        points, first = asked["points"], asked["order"] == 0
        more |= {
            "points": jnp.repeat(points["points"][:, None], first.shape[1], axis=1),
            "point_labels": jnp.where(first[..., None], points["labels"][:, None], -1),
            "point_frame": jnp.broadcast_to(points["frame"][:, None], first.shape),
        }
    return more


class WholeVideo:
    """Runs heads with `Head.whole_video` over the frames of films; few programs a head."""

    def __init__(self, model: FunctionalModel):
        self.model = model
        self._spread = jax.jit(self._run_spread, static_argnames="name")
        self._begin = jax.jit(self._run_begin, static_argnames="name")
        self._go_on = jax.jit(self._run_go_on, static_argnames="name")
        self._turned = jax.jit(self._run_turned, static_argnames="name")

    def results(
        self, params: Any, name: str, row: Mapping[str, Any], asked: Mapping[str, Any], slots: int,
        film: Frames, clip: ClipInfo,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """What `decode` of a head says of all frames of a film, for each of the first `slots`.

        Args:
          row: frames uint8[1, F, S, S, 3], frame_valid and frame_times [1, F], as shown.
          asked: as of `slot_inputs`, of this row, with "states" float32[1, S, D] and "frame"
            int32[1, S].
        """
        pieces = {"spread": self._pieces_spread, "follow": self._pieces_followed}
        parts: list[list[dict[str, Any]]] = [[] for _ in range(slots)]
        for piece in pieces[HEADS[name].whole_video](params, name, row, asked, slots, film):
            predictions = jax.device_get(piece.predictions)
            for slot, said in enumerate(piece.said[:slots]):
                if not said.any():
                    continue
                here = dataclasses.replace(clip, times=piece.times, frame_valid=said)
                one = {key: value[0, slot] for key, value in predictions.items()}
                result = HEADS[name].decode(one, here)
                parts[slot].append(result | {"masks": Rles.of(result["masks"])})
        return [_joined(part) for part in parts]

    def _run_spread(self, params: Any, row: Mapping, asked: Mapping, *, name: str) -> dict:
        model = self.model.bind(params)
        features = model.encode(row["frames"], row["frame_valid"], row["frame_times"]).features
        return model.run_head(name, asked["states"], features, row["frames"], row["frame_valid"],
                              asked["frame"], **slot_inputs(model, asked))  # fmt: skip

    def _pieces_spread(self, params: Any, name: str, row: Mapping, asked: Mapping, slots: int,
                       film: Frames) -> Iterator[_Piece]:  # fmt: skip
        shown, times = row["frame_valid"][0], film.times(film.fps)
        drawn = drawn_on(asked["box"], asked["branch"][:, :slots])
        free = np.setdiff1d(np.flatnonzero(shown), drawn)
        if not len(free):  # one frame is shown, with a box: the others come behind it
            free = np.flatnonzero(~shown)[:1]
        if not len(free):
            raise UserError(
                f"head {name!r}: boxes are drawn on all {np.sum(shown)} frames that the language "
                "model is shown, which leaves no place for other frames; ask about fewer boxes at "
                "once, or for the shown frames (predict --mask_fps=0, evaluate "
                "--mask_frames=shown)")
        runs = [zip(run, film.play(run), strict=True) for run in np.array_split(times, len(free))]
        for _ in range(math.ceil(len(times) / len(free))):
            now = {key: row[key].copy() for key in ("frames", "frame_valid", "frame_times")}
            at, said = np.zeros(len(shown)), np.zeros(len(shown), bool)
            for place, run in zip(free, runs, strict=True):
                time, frame = next(run, (None, None))
                if time is not None:
                    now["frames"][0, place], now["frame_times"][0, place] = frame, time
                    at[place] = time
                    said[place] = now["frame_valid"][0, place] = True
            found = self._spread(params, now, asked, name=name)
            yield _Piece(found, at, np.broadcast_to(said, (slots, len(said))))

    def _run_begin(self, params: Any, row: Mapping, asked: Mapping, *, name: str) -> tuple:
        model = self.model.bind(params)
        inputs = model.head_inputs(name, asked["states"], None, row["frames"], row["frame_valid"],
                                   asked["frame"], **slot_inputs(model, asked))  # fmt: skip
        return model.heads[name].begin(inputs)

    def _run_turned(self, params: Any, followed: Any, *, name: str) -> Any:
        return self.model.bind(params).heads[name].turned(followed)

    def _run_go_on(self, params: Any, followed: Any, pictures: jax.Array, start: jax.Array,
                   frames: tuple, count: jax.Array, direction: jax.Array, *, name: str) -> tuple:
        head = self.model.bind(params).heads[name]
        return head.go_on(followed, normalise(pictures), start, frames, count, direction)

    def _pieces_followed(self, params: Any, name: str, row: Mapping, asked: Mapping, slots: int,
                         film: Frames) -> Iterator[_Piece]:  # fmt: skip
        places, found, followed = self._begin(params, row, asked, name=name)
        times, start = _with_prompts(film, row["frame_times"][0][np.asarray(places)[0]])
        wanted = np.isin(times, film.times(film.fps))
        for slot in range(slots):
            own = np.arange(start.size)[:, None] == slot
            yield _Piece(found, times[start[slot : slot + 1]], own & wanted[start[slot]])
        real, count = start[:slots], np.int32(len(times))
        for direction, numbers in (
            (1, np.arange(real.min() + 1, len(times))), (-1, np.arange(real.max() - 1, -1, -1)),
        ):  # fmt: skip
            if direction < 0:
                followed = self._turned(params, followed, name=name)
            play = film.play if direction > 0 else functools.partial(_play_back, film)
            for frames, now in _windows(play(times[numbers]), numbers):
                there = np.arange(WINDOW) < len(now)
                index = np.resize(now, WINDOW).astype(np.int32)
                followed, found = self._go_on(
                    params, followed, frames, start[None], (index, there), count,
                    np.int32(direction), name=name)  # fmt: skip
                said = there & wanted[index] & (direction * (index - start[:, None]) > 0)
                yield _Piece(found, times[index], said)


def drawn_on(box: Mapping[str, Any] | None, branch: np.ndarray) -> np.ndarray:
    """int[n]: the frames that the questions of some branches, int[1, S], have boxes on.

    Args:
      box: the box slots of one row, [1, ...] each; None where the batch has none.
    """
    if box is None:
        return np.zeros(0, int)
    return np.unique(box["frame"][0][box["valid"][0] & np.isin(box["branch"][0], branch)])


def _play_back(film: Frames, times: Sequence[float]) -> Iterator[np.ndarray]:
    """uint8[S, S, 3] of the frames at these falling times."""
    for first in range(0, len(times), BLOCK):
        yield from reversed(list(film.play(times[first : first + BLOCK][::-1])))


def _with_prompts(film: Frames, prompted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times of the frames to go through, rising: those wanted and those that objects are prompted
    on, which lie at `prompted` float32[S]; and int32[S], the numbers of the latter."""
    every = film.times(None)
    prompts = every[np.abs(every - prompted[:, None]).argmin(1)]
    times = every if film.fps is None else np.union1d(film.times(film.fps), prompts)
    return times, np.searchsorted(times, prompts).astype(np.int32)


def _windows(frames: Iterator[np.ndarray], numbers: np.ndarray
             ) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """(uint8[WINDOW, S, S, 3], the last repeated where they end; numbers int[n] of those there)."""
    for first in range(0, len(numbers), WINDOW):
        now = numbers[first : first + WINDOW]
        read = list(itertools.islice(frames, len(now)))
        yield np.stack(read + [read[-1]] * (WINDOW - len(read))), now


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One result of those of some frames each, in the order of their times."""
    times = [time for part in parts for time in part["times"]]
    order = np.argsort(times, kind="stable")
    merged: dict[str, Any] = {}
    for key in parts[0]:
        entries = [entry for part in parts
                   for entry in (part[key].items if key == "masks" else part[key])]  # fmt: skip
        merged[key] = [entries[i] for i in order]
    shape = parts[0]["masks"]
    return merged | {"masks": Rles(tuple(merged["masks"]), shape.height, shape.width)}
