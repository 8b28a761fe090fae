"""Preference pairs: questions, right and manipulated evidence, filters and the judge.

Following Temporal Preference Optimization, the model answers one question twice: the preferred
answer with the right frames, the dis-preferred one with manipulated frames.

* localized: the right frames are dense in the segment that the question is about, or those of the
  whole video where that cannot be (`Evidence.right` says why); the manipulated ones come from the
  remainder, the segment excluded.
* comprehensive: the right frames are those of the whole video, the manipulated ones are a sparse
  random subset of them.

The frames of the whole video are those that training shows. They may be fewer than were asked for,
and other frames are repeated to as many, so that their number does not tell the sides apart.

Everything here is a pure function of its arguments and a seed; `tpo_jax.preferences` runs it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.data import sampling
from tpo_jax.data.records import Example, PreparedDataset, Turn, VideoInfo
from tpo_jax.data.target_parts import parts
from tpo_jax.data.text import render_options
from tpo_jax.errors import UserError

MANIPULATIONS = ("localized", "comprehensive")
# Share of the duration that a segment may have: of a longer one too little remains outside.
LONGEST_SEGMENT = 0.7
OPTIONS_SHOWN = 0.5  # share of multiple-choice questions that list their options
CHOSEN_SEGMENT = (0.3, 0.6)  # share of the duration, where no example tells the segment
# What training shows of a pair: the frames of the whole video, or those that its preferred answer
# was given with.
TRAIN_FRAMES = ("whole", "segment")
# Questions about times of the video or an order in it: a segment alone cannot answer them.
KINDS_ABOUT_TIME = (
    "moment", "when", "start", "at_time", "doing", "place", "order", "who", "earlier",
)  # fmt: skip
_STOP_WORDS = frozenset("a an and are at by do does for from happen happens how in is it its of on "
                        "or the then there this to was were what when where which while who "
                        "with".split())


@dataclasses.dataclass(frozen=True)
class Question:
    """One turn that the model will answer.

    Attributes:
      example: conversation that it is from.
      index: of the turn.
      asked: text as shown to the model, with its options or not.
      segment: [start, end] in seconds of the evidence, None when no example tells it.
    """

    example: Example
    index: int
    asked: str
    segment: tuple[float, float] | None

    @property
    def turn(self) -> Turn:
        return self.example.turns[self.index]

    @property
    def question_id(self) -> str:
        return f"{self.example.example_id}/{self.index}"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Frame indices behind one pair, each of length n <= F.

    Attributes:
      manipulation: "localized" or "comprehensive".
      frame_indices: of the whole video, as training shows it.
      chosen_indices: what the preferred answer was generated with.
      manipulated_indices: what the dis-preferred answer was generated with.
      segment: the excluded segment in seconds (localized), else None.
      right: of a localized pair "dense", or why its right frames are those of the whole video.
    """

    manipulation: str
    frame_indices: tuple[int, ...]
    chosen_indices: tuple[int, ...]
    manipulated_indices: tuple[int, ...]
    segment: tuple[float, float] | None
    right: str | None = None


