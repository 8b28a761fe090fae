"""VideoChat-TPO: Task Preference Optimization of VideoChat2 with Mistral-7B (arXiv 2412.19326).

    python -m tpo_jax.convert import --source=VideoChat-TPO --out=videochat2 --set heads=[]
    python -m tpo_jax.convert import --source=sam2-hiera-large --into=videochat2 \
        --out=runs/videochat_tpo/base
    C=configs/videochat_tpo.py
    for s in 1 2_temporal 2_region 2_mask 3_tasks 3; do
      python -m tpo_jax.train --config=$C:stage=$s,data=DIR --workdir=runs/videochat_tpo/$s
    done

  1           task assignment: LoRA alone; losses of heads are only reported
  2_temporal, 2_region, 2_mask   one head each with its task token, and LoRA
  3_tasks     everything but SAM 2, without conversation
  3           everything but SAM 2, with conversation

The published base is VideoChat2-Mistral, whose own files have no reader here. The first command
takes the released end result without its heads instead: its tower, Q-Former and LoRA have been
through these stages already.

Each starts from RUNS/<the one before>/model, the first from RUNS/base; `init` names another folder.
Heads are `region_mlp`, `cg_detr` and `sam2`; adapters of rank 16 on the language model. DIR holds
a prepared folder for each data set, named as in SETS; docs/task_preference.md has them with their
formats, what of all this is published and what is not. Those of RefCOCO are prepared with
`--split=train`: their files hold what is tested, too. Arguments beside `stage`, `runs` and `init`:

  numbers    table: the paper's Table 17. text: its sections, where they differ. run: the arguments
             that are published with the weights, of a joint stage (stage=3)
  sets       a+b: these instead of all of the stage's. Another name is a folder of your own, which
             is asked for every task of the stage
  media      of your own folders: video, image or video+image; "": as the stage's sets
  samples    how many questions there are, from which steps follow; 0: as published
  mask_loss  masks: of the predicted masks, of the prompt and of its box. prompt: as released, the
             last two alone
  random     random weights, for --dry_run and plans; tiny: a few steps of a tiny model
"""

import dataclasses

from ml_collections import ConfigDict

from tpo_jax.models.heads import cg_detr, region_mlp, sam2
from tpo_jax.models.presets import preset
from tpo_jax.models.published import VIDEOCHAT_LORA
from tpo_jax.training.config import ConfigError, parse_arg, source_config
from tpo_jax.training.families import family_config, image_bucket

