"""The stages of a pair: videos, captions, questions, preferred, dispreferred, filter, pairs.

Videos pass through all stages in chunks (`shards`), so that the work ends as soon as there are
enough pairs. Every stage turns jobs, which follow from the records before, into one record each.
What has a record is not done again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tpo_jax.data import sampling
from tpo_jax.data.records import Example, PreparedDataset
from tpo_jax.errors import UserError
from tpo_jax.generation import pairs
from tpo_jax.generation.answers import Settings
from tpo_jax.generation.pairs import Candidate, Evidence
from tpo_jax.generation.pipeline.manifest import Folder, Manifest, ManifestError, Record, digest
from tpo_jax.generation.pipeline.model import question_of, read_answer
from tpo_jax.generation.pipeline.plugins import Captioner, Done, Judge, Outputs, Writer

FILES = {
    "videos": "videos.jsonl", "captions": "captions.jsonl", "questions": "questions.jsonl",
    "preferred": "preferred.jsonl", "dispreferred": "dispreferred.jsonl",
    "filter": "filter.jsonl", "pairs": "pairs.jsonl",
}  # fmt: skip
KEYS = {"pairs": "example_id"}  # pairs are examples, as training reads them


class Answerer(Protocol):
    """See `model.ModelAnswerer`."""

    settings: Settings
    weights: str

    def preferred(self, jobs: Sequence[Record], done: Done) -> Outputs: ...

    def dispreferred(self, jobs: Sequence[Record], done: Done) -> Outputs: ...


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Everything that makes pairs of one prepared split.

    Attributes:
      folder: manifests, open.
      dataset: whose videos.
      captioner, writer, judge: plug-ins.
      answerer: both sides' answers; its settings hold frames, mix and seed as well.
      parts: of a video that are captioned apart.
      caption_frames: of a part.
      poll: called before every stage; what it raises ends the work.
    """

    folder: Folder
    dataset: PreparedDataset
    captioner: Captioner
    writer: Writer
    judge: Judge
    answerer: Answerer
    parts: int = 4
    caption_frames: int = 4
    poll: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        for name in ("parts", "caption_frames"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: expected at least 1")

    @property
    def settings(self) -> Settings:
        return self.answerer.settings

    @property
    def seed(self) -> int:
        return self.settings.evidence.seed

    def run(self, video_ids: Sequence[str], wanted: int) -> int:
        """Takes videos through all stages; no pair more is written once there are `wanted`.

        Returns:
          How many pairs these videos give, written or not.
        """
        videos = self._videos(video_ids)
        captions = self._captions(videos)
        questions = self._questions(videos, captions)
        preferred = self._preferred(questions)
        dispreferred = self._dispreferred(questions, preferred)
        kept = self._filter(questions, preferred, dispreferred)
        self._pairs(kept, wanted)
        return len(kept)

    def _stage(self, name: str, jobs: Sequence[Record],
               work: Callable[[Sequence[Record], Done], Outputs], shared: Record) -> list[Record]:
        """Records of all jobs of one stage; those that are missing are made.

        Args:
          work: yields (id, fields) for jobs; see `plugins`.
          shared: fields of every record.
        """
        self.poll()
        manifest = self.folder[name]
        inputs = {job["id"]: digest(job) for job in jobs}
        _check_inputs(manifest, inputs)
        if any(name not in manifest.records for name in inputs):
            by_id = {job["id"]: job for job in jobs}
            for key, fields in work(jobs, manifest.records.keys()):
                if key not in manifest.records:
                    job = by_id[key]
                    manifest.append({
                        "id": key, "input": inputs[key], "video_id": job["video_id"],
                        "frame_indices": job["frame_indices"], "seed": self.seed, **shared,
                        **fields})
            manifest.sync()
        return [manifest.records[name] for name in inputs]

    def _videos(self, video_ids: Sequence[str]) -> list[Record]:
        """frame_indices: what training shows; parts: [s, e] in seconds."""
        jobs, fields = [], {}
        for video_id in video_ids:
            info = self.dataset.video_info(video_id)
            edges = np.linspace(0.0, float(info.duration), self.parts + 1)
            indices = self.settings.evidence.whole(info)
            jobs.append({"id": video_id, "video_id": video_id, "frame_indices": _ints(indices),
                         "timestamps": digest([float(t) for t in info.timestamps])})
            fields[video_id] = {
                "duration": float(info.duration), "num_frames": info.num_frames,
                "parts": [[float(s), float(e)] for s, e in zip(edges, edges[1:], strict=False)]}
        return self._stage("videos", jobs, lambda jobs, done: iter(fields.items()),
                           {"temperature": None})

    def _captions(self, videos: Sequence[Record]) -> list[Record]:
        jobs = []
        for video in videos:
            times = self.dataset.video_info(video["video_id"]).timestamps
            for number, (start, end) in enumerate(video["parts"]):
                indices = sampling.uniform(times, self.caption_frames, start, end)
                jobs.append({"id": f"{video['video_id']}/part{number}",
                             "video_id": video["video_id"], "segment": [start, end],
                             "frame_indices": _ints(indices)})
        return self._stage("captions", jobs, _keeping(self.captioner.caption, "segment"),
                           {"temperature": self.captioner.temperature})

    def _questions(self, videos: Sequence[Record], captions: Sequence[Record]) -> list[Record]:
        by_video: dict[str, list[Record]] = {video["video_id"]: [] for video in videos}
        for caption in captions:
            by_video[caption["video_id"]].append(caption)
        jobs = [slot for video in videos
                for slot in self.writer.slots(video, by_video[video["video_id"]])]
        by_id = {job["id"]: job for job in jobs}

        def work(jobs: Sequence[Record], done: Done) -> Outputs:
            for key, fields in _keeping(self.writer.write, "source", "kind")(jobs, done):
                if "failed" not in fields:
                    fields = fields | self._evidence(by_id[key] | fields)
                yield key, fields

        records = self._stage("questions", jobs, work, {"temperature": self.writer.temperature})
        # Captions are in their own manifest; here they are for the judge.
        return [record | {"captions": by_id[record["id"]]["captions"]}
                for record in records if "failed" not in record]

    def _evidence(self, question: Record) -> dict[str, Any]:
        """Frames of both sides. Where the writer says which manipulation is meant, it is that."""
        settings = self.settings.evidence
        if question["manipulation"]:
            mix = float(question["manipulation"] == "localized")
            settings = dataclasses.replace(settings, mix=mix)
        info = self.dataset.video_info(question["video_id"])
        evidence = pairs.plan_evidence(question_of(question), info, settings)
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(evidence).items()}

    def _preferred(self, questions: Sequence[Record]) -> list[Record]:
        jobs = [_answered(q, "chosen_indices") for q in questions]
        return self._stage("preferred", jobs, self.answerer.preferred, self._drawn())

    def _dispreferred(self, questions: Sequence[Record],
                      preferred: Sequence[Record]) -> list[Record]:
        jobs = [_answered(q, "manipulated_indices") | {"chosen": p["answers"]}
                for q, p in zip(questions, preferred, strict=True)]
        return self._stage("dispreferred", jobs, self.answerer.dispreferred, self._drawn())

    def _drawn(self) -> Record:
        return {"temperature": self.settings.temperature, "top_p": self.settings.top_p}

    def _filter(self, questions: Sequence[Record], preferred: Sequence[Record],
                dispreferred: Sequence[Record]) -> dict[str, Candidate]:
        """The first sample of every question that all filters keep, in the order of questions."""
        kept: dict[str, Candidate] = {}
        for sample in range(self.settings.samples):
            jobs, candidates = [], {}
            for question, right, wrong in zip(questions, preferred, dispreferred, strict=True):
                candidate = _candidate(question, right, wrong, sample)
                job = {"id": f"{question['id']}/sample{sample}", "question_id": question["id"],
                       "has_pair": question["id"] in kept, "sample": sample,
                       "chosen": right["answers"][sample], "rejected": wrong["answers"][sample],
                       "chosen_logp": wrong["chosen_logp"][sample],
                       **{name: question[name] for name in (
                           "video_id", "asked", "captions", "manipulation", "frame_indices")}}
                jobs.append(job)
                candidates[job["id"]] = candidate
            records = self._stage("filter", jobs, lambda jobs, done, c=candidates: self._sift(
                jobs, c, done), {"temperature": self.judge.temperature})
            for job, record in zip(jobs, records, strict=True):
                if record["reason"] is None:
                    kept[job["question_id"]] = candidates[job["id"]]
        return {q["id"]: kept[q["id"]] for q in questions if q["id"] in kept}

    def _sift(self, jobs: Sequence[Record], candidates: Mapping[str, Candidate],
              done: Done) -> Outputs:
        """Cheap filters first; what they keep goes to the judge."""
        left = []
        for job in jobs:
            reason = ("question has a pair already" if job["has_pair"] else
                      pairs.cheap_reason(candidates[job["id"]], self.settings.filters))
            gap = {"gap": candidates[job["id"]].gap}
            if reason:
                yield job["id"], {"reason": reason, **gap}
            else:
                left.append((job, candidates[job["id"]]))
        for key, fields in self.judge.judge(left, done):
            yield key, {**fields, "gap": candidates[key].gap}

    def _pairs(self, kept: Mapping[str, Candidate], wanted: int) -> None:
        """Pairs are examples as training reads them, in the order of their questions."""
        manifest = self.folder["pairs"]
        drawn = self._drawn() | {"seed": self.seed, "weights": self.answerer.weights}
        for candidate in kept.values():
            video_id = candidate.question.example.video_id
            duration = float(self.dataset.video_info(video_id).duration)
            record = pairs.to_example(
                candidate, duration, drawn, self.settings.train_frames).to_json()
            there = manifest.records.get(record["example_id"])
            if there is not None and there != record:
                raise _stale(manifest, record["example_id"])
            if there is None and len(manifest.records) < wanted:
                manifest.append(record)
        manifest.sync()


