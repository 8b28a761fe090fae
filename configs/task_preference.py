"""The arms of the Task Preference Optimization studies: the demo's stages, other tasks or heads.

    python -m tpo_jax.train --config=configs/task_preference.py:arm=text,stage=1,runs=DIR,data=D \
        --workdir=DIR/stage1

  heads         region, temporal and mask head beside conversation: the demo itself
  text          the same targets written into the answers, no head
  conversation  conversation alone
  TRM           as heads, without conversation
  T, R, M       one task alone: temporal; region; mask and tracking
  temporal, cg_detr, temporal_mlp   one temporal head each, beside conversation
  sam2, first_frame_box   as M, with a SAM 2 head of the demo's size: trained by losses of its
                masks, or by the prompt that the box on the first frame would be, all that is
                published

Every arm asks at least as many questions of each of its kinds a step as `heads` does: rows of an
arm with fewer tasks are shorter. `text` has longer answers in longer branches, so it is given more
tokens in as many steps. `data` holds train/ and validation/, `runs` the stages of this arm; `rate`
multiplies all learning rates; `steps` the steps of every stage. Stage `track` of the SAM 2 arms
comes between 1 and 2: SAM 2 itself learns to follow boxes that are drawn, and is frozen from there
on, as the published head starts from a trained and frozen SAM 2.
"""

import dataclasses
import pathlib
import runpy

from ml_collections import ConfigDict

from tpo_jax.models.heads import cg_detr, heads_of, sam2
from tpo_jax.training.config import ConfigError, parse_arg

_DEMO = runpy.run_path(str(pathlib.Path(__file__).with_name("demo.py")))
# The demo counts the language loss eight times; published weights are a twentieth beside once.
_CG_DETR = cg_detr.published_weights(saliency=4.0, scale=8 * 0.05)
_SAM2 = sam2.published_weights()
_PROMPT = "sam2/prompt"
# Tokens of the longest answer in words, a track, and of it with its question.
TEXT_ANSWER, TEXT_BRANCH = 76, 100
TEXT_CONVERSATION = 2.0  # share of conversation where long questions have no bucket of their own
# What buckets of the demo hold, where that is not everything.
BUCKET_TASKS = {"image": ("conversation", "region"), "video_long": ("conversation",)}
TRACK_STEPS, TRACK_RATE = 160, 2e-3


@dataclasses.dataclass(frozen=True)
class Arm:
    """tasks: that are asked. heads: that answer them. losses: beside those of the demo."""

    tasks: tuple[str, ...]
    heads: tuple[str, ...] = ()
    losses: dict[str, float] = dataclasses.field(default_factory=dict)


_MASKS = ("mask", "tracking")
_TASKS = ("temporal", "region", *_MASKS)
_TEMPORAL = ("conversation", "temporal")
ARMS = {
    "heads": Arm(("conversation", *_TASKS), ("region", "temporal", "mask")),
    "text": Arm(("conversation", *_TASKS)),
    "conversation": Arm(("conversation",)),
    "TRM": Arm(_TASKS, ("region", "temporal", "mask")),
    "T": Arm(("temporal",), ("temporal",)),
    "R": Arm(("region",), ("region",)),
    "M": Arm(_MASKS, ("mask",)),
    "temporal": Arm(_TEMPORAL, ("temporal",)),
    "cg_detr": Arm(_TEMPORAL, ("cg_detr",), _CG_DETR),
    "temporal_mlp": Arm(
        _TEMPORAL, ("temporal_mlp",), {"temporal_mlp/l1": 5.0, "temporal_mlp/giou": 1.0}
    ),
    "sam2": Arm(_MASKS, ("sam2",), {term: w for term, w in _SAM2.items() if term != _PROMPT}),
    "first_frame_box": Arm(_MASKS, ("sam2",), {_PROMPT: _SAM2[_PROMPT]}),
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, arm="heads", stage="1", runs="runs/task_preference", data="runs/demo/data", init="",
        rate=1.0, steps=1.0, tiny=False,
    )  # fmt: skip
    if arg.arm not in ARMS:
        raise ConfigError(f"config argument arm={arg.arm}: expected one of {', '.join(ARMS)}")
    arm, tracks = ARMS[arg.arm], arg.stage == "track"
    stage = "2" if tracks else arg.stage
    config = _DEMO["get_config"](f"stage={stage},runs={arg.runs},init={arg.init},tiny={arg.tiny}")
    for split in ("train", "validation"):
        for source in config.data[split]:
            source["path"] = f"{arg.data}/{split}"
    _choose_heads(config, arm, stage)
    _choose_questions(config, arm)
    if arg.arm == "text":
        _write_text(config)
    if "sam2" in arm.heads:
        config.sam2 = "micro" if arg.tiny else "demo"
    if tracks:
        _track(config)
    elif "sam2" in arm.heads and stage == "2":
        config.init_from = arg.init or f"{arg.runs}/track/model"
        learnt = "heads/sam2/adapter|task_tokens/|box_encoder/"
        config.trainable = [[learnt, config.trainable[0][1]], *_without_heads(config.trainable)]
    config.trainable = [[pattern, rate * arg.rate] for pattern, rate in config.trainable]
    if not arg.tiny:
        config.steps = max(round(config.steps * arg.steps), 1)
    return config


