"""Preference pairs: questions, right and manipulated evidence, filters and the judge.

Following Temporal Preference Optimization, the model answers one question twice: the preferred
answer with the right frames, the dis-preferred one with manipulated frames.

* localized: the right frames are dense in the segment that the question is about (uniform over the
  video when it is unknown), the manipulated ones come from the remainder, the segment excluded.
* comprehensive: the right frames are uniform over the video, the manipulated ones are a sparse
  random subset of them, repeated to the same number.

Everything here is a pure function of its arguments and a seed; `tpo_jax.preferences` runs it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from tpo_jax.data import sampling
from tpo_jax.data.records import Example, PreparedDataset, Turn

MANIPULATIONS = ("localized", "comprehensive")
# Share of the duration that a segment may have: of a longer one too little remains outside.
LONGEST_SEGMENT = 0.7
CHOSEN_SEGMENT = (0.3, 0.6)  # share of the duration, where no example tells the segment
_STOP_WORDS = frozenset("a an and are at by does do for from how in is it its of on or the then "
                        "there this to was were what when where which while who with".split())


@dataclasses.dataclass(frozen=True)
class Question:
    """One turn that the model will answer, with the known answer for the judge.

    `segment` is [start, end] in seconds of the evidence, None when no example tells it.
    """

    question_id: str
    video_id: str
    media: str
    turn: Turn
    segment: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Frame indices behind one pair, each of length F.

    Attributes:
      manipulation: "localized" or "comprehensive".
      frame_indices: uniform over the video; what training shows.
      chosen_indices: what the preferred answer was generated with.
      manipulated_indices: what the dis-preferred answer was generated with.
      segment: the excluded segment in seconds (localized), else None.
    """

    manipulation: str
    frame_indices: tuple[int, ...]
    chosen_indices: tuple[int, ...]
    manipulated_indices: tuple[int, ...]
    segment: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Answer:
    """One sampled answer.

    `tokens` ends with <eos> if `finished`; `logp` is the sum of log-probabilities at temperature 1
    under the frames that it was sampled with.
    """

    text: str
    tokens: tuple[int, ...]
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
      judge: name in JUDGES.
    """

    near_equal: float = 0.95
    length_ratio: float = 4.0
    gap: float = 0.0
    judge: str = "rules"


# --- questions and evidence ---


def questions_of(dataset: PreparedDataset, video_id: str, limit: int, seed: int) -> list[Question]:
    """The conversation turns of one video without markers, at most `limit`, chosen by `seed`."""
    examples = dataset.examples(video_id)
    found = []
    for example in examples:
        if example.task != "conversation":
            continue
        for index, turn in enumerate(example.turns):
            if "<" in turn.question + turn.answer:
                continue  # a turn that calls a head has no answer text to prefer
            segment = evidence_segment(example, turn, examples,
                                       dataset.video_info(video_id).duration)
            found.append(Question(f"{example.example_id}/{index}", video_id, example.media, turn,
                                  segment))
    if len(found) > limit:
        order = np.random.default_rng([seed, _stable_id(video_id)]).permutation(len(found))
        found = [found[i] for i in sorted(order[:limit])]
    return found


def evidence_segment(example: Example, turn: Turn, examples: Sequence[Example],
                     duration: float) -> tuple[float, float] | None:
    """[start, end] in seconds that the question is about, or None.

    Known when the example is bounded to a part of the video, or when a temporal example of the
    video asks about the same things: all content words of its question are in this question.
    """
    if example.end - example.start < LONGEST_SEGMENT * duration:
        return float(example.start), float(example.end)
    words = _content_words(turn.question)
    for other in examples:
        if other.task != "temporal" or not other.targets["windows"]:
            continue
        asked = _content_words(other.turns[0].question)
        if asked and asked <= words:
            start = min(s for s, _ in other.targets["windows"])
            end = max(e for _, e in other.targets["windows"])
            if end - start < LONGEST_SEGMENT * duration:
                return float(start), float(end)
    return None


def plan_evidence(question: Question, timestamps: np.ndarray, frames: int, mix: float,
                  subset: float, seed: int) -> Evidence:
    """Draws the manipulation and its frames for one question.

    Args:
      question: with or without a known segment.
      timestamps: float32[n] seconds of the stored frames.
      frames: F, of every list of indices.
      mix: probability of "localized" (the rest is "comprehensive").
      subset: share of the F frames that the comprehensive manipulation keeps.
      seed: with the question id it determines the drawing.
    """
    video_seed = [seed, _stable_id(question.video_id)]
    whole = sampling.uniform(timestamps, frames)
    draw = np.random.default_rng([seed, _stable_id(question.question_id)])
    if draw.random() >= mix:
        # One subset per video, so that its questions share one prefill.
        kept = sampling.random_subset(whole, max(1, round(subset * frames)), video_seed)
        return Evidence("comprehensive", _indices(whole), _indices(whole),
                        _indices(repeat_to(kept, frames)), None)
    if question.segment is not None:
        segment = question.segment
        right = repeat_to(sampling.dense_segment(timestamps, frames, *segment), frames)
    else:
        segment = _choose_segment(timestamps, np.random.default_rng(video_seed))
        right = whole
    rest = repeat_to(sampling.excluding(timestamps, frames, [segment]), frames)
    return Evidence("localized", _indices(whole), _indices(right), _indices(rest), segment)


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


def _stable_id(text: str) -> int:
    """A number that names a string the same way in every process (unlike `hash`)."""
    return int.from_bytes(text.encode(), "little")


def _content_words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower())) - _STOP_WORDS


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


def reject_reason(candidate: Candidate, settings: FilterSettings) -> str | None:
    """The first filter that drops the pair, by name, or None when it is kept."""
    chosen, rejected = candidate.chosen, candidate.rejected
    if not chosen.finished or not rejected.finished:
        return "truncated"
    words_w, words_l = normalise(chosen.text).split(), normalise(rejected.text).split()
    if not words_w or not words_l:
        return "empty"
    if words_w == words_l:
        return "identical"
    if difflib.SequenceMatcher(None, words_w, words_l, False).ratio() >= settings.near_equal:
        return "near-equal"
    lengths = sorted((len(chosen.tokens), len(rejected.tokens)))
    if lengths[1] > settings.length_ratio * lengths[0]:
        return "length ratio"
    if not candidate.gap > settings.gap:
        return "likelihood gap"
    return JUDGES[settings.judge](candidate)


# --- the pair as a record ---


def to_example(candidate: Candidate, settings: dict) -> Example:
    """The pair as a "preference" example; `settings` (temperature, seed, ...) goes into targets."""
    question, evidence = candidate.question, candidate.evidence
    return Example(
        example_id=f"{question.question_id}/pair-{candidate.sample}",
        video_id=question.video_id, media=question.media, task="preference",
        source="self-generated", start=0.0, end=settings["duration"],
        turns=(dataclasses.replace(question.turn),),
        targets={
            "chosen": candidate.chosen.text,
            "rejected": candidate.rejected.text,
            "manipulation": evidence.manipulation,
            "segment": list(evidence.segment) if evidence.segment else None,
            "frame_indices": list(evidence.frame_indices),
            "chosen_indices": list(evidence.chosen_indices),
            "manipulated_indices": list(evidence.manipulated_indices),
            "chosen_logp": candidate.chosen.logp,
            "rejected_logp": candidate.rejected.logp,
            "chosen_logp_manipulated": candidate.manipulated_logp,
            **settings,
        })
