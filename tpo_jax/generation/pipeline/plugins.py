"""Captioners, question writers and judges by name.

`rules` reads the annotations of moving_shapes (or of any split with conversations). `model` and
`endpoint` are speakers: something that is asked with a text and pictures and replies with a text.

Every plug-in takes the jobs of a chunk and yields (id, fields of the record) in an order that
depends on the jobs alone. Jobs in `done` have a record; they may be left out or done again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol

from tpo_jax.data.records import Example, PreparedDataset, Turn
from tpo_jax.errors import UserError
from tpo_jax.generation import pairs
from tpo_jax.generation.pairs import Candidate
from tpo_jax.generation.pipeline import prompts
from tpo_jax.generation.pipeline.endpoint import Endpoint, RequestRefused
from tpo_jax.generation.pipeline.manifest import Record

NAMES = ("rules", "model", "endpoint")
Fields = dict[str, Any]
Outputs = Iterator[tuple[str, Fields]]
Done = Collection[str]


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to a speaker.

    Attributes:
      id: names its random stream.
      video_id: whose frames.
      text: of the question.
      frame_indices: the frames that go with it.
      needs_pictures: False where an endpoint answers from the text alone; our own model, which
        always sees a video, is shown the frames nevertheless.
    """

    id: str
    video_id: str
    text: str
    frame_indices: tuple[int, ...]
    needs_pictures: bool


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back. `failed` says why there is no text; `usage` is that of an endpoint, over all
    tries of the request."""

    text: str = ""
    failed: str | None = None
    usage: dict[str, int] | None = None

    def fields(self) -> Fields:
        """What every record keeps of it."""
        kept: Fields = {"usage": self.usage} if self.usage else {}
        return kept | ({"failed": self.failed} if self.failed else {})


class Speaker(Protocol):
    """`temperature` is the one that its replies are asked for with, None where that is left to a
    server; `say` yields one reply per request that is not done."""

    temperature: float | None

    def say(self, requests: Sequence[Request],
            done: Done) -> Iterator[tuple[str, Reply]]: ...


class Captioner(Protocol):
    """Jobs have id, video_id, segment [s, e] and frame_indices; fields are caption or failed."""

    temperature: float | None

    def caption(self, jobs: Sequence[Record], done: Done) -> Outputs: ...


class Writer(Protocol):
    """`slots` are the questions to write about a video; fields of `write` are question, asked,
    answer, options, kind and segment, or failed."""

    temperature: float | None

    def slots(self, video: Record, captions: Sequence[Record]) -> list[Record]: ...

    def write(self, jobs: Sequence[Record], done: Done) -> Outputs: ...


class Judge(Protocol):
    """Jobs come with the candidate that they are about; fields are reason (None: keep) and
    verdict."""

    temperature: float | None

    def judge(self, jobs: Sequence[tuple[Record, Candidate]], done: Done) -> Outputs: ...


# --- speakers ---


class EndpointSpeaker:
    """Replies of an endpoint, `workers` requests at a time.

    Where there is a budget the first goes alone: its reply tells how long such prompts are. What
    was asked is waited for and yielded before an error is raised: nothing that was paid for
    is lost.
    """

    def __init__(self, endpoint: Endpoint, dataset: PreparedDataset, seed: int, max_tokens: int,
                 workers: int = 4, poll: Callable[[], None] = lambda: None):
        if workers < 1:
            raise UserError(f"--workers={workers}: expected at least 1")
        self._endpoint, self._dataset, self._poll = endpoint, dataset, poll
        self._seed, self._max_tokens, self._workers = seed, max_tokens, workers
        self._told = not endpoint.budget.limits
        # As it is sent: entries of the body go over ours, and None removes one.
        settings = endpoint.settings
        self.temperature = settings.body.get("temperature", settings.temperature)

    def say(self, requests: Sequence[Request], done: Done) -> Iterator[tuple[str, Reply]]:
        todo = collections.deque(request for request in requests if request.id not in done)
        running: collections.deque[tuple[str, concurrent.futures.Future]] = collections.deque()
        problem: Exception | None = None
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            while running or (todo and problem is None):
                most = self._workers if self._told else 1
                while todo and problem is None and len(running) < most:
                    try:
                        self._poll()
                    except Exception as error:
                        problem = error
                    else:
                        request = todo.popleft()
                        running.append((request.id, pool.submit(self._ask, request)))
                if not running:
                    continue
                name, future = running.popleft()
                try:
                    reply = future.result()
                except Exception as error:
                    problem = problem or error
                else:
                    self._told = self._told or bool(reply.usage)
                    yield name, reply
        if problem:
            raise problem

    def _ask(self, request: Request) -> Reply:
        pictures = (self._dataset.frames(request.video_id, request.frame_indices)
                    if request.needs_pictures else ())
        seed = pairs.name_id(f"{self._seed}/{request.id}") >> 1
        try:
            said = self._endpoint.ask(request.text, pictures, self._max_tokens, seed)
        except RequestRefused as error:
            return Reply(failed=f"endpoint: {error}", usage=error.usage)
        return Reply(said.text, None if said.finished else "reply was cut off", said.usage)


class SpokenCaptioner:
    """Asks a speaker what the frames of a segment show."""

    def __init__(self, speaker: Speaker):
        self._speaker, self.temperature = speaker, speaker.temperature

    def caption(self, jobs: Sequence[Record], done: Done) -> Outputs:
        requests = [Request(job["id"], job["video_id"], prompts.CAPTION,
                            tuple(job["frame_indices"]), True) for job in jobs]
        for name, reply in self._speaker.say(requests, done):
            text = " ".join(reply.text.split())
            failed = {} if text or reply.failed else {"failed": "empty reply"}
            yield name, reply.fields() | failed | ({} if reply.failed else {"caption": text})


class SpokenWriter:
    """Asks a speaker for questions of the eight kinds from captions.

    A localized question is written from the caption of one part, a comprehensive one from all.

    Args:
      limit: questions of a video.
      mix: share of localized ones.
      seed: of the draw of kinds and parts.
    """

    def __init__(self, speaker: Speaker, limit: int, mix: float, seed: int):
        self._speaker, self.temperature = speaker, speaker.temperature
        self._limit, self._mix, self._seed = limit, mix, seed

    def slots(self, video: Record, captions: Sequence[Record]) -> list[Record]:
        told = [{"segment": c["segment"], "caption": c["caption"]}
                for c in captions if "caption" in c]
        if not told:
            return []
        draw = pairs.random_of(self._seed, f"{video['video_id']}/written")
        kinds: list[str] = []
        while len(kinds) < self._limit:
            kinds += [list(prompts.KINDS)[i] for i in draw.permutation(len(prompts.KINDS))]
        slots = []
        for number, kind in enumerate(kinds[: self._limit]):
            # Of one part alone nothing remains to be shown as the rest.
            is_part = bool(draw.random() < self._mix) and len(captions) > 1
            part = told[draw.integers(len(told))]
            slots.append({
                "id": f"{video['video_id']}/written{number}/0", "video_id": video["video_id"],
                "frame_indices": video["frame_indices"], "source": "generated", "kind": kind,
                "segment": part["segment"] if is_part else None,
                "manipulation": "localized" if is_part else "comprehensive",
                "captions": [part] if is_part else told})
        return slots

    def write(self, jobs: Sequence[Record], done: Done) -> Outputs:
        texts = {job["id"]: prompts.write(job["kind"], job["captions"], job["segment"] is not None)
                 for job in jobs}
        requests = [Request(job["id"], job["video_id"], texts[job["id"]],
                            tuple(job["frame_indices"]), False) for job in jobs]
        for name, reply in self._speaker.say(requests, done):
            read = reply.failed or prompts.read_question(reply.text)
            if isinstance(read, str):
                yield name, reply.fields() | {"failed": read, "reply": reply.text}
            else:
                question, answer = read
                yield name, reply.fields() | {
                    "question": question, "asked": question, "answer": answer, "options": []}


class SpokenJudge:
    """Asks a speaker, from captions and without pictures, which answer is better.

    Which answer comes first is drawn, because judges prefer one of the places. Without captions
    there is nothing to judge by: nobody is asked, and the pair is dropped.
    """

    def __init__(self, speaker: Speaker, seed: int):
        self._speaker, self.temperature, self._seed = speaker, speaker.temperature, seed

    def judge(self, jobs: Sequence[tuple[Record, Candidate]], done: Done) -> Outputs:
        requests, places = [], {}
        for job, candidate in jobs:
            if not job["captions"]:
                yield job["id"], {"reason": "judge: no captions"}
                continue
            answers = [candidate.chosen.text, candidate.rejected.text]
            swapped = bool(pairs.random_of(self._seed, f"{job['id']}/order").random() < 0.5)
            places[job["id"]] = "2" if swapped else "1"
            text = prompts.judge(candidate.question.asked, *answers[:: -1 if swapped else 1],
                                 job["captions"], _is_of_its_part(job, candidate))
            requests.append(Request(f"{job['id']}/judge", job["video_id"], text,
                                    tuple(job["frame_indices"]), False))
        finished = {f"{name}/judge" for name in done}
        for request, reply in self._speaker.say(requests, finished):
            name = request.removesuffix("/judge")
            verdict, reason = prompts.read_verdict(reply.text, places[name])
            if reply.failed:
                reason = f"judge: {reply.failed}"
            yield name, reply.fields() | {
                "reason": reason, "verdict": verdict | {"chosen": places[name]}}


def _is_of_its_part(job: Record, candidate: Candidate) -> bool:
    """Whether the captions are those of the question's segment alone, as of a question that was
    written about a part. A localized question of the split comes with those of the whole video."""
    segment = candidate.evidence.segment
    return segment is not None and [c["segment"] for c in job["captions"]] == [list(segment)]


# --- rules ---


def has_captions(dataset: PreparedDataset, video_ids: Sequence[str]) -> bool:
    """Whether `RuleCaptioner` finds a caption of any of these videos."""
    return any(True for video_id in video_ids for _ in _caption_turns(dataset, video_id))


def _caption_turns(dataset: PreparedDataset, video_id: str) -> Iterator[tuple[Example, Turn]]:
    for example in dataset.examples(video_id):
        for turn in example.turns if example.task == "conversation" else ():
            if turn.kind == "caption":
                yield example, turn


class RuleCaptioner:
    """The captions among the split's conversations: those about the part, else about the whole."""

    temperature = None

    def __init__(self, dataset: PreparedDataset):
        self._dataset = dataset

    def caption(self, jobs: Sequence[Record], done: Done) -> Outputs:
        for job in jobs:
            start, end = job["segment"]
            inside, whole = [], []
            for example, turn in _caption_turns(self._dataset, job["video_id"]):
                is_inside = start <= (example.start + example.end) / 2 <= end
                (inside if is_inside and example.end - example.start <= end - start
                 else whole).append((example.end - example.start, turn.answer))
            if inside:
                yield job["id"], {"caption": "; ".join(text for _, text in inside)}
            elif whole:
                yield job["id"], {"caption": max(whole)[1]}  # of the longest part
            else:
                yield job["id"], {"failed": "no caption among the conversations"}


