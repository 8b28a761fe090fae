"""Our own model in the pipeline: what answers both sides, and a speaker for the other parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tpo_jax.data.records import Example, PreparedDataset, Turn
from tpo_jax.data.text import TextCodec
from tpo_jax.generation.pair_generator import Drawn, PairGenerator, Settings
from tpo_jax.generation.pairs import Answer, Evidence, Question
from tpo_jax.generation.pipeline.manifest import Record
from tpo_jax.generation.pipeline.plugins import Done, Fields, Outputs, Reply, Request
from tpo_jax.models.video_language import FunctionalModel

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
    """A PairGenerator per padded length of prompts, so that a length compiles once."""

    def __init__(self, own: OwnModel, settings: Settings):
        self._own, self._settings = own, settings
        self._made: dict[int, PairGenerator] = {}

    def of(self, texts: Sequence[str]) -> PairGenerator:
        longest = max(self._own.prompt_tokens(text) for text in texts)
        padded = -(-longest // PROMPT_STEP) * PROMPT_STEP
        if padded not in self._made:
            own = self._own
            self._made[padded] = PairGenerator(
                own.model, own.params, own.codec, own.dataset, self._settings, own.poll,
                lengths=(padded, self._settings.max_new), mesh=own.mesh)
        return self._made[padded]


class ModelAnswerer:
    """Answers with right frames, then with manipulated ones, `settings.samples` times each.

    `settings.max_new` must be given: answers to written questions are not known.
    """

    def __init__(self, own: OwnModel, settings: Settings):
        self.settings, self.weights = settings, own.weights
        self._generators = _Generators(own, settings)

    def preferred(self, jobs: Sequence[Record], done: Done) -> Outputs:
        """Fields are answers, one per sample."""
        for rows, drawn, _ in self._batches(jobs, done, "chosen"):
            for number in _numbers(rows):
                yield jobs[number]["id"], {"answers": self._answers(drawn, number)}

    def dispreferred(self, jobs: Sequence[Record], done: Done) -> Outputs:
        """Fields are answers and, per sample, chosen_logp: of the job's chosen answer under the
        manipulated frames."""
        chosen: Drawn = {}
        for number, job in enumerate(jobs):
            for sample, answer in enumerate(job["chosen"]):
                tokens = np.asarray(answer["tokens"], np.int32)
                chosen[number, sample] = (read_answer(answer), tokens)
        for rows, drawn, score in self._batches(jobs, done, "manipulated"):
            scores = {}
            for sample in range(self.settings.samples):
                scores |= score(sample, chosen, rows)
            for number in _numbers(rows):
                yield jobs[number]["id"], {
                    "answers": self._answers(drawn, number),
                    "chosen_logp": [scores[number, s] for s in range(self.settings.samples)]}

    def _batches(self, jobs: Sequence[Record], done: Done, side: str):
        if not jobs:
            return iter(())
        generator = self._generators.of([job["asked"] for job in jobs])
        questions = [question_of(job) for job in jobs]
        indices = [tuple(job["frame_indices"]) for job in jobs]
        evidence = [Evidence("", i, i, i, None) for i in indices]
        return generator.answers(questions, evidence, side, _are_done(jobs, done))

    def _answers(self, drawn: Drawn, number: int) -> list[Fields]:
        answers = []
        for sample in range(self.settings.samples):
            answer, tokens = drawn[number, sample]
            answers.append({"text": answer.text, "tokens": [int(t) for t in tokens],
                            "finished": answer.finished, "logp": answer.logp})
        return answers


class ModelSpeaker:
    """Our own model as captioner, question writer or judge.

    Args:
      settings: one sample, with `max_new`, and as many frames as the requests bring.
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
        if not fitting:
            return
        generator = self._generators.of([request.text for request in fitting])
        questions = [_asked(request) for request in fitting]
        evidence = [Evidence("", r.frame_indices, r.frame_indices, r.frame_indices, None)
                    for r in fitting]
        skip = _are_done([{"id": request.id} for request in fitting], done)
        for rows, drawn, _ in generator.answers(questions, evidence, "chosen", skip):
            for number in _numbers(rows):
                answer = drawn[number, 0][0]
                failed = None if answer.finished else "reply was cut off"
                yield fitting[number].id, Reply(answer.text, failed)


def question_of(record: Record) -> Question:
    """The question behind a record with question_id (or id), video_id, asked, kind, ..."""
    name, _, index = record.get("question_id", record["id"]).rpartition("/")
    turn = Turn(record["question"], record["answer"], tuple(record["options"]), record["kind"])
    # A question is named by its example and turn: turns before it are not needed, their number is.
    example = Example(name, record["video_id"], "video", "conversation", "generated", 0.0,
                      float("inf"), (turn,) * (int(index) + 1), {})
    segment = tuple(record["segment"]) if record.get("segment") else None
    return Question(example, int(index), record["asked"], segment)


def read_answer(fields: Fields) -> Answer:
    return Answer(fields["text"], len(fields["tokens"]), fields["finished"], fields["logp"])


def _asked(request: Request) -> Question:
    example = Example(request.id, request.video_id, "video", "conversation", "generated", 0.0,
                      float("inf"), (Turn(request.text, ""),), {})
    return Question(example, 0, request.text, None)


def _numbers(rows: Sequence[Any]) -> Iterator[int]:
    for row in rows:
        yield from row.questions


def _are_done(jobs: Sequence[Record], done: Done) -> Callable[[list[int]], bool]:
    return lambda numbers: all(jobs[number]["id"] in done for number in numbers)