def _candidate(question: Record, right: Record, wrong: Record, sample: int) -> Candidate:
    evidence = Evidence(question["manipulation"], *(
        tuple(question[name]) for name in ("frame_indices", "chosen_indices",
                                           "manipulated_indices")),
        tuple(question["segment"]) if question["segment"] else None)
    # Not what the decoding program said: both terms of the gap are of the one that scores.
    chosen = dataclasses.replace(
        read_answer(right["answers"][sample]), logp=right["chosen_logp"][sample])
    return Candidate(
        question_of(question), evidence, sample, chosen, read_answer(wrong["answers"][sample]),
        wrong["chosen_logp"][sample])


def _answered(question: Record, frames: str) -> Record:
    """The job of answering a question with some of its frames."""
    names = ("id", "video_id", "source", "question", "asked", "answer", "options", "kind")
    return {name: question[name] for name in names} | {"frame_indices": question[frames]}


def _keeping(
    work: Callable[[Sequence[Record], Done], Outputs], *names: str
) -> Callable[[Sequence[Record], Done], Outputs]:
    """`work` whose records also hold these fields of their jobs."""

    def kept(jobs: Sequence[Record], done: Done) -> Outputs:
        by_id = {job["id"]: job for job in jobs}
        for key, fields in work(jobs, done):
            yield key, {name: by_id[key][name] for name in names} | fields

    return kept


