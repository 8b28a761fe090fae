"""`preferences generate --writer=...`: from flags to plug-ins, stages and the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import tqdm
from etils import epath

from tpo_jax.data import files
from tpo_jax.errors import UserError
from tpo_jax.generation import pairs
from tpo_jax.generation.pair_generator import (
    SPARE_TOKENS,
    Settings,
    longest_texts,
    shuffled_videos,
)
from tpo_jax.generation.pipeline import plugins, prompts
from tpo_jax.generation.pipeline.endpoint import (
    Budget,
    BudgetSpent,
    Clock,
    Endpoint,
    EndpointError,
    EndpointSettings,
)
from tpo_jax.generation.pipeline.manifest import Folder, digest
from tpo_jax.generation.pipeline.model import ModelAnswerer, ModelSpeaker, OwnModel
from tpo_jax.generation.pipeline.stages import FILES, KEYS, Pipeline, report

JUDGES = ("model", "endpoint")  # beyond those of `pairs.JUDGES`
BUDGET_STATUS = 3  # exit status where the budget ended the work

# (name, default, type, help) of the flags that --writer brings into play.
_FLAGS: tuple[tuple[str, Any, Callable[[str], Any], str], ...] = (
    ("captioner", None, str, "who describes parts of the videos: rules, model or endpoint "
     "(default: as --writer)"),
    ("parts", 4, int, "equal parts of a video that are captioned"),
    ("caption_frames", 4, int, "frames of a part"),
    ("reply_tokens", 192, int, "most tokens of a caption, a question or a verdict"),
    ("prompt_tokens", 768, int, "most tokens that our own model is asked with as a plug-in"),
    ("plugin_temperature", 0.0, float, "of captioner, writer and judge"),
    ("endpoint", "", str, "address up to and without /chat/completions"),
    ("endpoint_model", "", str, "name of the model there"),
    ("endpoint_body", "{}", str, "JSON: entries of every request over ours; null removes one"),
    ("key_variable", "OPENAI_API_KEY", str, "environment variable that holds the key; empty: none"),
    ("workers", 4, int, "requests at a time"),
    ("requests_per_minute", 0.0, float, "at most; 0: any number"),
    ("tries", 6, int, "of a request"),
    ("timeout", 120.0, float, "seconds of a try"),
    ("max_tokens", 0, int, "tokens to spend on the endpoint over all starts; 0: no limit"),
    ("max_cost", 0.0, float, "money to spend, in the currency of the prices; 0: no limit"),
    ("prompt_price", 0.0, float, "of a million prompt tokens"),
    ("completion_price", 0.0, float, "of a million reply tokens"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "questions written by a plug-in", "in stages, each with a manifest in --out")
    group.add_argument("--writer", choices=plugins.NAMES, help="who writes questions: rules (those "
                       "of the split), model (ours) or endpoint; without it, the split's are asked")
    for name, default, kind, text in _FLAGS:
        shown = "" if default in (None, "") else " (default: %(default)s)"
        group.add_argument(f"--{name}", type=kind, default=default, help=text + shown,
                           choices=plugins.NAMES if name == "captioner" else None)


def check(flags: argparse.Namespace, poll: Callable[[], None]) -> Endpoint | None:
    """Refuses flags that do not go together, before a model is read; the endpoint if one is used.

    Raises:
      ValueError: names the flag and the fix.
      EndpointError: no key.
    """
    if not flags.writer:
        given = [f"--{name}" for name, default, *_ in _FLAGS if getattr(flags, name) != default]
        if flags.judge in JUDGES:
            given.append(f"--judge={flags.judge}")
        if given:
            raise UserError(f"{', '.join(given)}: means nothing without --writer; add "
                            f"--writer={{{','.join(plugins.NAMES)}}}")
        return None
    flags.captioner = flags.captioner or flags.writer
    for name in ("reply_tokens", "prompt_tokens", "workers"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)}: expected at least 1")
    users = [role for role in ("captioner", "writer", "judge")
             if getattr(flags, role) == "endpoint"]
    if not users:
        given = [f"--{name}" for name in ("endpoint", "endpoint_model", "max_tokens", "max_cost")
                 if getattr(flags, name)]
        if given:
            raise UserError(f"{', '.join(given)}: no plug-in is the endpoint; set --captioner, "
                            "--writer or --judge to endpoint")
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
    budget = Budget(flags.max_tokens, flags.max_cost, flags.prompt_price, flags.completion_price)
    return Endpoint(settings, budget, Clock(poll))


def run(flags: argparse.Namespace, own: OwnModel, settings: Settings, endpoint: Endpoint | None,
        chunk: int) -> int:
    """Generates until there are enough pairs, no video is left or the budget is spent.

    Args:
      settings: of the answers; `max_new` 0 is replaced.
      chunk: videos that pass through all stages together.

    Returns:
      The exit status.
    """
    started = time.monotonic()
    if not settings.max_new:
        known = longest_texts(own.dataset, own.codec)[1] if flags.writer == "rules" else None
        settings = dataclasses.replace(
            settings, max_new=known + SPARE_TOKENS if known else flags.reply_tokens)
    with Folder(flags.out, FILES, stage_options(flags, settings, own.weights), KEYS) as folder:
        if endpoint:
            for record in folder.records():
                if record.get("usage"):
                    endpoint.budget.spend(record["usage"])
        pipeline = make_pipeline(flags, folder, own, settings, endpoint)
        videos = shuffled_videos(own.dataset, settings.evidence.seed)
        problem = None
        with tqdm.tqdm(total=flags.pairs, desc="pairs", unit="pair") as bar:
            try:
                pipeline.run(videos, flags.pairs, chunk,
                             lambda written: bar.update(written - bar.n))
            except (BudgetSpent, EndpointError) as error:
                problem = error
        result = report(folder, flags.pairs) | {"seconds": round(time.monotonic() - started, 1)}
    if endpoint:
        spent = endpoint.budget
        result["endpoint"] = {"prompt_tokens": spent.prompt, "completion_tokens": spent.completion,
                              "cost": round(spent.cost, 6)}
    text = json.dumps(result, indent=2)
    files.write(epath.Path(flags.out) / "counts.json", text + "\n")
    print(text)
    if isinstance(problem, EndpointError):
        raise problem
    if problem:
        print(f"{flags.out}: stopped. {problem}", file=sys.stderr)
        return BUDGET_STATUS
    if result["written"] < flags.pairs:
        print(f"{flags.out}: {result['written']} of {flags.pairs} pairs: all videos are used. See "
              "'failed' and 'dropped' above; raise --questions or --samples, or prepare more "
              "videos.", file=sys.stderr)
    return 0


def make_pipeline(flags: argparse.Namespace, folder: Folder, own: OwnModel, settings: Settings,
                  endpoint: Endpoint | None) -> Pipeline:
    """The stages with the plug-ins that the flags name."""
    seed = settings.evidence.seed

    def speaker(role: str, frames: int) -> plugins.Speaker:
        if getattr(flags, role) == "endpoint":
            return plugins.EndpointSpeaker(
                endpoint, own.dataset, seed, flags.reply_tokens, flags.workers, own.poll)
        most = own.model.config.vision.max_frames
        if frames > most:
            raise UserError(f"--caption_frames={frames}: the model takes at most {most} frames")
        evidence = dataclasses.replace(settings.evidence, frames=frames)
        return ModelSpeaker(own, dataclasses.replace(
            settings, evidence=evidence, temperature=flags.plugin_temperature, samples=1,
            max_new=flags.reply_tokens), flags.prompt_tokens)

    frames = settings.evidence.frames
    captioner = (plugins.RuleCaptioner(own.dataset) if flags.captioner == "rules"
                 else plugins.SpokenCaptioner(speaker("captioner", flags.caption_frames)))
    writer = (plugins.RuleWriter(own.dataset, settings.questions, seed)
              if flags.writer == "rules" else plugins.SpokenWriter(
                  speaker("writer", frames), settings.questions, settings.evidence.mix, seed))
    judge = (plugins.RuleJudge(flags.judge) if flags.judge in pairs.JUDGES
             else plugins.SpokenJudge(speaker("judge", frames), seed))
    return Pipeline(folder, own.dataset, captioner, writer, judge, ModelAnswerer(own, settings),
                    flags.parts, flags.caption_frames, own.poll)


def stage_options(flags: argparse.Namespace, settings: Settings,
                  weights: str) -> dict[str, dict[str, Any]]:
    """By stage, every option that changes its records; named as the flags are."""
    evidence, filters = settings.evidence, settings.filters

    def plugin(role: str) -> dict[str, Any]:
        name = getattr(flags, role)
        options: dict[str, Any] = {role: name}
        if name in JUDGES:  # a speaker
            options |= {"plugin_temperature": flags.plugin_temperature,
                        "reply_tokens": flags.reply_tokens, "prompts": digest(prompts.texts())}
        if name == "model":
            options |= {"weights": weights, "prompt_tokens": flags.prompt_tokens,
                        "batch_size": flags.batch_size, "branches": flags.branches}
        if name == "endpoint":
            options |= {"endpoint": flags.endpoint, "endpoint_model": flags.endpoint_model,
                        "endpoint_body": flags.endpoint_body}
        return options

    return {
        "videos": {"data": str(flags.data), "seed": evidence.seed, "frames": evidence.frames,
                   "parts": flags.parts},
        "captions": plugin("captioner") | {"caption_frames": flags.caption_frames},
        "questions": plugin("writer") | {
            "questions": settings.questions, "mix": evidence.mix, "subset": evidence.subset,
            "right": evidence.right},
        "preferred": {"weights": weights, "temperature": settings.temperature,
                      "top_p": settings.top_p, "max_new": settings.max_new,
                      "samples": settings.samples, "batch_size": settings.batch_size,
                      "branches": settings.branches},
        "dispreferred": {},
        "filter": plugin("judge") | {
            "near_equal": filters.near_equal, "length_ratio": filters.length_ratio,
            "gap": filters.gap},
        "pairs": {},
    }
