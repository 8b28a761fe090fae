"""The pair pipeline with plug-ins that cost nothing, whole, in shards, and killed anywhere."""

import collections
import contextlib
import json

import pytest
from etils import epath
from micro_model import MemoryDataset

from tpo_jax.generation import pairs
from tpo_jax.generation.answers import Settings
from tpo_jax.generation.pipeline import plugins, prompts
from tpo_jax.generation.pipeline.manifest import Manifest
from tpo_jax.generation.pipeline.shards import Work, run_part, run_whole
from tpo_jax.generation.pipeline.stages import FILES, Pipeline, report

VIDEOS = [f"video{i}" for i in range(4)]
OPTIONS = {stage: {"option": stage} for stage in FILES}


class Killed(Exception):
    pass


@contextlib.contextmanager
def killed_after(records):
    """Raises Killed, with the file of the last one, once so many records are written."""
    real, left = Manifest.append, [records]

    def append(self, record):
        real(self, record)
        left[0] -= 1
        if not left[0]:
            raise Killed(self.path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "append", append)
        yield


class Speaker:
    """Replies that are functions of the request; counts what it is asked."""

    temperature = 0.25

    def __init__(self):
        self.asked = collections.Counter()

    def say(self, requests, done):
        for request in requests:
            if request.id in done:
                continue
            self.asked[request.id] += 1
            yield request.id, plugins.Reply(self.reply(request))

    def reply(self, request):
        number = pairs.name_id(request.id)
        if request.text == prompts.CAPTION:
            assert request.needs_pictures and len(request.frame_indices) == 2
            return f"scene {number % 7} " if number % 5 else ""
        assert not request.needs_pictures
        if request.text.endswith("else no"):
            return f"better={1 + number % 2}\ncorrect=both\nunclear=no"
        return f"Question: what of {number}?\nAnswer: a thing" if number % 6 else "None."


class Answerer:
    """Answers of numbers; of some questions those of both sides are the same."""

    weights = "none"

    def __init__(self, speaker):
        self.asked = speaker.asked
        self.settings = Settings(pairs.EvidenceSettings(4), pairs.FilterSettings(), 8,
                                 questions=5, samples=2)

    def answers(self, job, side, same):
        self.asked[f"{side} {job['id']}"] += 1
        number = pairs.name_id(job["id"]) % 3
        words = [f"{side if number else same} number {number} {s}" for s in range(2)]
        return [{"text": text, "tokens": [1, 2], "finished": True, "logp": -1.5} for text in words]

    def preferred(self, jobs, done):
        for job in jobs:
            if job["id"] not in done:
                yield job["id"], {"answers": self.answers(job, "right", "same"),
                                  "chosen_logp": [-1.25, -1.25]}

    def dispreferred(self, jobs, done):
        for job in jobs:
            if job["id"] not in done:
                yield job["id"], {"answers": self.answers(job, "wrong", "same"),
                                  "chosen_logp": [-2.5, -2.5]}


def pipeline_of(folder, speaker, mix=0.5):
    return Pipeline(folder, MemoryDataset(len(VIDEOS)), plugins.SpokenCaptioner(speaker),
                    plugins.SpokenWriter(speaker, 5, mix, 0), plugins.SpokenJudge(speaker, 0),
                    Answerer(speaker), parts=3, caption_frames=2)


def run(path, speaker, wanted=1000, options=OPTIONS, mix=0.5):
    work = Work(epath.Path(path), VIDEOS, 2, options)
    with work.whole() as folder:
        found = work.elsewhere(folder, range(2))
        run_whole(work, folder, found, pipeline_of(folder, speaker, mix), wanted)
        return report(folder, wanted)


def run_shard(path, speaker, shard, shards, wanted=1000, size=1):
    """One of several commands; the chunks that are missing after it."""
    work = Work(epath.Path(path), VIDEOS, size, OPTIONS)
    with work.part(shard, shards) as folder:
        numbers = range(shard, len(work), shards)
        run_part(work, folder, work.elsewhere(folder, numbers), pipeline_of(folder, speaker),
                 wanted, numbers)
    return work.missing(wanted)


def manifests(path):
    return {name: (epath.Path(path) / name).read_bytes() for name in FILES.values()}


def read(path, stage):
    return [json.loads(line) for line in (path / FILES[stage]).read_text().splitlines()]
