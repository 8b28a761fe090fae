"""Our own model in the pipeline: what answers both sides, and a speaker for the other parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh

from tpo_jax.data.records import Example, PreparedDataset, Turn
from tpo_jax.data.text import TextCodec
from tpo_jax.generation.answers import Answered, AnswerGenerator, Drawn, Settings
from tpo_jax.generation.pairs import Answer, Evidence, Question
from tpo_jax.generation.pipeline.manifest import Record
from tpo_jax.generation.pipeline.plugins import Done, Fields, Outputs, Reply, Request
from tpo_jax.models.video_language import FunctionalModel

Job = TypeVar("Job")
PROMPT_STEP = 32  # prompts are padded to a multiple of this, because each length compiles once


@dataclasses.dataclass(frozen=True)
class OwnModel:
    """A model that is loaded and placed on `mesh`; `poll` is called before every batch.

    `weights` is the hash of its parameters, for records and fingerprints.
    """

    model: FunctionalModel
    params: Any
    codec: TextCodec
    dataset: PreparedDataset
    weights: str
    poll: Callable[[], None] = lambda: None
    mesh: Mesh | None = None

    def prompt_tokens(self, text: str) -> int:
        return len(self.codec.build_branch(text, None).ids)


class _Generators:
    """An AnswerGenerator for each number of frames and padded length of prompts: each is a program.

    Args:
      prompt: tokens of the longest prompt that there will be; 0 where that is not known.
    """

    def __init__(self, own: OwnModel, settings: Settings, prompt: int = 0):
        self._own, self._settings, self._prompt = own, settings, prompt
        self._made: dict[tuple[int, int], AnswerGenerator] = {}

    def answers(self, questions: Sequence[Question], indices: Sequence[Sequence[int]], side: str,
                skip: Callable[[list[int]], bool]) -> Iterator[Answered]:
        """As `AnswerGenerator.answers`. All questions have the same F."""
        frames = self._settings.evidence.frames_of(len(indices[0]))
        generator = self._of([q.asked for q in questions], frames)
        evidence = [Evidence("", *[tuple(i)] * 3, None) for i in indices]
        return generator.answers(questions, evidence, side, skip)

    def _of(self, texts: Sequence[str], frames: int) -> AnswerGenerator:
        longest = self._prompt or max(self._own.prompt_tokens(text) for text in texts)
        step = 1 if self._prompt else PROMPT_STEP
        key = frames, -(-longest // step) * step
        if key not in self._made:
            own = self._own
            evidence = dataclasses.replace(self._settings.evidence, frames=frames, fewer=())
            self._made[key] = AnswerGenerator(
                own.model, own.params, own.codec, own.dataset,
                dataclasses.replace(self._settings, evidence=evidence), key[1], own.poll, own.mesh)
        return self._made[key]


class ModelAnswerer:
    """Answers with right frames, then with manipulated ones, `settings.samples` times each.

    Args:
      prompt: tokens of the longest question that there will be; 0 where that is not known.
    """

    def __init__(self, own: OwnModel, settings: Settings, prompt: int = 0):
        self.settings, self.weights = settings, own.weights
        self._generators = _Generators(own, settings, prompt)

    def preferred(self, jobs: Sequence[Record], done: Done) -> Outputs:
        """Fields are answers and, per sample, chosen_logp: of the answer under these frames, from
        the program that scores it under the manipulated ones and not from the one that drew it."""
        return self._side(jobs, done, "chosen")

    def dispreferred(self, jobs: Sequence[Record], done: Done) -> Outputs:
        """Fields are answers and, per sample, chosen_logp: of the job's chosen answer under the
        manipulated frames."""
        return self._side(jobs, done, "manipulated")

    def _side(self, jobs: Sequence[Record], done: Done, side: str) -> Outputs:
        samples = range(self.settings.samples)
        for group in _by_frames(jobs, lambda job: job["frame_indices"], self.settings):
            for rows, drawn, score in self._batches(group, done, side):
                chosen, scores = drawn if side == "chosen" else _chosen_of(group), {}
                for sample in samples:
                    scores |= score(sample, chosen, rows)
                for number in _numbers(rows):
                    yield group[number]["id"], {
                        "answers": self._answers(drawn, number),
                        "chosen_logp": [scores[number, sample] for sample in samples]}

    def _batches(self, jobs: Sequence[Record], done: Done, side: str) -> Iterator[Answered]:
        return self._generators.answers(
            [question_of(job) for job in jobs], [job["frame_indices"] for job in jobs], side,
            _are_done(jobs, done))

    def _answers(self, drawn: Drawn, number: int) -> list[Fields]:
        answers = []
        for sample in range(self.settings.samples):
            answer, tokens = drawn[number, sample]
            answers.append({"text": answer.text, "tokens": [int(t) for t in tokens],
                            "finished": answer.finished, "logp": answer.logp})
        return answers


def _chosen_of(jobs: Sequence[Record]) -> Drawn:
    """The answers that the preferred side gave."""
    return {(number, sample): (read_answer(answer), np.asarray(answer["tokens"], np.int32))
            for number, job in enumerate(jobs) for sample, answer in enumerate(job["chosen"])}


class ModelSpeaker:
    """Our own model as captioner, question writer or judge.

    Args:
      settings: one sample.
      longest: tokens of a prompt from which on a request fails.
    """

    def __init__(self, own: OwnModel, settings: Settings, longest: int):
        self._own, self._settings, self._longest = own, settings, longest
        self.temperature = settings.temperature
        self._generators = _Generators(own, settings)

    def say(self, requests: Sequence[Request], done: Done) -> Iterator[tuple[str, Reply]]:
        fitting = []
        for request in requests:
            # What looks like a marker would be read as one.
            request = dataclasses.replace(request, text=request.text.replace("<", "< "))
            length = self._own.prompt_tokens(request.text)
            if length > self._longest:
                yield request.id, Reply(failed=f"prompt is longer than {self._longest} tokens")
            else:
                fitting.append(request)
        for group in _by_frames(fitting, lambda request: request.frame_indices, self._settings):
            yield from self._say(group, done)

    def _say(self, group: Sequence[Request], done: Done) -> Iterator[tuple[str, Reply]]:
        skip = _are_done([{"id": request.id} for request in group], done)
        for rows, drawn, _ in self._generators.answers(
                [_asked(request) for request in group],
                [request.frame_indices for request in group], "chosen", skip):
            for number in _numbers(rows):
                answer = drawn[number, 0][0]
                failed = None if answer.finished else "reply was cut off"
                yield group[number].id, Reply(answer.text, failed)


def question_of(record: Record) -> Question:
    """The question behind a record with question_id (or id), video_id, asked, kind, ..."""
    name, _, index = record.get("question_id", record["id"]).rpartition("/")
    turn = Turn(record["question"], record["answer"], tuple(record["options"]), record["kind"])
    # A question is named by its example and turn: turns before it are not needed, their number is.
    example = Example(name, record["video_id"], "video", "conversation", record["source"],
                      0.0, float("inf"), (turn,) * (int(index) + 1), {})
    segment = tuple(record["segment"]) if record.get("segment") else None
    return Question(example, int(index), record["asked"], segment)


def read_answer(fields: Fields) -> Answer:
    return Answer(fields["text"], len(fields["tokens"]), fields["finished"], fields["logp"])


def _asked(request: Request) -> Question:
    example = Example(request.id, request.video_id, "video", "conversation", "generated", 0.0,
                      float("inf"), (Turn(request.text, ""),), {})
    return Question(example, 0, request.text, None)


def _by_frames(jobs: Sequence[Job], indices: Callable[[Job], Sequence[int]],
               settings: Settings) -> list[list[Job]]:
    """The jobs of each F that takes their frames, fewest first: each is a program."""
    groups: dict[int, list[Job]] = {}
    for job in jobs:
        groups.setdefault(settings.evidence.frames_of(len(indices(job))), []).append(job)
    return [groups[count] for count in sorted(groups)]


def _numbers(rows: Sequence[Any]) -> Iterator[int]:
    for row in rows:
        yield from row.questions


def _are_done(jobs: Sequence[Record], done: Done) -> Callable[[list[int]], bool]:
    return lambda numbers: all(jobs[number]["id"] in done for number in numbers)
