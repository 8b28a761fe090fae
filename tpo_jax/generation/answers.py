"""Runs the model on one side of its questions: with the right frames, or with manipulated ones.

Questions that share a video and a set of frames share one prefill, however many they are; all
samples reuse it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.pipeline import row_builder
from tpo_jax.data.records import PreparedDataset
from tpo_jax.data.rows import BranchPlan, RowBuilder, RowPlan, row_id, stack_rows
from tpo_jax.data.text import TextCodec, render_options
from tpo_jax.errors import UserError
from tpo_jax.generation import pairs
from tpo_jax.generation.pairs import Answer, Evidence, Question
from tpo_jax.generation.sampler import (
    Arrays,
    Context,
    Generation,
    Sampler,
    Sampling,
    branch_keys,
    with_answers,
)
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import reader_shard

LONG_ANSWER = 10  # tokens of a known answer from which a question goes to rows of long answers
SCORED_TOKENS = 16  # scored answers are padded to a multiple of this

# question number, sample number -> answer and the tokens of it
Drawn = dict[tuple[int, int], tuple[Answer, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pairs are generated.

    Attributes:
      evidence: how frames are drawn.
      filters: which pairs are kept.
      max_new: answer tokens at most, the stop included.
      temperature, top_p: of sampling; temperature 0 is greedy.
      questions: most questions of a video.
      samples: pairs drawn for a question; the first that passes the filters is kept.
      batch_size: B, rows at a time.
      branches: K, questions about a set of frames that are answered at a time.
      train_frames: which frames a pair gives to training, of `pairs.TRAIN_FRAMES`.
    """

    evidence: pairs.EvidenceSettings
    filters: pairs.FilterSettings
    max_new: int
    temperature: float = 0.7
    top_p: float = 0.95
    questions: int = 16
    samples: int = 2
    batch_size: int = 16
    branches: int = 4
    train_frames: str = "whole"

    def __post_init__(self) -> None:
        for name in ("max_new", "questions", "samples", "batch_size", "branches"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)}, expected at least 1.")


@dataclasses.dataclass(frozen=True)
class _Row:
    """At most K questions (by number) that are asked about one set of frames at a time."""

    video_id: str
    indices: tuple[int, ...]
    questions: list[int]


@dataclasses.dataclass(frozen=True)
class _Clip:
    """One set of frames and all questions about it, at most K in a list. Those with long answers
    are kept apart: what is answered at a time runs until its longest answer ends."""

    video_id: str
    indices: tuple[int, ...]
    short: list[list[int]]
    long: list[list[int]]


# Function of (sample number, answers, rows): sums of log-probabilities, by question and sample
Scorer = Callable[[int, Drawn, Sequence[_Row]], dict[tuple[int, int], float]]
Answered = tuple[list[_Row], Drawn, Scorer]