ARGUMENTS = {
    "stage": "1", "runs": "runs/videochat_tpo", "data": "runs/data", "init": "",
    "numbers": "table", "sets": "", "media": "", "samples": 0, "mask_loss": "masks",
    "random": False, "tiny": False,
}  # fmt: skip
TASK_OF = {"region_mlp": "region", "cg_detr": "temporal", "sam2": "mask"}
HEADS = list(TASK_OF)
FRAMES = 16
# Media of each set, and the task that it is asked for.
SETS = {
    **dict.fromkeys(
        ("didemo", "queryd", "hirest", "activitynet", "tacos", "nlq", "qvhighlights"),
        ("video", "temporal"),
    ),
    **dict.fromkeys(
        ("refcoco", "refcoco_plus", "refcocog", "visual_genome", "as_v2"), ("image", "region")
    ),
    # Of tracks a box is drawn, whose prompt takes the place of the adapter's tokens: SAM 2 being
    # frozen, losses of masks have no gradient there, those of the prompt and of its box have.
    "mevis": ("video", "mask"), "sa_v": ("video", "tracking"),
    **dict.fromkeys(("youcook2_reasoning", "activitynet_reasoning", "llava_hound"),
                    ("video", "conversation")),
    "sharegpt4v": ("image", "conversation"),
    **dict.fromkeys(("videochat2_it", "sharegpt_4o"), ("video+image", "conversation")),
}  # fmt: skip
OF_IMAGES = ("conversation", "region")
REFERRING = ("refcoco", "refcoco_plus", "refcocog")
SPATIAL = ("as_v2", "visual_genome", *REFERRING)
LORA, TOKENS = "language/.*lora_", "task_tokens/|box_encoder/"
ADAPTER = "heads/sam2/(?!network)"  # with the box readout; SAM 2 itself is frozen
NEW = f"heads/region_mlp|heads/cg_detr|{ADAPTER}|{TOKENS}"
# Answers of AS-V2 name many objects, and one that does not fit ends the run; `region_mlp` is two
# layers on so many states.
SLOTS = {"region": 16, "temporal": 1, "mask": 1, "box": 1}
# Slots that a question of each task takes.
TAKES = {
    "conversation": (), "temporal": ("temporal",), "region": ("region",), "mask": ("mask",),
    "tracking": ("mask", "box"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Stage:
    """after: whose model it starts from. data: (questions, sets that they come from), as in
    Table 18. batch: rows of a step. rates: [regex, learning rate]. heads: whose losses count."""

    after: str
    data: tuple[tuple[int, tuple[str, ...]], ...]
    batch: int
    epochs: int
    rates: list
    heads: tuple[str, ...]
    warmup: float = 0.2

    @property
    def samples(self) -> int:
        return sum(count for count, _ in self.data)


def get_config(arg: str | None = None) -> ConfigDict:
    return make_config("videochat2", parse_arg(arg, **ARGUMENTS), FRAMES)


def make_config(family: str, arg: ConfigDict, frames: int) -> ConfigDict:
    """The config of `arg` for a family of models.presets; `frames` of a video."""
    stages = stages_of(arg.numbers)
    if arg.stage not in stages:
        expected = ", ".join(stages)
        raise ConfigError(
            f"config argument stage={arg.stage}: expected one of {expected} with "
            f"numbers={arg.numbers}"
        )
    stage = stages[arg.stage]
    start = f"{arg.runs}/base" if stage.after == "base" else f"{arg.runs}/{stage.after}/model"
    arg.init = "" if arg.random else arg.init or start
    config = family_config(family, arg, frames=frames, batch=stage.batch)
    config.model.heads = HEADS
    config.sam2 = ("micro" if arg.tiny else "large") if arg.random else ""
    if arg.init and stage.after == "base":
        config.init_missing = NEW.split("|")
    config.lora = dataclasses.asdict(VIDEOCHAT_LORA)
    config.optimizer.update(weight_decay=0.02, warmup=stage.warmup, min_lr_ratio=0.05, eps=1e-5)
    _choose_data(config, stage, arg)
    asked = {slot for bucket in config.buckets.values() for slot in bucket.slots}
    _choose_trained(config, stage, asked, arg.mask_loss)
    config.task_gradients_every = 1 if arg.tiny else 500
    sizes = preset(f"{family}_{'tiny' if arg.tiny else '7b'}")
    for bucket in config.buckets.values():
        bucket.update(windows=10, mask_size=sizes.mask_size)
    if not arg.tiny:
        # SAM 2 is 288 wide in its second stage, which no larger power of two divides.
        config.mesh.update(data=-1, fsdp=32)
        config.steps = -(-(arg.samples or stage.samples) * stage.epochs // stage.batch)
    return config


def stages_of(numbers: str) -> dict[str, Stage]:
    """The stages in order. What differs between Table 17 and the text is the rate of region and
    mask head with their tokens, the epochs of their stages, and the batch of the joint ones."""
    if numbers not in ("table", "text", "run"):
        raise ConfigError(f"config argument numbers={numbers}: expected table, text or run")
    table = numbers == "table"
    new, joint = (1e-4, 256) if table else (2e-5, 128)
    lora = [LORA, 2e-5]
    temporal = [["heads/cg_detr", 1e-4], ["task_tokens/temporal", 2e-4], lora]
    region = [["heads/region_mlp|task_tokens/region", new], lora]
    # The table does not list the encoder of given boxes, which only tracking reads here.
    mask = [[f"{ADAPTER}|task_tokens/mask|box_encoder/", new], lora]
    everything = [["vision/|connector/", 2e-5], [NEW, 2e-5], lora]
    assigned = (50_000, ("didemo", "queryd")), (50_000, REFERRING), (50_000, ("sa_v", "mevis"))
    grounded = (116_500, ("didemo", "queryd", "hirest", "activitynet", "tacos", "nlq")),
    tasks = (7_500, ("qvhighlights",)), (400_000, SPATIAL), (116_500, ("mevis", "sa_v"))
    talk = ("videochat2_it", "sharegpt_4o", "llava_hound", "sharegpt4v")
    talk = (40_000, ("youcook2_reasoning", "activitynet_reasoning")), (3_000_000, talk)
    spatial, segmented = ((540_000, SPATIAL),), ((114_600, ("sa_v", "mevis")),)
    last = Stage("3_tasks", (*tasks, *talk), joint, 3, everything, tuple(HEADS))
    if numbers == "run":
        return {"3": dataclasses.replace(last, epochs=1, warmup=0.0)}
    return {
        "1": Stage("base", assigned, 128, 1, [lora], ()),
        "2_temporal": Stage("1", grounded, 64, 25, temporal, ("cg_detr",)),
        "2_region": Stage(
            "2_temporal", spatial, 128, 3 if table else 1, region, ("region_mlp",)
        ),
        "2_mask": Stage("2_region", segmented, 128, 1 if table else 3, mask, ("sam2",)),
        "3_tasks": Stage("2_mask", tasks, joint, 1, everything, tuple(HEADS)),
        "3": last,
    }


def _choose_trained(
    config: ConfigDict, stage: Stage, asked: set[str], mask_loss: str
) -> None:
    """What the stage trains, but for heads that the chosen sets do not ask: those would only decay.

    Losses have the published weights, and 0 (only reported) for heads that are not trained.
    """
    if mask_loss not in ("masks", "prompt"):
        raise ConfigError(f"config argument mask_loss={mask_loss}: expected masks or prompt")
    trained = {name for name in stage.heads if TASK_OF[name] in asked}
    left_out = [f"heads/{name}" for name in HEADS if name not in trained]
    left_out += [] if "box" in asked else ["box_encoder/"]
    for pattern, rate in stage.rates:
        parts = [part for part in pattern.split("|") if not part.startswith(tuple(left_out))]
        if parts:
            config.trainable.append(["|".join(parts), rate])
    weights = region_mlp.published_weights() | cg_detr.published_weights(scale=0.05)
    for term, weight in sam2.published_weights().items():
        weights[term] = weight if mask_loss == "masks" or term in sam2.PROMPT_TERMS else 0.0
    for term, weight in weights.items():
        config.losses[term] = weight if term.split("/")[0] in trained else 0.0


def _choose_data(config: ConfigDict, stage: Stage, arg: ConfigDict) -> None:
    """Sources, and a bucket for each medium. A step has one medium, as often as its questions are;
    in it, rows come from each source in proportion to its questions."""
    sources, asked = [], {}
    for name, (count, media, tasks) in _chosen(stage, arg).items():
        media = media.split("+")
        share = count / len(media)  # of a set with both, half each
        sources.append(source_config(f"{arg.data}/{name}", weight=share, tasks=tasks))
        for medium in media:
            known = asked.setdefault(medium, {})
            for task in tasks if medium == "video" else [t for t in tasks if t in OF_IMAGES]:
                part = share * tasks[task] / sum(tasks.values())
                known[task] = known.get(task, 0.0) + part
    config.data.train = sources
    video = config.buckets.video
    buckets = {"video": video, "image": image_bucket(video)}
    config.buckets = {medium: buckets[medium] for medium in sorted(asked, reverse=True)}
    for medium, tasks in asked.items():
        taken = {slot for task in tasks for slot in TAKES[task]}
        config.buckets[medium].update(
            weight=sum(tasks.values()),
            slots={slot: count for slot, count in SLOTS.items() if slot in taken},
            idle=[slot for slot in SLOTS if slot not in (*taken, "box")],
        )


def _chosen(stage: Stage, arg: ConfigDict) -> dict[str, tuple[float, str, dict[str, float]]]:
    """{set: (questions, media, {task: share of draws})}.

    Only the totals of several sets are published: they count equally.
    """
    published: dict[str, tuple[float, str, dict[str, float]]] = {}
    for count, names in stage.data:
        for name in names:
            media, task = SETS[name]
            published[name] = (count / len(names), media, {task: 1.0})
    names = [name for name in arg.sets.split("+") if name]
    if not names:
        return published
    if wrong := [name for name in names if name in SETS and name not in published]:
        raise ConfigError(
            f"config argument sets={arg.sets}: {wrong[0]} is no set of stage {arg.stage}, which "
            f"has {', '.join(published)}"
        )
    tasks: dict[str, float] = {}
    for count, _, (task,) in published.values():
        tasks[task] = tasks.get(task, 0.0) + count
    media = arg.media or "+".join(
        m for m in ("video", "image") if any(m in media for _, media, _ in published.values())
    )
    if set(media.split("+")) - {"video", "image"}:
        raise ConfigError(f"config argument media={media}: expected video, image or video+image")
    own = sum(name not in published for name in names)
    return {n: published.get(n, (stage.samples / max(own, 1), media, tasks)) for n in names}