@dataclasses.dataclass(frozen=True)
class EvidenceSettings:
    """How evidence is drawn.

    Attributes:
      frames: F, most of a list of indices; with `fewer`, of videos that fit no smaller number.
      fewer: other numbers of frames. A video is shown in the smallest number that takes all of its
        stored frames.
      mix: probability of "localized"; the rest is "comprehensive".
      subset: share of the F frames that the comprehensive manipulation keeps.
      right: right frames of a localized pair with a known segment: "dense" in it, or "whole".
      seed: of every draw.
      sampling: how the template samples the whole video, of `data.sampling.SAMPLERS`.
    """

    frames: int
    mix: float = 0.5
    subset: float = 0.25
    right: str = "dense"
    seed: int = 0
    fewer: tuple[int, ...] = ()
    sampling: str = "uniform"

    def frames_of(self, stored: int) -> int:
        """F of a video with so many stored frames."""
        return min((count for count in self.fewer if stored <= count), default=self.frames)

    def whole(self, video: VideoInfo) -> np.ndarray:
        """int64[n], n <= F: the frames of a whole video, as training shows them."""
        frames = self.frames_of(len(video.timestamps))
        return sampling.shown(self.sampling, video.timestamps, frames, 0.0, video.duration)

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("frames", self.frames >= 1, "at least 1"),
            ("fewer", all(1 <= n < self.frames for n in self.fewer), "numbers below frames"),
            ("mix", 0 <= self.mix <= 1, "in [0, 1]"),
            ("subset", 0 < self.subset < 1, "in (0, 1)"),
            ("right", self.right in ("dense", "whole"), "'dense' or 'whole'"),
        ):
            if not good:
                raise UserError(f"{name}: {getattr(self, name)!r}, expected {expected}.")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sampled answer.

    `length` counts tokens, with its stop if `finished`; `logp` is the sum of log-probabilities at
    temperature 1 under the frames that it was sampled with.
    """

    text: str
    length: int
    finished: bool
    logp: float


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A generated pair before filtering. `manipulated_logp` is the preferred answer's sum of
    log-probabilities under the manipulated frames."""

    question: Question
    evidence: Evidence
    sample: int
    chosen: Answer
    rejected: Answer
    manipulated_logp: float

    @property
    def gap(self) -> float:
        """log p(y_w | right) - log p(y_w | manipulated): how much the evidence matters."""
        return self.chosen.logp - self.manipulated_logp


@dataclasses.dataclass(frozen=True)
class FilterSettings:
    """Limits of the cheap filters.

    Attributes:
      near_equal: word-level similarity in [0, 1] from which two answers count as near-equal.
      length_ratio: largest ratio of the two token counts.
      gap: smallest likelihood gap (exclusive), in nats.
    """

    near_equal: float = 0.95
    length_ratio: float = 4.0
    gap: float = 0.0


# --- questions and evidence ---


def questions_of(dataset: PreparedDataset, video_id: str, limit: int,
                 seed: int) -> list[Question]:
    """The conversation turns of one video, at most `limit`, drawn by `seed`; none is asked twice.

    Turns that call a head are left out: they have no answer text to prefer.
    """
    examples, duration = dataset.examples(video_id), dataset.video_info(video_id).duration
    found: dict[str, Question] = {}
    for example in examples:
        for index, turn in enumerate(example.turns):
            if example.task != "conversation" or "<" in turn.question + turn.answer:
                continue
            draw = random_of(seed, f"{example.example_id}/{index}/options")
            shown = turn.options and draw.random() < OPTIONS_SHOWN
            asked = render_options(turn.question, turn.options) if shown else turn.question
            segment = evidence_segment(example, turn, examples, duration)
            found.setdefault(asked, Question(example, index, asked, segment))
    order = random_of(seed, f"{video_id}/questions").permutation(len(found))
    questions = list(found.values())
    return [questions[i] for i in sorted(order[:limit])]


def evidence_segment(example: Example, turn: Turn, examples: Sequence[Example],
                     duration: float) -> tuple[float, float] | None:
    """[start, end] in seconds that the question is about, or None.

    Known when the example is bounded to a part of the video, or when temporal examples of the video
    ask for things that question and answer name: all words of theirs occur. Their windows are then
    joined, unless too little of the video would remain.
    """
    if example.end - example.start < LONGEST_SEGMENT * duration:
        return float(example.start), float(example.end)
    words = content_words(f"{turn.question} {turn.answer}")
    windows = []
    for other in examples:
        asked = content_words(other.turns[0].question) if other.task == "temporal" else None
        if asked and asked <= words:
            windows += [window for one in parts(other) for window in one.targets["windows"]]
    if not windows:
        return None
    start, end = float(min(s for s, _ in windows)), float(max(e for _, e in windows))
    return (start, end) if end - start < LONGEST_SEGMENT * duration else None


