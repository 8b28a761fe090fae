"""The training config: its skeleton with defaults, typed config-file arguments, and validation.

A config file is `def get_config(arg=None) -> ConfigDict`: it takes `default_config()`, fills it in,
and returns it. Every key that exists is in the skeleton; `validate` refuses any other, so that a
misspelt option cannot be ignored.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tpo_jax.data.evidence import MODES
from tpo_jax.data.mixture import SOURCE_DEFAULTS
from tpo_jax.data.records import known_tasks
from tpo_jax.errors import UserError
from tpo_jax.models.heads import HEADS, heads_of
from tpo_jax.training.config_checks import (
    check_beside,
    check_objective,
    check_optimizer,
    check_running,
)
from tpo_jax.training.config_checks import problem as _problem
from tpo_jax.training.save_policy import SavePolicy

# Options whose keys are names that the config chooses.
_FREE_KEYS = ("buckets", "init_options", "losses", "slots", "tasks")
# Options that take more than one type.
_ANY_KIND = {"preference.loss": ("str", "list", "dict")}


class ConfigError(UserError):
    """One or more options that cannot be used: option, value, reason and fix of each."""


def default_config() -> ConfigDict:
    """The skeleton: every option with its default. Lists and buckets start empty."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 1000
    config.objective = "sft"  # or "preference" (DPO and relatives)
    config.model = {
        "preset": "tiny",  # models.presets.PRESETS; "": the configuration in init_from
        "heads": [],  # of models.heads.HEADS, at most one a task
        # How the model runs, whatever folder or preset it is of.
        "attention": "auto",  # models.config.ATTENTION_BACKENDS; "auto": the best of the devices
        "remat": "",  # what layers compute again in the backward pass: models.checks.REMAT
        "dtype": "",  # "float32" or "bfloat16", to compute in; "": that of the folder or preset
    }
    config.sam2 = ""  # size of the head sam2, of models.sam2_config.SIZES; "": that of init_from
    config.clip_features = config.text_features = False  # head cg_detr reads those of data.train
    config.init_from = ""  # model folder to start from; "": random weights
    config.init_missing = []  # regexes of parameters that init_from may lack (new heads)
    # Of a published folder in init_from: what its config.json lacks, as of `convert import --set`.
    config.init_options = {}
    config.tokenizer = ""  # tokenizer.json; "": the one in init_from
    config.time_instruction = False  # tell the times of frames in words; init_from says it itself
    config.data = {
        "train": [],  # source_config(...): prepared folders and their weights
        "validation": [],
        "references": [],  # sidecars with reference log-probabilities of preference pairs
        "threads": 2,  # that read batches ahead
        "evidence": "full",  # "blind" and "middle_frame" train the models that floors come from
        "task_text": False,  # targets of heads as text of answers (data.task_text), without heads
        "epochs": 0.0,  # asked for, for which steps were counted: more are warned of; 0: any
    }
    config.buckets = {}  # name -> bucket_config(...): the shapes that are compiled
    config.losses = {"language": 1.0}  # term -> weight; "region/l1" is a term of a head
    config.preference = {  # objectives.preference.PreferenceConfig
        "loss": "sigmoid",  # a name, a list of names, or {name: weight}
        "beta": 0.3,  # this and sft: as published for LongVA-TPO (arXiv 2501.13919)
        "sft": 0.5,
        "label_smoothing": 0.0,
        "simpo_gamma": 0.5,
        "rpo_alpha": 1.0,
        "discopop_tau": 0.05,
        "ld_alpha": 1.0,
        "wpo": False,
        "divergence": "reverse_kl",
        "divergence_alpha": 0.5,
        "kinds": [],  # kinds of question to report one by one
        # "sidecar": data.references. "adapters_off": the model without its LoRA, in the same step.
        "reference": "sidecar",
    }
    # New low-rank adapters on the kernels whose path matches; rank 0: those of init_from, if any.
    config.lora = {"pattern": "language/layers/.*kernel", "rank": 0, "alpha": 0.0, "dropout": 0.0}
    config.trainable = []  # [regex, peak learning rate]; first match wins, the rest is frozen
    config.optimizer = {
        "name": "adamw",  # or "muon", for models that start from random weights
        "warmup": 0.05,  # share of all steps
        "schedule": "cosine",  # after it, or "linear", down to min_lr_ratio
        "weight_decay": 0.05,
        "clip": 1.0,  # largest global gradient norm; 0: no clipping
        "min_lr_ratio": 0.1,
        "b2": 0.999,  # of Adam, as eps
        "eps": 1e-8,
        "moments": "float32",  # stored so; or "bfloat16", or "host" in the memory of the host
    }
    config.accumulation = 1  # micro-batches a step
    config.dropout = 0.0
    config.mesh = {"data": -1, "fsdp": 1, "context": 1, "tensor": 1}  # -1: what is left
    config.checkpoint = {
        "every": 500,  # steps between saves
        "keep": 2,  # how many of them stay
        "permanent": 0,  # steps between checkpoints that stay for good; 0: none
        "minutes": 0.0,  # longest time without a save; such a one goes with the next; 0: any
        "best": 0,  # checkpoints of the lowest validation losses that stay
        "local_dir": "",  # folder on every host, fast: its disk or memory
        "local_every": 0,  # steps between saves there; 0: none
    }
    config.divergence = {
        "spike": 10.0,  # a loss above so many medians is written down; 0: only one not finite
        "rollbacks": 0,  # times the run may go back to a checkpoint and skip such a batch
    }
    config.log_every = 10
    # Steps between measurements of each task's gradient, a backward pass a task each; 0: none.
    config.task_gradients_every = 0
    config.eval_every = 500  # 0: no validation
    config.eval_batches = 8
    config.compile_cache = ""  # directory; compiled programs survive restarts
    # Steps that are traced for xprof, into workdir/profile/; start 0: none. See docs/sweeps.md.
    config.profile = {"start": 0, "steps": 0}
    config.wandb = ""  # project of Weights & Biases; "": not used
    return config