class AnswerGenerator:
    """Answers questions about videos of one prepared split.

    All questions are padded to `prompt` tokens and all clips, which may have fewer frames, to
    `settings.evidence.frames`: one program. `poll` is called before every batch; what it raises
    ends the work. With a `mesh` the rows of a batch are split over it, and each process reads the
    videos of its own; every one gets all answers.
    """

    def __init__(self, model: FunctionalModel, params: Any, codec: TextCodec,
                 dataset: PreparedDataset, settings: Settings, prompt: int,
                 poll: Callable[[], None] = lambda: None, mesh: Mesh | None = None):
        self._poll = poll
        index, count = (0, 1) if mesh is None else reader_shard(mesh)
        own = settings.batch_size // count
        self._own = slice(index * own, (index + 1) * own)  # rows of a batch that are read here
        self.params, self.codec, self.dataset = params, codec, dataset
        self.settings = settings
        self.sampler = Sampler(model, codec, Sampling(
            settings.max_new, 1, settings.temperature, settings.top_p), mesh)
        config = dataclasses.replace(  # no head is called
            model.config, clip_features=None, text_features=None)
        self._builder: RowBuilder = row_builder(codec, config, Bucket(
            name="pairs", media="video", batch_size=settings.batch_size,
            frames=settings.evidence.frames, branches=settings.branches,
            branch_tokens=-(-prompt // 8) * 8, answers=1, windows=1,
            mask_size=model.config.mask_size))

    def answers(self, questions: Sequence[Question], evidence: Sequence[Evidence], side: str,
                skip: Callable[[list[int]], bool] = lambda numbers: False
                ) -> Iterator[Answered]:
        """Yields (rows, drawn answers, scorer of other answers in the same context) per batch.

        B clips are encoded once; a batch is the next K questions about each of them. `skip` is
        asked with the numbers of a batch's questions. Batches stay what they are where others are
        skipped, so that an answer does not depend on what was done before.
        """
        clips = self._clips(questions, evidence, f"{side}_indices")
        size = self.settings.batch_size
        for first in range(0, len(clips), size):
            yield from self._answers_about(clips[first : first + size], questions, side, skip)

    def _answers_about(self, clips: Sequence[_Clip], questions: Sequence[Question], side: str,
                       skip: Callable[[list[int]], bool]) -> Iterator[Answered]:
        context = None
        for now in _rounds(clips):
            self._poll()
            if skip([number for row in now for number in row.questions]):
                continue
            batch = self._batch(now[self._own], questions, read_frames=context is None)
            if context is None:
                context = self.sampler.prefill(self.params, batch)
            ids = np.zeros(batch["branch_tokens"].shape[:2], np.uint32)
            for b, k, number in _places(now[self._own]):
                ids[b, k] = pairs.name_id(f"{questions[number].question_id}/{side}")
            drawn: Drawn = {}
            for sample in range(self.settings.samples):
                keys = branch_keys(self.settings.evidence.seed, ids, sample)
                out = self.sampler.generate(self.params, context, batch, keys)
                drawn |= self._read(jax.device_get(out), now, sample)
            yield now, drawn, self._scorer(context, batch)

    def _clips(self, questions: Sequence[Question], evidence: Sequence[Evidence],
               field: str) -> list[_Clip]:
        """Questions by video and frames. Clips with as many of them are neighbours, so that few
        places of a batch stay empty: more and more short answers, then fewer and fewer beside a
        long one, and so on."""
        lengths = [len(self.codec.encode(q.turn.answer)) for q in questions]
        groups: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
        for number, (question, plan) in enumerate(zip(questions, evidence, strict=True)):
            groups[question.example.video_id, getattr(plan, field)].append(number)

        def cut(numbers: list[int]) -> list[list[int]]:
            K = self.settings.branches
            return [numbers[i : i + K] for i in range(0, len(numbers), K)]

        clips = [_Clip(*key, cut([n for n in numbers if lengths[n] <= LONG_ANSWER]),
                       cut([n for n in numbers if lengths[n] > LONG_ANSWER]))
                 for key, numbers in groups.items()]
        return sorted(clips, key=lambda clip: (
            len(clip.long), len(clip.short) * (-1) ** len(clip.long),
            max(lengths[n] for part in clip.short + clip.long for n in part)))

    def _batch(self, rows: Sequence[_Row], questions: Sequence[Question],
               read_frames: bool) -> Arrays:
        """The prompts of this process's rows; blank ones fill the batch."""
        built = []
        for row in rows:
            branches = tuple(BranchPlan(questions[n].example, questions[n].index,
                                        questions[n].asked, None) for n in row.questions)
            duration = self.dataset.video_info(row.video_id).duration
            plan = RowPlan(self.dataset, row.video_id, 0.0, duration, branches,
                           frame_indices=row.indices)
            built.append(self._builder.build(plan, row_id("pairs", len(built)), read_frames))
        blank = [self._builder.blank()] * (self._own.stop - self._own.start - len(built))
        return stack_rows(built + blank)

    def _read(self, out: Generation, rows: Sequence[_Row], sample: int) -> Drawn:
        drawn = {}
        for b, k, number in _places(rows):
            tokens = out.tokens[b, k, : out.lengths[b, k]]
            answer = Answer(self.codec.decode(tokens).strip(), len(tokens),
                            bool(out.finished[b, k]), float(out.logps[b, k].sum()))
            drawn[number, sample] = (answer, tokens)
        return drawn

    def _scorer(self, context: Context, batch: Arrays) -> Scorer:
        """Function of (sample, answers, rows): sums of log-probabilities of the answers there."""

        def score(sample: int, answers: Drawn, rows: Sequence[_Row]
                  ) -> dict[tuple[int, int], float]:
            B, K = self.settings.batch_size, self.settings.branches
            longest = max(len(answers[number, sample][1]) for _, _, number in _places(rows))
            # Few distinct widths, because each compiles once.
            tokens = np.zeros((B, K, -(-longest // SCORED_TOKENS) * SCORED_TOKENS), np.int32)
            lengths = np.zeros((B, K), np.int32)
            for b, k, number in _places(rows):
                ids = answers[number, sample][1]
                tokens[b, k, : len(ids)], lengths[b, k] = ids, len(ids)
            answered = with_answers(batch, tokens[self._own], lengths[self._own])
            logps = np.asarray(self.sampler.score(self.params, context, answered))
            real = np.arange(tokens.shape[-1]) < lengths[..., None]
            sums = np.where(real, logps, 0).sum(-1)
            return {(number, sample): float(sums[b, k]) for b, k, number in _places(rows)}

        return score


def _rounds(clips: Sequence[_Clip]) -> Iterator[list[_Row]]:
    """The next questions about every clip, until none has more; a clip may have none of a round."""
    for side in ("short", "long"):
        parts = [getattr(clip, side) for clip in clips]
        for part in itertools.zip_longest(*parts, fillvalue=[]):
            yield [_Row(clip.video_id, clip.indices, numbers)
                   for clip, numbers in zip(clips, part, strict=True)]


def _places(rows: Sequence[_Row]) -> Iterator[tuple[int, int, int]]:
    """(row, branch, question number)."""
    for b, row in enumerate(rows):
        for k, number in enumerate(row.questions):
            yield b, k, number


def shuffled_videos(dataset: PreparedDataset, seed: int) -> list[str]:
    """All videos of a split in random order, without its images."""
    videos = [v for v in dataset.videos if dataset.video_info(v).media == "video"]
    order = pairs.random_of(seed, "videos").permutation(len(videos))
    return [videos[i] for i in order]


def longest_texts(dataset: PreparedDataset, codec: TextCodec) -> tuple[int, int]:
    """Tokens of the longest prompt and answer of a split, so that no length needs setting."""
    prompt, answer = 0, 0
    for video_id in dataset.videos:
        for example in dataset.examples(video_id):
            for turn in example.turns if example.task == "conversation" else ():
                if "<" not in turn.question + turn.answer:
                    text = render_options(turn.question, turn.options)
                    prompt = max(prompt, len(codec.build_branch(text, None).ids))
                    answer = max(answer, len(codec.encode(turn.answer)))
    if not prompt:
        raise UserError(f"{dataset.path}: no conversation to ask questions from; prepare the "
                        "split with conversation annotations")
    return prompt, answer