class RuleWriter:
    """The questions of the split."""

    temperature = None

    def __init__(self, dataset: PreparedDataset, limit: int, seed: int):
        self._dataset, self._limit, self._seed = dataset, limit, seed

    def slots(self, video: Record, captions: Sequence[Record]) -> list[Record]:
        found = pairs.questions_of(self._dataset, video["video_id"], self._limit, self._seed)
        told = [{"segment": c["segment"], "caption": c["caption"]}
                for c in captions if "caption" in c]
        return [{
            "id": question.question_id, "video_id": video["video_id"],
            "frame_indices": video["frame_indices"], "source": question.example.source,
            "kind": question.turn.kind,
            "segment": list(question.segment) if question.segment else None,
            "manipulation": None, "captions": told, "question": question.turn.question,
            "asked": question.asked, "answer": question.turn.answer,
            "options": list(question.turn.options)} for question in found]

    def write(self, jobs: Sequence[Record], done: Done) -> Outputs:
        for job in jobs:
            yield job["id"], {name: job[name]
                              for name in ("question", "asked", "answer", "options")}


class RuleJudge:
    """A judge of `pairs.JUDGES`, which knows the answer."""

    temperature = None

    def __init__(self, name: str):
        self._judge = pairs.JUDGES[name]

    def judge(self, jobs: Sequence[tuple[Record, Candidate]], done: Done) -> Outputs:
        for job, candidate in jobs:
            yield job["id"], {"reason": self._judge(candidate)}
