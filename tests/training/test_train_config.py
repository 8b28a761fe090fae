import copy
import json
import pathlib
import runpy

import pytest
from absl import flags

from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import flatten
from tpo_jax.training.config import (
    ConfigError,
    bucket_config,
    default_config,
    from_dict,
    parse_arg,
    source_config,
    to_dict,
    validate,
)
from tpo_jax.training.config_changes import changed_since
from tpo_jax.training.config_flag import define_config
from tpo_jax.training.optimizer import assign_groups


def good():
    config = default_config()
    config.tokenizer = "tokenizer.json"
    config.data.train = [source_config("clips", tasks={"conversation": 1.0})]
    config.data.validation = [source_config("held_out", tasks={"conversation": 1.0})]
    config.buckets = {
        "video": bucket_config(
            media="video", batch_size=8, frames=4, branches=2, branch_tokens=32, answers=8
        )
    }
    config.trainable = [[".*", 1e-3]]
    return config


def _heads(losses):
    return {"model": {"preset": "tiny", "heads": ["cg_detr"]}, "losses": {"language": 1.0} | losses}


def test_a_good_config_passes():
    validate(good())
    config = good()
    config.update(_heads({"cg_detr/align": 1.0, "cg_detr/l1": 10.0}))
    config.buckets.video.slots.temporal = 2
    validate(config)
    # Only terms that count refuse micro-batches.
    config.losses["cg_detr/align"], config.accumulation = 0.0, 2
    validate(config)


def test_a_source_may_leave_out_kinds_and_pairs():
    """As docs/own_data.md writes it."""
    config = good()
    config.data.train = [{"path": "prepared", "weight": 1.0, "tasks": {"conversation": 1.0}}]
    validate(config)
    config.data.train[0]["kinds"] = "caption"
    with pytest.raises(ConfigError, match=r"data.train\[0\].kinds = 'caption': is a str"):
        validate(config)


def test_a_config_comes_back_from_its_json_with_types_and_order():
    values = to_dict(good())
    assert json.dumps(to_dict(from_dict(values))) == json.dumps(values)


def test_an_option_younger_than_the_json_has_its_default_and_an_unknown_one_is_refused():
    values = to_dict(good())
    del values["profile"], values["optimizer"]["clip"], values["buckets"]["video"]["idle"]
    values["buckets"]["video"]["windows"] = 3  # names of the config's own choice stay as they are
    config = from_dict(values)
    assert config.profile.steps == 0 and config.optimizer.clip == 1.0
    assert list(config.buckets) == ["video"] and config.buckets.video.windows == 3
    assert config.buckets.video.idle == []
    validate(config)
    with pytest.raises(ConfigError, match="stepz"):
        validate(from_dict(values | {"stepz": 1}))