def source_config(
    path: str,
    *,
    weight: float = 1.0,
    tasks: Mapping[str, float],
    kinds: Sequence[str] = (),
    pairs: str = "",
) -> dict[str, Any]:
    """One entry of data.train or data.validation: a prepared folder, and weights of its tasks.

    `kinds` limits conversations to these kinds of question. `pairs` names the pairs.jsonl of a
    preference run, which replaces the folder's examples.
    """
    tasks, kinds = dict(tasks), list(kinds)
    return {"path": path, "weight": weight, "tasks": tasks, "kinds": kinds, "pairs": pairs}


def bucket_config(
    *,
    media: str,
    batch_size: int,
    frames: int,
    branches: int,
    branch_tokens: int,
    answers: int,
    question: int = 0,
    slots: Mapping[str, int] | None = None,
    windows: int = 0,
    mask_size: int = 0,
    weight: float = 1.0,
    beside: str = "",
    idle: Sequence[str] = (),
    tiles: int = 0,
) -> dict[str, Any]:
    """One entry of buckets: fields as in data.pipeline.Bucket, sizes per row except batch_size."""
    return {
        "media": media,
        "batch_size": batch_size,
        "frames": frames,
        "question": question,
        "branches": branches,
        "branch_tokens": branch_tokens,
        "answers": answers,
        "slots": dict(slots or {}),
        "windows": windows,
        "mask_size": mask_size,
        "weight": weight,
        "beside": beside,
        "idle": list(idle),
        "tiles": tiles,
    }


def parse_arg(
    arg: str | None, **defaults: bool | int | float | str | tuple[int, ...]
) -> ConfigDict:
    """Parses the part of --config=file.py:ARG behind the colon, "key=value,flag,...".

    Types come from the defaults; a bare name is a bool set to True. `parse_arg("stage=2,tiny",
    stage=1, tiny=False)` gives stage 2 (an int) and tiny True. Where the default is a tuple,
    "8+16" gives (8, 16): different whole numbers.

    Raises:
      ConfigError: an unknown key, a key given twice, or a value of the wrong type.
    """
    values = ConfigDict(defaults)
    seen: set[str] = set()
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            known = ", ".join(f"{name}={default!r}" for name, default in defaults.items())
            raise ConfigError(f"config argument {item!r}: unknown key {key!r}; known: {known}")
        if key in seen:
            raise ConfigError(f"config argument {arg!r}: {key!r} is given twice")
        seen.add(key)
        values[key] = _parse_value(item, text if equals else "true", type(defaults[key]))
    return values


