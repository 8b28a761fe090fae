"""From head calls in generated answers to results: run the heads, decode, inline in the text."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpo_jax.data.text import TextCodec
from tpo_jax.generation.rles import Rles
from tpo_jax.generation.sampler import Arrays, Context, Generation
from tpo_jax.generation.whole_video import Frames, WholeVideo, drawn_on, slot_inputs
from tpo_jax.models.heads import HEADS, ClipInfo
from tpo_jax.models.video_language import FunctionalModel

Result = dict[str, Any]
Place = tuple[int, int, int]  # row, branch, number of the call in its answer
# A temporal answer names every window with at least this share of the best one's score.
NAMED_WINDOWS = 0.8
# Head calls of one video that are answered together, where there are several.
SLOTS_AT_ONCE = 4


@dataclasses.dataclass(frozen=True)
class Event:
    """One head call in an answer.

    Attributes:
      task: what was called.
      slot: position of the slot token in the answer's tokens; -1 of a result given in words.
      result: what the head's `decode` gives.
    """

    task: str
    slot: int
    result: Result


@dataclasses.dataclass(frozen=True)
class RoutedAnswer:
    """An answer with its head results.

    Attributes:
      text: results inlined, for people.
      marked: with "<region>" and so on at head calls, as in training texts.
      finished: whether the answer ended by itself.
      events: in order of the text.
    """

    text: str
    marked: str
    finished: bool
    events: tuple[Event, ...]

    def to_json(self) -> dict[str, Any]:
        """{text, marked, finished, events: [{task, slot, result}]}; masks become COCO RLE."""
        events = [{"task": e.task, "slot": e.slot, "result": _jsonable(e.result)}
                  for e in self.events]
        return {"text": self.text, "marked": self.marked, "finished": self.finished,
                "events": events}


class Router:
    """Runs the heads of one model on collected slot states; one compiled program per head."""

    def __init__(self, model: FunctionalModel, codec: TextCodec):
        self.model, self.codec = model, codec
        self.heads = tuple(model.config.heads)
        self.over_video = WholeVideo(model)
        self._run = jax.jit(self._run_head, static_argnames="name")
        self._tokenise = jax.jit(lambda params, x: model.bind(params).tokenise(x))

    def _run_head(self, params: Any, features: Any, frames: jax.Array, frame_valid: jax.Array,
                  tokens: jax.Array | None, asked: Mapping[str, Any], *, name: str
                  ) -> dict[str, jax.Array]:
        model = self.model.bind(params)
        return model.run_head(name, asked["states"], features, frames, frame_valid, asked["frame"],
                              tokens=tokens, **slot_inputs(model, asked))

    def route(self, params: Any, context: Context, batch: Arrays, generation: Generation,
              clips: Sequence[ClipInfo], frames_asked: np.ndarray | None = None,
              films: Sequence[Frames | None] = (),
              points: Mapping[str, np.ndarray] | None = None) -> list[list[RoutedAnswer | None]]:
        """Decodes all answers of a batch, heads included.

        Args:
          context: of `Sampler.prefill`; its features are read by the heads.
          batch: frames uint8[B, F, H, W, 3], frame_valid bool[B, F], branch_tokens of the prompts
            and slots are read, and clip_features and text features where it has them.
          generation: of `Sampler.generate`.
          clips: one a row (may be fewer than B: the rest is filling).
          frames_asked: int32[B, K, C], frame that each region call of an answer answers for, the
            last also for calls beyond C; None is each row's `ClipInfo.frame`.
          films: one a row, or none; the video of a row, whose every frame a head with
            `whole_video` answers for instead of those in the batch.
          points: where users point: "points" float32[B, P, 2], normalised, "labels" int32[B, P] (1
            on the object, 0 not, -1 no point) and "frame" int32[B]. They are of the first call of a
            head with `reads_points` in an answer.

        Returns:
          [row][branch]; None for an unused branch.
        """
        host, prompts = _on_host(generation, batch)
        batch = {**batch, "points": points}
        rows, branches = host.lengths.shape
        if frames_asked is None:
            asked = [clip.frame for clip in clips] + [0] * (rows - len(clips))
            frames_asked = np.tile(np.asarray(asked, np.int32)[:, None, None], (branches, 1))
        results: dict[Place, Result] = {}
        tokens = None  # of the clips, for all heads that read them
        for index, name in enumerate(self.heads):
            places = [tuple(int(i) for i in place)
                      for place in np.argwhere(host.event_heads[: len(clips)] == index)]
            filmed = bool(HEADS[name].whole_video and films)
            whole = [place for place in places if filmed and films[place[0]]]
            places = [place for place in places if place not in whole]
            results |= self._whole(params, name, whole, batch, host, frames_asked, prompts, clips,
                                   films)
            if places and tokens is None and HEADS[name].reads_tokens:
                tokens = self._tokenise(params, context.encoded.features)
            for places_now, predictions in self._predictions(
                    params, name, places, context, batch, host, frames_asked, prompts, tokens):
                for place, one in zip(places_now, predictions, strict=True):
                    frame = _frame_of(frames_asked, place, _earlier(host, place))
                    clip = dataclasses.replace(clips[place[0]], frame=frame)
                    results[place] = HEADS[name].decode(one, clip)
        return [[self._answer(host, row, branch, results, clips[row].frame_valid)
                 for branch in range(branches)] for row in range(len(clips))]

    def over_films(self, params: Any, batch: Arrays, generation: Generation,
                   clips: Sequence[ClipInfo], films: Sequence[Frames | None],
                   wanted: Collection[Place]) -> dict[Place, Result]:
        """Results of the calls `wanted` alone, of heads with `whole_video`, over their films.

        Args:
          batch, clips, films: as of `route`.
          generation: its events are read, and what it has of the questions.
        """
        host, prompts = _on_host(generation, batch)
        batch = {**batch, "points": None}
        frames_asked = np.zeros((*host.lengths.shape, 1), np.int32)  # no head of films reads it
        results: dict[Place, Result] = {}
        for index, name in enumerate(self.heads):
            places = [place for place in wanted if host.event_heads[place] == index]
            results |= self._whole(params, name, places, batch, host, frames_asked, prompts, clips,
                                   films)
        return results

    def _predictions(self, params: Any, name: str, places: Sequence[Place],
                     context: Context, batch: Arrays, host: Generation, frames_asked: np.ndarray,
                     prompts: Mapping[str, jax.Array | None],
                     tokens: jax.Array | None
                     ) -> Iterator[tuple[list[Place], list[dict[str, np.ndarray]]]]:
        """Yields (places, predictions of each) with a few events of every row at a time.

        The mask head's memory is that of so many clips, however many calls an answer makes.
        """
        for slots, now in _together(places):
            asked = self._asked(name, slots, now, batch, host, frames_asked, prompts)
            predictions = jax.device_get(self._run(
                params, context.encoded.features, jnp.asarray(batch["frames"]),
                jnp.asarray(batch["frame_valid"]), tokens if HEADS[name].reads_tokens else None,
                asked, name=name))
            yield [place for _, place in now], [
                _of_slot(predictions, place[0], slot) for slot, place in now]

    def _asked(self, name: str, slots: int, now: Sequence[tuple[int, Place]], batch: Arrays,
               host: Generation, frames_asked: np.ndarray,
               prompts: Mapping[str, jax.Array | None]) -> dict[str, Any]:
        """Arrays of all rows about the calls `now`, (slot, place) each, as `slot_inputs` takes
        them, with "states" and "frame" of the slots."""
        rows, texts = host.lengths.shape[0], {}
        if HEADS[name].reads_text_features and "text_features" in batch:
            texts = {key: batch[key] for key in ("text_features", "text_valid")}
        states = np.zeros((rows, slots, host.event_states.shape[-1]), np.float32)
        frame, branches, order = np.zeros((3, rows, slots), np.int32)
        for slot, (row, branch, event) in now:
            order[row, slot] = _earlier(host, (row, branch, event))
            states[row, slot] = host.event_states[row, branch, event]
            frame[row, slot] = _frame_of(frames_asked, (row, branch, event), order[row, slot])
            branches[row, slot] = branch
        return {
            "states": states, "frame": frame, "branch": branches, "order": order,
            "texts": texts,
            "prompts": {} if texts or not HEADS[name].reads_prompt else prompts,
            "box": batch["slots"].get("box"),
            "points": batch["points"] if HEADS[name].reads_points else None,
            "clip_features":
                batch.get("clip_features") if HEADS[name].reads_clip_features else None,
        }

    def _whole(self, params: Any, name: str, places: Sequence[Place], batch: Arrays,
               host: Generation, frames_asked: np.ndarray,
               prompts: Mapping[str, jax.Array | None], clips: Sequence[ClipInfo],
               films: Sequence[Frames | None]) -> dict[Place, Result]:
        """Results of calls over all frames of their films, one row at a time."""
        results: dict[Place, Result] = {}
        for row, alike in _drawn_alike(name, places, batch["slots"].get("box")):
            for slots, now in _together(alike):
                asked = self._asked(name, slots, now, batch, host, frames_asked, prompts)
                one = jax.tree.map(lambda x, row=row: x[row : row + 1], asked)
                shown = {key: np.asarray(batch[key][row : row + 1])
                         for key in ("frames", "frame_valid", "frame_times")}
                found = self.over_video.results(
                    params, name, shown, one, len(now), films[row], clips[row])
                results |= dict(zip([place for _, place in now], found, strict=True))
        return results

    def _answer(self, host: Generation, row: int, branch: int,
                results: Mapping[Place, Result],
                frame_valid: np.ndarray) -> RoutedAnswer | None:
        length = int(host.lengths[row, branch])
        if not length:
            return None
        tokens = host.tokens[row, branch, :length]
        events, pieces, begin = [], [], 0
        for number, head in enumerate(host.event_heads[row, branch]):
            if head < 0:
                break
            task = HEADS[self.heads[head]].task
            slot = int(host.event_positions[row, branch, number])
            result = results[row, branch, number]
            events.append(Event(task, slot, result))
            # The routing token stands right before the slot.
            pieces += [self.codec.decode(tokens[begin : slot - 1]), inline(task, result)]
            begin = slot + 1
        text = "".join([*pieces, self.codec.decode(tokens[begin:])])
        return RoutedAnswer(text.strip(), self.codec.decode(tokens).strip(),
                            bool(host.finished[row, branch]), tuple(events))


def _on_host(generation: Generation, batch: Arrays) -> tuple[Generation, dict[str, Any]]:
    """A generation on the host, and its prompts, which stay where the heads read them."""
    prompts = {"states": generation.prompt_states, "valid": generation.prompt_valid,
               "tokens": batch["branch_tokens"]}
    host = dataclasses.replace(generation, prompt_states=None, prompt_valid=None)
    return jax.device_get(host), prompts


def _earlier(host: Generation, place: Place) -> int:
    """How many calls of the same head an answer makes before one."""
    row, branch, event = place
    heads = host.event_heads[row, branch]
    return int(np.sum(heads[:event] == heads[event]))


def _frame_of(frames_asked: np.ndarray, place: Place, earlier: int) -> int:
    """The frame that a call answers for; see `Router.route`."""
    row, branch, _ = place
    return int(frames_asked[row, branch, min(earlier, frames_asked.shape[2] - 1)])


def _drawn_alike(name: str, places: Sequence[Place], box: Mapping[str, np.ndarray] | None
                 ) -> Iterator[tuple[int, list[Place]]]:
    """(row, some calls in it); a "spread" head is shown the frames with boxes in every round, so
    that calls with boxes on other frames are not among them: they would take each other's places.
    """
    alike: dict[tuple[int, tuple[int, ...]], list[Place]] = defaultdict(list)
    for place in sorted(places):
        row, branch, _ = place
        frames = np.zeros(0, int)
        if box is not None and HEADS[name].whole_video == "spread":
            one = {key: value[row : row + 1] for key, value in box.items()}
            frames = drawn_on(one, np.array([[branch]]))
        alike[row, tuple(frames.tolist())].append(place)
    yield from ((row, some) for (row, _), some in alike.items())


def _together(places: Sequence[Place]) -> Iterator[tuple[int, list[tuple[int, Place]]]]:
    """Slots of a program, and (slot, place) of so many calls of every row at a time."""
    of_row = defaultdict(list)
    for place in places:
        of_row[place[0]].append(place)
    most = max(map(len, of_row.values()), default=0)
    slots = 1 if most == 1 else SLOTS_AT_ONCE  # few shapes to compile
    for first in range(0, most, slots):
        yield slots, [(slot, place) for given in of_row.values()
                      for slot, place in enumerate(given[first : first + slots])]


def _of_slot(predictions: Mapping[str, np.ndarray], row: int, slot: int
             ) -> dict[str, np.ndarray]:
    """The predictions of one slot; what a head gives per row, [B, F], is passed as it is."""
    return {name: value[row, slot] if value.ndim > 2 else value[row]
            for name, value in predictions.items()}


def inline(task: str, result: Result) -> str:
    """A result as words: "[12,30,20,41]" in pixels, "4.0 s to 7.5 s", "(visible ...)".

    A task without words of its own is named.
    """
    own = next((head.words for head in HEADS.values() if head.task == task and head.words), None)
    return (own or _WORDS.get(task, lambda _: f"({task})"))(result)


def _region_words(result: Result) -> str:
    return "[" + ",".join(str(round(v)) for v in result["box_pixels"]) + "]"


def _temporal_words(result: Result) -> str:
    windows = result["windows"]
    named = sorted(w[:2] for w in windows if w[2] >= NAMED_WINDOWS * windows[0][2])
    spans = [f"{start:.1f} s to {end:.1f} s" for start, end in named]
    return " and ".join(spans)


def _mask_words(result: Result) -> str:
    seen = [time for time, box in zip(result["times"], result["boxes"], strict=True) if box]
    if not seen:
        return "(not visible)"
    if len(result["times"]) == 1:
        box = next(box for box in result["boxes"] if box)
        return "(mask in " + "[" + ",".join(f"{v:.2f}" for v in box) + "])"
    return f"(visible from {seen[0]:.1f} s to {seen[-1]:.1f} s)"


_WORDS = {"region": _region_words, "temporal": _temporal_words, "mask": _mask_words}


@functools.singledispatch
def _jsonable(value: Any) -> Any:
    return value


@_jsonable.register
def _(value: dict) -> Any:
    return {key: list(Rles.of(item).items) if key == "masks" else _jsonable(item)
            for key, item in value.items()}


@_jsonable.register
def _(value: list) -> Any:
    return [_jsonable(item) for item in value]


@_jsonable.register
def _(value: np.ndarray) -> Any:
    return value.tolist()

