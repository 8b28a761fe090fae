"""The configs of Task Preference Optimization as published: numbers, data, full size, tiny runs."""

import functools
import runpy

import jax
import pytest
from etils import epath
from fake_batches import small_params

import tpo_jax.prepare
import tpo_jax.train
from tpo_jax.data.moving_shapes.__main__ import main as render
from tpo_jax.interop.folder import load_model
from tpo_jax.models.heads import cg_detr, region_mlp, sam2
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import flatten
from tpo_jax.training.config import ConfigError, validate
from tpo_jax.training.dry_run import DryRun, DryRunError
from tpo_jax.training.ledger import Ledger
from tpo_jax.training.optimizer import assign_groups
from tpo_jax.training.preemption import Preemption
from tpo_jax.training.writers import read_scalars

FAMILIES = ("videochat_tpo", "llava_onevision_tpo")
STAGES = ("1", "2_temporal", "2_region", "2_mask", "3_tasks", "3")
LORA = ["language/.*lora_", 2e-5]
ALL = "heads/region_mlp|heads/cg_detr|heads/sam2/(?!network)|task_tokens/|box_encoder/"
TRACK = "heads/sam2/(?!network)|task_tokens/mask|box_encoder/"


@functools.cache
def module(name):
    return runpy.run_path(f"configs/{name}.py")


def config_of(name, arg):
    config = module(name)["get_config"](arg)
    validate(config)
    return config


# Steps are questions x epochs / rows: 150,000 / 128, 116,500 x 25 / 64, 540,000 x 3 / 128, ...
@pytest.mark.parametrize("stage, steps, rows, trainable", [
    ("1", 1172, 128, [LORA]),
    ("2_temporal", 45508, 64, [["heads/cg_detr", 1e-4], ["task_tokens/temporal", 2e-4], LORA]),
    ("2_region", 12657, 128, [["heads/region_mlp|task_tokens/region", 1e-4], LORA]),
    ("2_mask", 896, 128, [[TRACK, 1e-4], LORA]),
    ("3_tasks", 2047, 256, [["vision/|connector/", 2e-5], [ALL, 2e-5], LORA]),
    ("3", 41766, 256, [["vision/|connector/", 2e-5], [ALL, 2e-5], LORA]),
])  # fmt: skip
@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_of_the_table(name, stage, steps, rows, trainable):
    config = config_of(name, f"stage={stage}")
    assert config.steps == steps and config.trainable == trainable
    assert config.task_gradients_every == 500
    assert {bucket.batch_size for bucket in config.buckets.values()} == {rows}
    assert config.optimizer.to_dict() == {
        "name": "adamw", "warmup": 0.2, "weight_decay": 0.02, "clip": 1.0, "min_lr_ratio": 0.05,
        "schedule": "cosine", "b2": 0.999, "eps": 1e-5,
        "moments": "float32",
    }  # fmt: skip
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (16, 32.0, 0.1)
    frames = {medium: bucket.frames for medium, bucket in config.buckets.items()}
    assert frames == {m: f for m, f in {"video": 16, "image": 1}.items() if m in frames}


@pytest.mark.parametrize("stage, steps, rows, rate", [
    ("2_temporal", 45508, 64, 1e-4), ("2_region", 4219, 128, 2e-5), ("2_mask", 2686, 128, 2e-5),
    ("3_tasks", 4094, 128, 2e-5), ("3", 83532, 128, 2e-5),
])  # fmt: skip
def test_numbers_of_the_text(stage, steps, rows, rate):
    config = config_of("videochat_tpo", f"stage={stage},numbers=text")
    assert (config.steps, config.trainable[0][1]) == (steps, rate)
    assert all(bucket.batch_size == rows for bucket in config.buckets.values())


def test_numbers_of_the_public_run():
    config = config_of("videochat_tpo", "stage=3,numbers=run")
    assert config.steps == 27844 and config.optimizer.warmup == 0.0  # 3,564,000 / 128, one epoch
    assert config.optimizer.min_lr_ratio == 0.05 and config.buckets.video.batch_size == 128


@pytest.mark.parametrize("name, arg, message", [
    ("videochat_tpo", "stage=2", "stage=2: expected one of 1, 2_temporal, 2_region"),
    ("videochat_tpo", "stage=1,numbers=run", "stage=1: expected one of 3 with numbers=run"),
    ("llava_onevision_tpo", "stage=3,numbers=run", "numbers=run: of this model"),
    ("videochat_tpo", "numbers=paper", "numbers=paper: expected table, text or run"),
    ("videochat_tpo", "mask_loss=boxes", "mask_loss=boxes: expected masks or prompt"),
    ("videochat_tpo", "stage=1,sets=tacos", "tacos is no set of stage 1, which has didemo, queryd"),
    ("videochat_tpo", "sets=mine,media=audio", "media=audio: expected video, image"),
])  # fmt: skip
def test_wrong_arguments_are_named(name, arg, message):
    with pytest.raises(ConfigError, match=message):
        config_of(name, arg)