def _parse_value(
    item: str, text: str, kind: type
) -> bool | int | float | str | tuple[int, ...]:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"config argument {item!r}: expected true or false, got {text!r}")
        return text.lower() == "true"
    if kind is tuple:
        return _parse_numbers(item, text)
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(
            f"config argument {item!r}: expected {kind.__name__}, got {text!r}"
        ) from error


def _parse_numbers(item: str, text: str) -> tuple[int, ...]:
    parts = text.split("+")
    if not all(part.isdecimal() for part in parts) or len({*map(int, parts)}) < len(parts):
        raise ConfigError(
            f"config argument {item!r}: expected a whole number, or different ones such as "
            f"8+16+32, got {text!r}"
        )
    return tuple(map(int, parts))


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON-able dicts and lists (tuples become lists)."""
    return json.loads(config.to_json())


def from_dict(values: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `to_dict`; an option that is younger than `values` has its default."""

    def fill(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        filled = defaults | values
        for key, default in defaults.items():
            both = isinstance(default, Mapping) and isinstance(filled[key], Mapping)
            if both and key not in _FREE_KEYS:
                filled[key] = fill(filled[key], default)
        return {key: filled[key] for key in [*values, *filled]}  # in the order of `values`

    filled = fill(values, to_dict(default_config()))
    buckets = {name: b | {"idle": b.get("idle", [])} for name, b in filled["buckets"].items()}
    return ConfigDict(filled | {"buckets": buckets}, sort_keys=False)


def validate(config: ConfigDict) -> None:
    """Checks every option that can be checked without data, weights or devices.

    Raises:
      ConfigError: lists every problem as "option = value: reason; fix".
    """
    problems = _check_keys(to_dict(config), default_config())
    if not problems:  # the checks below read keys that the first pass has verified
        problems = [*_check_scalars(config), *_check_start(config), *_check_data(config)]
        problems += [*_check_buckets(config), *_check_heads(config), *check_running(config)]
        problems += [*check_objective(config), *check_optimizer(config)]
    if problems:
        raise ConfigError("config:\n" + "\n".join(f"  {problem}" for problem in problems))


def _check_keys(values: Mapping[str, Any], skeleton: Any, prefix: str = "") -> list[str]:
    """Unknown and missing keys, and types that differ from the skeleton's."""
    problems = []
    for key in skeleton:
        if key not in values:
            problems.append(_problem(prefix + key, None, "missing", "start from default_config()"))
    for key, value in values.items():
        option = prefix + key
        if key not in skeleton:
            near = difflib.get_close_matches(key, list(skeleton), n=1)
            fix = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(skeleton)}"
            problems.append(_problem(option, value, "unknown key", fix))
            continue
        expected = skeleton[key]
        kind = _kind(expected)
        if _kind(value) in _ANY_KIND.get(option, ()):
            continue
        if _kind(value) != kind and not (kind == "float" and _kind(value) == "int"):
            problems.append(_problem(option, value, f"is a {_kind(value)}", f"give a {kind}"))
        elif kind == "dict" and key not in _FREE_KEYS:
            problems += _check_keys(value, expected, option + ".")
    return problems


def _kind(value: Any) -> str:
    """bool, int, float, str, dict or list: the JSON type of a value."""
    for name, kind in [("bool", bool), ("int", int), ("float", float), ("str", str)]:
        if isinstance(value, kind):
            return name
    return "dict" if isinstance(value, Mapping | ConfigDict) else "list"