@pytest.mark.parametrize("profile", [{"start": 3, "steps": 0}, {"start": 0, "steps": 3}])
def test_half_a_profiler_window_is_refused(profile):
    config = good()
    config.profile = profile
    with pytest.raises(ConfigError, match="half a window"):
        validate(config)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(stepz=5), ["stepz = 5", "unknown key", "did you mean steps?"]),
        (lambda c: c.optimizer.update(warm_up=0.1), ["optimizer.warm_up", "optimizer.warmup?"]),
        (lambda c: c.data.train[0].update(path_=1), ["data.train[0].path_", "unknown key"]),
        (lambda c: c.data.train[0].pop("path"), ["data.train[0].path", "missing"]),
        (lambda c: c.buckets.video.update(frame=1), ["buckets.video.frame", "frames?"]),
        (lambda c: c.data.train[0]["tasks"].update(cooking=1.0), ["cooking", "unknown task"]),
        (lambda c: c.data.update(train=[]), ["data.train", "no training data"]),
        (lambda c: c.data.update(validation=[]), ["eval_every", "data.validation is empty"]),
        (lambda c: c.buckets.__delitem__("video"), ["buckets", "no bucket"]),
        (lambda c: c.update(steps=0), ["steps = 0", "at least 1"]),
        (lambda c: c.update(dropout=1.0), ["dropout = 1.0", "[0, 1)"]),
        (lambda c: c.update(accumulation=3), ["buckets.video.batch_size = 8", "accumulation=3"]),
        (lambda c: c.buckets.video.update(answers=32), ["buckets.video.answers", "branch_tokens"]),
        (
            lambda c: c.buckets.video.update(slots={"region": 1}),
            ["buckets.video.slots.region", "model.heads"],
        ),
        (
            lambda c: c.buckets.video.update(idle=["region"]),
            ["buckets.video.slots.region = 'idle'", "model.heads"],
        ),
        (
            lambda c: c.update(_heads({"cg_detr/l1": 1.0, "cg_detr/giou": 0.0}))
            or c.buckets.video.update(idle=["temporal"]),
            ["losses.cg_detr/l1 = 1.0: runs in no bucket"],
        ),
        (lambda c: c.update(task_gradients_every=-1), ["task_gradients_every = -1", "at least 0"]),
        (lambda c: c.data.update(epochs=-1.0), ["data.epochs = -1.0", "at least 0"]),
        (lambda c: c.update(objective="ppo"), ["objective = 'ppo'", "sft, preference"]),
        (lambda c: c.losses.update({"region/l1": 1.0}), ["losses.region/l1", "missing head"]),
        (lambda c: c.update(trainable=[]), ["trainable", "everything is frozen"]),
        (lambda c: c.update(trainable=[["a"]]), ["trainable[0]", "peak learning rate"]),
        (lambda c: c.update(tokenizer=""), ["tokenizer", "init_from"]),
        (lambda c: c.update(init_from="base"), ["tokenizer", "brings its own"]),
        (
            lambda c: c.update(init_from="base", tokenizer="", time_instruction=True),
            ["time_instruction = True", "template.json"],
        ),
        (lambda c: c.model.update(preset=""), ["model.preset", "init_from"]),
        (lambda c: c.model.update(attention="flash"), ["model.attention = 'flash'", "'splash'"]),
        (lambda c: c.model.update(remat="all"), ["model.remat = 'all'", "'dots_no_batch'"]),
        (lambda c: c.model.update(dtype="float16"), ["model.dtype = 'float16'", "'bfloat16'"]),
        (lambda c: c.optimizer.update(moments="disk"), ["optimizer.moments='disk'", "16, host"]),
        (lambda c: c.update(init_missing=["heads"]), ["init_missing", "init_from is empty"]),
        (
            lambda c: c.update(init_options={"frames_upbound": 32}),
            ["init_options = {'frames_upbound': 32}", "init_from is empty"],
        ),
        (
            lambda c: c.model.update(heads=["temporal", "cg_detr"]),
            ["model.heads", "'temporal' and 'cg_detr' both answer 'temporal'; keep one"],
        ),
        (lambda c: c.model.update(heads=["depth"]), ["model.heads", "'depth' is not a head"]),
        (
            lambda c: c.update(accumulation=2, **_heads({"cg_detr/align": 1.0})),
            ["losses.cg_detr/align = 1.0", "compares rows of the whole batch", "accumulation=2"],
        ),
        (
            lambda c: c.update(_heads({"cg_detr/align": 1.0}))
            or c.buckets.video.update(beside="image"),
            ["buckets.video.beside = 'image'", "would change cg_detr/align"],
        ),
    ],
)
def test_errors_name_option_value_reason_and_fix(change, expected):
    config = good().unlock()
    change(config)
    with pytest.raises(ConfigError) as error:
        validate(config)
    for part in expected:
        assert part in str(error.value)


def test_what_a_published_folder_lacks_is_typed_as_a_dictionary():
    values, given = flags.FlagValues(), {"frames_upbound": 32, "heads": [], "cg_config": {"x": 1}}
    config = "--config=configs/llava_onevision.py:init=ov"
    argv = ["train", config, f"--config.init_options={given}"]
    define_config("config", flag_values=values, sys_argv=argv)
    values(argv)
    config = values["config"].value
    validate(config)
    assert config.init_options.to_dict() == to_dict(config)["init_options"] == given