def _check_inputs(manifest: Manifest, inputs: Mapping[str, str]) -> None:
    for name, value in inputs.items():
        if name in manifest.records and manifest.records[name]["input"] != value:
            raise _stale(manifest, name)


def _stale(manifest: Manifest, name: str) -> ManifestError:
    return ManifestError(
        f"{manifest.path}: {name!r} was made from other records than are there now (an earlier "
        "manifest or the prepared videos changed). Remove this manifest and those of later stages, "
        "or give another --out.")


def _ints(indices: Iterable[int]) -> list[int]:
    return [int(i) for i in indices]


def report(folder: Folder, wanted: int) -> dict[str, Any]:
    """counts.json: what every stage made and dropped, by reason; dropped + kept = generated."""
    sifted = list(folder["filter"].records.values())
    written = [Example.from_json(record) for record in folder["pairs"].records.values()]
    dropped = Counter(record["reason"] for record in sifted if record["reason"])
    return {
        "captions": _outcomes(folder["captions"], "caption"),
        "questions": _outcomes(folder["questions"], "question"),
        "generated": len(sifted), "dropped": dict(sorted(dropped.items())),
        "kept": len(sifted) - dropped.total(), "written": len(written), "wanted": wanted,
        "videos": len(folder["videos"].records),
        "videos_with_pairs": len({example.video_id for example in written}),
        "manipulation": dict(Counter(_manipulation(folder, e) for e in written)),
        "kind": dict(Counter(e.turns[0].kind for e in written)),
    }


def _manipulation(folder: Folder, pair: Example) -> str:
    """Of a localized pair whose right frames were those of the whole video, with the reason."""
    name = pair.targets["manipulation"]
    question = folder["questions"].records.get(pair.example_id.removesuffix("/pair"), {})
    right = question.get("right")  # older records do not say
    return name if right in (None, "dense") else f"{name}, {right}"


def _outcomes(manifest: Manifest, field: str) -> dict[str, Any]:
    records = manifest.records.values()
    failed = Counter(record["failed"].partition(": ")[0] for record in records
                     if "failed" in record)
    return {"written": sum(field in record for record in records),
            "failed": dict(sorted(failed.items()))}
