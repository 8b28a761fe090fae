"""`preferences generate`: from flags to plug-ins, stages, shards and the report."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tqdm
from etils import epath

from tpo_jax.data import files
from tpo_jax.data.pipeline import shown_frames
from tpo_jax.data.records import PreparedDataset
from tpo_jax.errors import UserError
from tpo_jax.generation import pairs
from tpo_jax.generation.answers import Settings, longest_texts, shuffled_videos
from tpo_jax.generation.pipeline import plugins, prompts
from tpo_jax.generation.pipeline.endpoint import (
    Budget,
    BudgetSpent,
    Clock,
    Endpoint,
    EndpointError,
    EndpointSettings,
)
from tpo_jax.generation.pipeline.manifest import Folder, FolderBusy, digest
from tpo_jax.generation.pipeline.model import ModelAnswerer, ModelSpeaker, OwnModel
from tpo_jax.generation.pipeline.relay import RelayedSpeaker
from tpo_jax.generation.pipeline.shards import Found, Work, run_part, run_whole
from tpo_jax.generation.pipeline.stages import Pipeline, report
from tpo_jax.parallel.distributed import say

ROLES = ("captioner", "writer", "judge")
SPEAKERS = ("model", "endpoint")  # plug-ins that are asked in words
SPARE_TOKENS = 8  # that a sampled answer may be longer than the longest known one
BUDGET_STATUS = 3  # exit status where the budget ended the work

# (name, default, type, help) of the flags of plug-ins.
_FLAGS: tuple[tuple[str, Any, Callable[[str], Any], str], ...] = (
    ("captioner", None, str, "who describes parts of the videos: rules, model or endpoint "
     "(default: as --writer)"),
    ("parts", 4, int, "equal parts of a video that are captioned"),
    ("caption_frames", 4, int, "frames of a part"),
    ("reply_tokens", 192, int, "most tokens of a caption, a question or a verdict"),
    ("prompt_tokens", 768, int, "most tokens that our own model is asked with as a plug-in"),
    ("plugin_temperature", 0.0, float, "of captioner, writer and judge; our own model also draws "
     "with --top_p"),
    ("endpoint", "", str, "address up to and without /chat/completions"),
    ("endpoint_model", "", str, "name of the model there"),
    ("endpoint_body", "{}", str, "JSON: entries of every request over ours; null removes one"),
    ("key_variable", "OPENAI_API_KEY", str, "environment variable that holds the key; empty: none"),
    ("workers", 4, int, "requests at a time"),
    ("requests_per_minute", 0.0, float, "at most, of each of --shards; 0: any number"),
    ("tries", 6, int, "of a request"),
    ("timeout", 120.0, float, "seconds of a try"),
    ("max_tokens", 0, int, "tokens that each of --shards may spend on the endpoint over all its "
     "starts; 0: no limit"),
    ("max_cost", 0.0, float, "money that each of --shards may spend, in the currency of the "
     "prices; 0: no limit"),
    ("prompt_price", 0.0, float, "of a million prompt tokens"),
    ("completion_price", 0.0, float, "of a million reply tokens"),
)
_OF_SPEAKERS = ("reply_tokens", "prompt_tokens", "plugin_temperature")
_OF_ENDPOINT = (
    "endpoint", "endpoint_model", "endpoint_body", "key_variable", "workers",
    "requests_per_minute", "tries", "timeout", "max_tokens", "max_cost", "prompt_price",
    "completion_price",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plug-ins")
    group.add_argument("--writer", choices=plugins.NAMES, default="rules", help="who writes "
                       "questions: rules (asks those of the split), model (ours) or endpoint "
                       "(default: %(default)s)")
    for name, default, kind, text in _FLAGS:
        shown = "" if default in (None, "") else " (default: %(default)s)"
        group.add_argument(f"--{name}", type=kind, default=default, help=text + shown,
                           choices=plugins.NAMES if name == "captioner" else None)


def check(flags: argparse.Namespace, poll: Callable[[], None]) -> Endpoint | None:
    """Refuses flags that do not go together, before a model is read; the endpoint if one is used.

    Args:
      poll: called while an endpoint is waited for, in any thread; what it raises ends the wait.

    Raises:
      ValueError: names the flag and the fix.
      EndpointError: no key.
    """
    flags.captioner = flags.captioner or flags.writer
    for name in ("reply_tokens", "prompt_tokens", "workers"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: expected at least 1")
    users = [role for role in ROLES if getattr(flags, role) == "endpoint"]
    if not {getattr(flags, role) for role in ROLES} & set(SPEAKERS):
        _refuse_given(flags, _OF_SPEAKERS, "no plug-in is the model or an endpoint", SPEAKERS)
    if not users:
        _refuse_given(flags, _OF_ENDPOINT, "no plug-in is the endpoint", ("endpoint",))
        return None
    if not flags.endpoint:
        raise UserError(f"--{users[0]}=endpoint: needs --endpoint, the address of an "
                        "OpenAI-compatible server, such as http://127.0.0.1:8000/v1")
    try:
        body = json.loads(flags.endpoint_body)
    except ValueError as error:
        raise UserError(f"--endpoint_body={flags.endpoint_body}: not JSON ({error})") from error
    if not isinstance(body, dict):
        raise UserError(f"--endpoint_body={flags.endpoint_body}: expected a JSON object, such as "
                        '{"max_tokens": null, "max_completion_tokens": 500}')
    settings = EndpointSettings(
        flags.endpoint, flags.endpoint_model, flags.key_variable, flags.plugin_temperature, body,
        flags.requests_per_minute, flags.tries, flags.timeout)
    return Endpoint(settings, budget_of(flags), Clock(poll))


def _refuse_given(flags: argparse.Namespace, names: Sequence[str], why: str,
                  values: Sequence[str]) -> None:
    defaults = {name: default for name, default, *_ in _FLAGS}
    given = [f"--{name}" for name in names if getattr(flags, name) != defaults[name]]
    if given:
        raise UserError(f"{', '.join(given)}: {why}; set --captioner, --writer or --judge to "
                        + " or ".join(values))


def check_notes(flags: argparse.Namespace, dataset: PreparedDataset,
                videos: Sequence[str]) -> None:
    """Refuses a judge who goes by captions where the split has none, before anything is answered.

    Raises:
      ValueError: names the flags and the fix.
    """
    if (flags.judge in SPEAKERS and flags.captioner == "rules"
            and not plugins.has_captions(dataset, videos)):
        raise UserError(
            f"--judge={flags.judge}: goes by captions, and --captioner=rules finds none: no turn "
            f"of a conversation in {dataset.path} is of kind 'caption'. Give "
            "--captioner=endpoint or --captioner=model, or --judge=rules")


def budget_of(flags: argparse.Namespace) -> Budget:
    return Budget(flags.max_tokens, flags.max_cost, flags.prompt_price, flags.completion_price)


def run(flags: argparse.Namespace, own: OwnModel, endpoint: Endpoint | None, chunk: int) -> int:
    """Generates until there are enough pairs, no video is left or the budget is spent.

    Args:
      chunk: videos that pass through all stages together.

    Returns:
      The exit status.
    """
    started = time.monotonic()
    videos = shuffled_videos(own.dataset, flags.seed)
    check_notes(flags, own.dataset, videos)
    asked = longest_texts(own.dataset, own.codec) if flags.writer == "rules" else None
    settings = settings_of(flags, own, asked)
    prompt = asked[0] if asked else 0
    make = functools.partial(make_pipeline, flags, own, settings, endpoint, prompt)
    work = Work(epath.Path(flags.out), videos, chunk, stage_options(flags, settings, own.weights))
    if flags.shards == 1:
        return _whole(flags, work, make, endpoint.budget if endpoint else None, started)
    with work.part(flags.shard, flags.shards) as folder:
        numbers = range(flags.shard, len(work), flags.shards)
        found = work.elsewhere(folder, numbers)
        _spend(endpoint.budget if endpoint else None, folder, found)
        if problem := _until(flags, lambda told: run_part(
                work, folder, found, make(folder), flags.pairs, numbers, told)):
            return _stopped(flags, problem)
    if missing := work.missing(flags.pairs):
        say(f"{flags.out}: chunks {missing} of {len(work)} are left to the other shards")
        return 0
    try:  # all is there: nothing is spent, whatever was spent
        return _whole(flags, work, make, budget_of(flags) if endpoint else None, started)
    except FolderBusy:
        say(f"{flags.out}: another shard puts the parts together")
        return 0


def _whole(flags: argparse.Namespace, work: Work, make: Callable[[Folder], Pipeline],
           budget: Budget | None, started: float) -> int:
    """Writes the manifests of --out and counts.json; returns the exit status."""
    with work.whole() as folder:
        found = work.elsewhere(folder, range(len(work)))
        _spend(budget, folder, found)
        problem = _until(flags, lambda told: run_whole(
            work, folder, found, make(folder), flags.pairs, told))
        result = report(folder, flags.pairs) | {"seconds": round(time.monotonic() - started, 1)}
    if budget:
        result["endpoint"] = {"prompt_tokens": budget.prompt,
                              "completion_tokens": budget.completion,
                              "cost": round(budget.cost, 6)}
    text = json.dumps(result, indent=2)
    if jax.process_index() == 0:
        files.write(work.path / "counts.json", text + "\n")
    say(text)
    if problem:
        return _stopped(flags, problem)
    if result["written"] < flags.pairs and jax.process_index() == 0:
        print(f"{flags.out}: {result['written']} of {flags.pairs} pairs: all videos are used. See "
              "'failed' and 'dropped' above; raise --questions, --samples or --temperature, or "
              "prepare more videos.", file=sys.stderr)
    return 0


def _spend(budget: Budget | None, folder: Folder, found: Found) -> None:
    """Counts what the records of earlier starts took."""
    for record in (*folder.records(), *itertools.chain.from_iterable(found.values())):
        if budget and record.get("usage"):
            budget.spend(record["usage"])


def _until(flags: argparse.Namespace, work: Callable[[Callable[[int], None]], None]
           ) -> Exception | None:
    """Does the work under a bar; what ends it early at an endpoint, or None."""
    with tqdm.tqdm(total=flags.pairs, desc="pairs", unit="pair") as bar:
        try:
            work(lambda pairs: bar.update(pairs - bar.n))
        except (BudgetSpent, EndpointError) as error:
            return error
    return None


def _stopped(flags: argparse.Namespace, problem: Exception) -> int:
    if isinstance(problem, EndpointError):
        raise problem
    print(f"{flags.out}: stopped. {problem}", file=sys.stderr)
    return BUDGET_STATUS


def settings_of(flags: argparse.Namespace, own: OwnModel,
                asked: tuple[int, int] | None) -> Settings:
    """The settings of answers that the flags ask for.

    Args:
      asked: `longest_texts` of the split, where its questions are asked.
    """
    *fewer, frames = (
        sorted(set(flags.frames)) or [shown_frames(own.codec, own.model.config)])
    return Settings(
        evidence=pairs.EvidenceSettings(
            frames, flags.mix, flags.subset, flags.right, flags.seed, tuple(fewer),
            own.codec.template.sampling),
        filters=pairs.FilterSettings(flags.near_equal, flags.length_ratio, flags.gap),
        max_new=flags.max_new or (asked[1] + SPARE_TOKENS if asked else flags.reply_tokens),
        temperature=flags.temperature, top_p=flags.top_p, questions=flags.questions,
        samples=flags.samples, batch_size=flags.batch_size, branches=flags.branches,
        train_frames=flags.train_frames)


def make_pipeline(flags: argparse.Namespace, own: OwnModel, settings: Settings,
                  endpoint: Endpoint | None, prompt: int, folder: Folder) -> Pipeline:
    """The stages with the plug-ins that the flags name, into `folder`.

    Args:
      prompt: tokens of the longest question, 0 where that is not known.
    """
    seed = settings.evidence.seed

    def speaker(role: str, evidence: pairs.EvidenceSettings) -> plugins.Speaker:
        if getattr(flags, role) == "endpoint":
            return _asking(endpoint, flags, own)
        most = own.model.config.vision.max_frames
        if evidence.frames > most:
            raise UserError(
                f"--caption_frames={evidence.frames}: the model takes at most {most} frames")
        return ModelSpeaker(own, dataclasses.replace(
            settings, evidence=evidence, temperature=flags.plugin_temperature, samples=1,
            max_new=flags.reply_tokens), flags.prompt_tokens)

    of_part = dataclasses.replace(settings.evidence, frames=flags.caption_frames, fewer=())
    captioner = (plugins.RuleCaptioner(own.dataset) if flags.captioner == "rules"
                 else plugins.SpokenCaptioner(speaker("captioner", of_part)))
    writer = (plugins.RuleWriter(own.dataset, settings.questions, seed)
              if flags.writer == "rules" else plugins.SpokenWriter(
                  speaker("writer", settings.evidence), settings.questions,
                  settings.evidence.mix, seed))
    judge = (plugins.RuleJudge(flags.judge) if flags.judge in pairs.JUDGES
             else plugins.SpokenJudge(speaker("judge", settings.evidence), seed))
    answerer = ModelAnswerer(own, settings, prompt)
    return Pipeline(folder, own.dataset, captioner, writer, judge, answerer, flags.parts,
                    flags.caption_frames, own.poll)


def _asking(endpoint: Endpoint, flags: argparse.Namespace, own: OwnModel) -> plugins.Speaker:
    """The endpoint as a speaker; of several processes the first one asks it."""
    alone = jax.process_count() == 1
    speaker = plugins.EndpointSpeaker(
        endpoint, own.dataset, flags.seed, flags.reply_tokens, flags.workers,
        own.poll if alone else endpoint.clock.poll)
    return speaker if alone else RelayedSpeaker(speaker, endpoint.clock, own.poll)


def stage_options(flags: argparse.Namespace, settings: Settings,
                  weights: str) -> dict[str, dict[str, Any]]:
    """By stage, every option that changes its records; named as the flags are."""
    evidence, filters = settings.evidence, settings.filters

    def plugin(role: str) -> dict[str, Any]:
        name = getattr(flags, role)
        options: dict[str, Any] = {role: name}
        if name in SPEAKERS:
            options |= {"plugin_temperature": flags.plugin_temperature,
                        "reply_tokens": flags.reply_tokens, "prompts": digest(prompts.texts())}
        if name == "model":
            options |= {"weights": weights, "prompt_tokens": flags.prompt_tokens,
                        "batch_size": flags.batch_size, "branches": flags.branches}
            if flags.plugin_temperature > 0:  # greedy replies are the same with any
                options |= {"top_p": settings.top_p}
        if name == "endpoint":
            options |= {"endpoint": flags.endpoint, "endpoint_model": flags.endpoint_model,
                        "endpoint_body": flags.endpoint_body}
        return options

    # Folders that are older than these options go on where they have their default.
    sampling = {} if evidence.sampling == "uniform" else {"sampling": evidence.sampling}
    train_frames = (
        {} if settings.train_frames == "whole" else {"train_frames": settings.train_frames})
    # Judges once took these for notes on a part, and were asked without any as well.
    notes = ({"notes": "on the whole video"}
             if flags.writer == "rules" and flags.judge in SPEAKERS else {})
    return {
        "videos": {"data": str(flags.data), "seed": evidence.seed, "parts": flags.parts,
                   "frames": [*evidence.fewer, evidence.frames]} | sampling,
        "captions": plugin("captioner") | {"caption_frames": flags.caption_frames},
        "questions": plugin("writer") | {
            "questions": settings.questions, "mix": evidence.mix, "subset": evidence.subset,
            "right": evidence.right},
        "preferred": {"weights": weights, "temperature": settings.temperature,
                      "top_p": settings.top_p, "max_new": settings.max_new,
                      "samples": settings.samples, "batch_size": settings.batch_size,
                      "branches": settings.branches,
                      "chosen_logp": "scored"},  # once it was what the decoding program said
        "dispreferred": {},
        "filter": plugin("judge") | {
            "near_equal": filters.near_equal, "length_ratio": filters.length_ratio,
            "gap": filters.gap} | notes,
        "pairs": train_frames,
    }