def test_a_preference_run_needs_pairs():
    config = good()
    config.objective = "preference"
    config.init_from, config.tokenizer = "stage3/model", ""
    config.buckets.video.update(branches=2, question=16)
    config.data.references = ["pairs.npz"]
    validate(config)
    config.buckets.video.branches = 3
    validate(config)
    config.preference.loss, config.preference.sft = "aot", 0.0
    with pytest.raises(ConfigError, match=r"branches=3: aot sorts pairs.*another loss"):
        validate(config)
    config.preference.loss = "sigmoid"
    config.buckets.video.branches = 1
    with pytest.raises(ConfigError, match=r"branches=1: .*chosen, rejected.*give 2"):
        validate(config)
    config.buckets.video.update(branches=2, question=0)
    with pytest.raises(ConfigError, match=r"buckets.video.question = 0.*prefix"):
        validate(config)
    config.data.references = []
    with pytest.raises(ConfigError, match=r"data.references.*preferences score"):
        validate(config)


def test_the_default_objective_is_the_papers():
    preference = default_config().preference
    assert (preference.loss, preference.beta, preference.sft) == ("sigmoid", 0.3, 0.5)


def preference_config(**options):
    config = good()
    config.objective = "preference"
    config.init_from, config.tokenizer = "stage3/model", ""
    config.buckets.video.update(branches=2, question=16)
    config.data.references = ["pairs.npz"]
    with config.ignore_type():
        config.preference.update(options)
    return config


def test_a_loss_may_be_a_name_a_list_or_weights():
    for loss in ("hinge", ["sigmoid", "sft"], {"sigmoid": 0.8, "bco_pair": 0.2}):
        validate(preference_config(loss=loss))
    config = preference_config(loss="simpo")
    config.data.references = []  # reads none
    validate(config)


@pytest.mark.parametrize(
    ("options", "accumulation", "expected"),
    [
        ({"loss": "dpo"}, 1, "preference.loss='dpo' is unknown; known: sigmoid, cdpo"),
        ({"loss": 3}, 1, "preference.loss = 3: is a int; give a str"),
        ({"loss": "kto_pair"}, 2, "accumulation = 2: would change kto_pair, .*; set it to 1"),
        ({"reference": "model"}, 1, "preference.reference = 'model': unknown; one of sidecar, "),
        (  # TR-DPO, as TRL names it
            {"sync_ref_model": True}, 1,
            "preference.sync_ref_model = True: unknown key; known: .*reference",
        ),
        (
            {"loss": "vocabulary_kl"}, 1,
            "preference.reference = 'sidecar': 'vocabulary_kl' reads .*'adapters_off'.*'chosen_kl'",
        ),
        ({"reference": "adapters_off"}, 1, r"data.references = .*not read.*leave it empty"),
    ],
)
def test_preference_options_that_cannot_be_used_are_named(options, accumulation, expected):
    config = preference_config(**options)
    config.accumulation = accumulation
    with pytest.raises(ConfigError, match=expected):
        validate(config)


def test_a_bucket_beside_another_is_refused_with_a_loss_that_compares_a_batch():
    config = preference_config(loss="aot")
    config.buckets.long = config.buckets.video.copy_and_resolve_references()
    config.buckets.video.beside = "long"
    expected = r"buckets.video.beside = 'long': would change aot, .*; set it to ''"
    with pytest.raises(ConfigError, match=expected):
        validate(config)
    config.preference.loss = "sigmoid"
    validate(config)


def test_a_contrast_is_not_shown_to_a_blind_model():
    config = preference_config(loss="conditional")
    validate(config)
    config.data.evidence = "blind"
    with pytest.raises(ConfigError, match=r"data.evidence = 'blind': .*'conditional'.*'full'"):
        validate(config)


def test_wrong_type_is_named_and_ints_pass_for_floats():
    config = good()
    config.dropout = 0  # ml_collections keeps the declared type
    config.data.train[0]["weight"] = 2
    validate(config)
    config.data.train[0]["path"] = 3
    with pytest.raises(ConfigError, match=r"data.train\[0\].path = 3: is a int; give a str"):
        validate(config)


def test_all_problems_are_listed_at_once():
    config = good()
    config.steps, config.dropout = 0, 2.0
    with pytest.raises(ConfigError) as error:
        validate(config)
    assert "steps = 0" in str(error.value) and "dropout = 2.0" in str(error.value)