def _check_scalars(config: ConfigDict) -> list[str]:
    problems = []
    positive = (
        "steps", "accumulation", "log_every", "checkpoint.every", "checkpoint.keep", "data.threads",
    )  # fmt: skip
    not_negative = (
        "eval_every", "eval_batches", "checkpoint.permanent", "checkpoint.minutes",
        "checkpoint.best", "checkpoint.local_every", "divergence.spike", "divergence.rollbacks",
        "profile.start", "profile.steps", "task_gradients_every", "data.epochs",
    )  # fmt: skip
    for option in (*positive, *not_negative):
        value, low = _get(config, option), 1 if option in positive else 0
        if value < low:
            problems.append(_problem(option, value, "too small", f"give at least {low}"))
    if 0 < config.divergence.spike <= 1:
        fix = "give more than 1, or 0 for none"
        problems.append(
            _problem("divergence.spike", config.divergence.spike, "takes usual losses", fix)
        )
    if config.checkpoint.best and not config.eval_every:
        fix = "set eval_every, or checkpoint.best=0"
        problems.append(
            _problem("checkpoint.best", config.checkpoint.best, "without validation", fix)
        )
    if not problems:  # those that are too small would be named twice
        try:
            SavePolicy(**config.checkpoint.to_dict())
        except ValueError as error:
            problems.append(str(error))
    if not 0.0 <= config.dropout < 1.0:
        problems.append(_problem("dropout", config.dropout, "not a share", "give one in [0, 1)"))
    if config.eval_every and not config.data.validation:
        fix = "list prepared folders there, or set eval_every=0"
        problems.append(
            _problem("eval_every", config.eval_every, "data.validation is empty", fix)
        )
    if config.eval_every and not config.eval_batches:
        fix = "give at least 1, or set eval_every=0"
        problems.append(_problem("eval_batches", config.eval_batches, "nothing to average", fix))
    if not config.trainable:
        fix = 'list [regex, learning rate] groups, such as [[".*", 1e-3]]'
        problems.append(_problem("trainable", config.trainable, "everything is frozen", fix))
    for index, group in enumerate(config.trainable):
        if _kind(group) != "list" or [_kind(x) for x in group] not in (
            ["str", "float"], ["str", "int"],
        ):  # fmt: skip
            fix = "give [regex, peak learning rate]"
            problems.append(_problem(f"trainable[{index}]", group, "not a group", fix))
    if bool(config.profile.start) != bool(config.profile.steps):
        fix = "give both profile.start (first step to trace) and profile.steps, or neither"
        reason = "half a window"
        problems.append(_problem("profile", config.profile.to_dict(), reason, fix))
    return problems


def _check_start(config: ConfigDict) -> list[str]:
    """Where model and tokenizer come from."""
    problems = []
    if not config.tokenizer and not config.init_from:
        fix = "name a tokenizer.json, or a model folder in init_from"
        problems.append(_problem("tokenizer", "", "no tokenizer and no init_from", fix))
    if config.tokenizer and config.init_from:
        reason = f"init_from={config.init_from!r} brings its own"
        problems.append(_problem("tokenizer", config.tokenizer, reason, "leave it empty"))
    if config.time_instruction and config.init_from:
        reason = f"init_from={config.init_from!r} says it in its template.json"
        problems.append(_problem("time_instruction", True, reason, "leave it False"))
    if not config.model.preset and not config.init_from:
        fix = "name a preset, or a model folder in init_from"
        problems.append(_problem("model.preset", "", "no preset and no init_from", fix))
    for option in ("init_missing", "init_options"):
        if config[option] and not config.init_from:
            value = to_dict(config)[option]
            problems.append(_problem(option, value, "init_from is empty", "leave it empty"))
    return problems