def _choose_heads(config: ConfigDict, arm: Arm, stage: str) -> None:
    config.model.heads = list(arm.heads)
    kept = {
        term: weight for term, weight in config.losses.items()
        if term.split("/")[0] in ("language", *arm.heads)
    }  # fmt: skip
    asleep = 0.0 if stage == "1" else 1.0  # stage 1 of the demo reports the losses of heads only
    config.losses = kept | {term: weight * asleep for term, weight in arm.losses.items()}
    if not arm.heads:
        config.init_missing = []
        config.trainable = _without_heads(config.trainable)


def _without_heads(trainable: list) -> list:
    """The entries of the language model and what it sees."""
    new = ("heads/", "task_tokens/", "box_encoder/")
    entries = []
    for pattern, rate in trainable:
        old = [part for part in pattern.split("|") if part not in new]
        if old:
            entries.append(["|".join(old), rate])
    return entries


def _choose_questions(config: ConfigDict, arm: Arm) -> None:
    """Tasks of the arm alone, in rows as much shorter as the other tasks are questions."""
    every = _DEMO["TASKS"]
    kept = {task: weight for task, weight in every.items() if task in arm.tasks}
    for source in (*config.data.train, *config.data.validation):
        source["tasks"] = dict(kept)
    slots = {*heads_of(arm.heads), *(["box"] if "mask" in heads_of(arm.heads) else [])}
    for name, bucket in list(config.buckets.items()):
        asked = BUCKET_TASKS.get(name, tuple(every))
        if not any(task in kept for task in asked):
            del config.buckets[name]
            continue
        share = sum(kept.get(task, 0.0) for task in asked) / sum(every[task] for task in asked)
        bucket.branches = max(round(bucket.branches * share), 1)
        bucket.slots = {task: count for task, count in bucket.slots.items() if task in slots}


def _write_text(config: ConfigDict) -> None:
    config.data.task_text = True
    for source in (*config.data.train, *config.data.validation):
        source["tasks"]["conversation"] = TEXT_CONVERSATION
    video = config.buckets.video
    video.branch_tokens, video.answers = TEXT_BRANCH, TEXT_ANSWER
    # Every question is shorter than the longest answer in words.
    video.weight = round(video.weight + config.buckets.video_long.weight)
    del config.buckets["video_long"]


def _track(config: ConfigDict) -> None:
    """SAM 2 alone, prompted by drawn boxes."""
    for source in (*config.data.train, *config.data.validation):
        source["tasks"] = {"tracking": 1.0}
    config.buckets = {"video": config.buckets.video}
    config.losses = {"language": 1.0} | {t: w for t, w in _SAM2.items() if t != _PROMPT}
    config.trainable = [["heads/sam2/(?!adapter)", TRACK_RATE]]
    config.steps = min(config.steps, TRACK_STEPS)