def plan_evidence(question: Question, info: VideoInfo, settings: EvidenceSettings) -> Evidence:
    """Draws the manipulation and its frames for one question.

    Args:
      question: with or without a known segment.
      info: of its video.
      settings: with the ids of question and video they determine the draw.
    """
    timestamps, seed = info.timestamps, settings.seed
    whole = settings.whole(info)
    frames = len(whole)  # of every side
    # Drawn per video where possible, so that questions share the prefill of one set of frames.
    video = question.example.video_id
    segment = question.segment or _choose_segment(
        timestamps, random_of(seed, f"{video}/segment"))
    times = np.asarray(timestamps, np.float64)  # as `sampling` compares them
    outside = (times < segment[0]) | (times > segment[1])
    is_localized = random_of(seed, f"{question.question_id}/manipulation").random() < settings.mix
    if not is_localized or not outside.any():  # a video of very few frames has no remainder
        kept = sampling.random_subset(
            whole, max(1, round(settings.subset * frames)), [seed, name_id(f"{video}/subset")])
        return Evidence("comprehensive", _indices(whole), _indices(whole),
                        _indices(repeat_to(kept, frames)), None)
    dense = sampling.dense_segment(timestamps, frames, *segment)
    # Where the store has no frames between those of the whole video, dense shows only less.
    has_more = len(dense) > len(np.intersect1d(whole, np.flatnonzero(~outside)))
    reason = _why_whole(question, settings, has_more)
    right = whole if reason else repeat_to(dense, frames)
    rest = repeat_to(sampling.excluding(timestamps, frames, [segment]), frames)
    return Evidence("localized", _indices(whole), _indices(right), _indices(rest), segment,
                    reason or "dense")


def _why_whole(question: Question, settings: EvidenceSettings, has_more: bool) -> str | None:
    """Why the right frames of a localized pair are those of the whole video; None: they are not.

    Args:
      has_more: whether the store has more frames of the segment than the whole video shows.
    """
    if not question.segment:
        return "segment unknown"
    if settings.right == "whole":
        return "right=whole"
    if question.turn.kind in KINDS_ABOUT_TIME:
        return "question about time"
    return None if has_more else "no more frames stored"