def _check_data(config: ConfigDict) -> list[str]:
    problems = []
    if config.data.evidence not in MODES:
        fix = f"one of {', '.join(MODES)}"
        problems.append(_problem("data.evidence", config.data.evidence, "unknown", fix))
    if config.data.task_text and config.model.heads:
        reason, fix = "leaves nothing for model.heads to learn", "set it to False, or heads to []"
        problems.append(_problem("data.task_text", True, reason, fix))
    if not config.data.train:
        problems.append(_problem("data.train", [], "no training data", "list prepared folders"))
    for split in ("train", "validation"):
        for index, source in enumerate(config.data[split]):
            option = f"data.{split}[{index}]"
            given = SOURCE_DEFAULTS | dict(source)
            wrong = _check_keys(given, source_config("", tasks={}), option + ".")
            problems += wrong
            if wrong:
                continue
            if source["weight"] <= 0:
                problems.append(
                    _problem(f"{option}.weight", source["weight"], "not positive", "remove it")
                )
            if not any(weight > 0 for weight in source["tasks"].values()):
                fix = f"give positive weights to some of {', '.join(known_tasks())}"
                problems.append(_problem(f"{option}.tasks", source["tasks"], "draws nothing", fix))
            for task in source["tasks"]:
                if task not in known_tasks():
                    fix = f"one of {', '.join(known_tasks())}"
                    problems.append(_problem(f"{option}.tasks.{task}", task, "unknown task", fix))
    return problems


def _check_buckets(config: ConfigDict) -> list[str]:
    problems = []
    if not config.buckets:
        problems.append(_problem("buckets", {}, "no bucket", "add one made by bucket_config(...)"))
    skeleton = bucket_config(
        media="", batch_size=1, frames=1, branches=1, branch_tokens=1, answers=1
    )
    for name, bucket in to_dict(config)["buckets"].items():
        wrong = _check_keys(bucket, skeleton, f"buckets.{name}.")
        problems += wrong
        if wrong:
            continue
        at = f"buckets.{name}."
        if bucket["media"] not in ("video", "image"):
            problems.append(_problem(at + "media", bucket["media"], "unknown", "video or image"))
        for field in ("batch_size", "frames", "branches", "branch_tokens", "answers"):
            if bucket[field] < 1:
                problems.append(_problem(at + field, bucket[field], "too small", "give >= 1"))
        if bucket["batch_size"] % config.accumulation:
            fix = "make batch_size a multiple of it"
            reason = f"does not divide by accumulation={config.accumulation}"
            problems.append(_problem(at + "batch_size", bucket["batch_size"], reason, fix))
        if bucket["answers"] >= bucket["branch_tokens"]:
            reason = "a branch starts with at least one token that is given"
            fix = f"give less than branch_tokens={bucket['branch_tokens']}"
            problems.append(_problem(at + "answers", bucket["answers"], reason, fix))
        answered = {HEADS[head].task for head in config.model.heads if head in HEADS}
        for task in {**bucket["slots"], **dict.fromkeys(bucket["idle"])}:
            if task != "box" and task not in answered:
                fix = f"add a head for {task!r} to model.heads or drop the slot"
                value = bucket["slots"].get(task, "idle")
                problems.append(_problem(f"{at}slots.{task}", value, "no such head", fix))
    return problems


def _check_heads(config: ConfigDict) -> list[str]:
    names = list(config.model.heads)
    try:
        heads_of(names)
    except ValueError as error:
        return [_problem("model.heads", names, str(error), "correct the list")]
    problems = []
    for kind in ("clip_features", "text_features"):
        if config[kind] and not any(getattr(HEADS[name], f"reads_{kind}") for name in names):
            reason, fix = "no head of model.heads reads them", "add cg_detr, or set it to False"
            problems.append(_problem(kind, True, reason, fix))
    idle = [{*bucket.get("idle", ())} for bucket in config.buckets.values()] or [set()]
    for term, weight in config.losses.items():
        head = HEADS.get(term.split("/")[0])
        if head and weight and head.task in set.intersection(*idle):
            fix = "take its task out of the idle of one, or set the weight to 0"
            problems.append(_problem(f"losses.{term}", weight, "runs in no bucket", fix))
        if not weight or not any(term in HEADS[name].coupled for name in names):
            continue
        if config.accumulation > 1:
            reason = f"compares rows of the whole batch, but accumulation={config.accumulation}"
            problems.append(_problem(f"losses.{term}", weight, reason, "set one to 0, or 1"))
        problems += check_beside(config, f"would change {term}, which compares a whole batch")
    return problems


def _get(config: ConfigDict, option: str) -> Any:
    for key in option.split("."):
        config = config[key]
    return config
