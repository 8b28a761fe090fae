"""The arms of the studies of Task Preference Optimization: a joint stage each, from the base.

    python -m tpo_jax.train --config=configs/task_preference.py:arm=text,data=D --workdir=DIR

  heads         region, temporal and mask head beside conversation
  text          the same targets written into the answers, no head, asked as often as in `heads`
  text_half     the same, asked half as often: as many positions as in `heads`
  conversation  conversation alone
  middle_frame  the same about the middle frame alone: a floor of questions
  TRM           as heads, without conversation
  T, R, M       one task alone: temporal; region; mask and tracking
  temporal, cg_detr, temporal_mlp   one temporal head each, beside conversation
  tracker_stills, tracker_pairs, tracker   a SAM 2 of the demo's size, and nothing else, learns to
                find what is in boxes that are drawn, to find it again in another frame, and to
                follow it through clips
  sam2, first_frame_box, sam2_all   masks by that SAM 2, frozen, which the slot state prompts:
                taught by the losses of its masks; all that is published, by the box on the first
                frame, as the prompt that it would be and as four numbers that are read out of the
                slot state; or by all of it, the box that of the best labelled frame, as
                configs/videochat_tpo.py does

What is trained at which rates is the demo's stage 2, with everything in it from the start: routing,
heads and language model. Published are three stages, of which arms differ in the later ones; one
for all of them is a third of the time, and no claim here is about stages.

Rows are made to ask each kind as often in an arm as in `heads`, within 7 %: rows of an arm with
fewer tasks are shorter, and arms without conversation have no steps of long questions, the other
steps being as many. A row that runs out of its video's questions, or of slots, asks fewer: counted
in the videos of seed 0, `conversation` asks 24 % less than `heads`, T, R, M and TRM between 4 %
less and 12 % more. `text` has longer answers; what is too long for the rows of short ones stands
beside them in every step, so that in as many steps it sees twice the rows, reads twice the
positions and asks 9 to 27 % more of every kind than `heads`. `text_half` has the one or the other
in a step, by turns. The page of the study prints what every run was asked.

The tracker is asked to follow what is masked, from a box: its `data` are `drawn_boxes` of
experiments/task_preference/relabelled.py.

The three temporal heads have four times as many steps as the other arms. In as many as those, the
loss by which `cg_detr` learns which of its windows to answer with had not moved (cg_detr/label was
0.138 at step 10, 0.135 at step 110), and its windows were below the floor. So have the arms that
prompt SAM 2, whose losses were still falling at the end of fewer.

`data` holds train/; `init` is the model folder that an arm starts from, the base by default; `rate`
multiplies all learning rates, `steps` the number of steps; `tiny` is a few steps on small shapes.
"""

import dataclasses
import pathlib
import runpy

from ml_collections import ConfigDict

from tpo_jax.interop.folder import load_config
from tpo_jax.models.heads import cg_detr, heads_of, sam2
from tpo_jax.training.config import ConfigError, parse_arg, source_config

_DEMO = runpy.run_path(str(pathlib.Path(__file__).with_name("demo.py")))
STEPS, LONG_STEPS = 120, 480
# Single frames come first, as published. In 200 steps on clips alone, or 240 after single frames,
# nothing was followed; at 1e-2 features grew until memories drowned what was found.
TRACKER_STAGES = {  # frames, videos a step, steps, learning rate
    "tracker_stills": (1, 32, 400, 3e-3),
    "tracker_pairs": (2, 32, 240, 3e-3),
    "tracker": (8, 8, 160, 1e-3),
}
# Of what guesses the overlaps; at more, it learns that there are none while there are none, for
# good.
TRACKER_IOU_RATE = 1e-3
TRACKER_OBJECTS = 4
SAM2_FRAMES = 8  # published: 8 in training; tests show all frames
SAVE_EVERY = 40
# The demo counts the language loss eight times; published weights are a twentieth beside once.
_CG_DETR = cg_detr.published_weights(saliency=4.0, scale=8 * 0.05)
_NEW = "heads/|task_tokens/|box_encoder/"
_ADAPTER = "heads/sam2/(?!network)|task_tokens/|box_encoder/"
_TRACKER, _TRACKER_IOU = "heads/sam2/network", "heads/sam2/network/mask_decoder/iou_mlp"
# In words: tokens of answers and of questions with them, of most places and windows, and of tracks.
TEXT_SHORT = {"answers": 24, "branch_tokens": 40}
TEXT_LONG = {"answers": 76, "branch_tokens": 100}
TEXT_LONG_BRANCHES = 7  # counted: 1.27 x the masks, 1.24 x the tracks of `heads`, 1.10 x the talk


@dataclasses.dataclass(frozen=True)
class Arm:
    """tasks: that are asked. heads: that answer them. losses: beside those of the demo. new: regex
    of the parameters that learn at the rate of heads. evidence: as config.data.evidence. steps:
    before the argument of that name."""

    tasks: tuple[str, ...]
    heads: tuple[str, ...] = ()
    losses: dict[str, float] = dataclasses.field(default_factory=dict)
    new: str = _NEW
    evidence: str = "full"
    steps: int = STEPS


def _sam2(taught: str) -> dict[str, float]:
    """Weights of the terms: of the "prompt" and its box, of all "masks", of "all" these, or of
    "tracks" by drawn boxes, which do not prompt frames by themselves."""
    weights = sam2.published_weights()
    masks = weights.keys() - sam2.PROMPT_TERMS
    tracks = {term for term in masks if "/still_" not in term}
    prompt = set(sam2.PROMPT_TERMS)
    terms = {"prompt": prompt, "masks": masks, "all": weights.keys(), "tracks": tracks}[taught]
    return {term: weight * float(term in terms) for term, weight in weights.items()}