def test_each_stage_starts_from_the_one_before():
    starts = [config_of("videochat_tpo", f"stage={stage},runs=R").init_from for stage in STAGES]
    assert starts == ["R/base", *(f"R/{stage}/model" for stage in STAGES[:-1])]
    first, *others = (config_of("videochat_tpo", f"stage={stage}") for stage in STAGES)
    # SAM 2 itself comes with the base.
    assert first.init_missing == ALL.split("|")
    assert not any(config.init_missing for config in others)
    assert config_of("videochat_tpo", "stage=2_mask,init=other").init_from == "other"


def test_the_mixture_is_that_of_the_published_amounts():
    config = config_of("videochat_tpo", "stage=3,data=D")
    weights = {source["path"]: source["weight"] for source in config.data.train}
    tasks = {source["path"]: source["tasks"] for source in config.data.train}
    assert weights["D/qvhighlights"] == 7500 and tasks["D/qvhighlights"] == {"temporal": 1.0}
    assert weights["D/refcocog"] == 80_000 and tasks["D/sa_v"] == {"tracking": 1.0}
    # 3,000,000 over four sets; of those with both media half in each.
    assert weights["D/sharegpt4v"] == 750_000 and weights["D/videochat2_it"] == 375_000
    buckets = config.buckets
    assert (buckets.video.weight, buckets.image.weight) == (1_664_000, 1_900_000)
    assert buckets.image.idle == ["temporal", "mask"] and buckets.video.idle == ["region"]
    temporal = config_of("videochat_tpo", "stage=2_temporal").buckets
    assert list(temporal) == ["video"] and temporal.video.idle == ["region", "mask"]


def test_a_folder_of_ones_own_is_asked_for_everything():
    config = config_of("videochat_tpo", "stage=1,sets=mine,data=D,samples=6400")
    (source,) = config.data.train
    assert source["path"] == "D/mine" and config.steps == 50
    assert source["tasks"] == {"temporal": 50_000, "region": 50_000, "tracking": 25_000,
                               "mask": 25_000}  # fmt: skip
    # Half of the questions in each medium; of images only regions can be asked.
    assert config.buckets.image.slots.to_dict() == {"region": 16}
    assert config.buckets.image.weight == 25_000 and config.buckets.video.weight == 75_000
    videos = config_of("videochat_tpo", "stage=1,sets=mine,media=video")
    assert list(videos.buckets) == ["video"] and videos.buckets.video.idle == []
    some = config_of("videochat_tpo", "stage=3,sets=qvhighlights+sharegpt4v")
    assert [s["weight"] for s in some.data.train] == [7500, 750_000]
    assert some.trainable[1] == ["heads/cg_detr|task_tokens/", 2e-5]  # nobody asks the others
    assert not any(w for t, w in some.losses.items() if t.startswith(("sam2/", "region_mlp/")))


def test_losses_that_count():
    published = region_mlp.published_weights() | cg_detr.published_weights(scale=0.05)
    published |= {"language": 1.0} | sam2.published_weights()
    heads = {"1": (), "2_temporal": ("cg_detr",), "2_region": ("region_mlp",), "2_mask": ("sam2",),
             "3_tasks": ("region_mlp", "cg_detr", "sam2"), "3": ("region_mlp", "cg_detr", "sam2")}
    for stage, trained in heads.items():
        found = config_of("videochat_tpo", f"stage={stage}").losses.to_dict()
        counts = ("language", *trained)
        assert found == {t: w * (t.split("/")[0] in counts) for t, w in published.items()}
    assert published["cg_detr/l1"] == 0.5 and published["cg_detr/margin"] == pytest.approx(0.2)
    prompt = config_of("videochat_tpo", "stage=2_mask,mask_loss=prompt").losses
    counts = {"language": 1.0, "sam2/prompt": 1.0, "sam2/box": 1.0}
    assert {t: w for t, w in prompt.items() if w} == counts


def full_size(name, stage):
    """The dry run on 64 chips, up to the sharding."""
    found = DryRun(config_of(name, f"stage={stage},random"), "", "v5e:8x8", lambda finding: None)
    for check in (found._config, found._model, found._sharding):
        check()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_stages_train_at_full_size(name):
    found = full_size(name, "3")
    assert found._mesh()[0].shape["fsdp"] == 32
    paths = list(flatten(found.params))
    trained = {
        stage: set(assign_groups(config_of(name, f"stage={stage},random").trainable, paths))
        for stage in STAGES
    }
    adapters = {path for path in paths if "/lora_" in path}
    assert trained["1"] == adapters and len(adapters) == 16  # 7 kinds of kernels and the output
    assert all(trained["1"] < trained[stage] for stage in STAGES[1:])
    for stage, kept in (("2_temporal", "temporal"), ("2_region", "region"), ("2_mask", "mask")):
        tokens = {path for path in trained[stage] if path.startswith("task_tokens/")}
        assert tokens == {f"task_tokens/{kept}"}
    frozen = set(paths) - trained["3"]
    assert {path.split("/")[0] for path in frozen} == {"language", "heads"}
    assert all(p.startswith("heads/sam2/network/") for p in frozen if p.startswith("heads/"))


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_rows_and_losses_of_a_stage_at_full_size(name, stage):
    """Traced, every bucket: only the data is missing from the dry run."""
    found = full_size(name, stage)
    found._batches()
    found._losses()