def test_parse_arg_is_typed():
    text = "stage=2,tiny,rate=1e-3,data=gs://a/b=c"
    arg = parse_arg(text, stage=1, tiny=False, rate=0.1, data="")
    assert (arg.stage, arg.tiny, arg.rate, arg.data) == (2, True, 1e-3, "gs://a/b=c")
    assert parse_arg(None, stage=1).stage == 1
    assert parse_arg("tiny=false", tiny=True).tiny is False
    assert parse_arg("frames=8+16", frames=()).frames == (8, 16)
    assert parse_arg("frames=8", frames=()).frames == (8,) != parse_arg("", frames=()).frames


@pytest.mark.parametrize(
    ("arg", "match"),
    [
        ("stag=2", r"unknown key 'stag'; known: stage=1, tiny=False, frames=\(\)"),
        ("stage=two", "expected int, got 'two'"),
        ("stage", "expected int, got 'true'"),
        ("tiny=yes", "expected true or false"),
        ("stage=1,stage=2", "given twice"),
        ("frames=8+x", r"'frames=8\+x': expected a whole number.*8\+16\+32, got '8\+x'"),
        ("frames=8+8", "different ones"),
        ("frames=-8", "whole number"),
        ("frames", "got 'true'"),
    ],
)
def test_parse_arg_errors(arg, match):
    with pytest.raises(ConfigError, match=match):
        parse_arg(arg, stage=1, tiny=False, frames=())


def test_resume_may_change_only_what_does_not_change_the_run():
    saved = to_dict(good())
    current = copy.deepcopy(saved)
    current["mesh"]["fsdp"] = 8
    current["log_every"] = 1
    current["checkpoint"]["every"] = 7
    del saved["clip_features"]  # saved by a program that did not have it yet
    assert changed_since(saved, current) == []
    current["data"]["train"][0]["weight"] = 5.0
    current["optimizer"]["clip"] = 2.0
    del current["buckets"]["video"]
    lines = changed_since(saved, current)
    assert "data.train[0].weight: checkpoint has 1.0, this command has 5.0" in lines
    assert any(line.startswith("optimizer.clip") for line in lines)
    assert any(line.startswith("buckets.video") for line in lines)
    assert len(lines) == 3


CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
SHIPPED = [
    ("tiny_base.py", None),
    ("tiny_base.py", "stage=pictures"),
    ("tiny_base.py", "stage=events"),
    ("tiny_base.py", "stage=times"),
    ("tiny_base.py", "tiny,runs=somewhere"),
    *(("demo.py", f"stage={stage}") for stage in ("1", "2", "3", "dpo", "floor")),
    ("demo.py", "stage=1,tiny"),
    ("seven_b.py", None),
    ("seven_b.py", "tiny,init=somewhere"),
    ("demo.py", "stage=dpo,tiny,runs=elsewhere"),
]


@pytest.mark.parametrize(("name", "arg"), SHIPPED)
def test_shipped_configs_are_valid(name, arg):
    config = runpy.run_path(str(CONFIGS / name))["get_config"](arg)
    validate(config)


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("1", {"task_tokens", "box_encoder", "language"}),
        ("2", {"heads", "task_tokens", "box_encoder", "language"}),
        ("3", {"heads", "task_tokens", "box_encoder", "language", "connector", "vision"}),
        ("dpo", {"language"}),
    ],
)
def test_a_stage_of_the_demo_trains_its_parts_whole_and_nothing_else(stage, trained):
    config = runpy.run_path(str(CONFIGS / "demo.py"))["get_config"](f"stage={stage}")
    model = FunctionalModel(preset("tiny", tuple(config.model.heads)))
    paths = sorted(flatten(model.abstract()))
    groups = assign_groups(config.trainable, paths)
    assert sorted(groups) == [path for path in paths if path.split("/")[0] in trained]
    assert {path.split("/")[0] for path in groups} == trained


def test_an_unknown_stage_lists_the_stages():
    with pytest.raises(ValueError, match="stage=4: expected one of 1, 2, 3, dpo, floor$"):
        runpy.run_path(str(CONFIGS / "demo.py"))["get_config"]("stage=4")