_MASKS = ("mask", "tracking")
_TASKS = ("temporal", "region", *_MASKS)
_TEMPORAL = ("conversation", "temporal")
_MLP = {"temporal_mlp/l1": 5.0, "temporal_mlp/giou": 1.0}
ARMS = {
    "heads": Arm(("conversation", *_TASKS), ("region", "temporal", "mask")),
    "text": Arm(("conversation", *_TASKS)),
    "text_half": Arm(("conversation", *_TASKS)),
    "conversation": Arm(("conversation",)),
    "middle_frame": Arm(("conversation",), evidence="middle_frame"),
    "TRM": Arm(_TASKS, ("region", "temporal", "mask")),
    "T": Arm(("temporal",), ("temporal",)),
    "R": Arm(("region",), ("region",)),
    "M": Arm(_MASKS, ("mask",)),
    "temporal": Arm(_TEMPORAL, ("temporal",), steps=LONG_STEPS),
    "cg_detr": Arm(_TEMPORAL, ("cg_detr",), _CG_DETR, steps=LONG_STEPS),
    "temporal_mlp": Arm(_TEMPORAL, ("temporal_mlp",), _MLP, steps=LONG_STEPS),
    **{stage: Arm(("tracking",), ("sam2",), _sam2("tracks")) for stage in TRACKER_STAGES},
    "sam2": Arm(("mask",), ("sam2",), _sam2("masks"), _ADAPTER, steps=LONG_STEPS),
    "sam2_all": Arm(("mask",), ("sam2",), _sam2("all"), _ADAPTER, steps=LONG_STEPS),
    "first_frame_box": Arm(("mask",), ("sam2",), _sam2("prompt"), _ADAPTER, steps=LONG_STEPS),
}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg, arm="heads", data="runs/demo/data", init=_DEMO["BASE"], rate=1.0, steps=1.0, tiny=False
    )
    if arg.arm not in ARMS:
        raise ConfigError(f"config argument arm={arg.arm}: expected one of {', '.join(ARMS)}")
    arm = ARMS[arg.arm]
    config = _DEMO["get_config"](f"stage=2,init={arg.init},tiny={arg.tiny}")
    asked = {task: weight for task, weight in _DEMO["TASKS"].items() if task in arm.tasks}
    config.data.train = [source_config(f"{arg.data}/train", tasks=asked)]
    config.data.validation = []
    config.data.evidence = arm.evidence
    config.steps = config.steps if arg.tiny else max(round(arm.steps * arg.steps), 1)
    config.checkpoint.every = SAVE_EVERY
    for bucket in config.buckets.values():  # with `tiny`, the base may be one of any size
        bucket.mask_size = load_config(arg.init).mask_size
    _choose_heads(config, arm)
    _choose_questions(config, arm, asked)
    if arg.arm in ("text", "text_half"):
        _write_text(config, arg)
    if "sam2" in arm.heads:
        video = config.buckets.video
        video.frames, video.slots.mask = min(video.frames, SAM2_FRAMES), video.branches
        config.sam2 = "micro" if arg.tiny else "demo"
    if arg.arm in TRACKER_STAGES:
        _choose_tracks(config, arg)
    config.trainable = [[pattern, rate * arg.rate] for pattern, rate in config.trainable]
    return config


def _choose_heads(config: ConfigDict, arm: Arm) -> None:
    config.model.heads = list(arm.heads)
    kept = ("language", *arm.heads)
    losses = {term: w for term, w in config.losses.items() if term.split("/")[0] in kept}
    config.losses = losses | arm.losses
    (_, new_rate), (language, language_rate) = config.trainable
    config.trainable = [[language, language_rate]]
    if arm.heads:
        config.trainable.insert(0, [arm.new, new_rate])
        config.init_missing = _NEW.split("|")


def _choose_questions(config: ConfigDict, arm: Arm, asked: dict[str, float]) -> None:
    """Rows as much shorter as the other tasks are questions."""
    every = _DEMO["TASKS"]
    video, long = config.buckets.video, config.buckets.video_long
    video.branches = max(round(video.branches * sum(asked.values()) / sum(every.values())), 1)
    answered = heads_of(arm.heads)
    slots = {*answered, "box"} if "mask" in answered else set(answered)
    video.slots = {task: count for task, count in video.slots.items() if task in slots}
    if "conversation" not in arm.tasks:
        config.steps = max(round(config.steps * video.weight / (video.weight + long.weight)), 1)
        del config.buckets.video_long
    if arm.evidence != "full":
        video.frames = long.frames = 1


def _choose_tracks(config: ConfigDict, arg: ConfigDict) -> None:
    """As many objects as a row of the other arms has masks, each behind a box."""
    video = config.buckets.video
    video.frames, rows, steps, rate = TRACKER_STAGES[arg.arm]
    config.trainable = [[_TRACKER_IOU, TRACKER_IOU_RATE], [_TRACKER, rate]]
    if not arg.tiny:
        video.batch_size, config.steps = rows, max(round(steps * arg.steps), 1)
    video.branches = TRACKER_OBJECTS
    video.slots.mask = video.slots.box = video.branches


def _write_text(config: ConfigDict, arg: ConfigDict) -> None:
    """Short answers, and beside them or by turns the masks, tracks and conversation that need long
    rows."""
    config.data.task_text = True
    video, long = config.buckets.video, config.buckets.video_long
    every = _DEMO["TASKS"]
    masks = sum(every[task] for task in _MASKS)
    video.update(TEXT_SHORT, branches=round(video.branches * (1 - masks / sum(every.values()))))
    long.update(TEXT_LONG, branches=2 if arg.tiny else TEXT_LONG_BRANCHES)
    if arg.arm == "text":
        video.beside = "video_long"
    else:
        video.weight = long.weight = 1