def test_a_loss_without_a_weight_is_found_in_any_bucket():
    """The second bucket's head is checked, too."""
    config = config_of("videochat_tpo", "stage=3,tiny,random")
    del config.losses["region_mlp/giou"]  # which runs on images alone
    dry_run = DryRun(config, "", "", lambda finding: None)
    config.mesh = {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}
    for check in (dry_run._config, dry_run._model, dry_run._sharding):
        check()
    dry_run.reference = None
    with pytest.raises((ValueError, DryRunError), match=r"set losses\['region_mlp/giou'\]"):
        dry_run._losses()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """data/shapes, prepared from six videos and as many images of moving shapes."""
    folder = tmp_path_factory.mktemp("shapes")
    render(["--out", f"{folder}/world", "--videos", "6", "--images", "6", "--seed", "1000",
            "--splits", "train:6"])  # fmt: skip
    arguments = ["run", "--data", f"{folder}/world/train", "--out", f"{folder}/data/shapes"]
    assert tpo_jax.prepare.main(arguments) == 0
    return folder / "data"


def train(name, arg, workdir, monkeypatch, **options):
    """The train command on one device, and its records. Drawing random weights would take longer
    than all the rest."""
    if "random" in arg:
        monkeypatch.setattr(tpo_jax.train, "initial_params", lambda config, program, *_: (
            small_params(program.abstract_state.params)))  # fmt: skip
    mesh = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(tpo_jax.train, "make_mesh", mesh)
    config = config_of(name, f"{arg},tiny")
    config.update(options)
    for bucket in config.buckets.values():
        bucket.batch_size = 4
    workdir.mkdir(parents=True)
    with Preemption() as preemption:
        assert tpo_jax.train.train(config, epath.Path(workdir), preemption, Ledger()) == 0
    return read_scalars(workdir / "metrics.jsonl")


def test_a_tiny_stage_trains_on_moving_shapes(data, tmp_path, monkeypatch, capsys):
    """Of the region head, the cheapest to compile: no other head runs in it."""
    arg = f"stage=2_region,random,data={data},sets=shapes"
    records = train("videochat_tpo", arg, tmp_path / "run", monkeypatch)
    assert [record["train/examples/region"] for record in records] == [4, 8, 12]
    assert records[-1]["train/objective/region"] > 0
    parts = [records[-1][f"train/objective/{task}"] for task in ("language", "region")]
    assert sum(parts) == pytest.approx(records[-1]["train/loss"], rel=1e-5)
    shares = [records[-1][f"train/gradient_share/{task}"] for task in ("language", "region")]
    assert 0 < shares[1] < 1 and sum(shares) == pytest.approx(1.0, rel=1e-5)
    assert not any("cg_detr/" in name or "sam2/" in name for name in records[-1])
    told = capsys.readouterr().err
    assert f"100.0% {data}/shapes: 6 images, 2.0 epochs; region 100.0%" in told
    # The published sets of this stage have images alone, and so has it buckets.
    assert f"{data}/shapes: no bucket shows 6 videos with a conversation example" in told


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_the_chain_trains_on_moving_shapes(name, data, tmp_path, monkeypatch):
    """Every stage from the one before; each moves what it trains and nothing else."""
    arg = f"runs={tmp_path},data={data},sets=shapes"
    seen, before = {}, None
    for stage in STAGES:
        random = ",random" if stage == "1" else ""
        with monkeypatch.context() as patch:
            records = train(name, f"stage={stage}{random},{arg}", tmp_path / stage, patch)
        seen[stage] = {task.split("/")[-1] for task in records[-1] if "train/examples/" in task}
        assert all(record["train/nonfinite"] == 0 for record in records)
        _, params, _ = load_model(tmp_path / stage / "model")
        after = flatten(params)
        if before is not None:
            moved = {p for p in after if (after[p] != before[p]).any()}
            trained = set(assign_groups(config_of(name, f"stage={stage}").trainable, list(after)))
            assert moved and moved <= trained
        before = after
    tasks = {"temporal", "region", "mask", "tracking"}
    assert seen["2_temporal"] == {"temporal"} and seen["2_region"] == {"region"}
    assert seen["2_mask"] <= {"mask", "tracking"}
    assert seen["1"] <= tasks and seen["3"] <= tasks | {"conversation"}