def repeat_to(indices: np.ndarray, count: int) -> np.ndarray:
    """int64[count]: the given indices, each repeated (almost) equally often, in their order."""
    return np.asarray(indices, np.int64)[np.arange(count) * len(indices) // count]


def _choose_segment(timestamps: np.ndarray, draw: np.random.Generator) -> tuple[float, float]:
    duration = float(timestamps[-1] - timestamps[0])
    length = draw.uniform(*CHOSEN_SEGMENT) * duration
    start = float(timestamps[0]) + draw.uniform(0, duration - length)
    return start, start + length


def _indices(array: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in array)


def random_of(seed: int, name: str) -> np.random.Generator:
    """A random stream of its own for everything that has a name."""
    return np.random.default_rng([seed, name_id(name)])


def name_id(name: str) -> int:
    """uint32 of a name, the same in every process (unlike `hash`)."""
    return zlib.crc32(name.encode())


def content_words(text: str) -> frozenset[str]:
    """Lower-case words that carry meaning, without the s of verbs and plurals."""
    words = frozenset(re.findall(r"[a-z0-9]+", text.lower())) - _STOP_WORDS
    return frozenset(word.removesuffix("s") for word in words)


# --- filters ---

# Names the reason why a pair is not preferred on the known answer, or None when it is.
Judge = Callable[[Candidate], str | None]


def normalise(text: str) -> str:
    """Lower-case words without punctuation and articles, for comparing answers."""
    return " ".join(w for w in re.findall(r"[a-z0-9]+", text.lower())
                    if w not in ("a", "an", "the"))


def word_f1(text: str, reference: str) -> float:
    """Harmonic mean of word precision and recall after normalisation."""
    words, known = Counter(normalise(text).split()), Counter(normalise(reference).split())
    common = sum((words & known).values())
    return 2 * common / max(words.total() + known.total(), 1)


# What answers begin with that say why there is none.
_REFUSALS = re.compile(
    r"(i am |im |we are )?(sorry|afraid|unable|not able)\b|as (ai|language|assistant)\b"
    r"|(i|we) (cannot|cant|can not|could not|couldnt|do not know|dont know|am not sure)\b"
    r"|it is (not possible|impossible) to\b|(there is )?(not enough|no) (information|context)\b")


def is_refusal(text: str) -> bool:
    """Whether an answer says that there is none."""
    return bool(_REFUSALS.match(normalise(text.replace("'", "").replace("\u2019", ""))))


def judge_by_rules(candidate: Candidate) -> str | None:
    """The preferred answer must be right and the other wrong, against the known answer.

    Right means equal after normalisation; an open answer of more than six words (a caption) is
    right from a word F1 of 0.9 and wrong below 0.75, so that pairs in between are left out.
    """
    known = candidate.question.turn.answer
    if candidate.question.turn.options or len(known.split()) <= 6:
        score_w, score_l = (float(normalise(answer.text) == normalise(known))
                            for answer in (candidate.chosen, candidate.rejected))
    else:
        score_w, score_l = (word_f1(answer.text, known)
                            for answer in (candidate.chosen, candidate.rejected))
    if score_w < 0.9:
        return "judge: preferred answer is wrong"
    return "judge: dis-preferred answer is right" if score_l >= 0.75 else None


JUDGES: dict[str, Judge] = {"rules": judge_by_rules, "none": lambda candidate: None}


def cheap_reason(candidate: Candidate, settings: FilterSettings) -> str | None:
    """The first filter before the judge that drops the pair, by name, or None."""
    chosen, rejected = candidate.chosen, candidate.rejected
    if not chosen.finished or not rejected.finished:
        return "truncated"
    words_w, words_l = normalise(chosen.text).split(), normalise(rejected.text).split()
    if not words_w or not words_l:
        return "empty"
    if "<" in chosen.text + rejected.text:
        return "head call"
    if is_refusal(chosen.text) or is_refusal(rejected.text):
        return "refusal"
    if words_w == words_l:
        return "identical"
    if difflib.SequenceMatcher(None, words_w, words_l, False).ratio() >= settings.near_equal:
        return "near-equal"
    lengths = sorted((chosen.length, rejected.length))
    if lengths[1] > settings.length_ratio * lengths[0]:
        return "length ratio"
    if not candidate.gap > settings.gap:
        return "likelihood gap"
    return None


# --- the pair as a record ---


def to_example(candidate: Candidate, duration: float, drawn: Mapping[str, Any],
               train_frames: str = "whole") -> Example:
    """The pair as an Example of task "preference".

    Args:
      candidate: that was kept.
      duration: of the video, seconds.
      drawn: how the answers were drawn (temperature, top_p, seed, model, ...), kept in the targets.
      train_frames: of TRAIN_FRAMES; kept in the targets where it is not "whole".
    """
    question, evidence = candidate.question, candidate.evidence
    shown = evidence.frame_indices if train_frames == "whole" else evidence.chosen_indices
    return Example(
        example_id=f"{question.question_id}/pair", video_id=question.example.video_id,
        media=question.example.media, task="preference", source=question.example.source,
        start=0.0, end=duration,
        turns=(dataclasses.replace(question.turn, question=question.asked),),
        targets={
            "chosen": candidate.chosen.text,
            "rejected": candidate.rejected.text,
            "manipulation": evidence.manipulation,
            "segment": list(evidence.segment) if evidence.segment else None,
            "frame_indices": list(shown),
            "chosen_indices": list(evidence.chosen_indices),
            "manipulated_indices": list(evidence.manipulated_indices),
            "chosen_logp": candidate.chosen.logp,
            "chosen_logp_manipulated": candidate.manipulated_logp,
            "rejected_logp_manipulated": candidate.rejected.logp,
            "sample": candidate.sample,
            **({} if train_frames == "whole" else {"train_frames": train_frames}),
            **drawn,
        })
