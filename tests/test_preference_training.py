"""The configs of temporal preference optimization, a few steps of each on the micro model."""

import dataclasses
import functools
import json
import pathlib
import re
import runpy

import jax
import micro_model
import numpy as np
import pytest
from etils import epath

import tpo_jax.train
from tpo_jax import preferences
from tpo_jax.data import pairs as pair_data
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.buckets import Bucket, BucketSchedule
from tpo_jax.data.evaluation_rows import build_pair_rows
from tpo_jax.data.pairs import PairedDataset
from tpo_jax.data.pipeline import Pipeline, row_builder
from tpo_jax.data.records import Example, Turn
from tpo_jax.data.rows import kind_id
from tpo_jax.interop.folder import load_model, save_model, write_model
from tpo_jax.models.config import DTYPES, LoraConfig
from tpo_jax.models.presets import PRESETS
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.hashes import hash_weights
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.parallel.paths import flatten
from tpo_jax.training import config as training_config
from tpo_jax.training import references, scoring, sidecar
from tpo_jax.training.ledger import Ledger
from tpo_jax.training.preemption import Preemption
from tpo_jax.training.program import make_program
from tpo_jax.training.start import initial_params, make_model_config, pipeline_options
from tpo_jax.training.writers import read_scalars

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
VIDEOS = 3
KINDS = ("temporal", "action", "spatial")


@pytest.fixture(scope="module", autouse=True)
def in_memory():
    """Videos in memory, one of the fake devices, one quick compilation for runs of one program."""
    compiled, compile_buckets = {}, tpo_jax.train.compile_buckets
    programs, make_program = {}, tpo_jax.train.make_program
    jax.config.update("jax_disable_most_optimizations", True)

    def compile_once(program, builders, evaluate, say, preemption):
        shapes = [builder.bucket for builder in builders.values()]
        key = str((program.abstract_state, program.objective, program.optimizer.report, shapes))
        if key not in compiled:
            compiled[key] = compile_buckets(program, builders, evaluate, say, preemption)
        return compiled[key]

    def make_once(config, model_config, mesh):
        key = str({name: value for name, value in config.to_dict().items() if name != "data"})
        if key not in programs:
            programs[key] = make_program(config, model_config, mesh)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        dataset = functools.partial(micro_model.MemoryDataset, VIDEOS)
        patch.setattr(pair_data, "PreparedDataset", lambda path: dataset())
        patch.setattr(tpo_jax.train, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))
        patch.setattr(tpo_jax.train, "compile_buckets", compile_once)
        patch.setattr(tpo_jax.train, "make_program", make_once)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """base/, pairs/pairs.jsonl and, scored with contrast, pairs/reference.npz."""
    runs = tmp_path_factory.mktemp("runs")
    codec = micro_model.make_codec(())
    model = micro_model.make_model(codec, ())
    save_model(runs / "base", model.config, micro_model.make_params(model), codec)
    write_pairs(runs / "pairs" / "pairs.jsonl")
    score(runs, runs / "pairs" / "reference.npz", "--contrast")
    return runs


def write_pairs(path, **targets):
    """Eight pairs, as `preferences generate` writes them."""
    path.parent.mkdir(exist_ok=True)
    lines = []
    for i in range(8):
        turn = Turn(micro_model.QUESTIONS[i % 4], "it moves left", (), KINDS[i % 3])
        shown = {"frame_indices": list(range(0, 24, 3)), "manipulated_indices": [i, 20] * 4}
        answers = {"chosen": "it moves left then right", "rejected": "it blinks and grows"}
        lines.append(Example(f"pair{i}", f"video{i % VIDEOS}", "video", "preference", "test", 0.0,
                             12.0, (turn,), answers | shown | targets).to_json())  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def score(runs, out, *more, pairs=None):
    pairs = pairs or runs / "pairs" / "pairs.jsonl"
    about = [f"--model={runs / 'base'}", "--data=memory", f"--pairs={pairs}", f"--out={out}"]
    assert preferences.main(["score", *about, "--batch_size=4", *more]) == 0


def get_config(file, arg, runs):
    config = runpy.run_path(str(CONFIGS / file))["get_config"](f"{arg},runs={runs},tiny")
    config.trainable = [[pattern, 1e-2] for pattern, _ in config.trainable]
    training_config.validate(config)
    return config


def train(config, workdir):
    """Metric records of the run."""
    with Preemption() as preemption:
        assert tpo_jax.train.train(config, epath.Path(workdir), preemption, Ledger()) == 0
    return read_scalars(workdir / "metrics.jsonl")


@pytest.fixture(scope="module")
def plain(runs):
    """A sidecar of the answers alone."""
    out = runs / "pairs" / "plain.npz"
    score(runs, out)
    return out


def weights(folder):
    return flatten(load_model(folder)[1])


ADAPTERS = "adapters"


@pytest.mark.parametrize(
    ("file", "recipe", "losses", "moved"),
    [
        ("longva_tpo.py", "hound", {"sigmoid": 1.0}, {"language"}),
        ("longva_tpo.py", "realign", {"sigmoid": 1.0, "conditional": 1.0}, ADAPTERS),
        ("longva_tpo.py", "mdpo", {"sigmoid": 1.0, "conditional": 1.0, "anchor": 1.0}, ADAPTERS),
        ("llava_video_tpo.py", "tpo", {"sigmoid": 1.0, "sft": 1.0}, {"language", "connector"}),
        ("llava_video_tpo.py", "rrpo", {"sigmoid": 1.0, "vocabulary_kl": 0.01}, ADAPTERS),
    ],
)
def test_a_recipe_trains_its_losses_and_its_part_of_the_model(
    request, runs, tmp_path, capsys, file, recipe, losses, moved
):
    config = get_config(file, f"recipe={recipe}", runs)
    config.data.epochs = 1.0
    if config.data.references and "conditional" not in losses:
        config.data.references = [str(request.getfixturevalue("plain"))]
    first, *_, last = train(config, tmp_path)
    said = capsys.readouterr().err
    assert ": 8 pairs, 2.0 epochs; preference 100.0%" in said
    assert "WARNING: 4 steps make 2.0 epochs of the 8 pairs" in said
    for name in losses:
        at_first = first[f"train/preference/{name}"]
        if name != "sft":  # at step 1 the policy is the reference
            start = 0.0 if name == "vocabulary_kl" else np.log(2)
            assert at_first == pytest.approx(start, abs=1e-4), name
        assert abs(last[f"train/preference/{name}"] - at_first) > 1e-3, name
    for record in (first, last):
        total = sum(w * record[f"train/preference/{name}"] for name, w in losses.items())
        assert record["train/loss"] == pytest.approx(total, rel=1e-5)
    if moved != ADAPTERS:
        assert last["train/preference/sigmoid"] < first["train/preference/sigmoid"] - 0.01
    assert ("train/preference/vocabulary_kl_per_token" in last) == (recipe == "rrpo")
    before, after = weights(runs / "base"), weights(tmp_path / "model")
    changed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert {path.split("/")[0] for path in changed} == (set() if moved == ADAPTERS else moved)
    adapters = {path for path in after if path.split("/")[-1] in ("lora_a", "lora_b")}
    assert after.keys() == before.keys() | adapters and bool(adapters) == (moved == ADAPTERS)
    assert all(np.any(after[path]) for path in adapters)


@pytest.mark.long
def test_longva_realign_trains_adapters_against_manipulated_frames(runs, tmp_path, capsys):
    config = get_config("longva_tpo.py", "recipe=realign", runs)
    config.preference.kinds = list(KINDS[:2])
    first, *_, last = train(config, tmp_path)
    said = capsys.readouterr().err
    assert "references hold: " in said and f"pairs of the kinds ['{KINDS[2]}'] have no" in said
    # At step 1 the policy is the reference.
    for name in ("sigmoid", "conditional"):
        assert first[f"train/preference/{name}"] == pytest.approx(np.log(2), abs=1e-4)
        assert last[f"train/preference/{name}"] != first[f"train/preference/{name}"]
    for name in ("contrast_margin", "chosen_drift", "margin"):
        assert first[f"train/preference/{name}"] == pytest.approx(0, abs=1e-3)
    assert last["train/preference/kl_per_token"] > 0
    assert 0 < first["train/padding/pairs"] < 1 and "train/padding" not in first
    assert {f"train/preference/kind/{kind}/margin" for kind in KINDS[:2]} & set(last)
    assert "train/preference/duration/under_1_min/accuracy" in last
    assert "train/preference/duration/over_10_min/accuracy" not in last
    assert load_model(tmp_path / "model")[0].lora.rank == 2
    after = weights(tmp_path / "model")
    for path, leaf in weights(runs / "base").items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)
    assert all(np.any(leaf) for path, leaf in after.items() if path.endswith("lora_b"))


@pytest.mark.parametrize("rows", [[0, 1], [2]], ids=["answers", "manipulated_frames"])
def test_a_sidecar_that_is_not_what_the_program_scores_refuses(runs, tmp_path, rows):
    """The fingerprint is right, a number in it is not."""
    good = sidecar.read(runs / "pairs" / "reference.npz")
    wrong = {pair: logps.copy() for pair, logps in good.logps.items()}
    wrong["pair3"][rows] -= 0.2 * (good.logps["pair3"][rows] != 0)
    file = tmp_path / "wrong.npz"
    sidecar.write(file, sidecar.Sidecar(good.fingerprint, good.digests, wrong))
    config = get_config("longva_tpo.py", "recipe=realign", runs)
    config.data.references = [str(file)]
    with pytest.raises(sidecar.SidecarMismatch) as error:
        train(config, tmp_path / "run")
    message = str(error.value)
    assert "pair: 'pair3'" in message and "wrong.npz: " in message and "this program: " in message
    assert "up to 0.2 nats" in message and "float32 are 0.005 and 0.0005" in message
    stored, live = (
        [float(x) for x in message.split(marker)[1].split("\n")[0].split(", ")]
        for marker in ("wrong.npz: ", "this program: ")
    )
    np.testing.assert_allclose(stored, wrong["pair3"].sum(-1), atol=1e-3)
    np.testing.assert_allclose(live, good.logps["pair3"].sum(-1), atol=1e-3)


def test_pairs_come_in_buckets_of_the_frames_of_their_clips(runs, tmp_path, capsys):
    """Two programs in one run, and one sidecar for both: each is held against the live scores.
    Pairs have one or two rejected answers."""
    write_pairs(tmp_path / "pairs" / "pairs.jsonl")
    lines = (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    for number, pair in enumerate(pairs):
        pair["targets"]["frame_indices"] = [2, 9, 11, 20, 21, 22, 23][: 3 + number % 2 * 4]
        if number % 3:  # a rejected answer, or two
            pair["targets"]["rejected"] = ["it blinks and grows", "it moves right"]
    manifest = tmp_path / "both.jsonl"
    manifest.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    score(runs, tmp_path / "both.npz", "--frames=4,8", pairs=manifest)
    config = get_config("longva_tpo.py", "recipe=tpo,frames=8+4", runs)
    config.data.references = [str(tmp_path / "both.npz")]
    config.data.train[0]["pairs"] = str(tmp_path / "both.jsonl")
    for bucket in config.buckets.values():
        bucket.branches = 3
    records = train(config, tmp_path / "run")
    said = capsys.readouterr().err
    assert "compiled bucket 'pairs4'" in said and "compiled bucket 'pairs8'" in said
    assert re.search(r"references hold: \d+ tokens of pairs4, pairs8 differ by", said)
    used = {name for record in records for name in record if name.startswith("train/padding/")}
    assert used == {"train/padding/pairs4", "train/padding/pairs8"}
    assert records[0]["train/preference/sigmoid"] == pytest.approx(np.log(2), abs=1e-4)

    config.data.references = [str(runs / "pairs" / "reference.npz")]
    with pytest.raises(sidecar.SidecarMismatch, match="this run 'video, 4, 8 frames'"):
        train(config, tmp_path / "other")


def test_buckets_of_pairs_hold_answers_of_one_length(runs):
    config = get_config("longva_tpo.py", "recipe=tpo", runs)
    other = config.buckets.pairs.copy_and_resolve_references()
    other.update(frames=4, answers=20)
    config.buckets.other = other
    with pytest.raises(training_config.ConfigError, match=r"buckets\.\*\.answers.*give equal"):
        training_config.validate(config)


def test_sidecars_with_and_without_contrast_are_not_mixed_up(runs, tmp_path):
    config = get_config("llava_video_tpo.py", "recipe=tpo", runs)
    with pytest.raises(sidecar.SidecarMismatch, match="sidecar 'video, 8 frames, right and mani"):
        train(config, tmp_path)


def test_the_second_round_refuses_the_sidecar_of_the_first(runs, tmp_path):
    """Its reference is the model that the first round made; the pairs have to be scored again."""
    model_config, params, codec = load_model(runs / "base")
    params["connector"] = jax.tree.map(lambda x: x * 1.001, params["connector"])
    save_model(tmp_path / "round1", model_config, params, codec)
    config = get_config("longva_tpo.py", f"recipe=realign,init={tmp_path / 'round1'}", runs)
    with pytest.raises(sidecar.SidecarMismatch) as error:
        train(config, tmp_path / "run")
    scored = sidecar.read(runs / "pairs" / "reference.npz").fingerprint.weights
    message = str(error.value)
    assert f"weights: sidecar '{scored}', this run '{hash_weights(params)}'" in message
    assert "preferences score` again" in message


@pytest.mark.parametrize("preset", ["", "micro"])
def test_the_second_round_does_not_switch_off_the_adapters_of_the_first(runs, tmp_path, preset):
    """They are part of its reference. Whatever of the model a preset describes."""
    config = get_config("longva_tpo.py", "recipe=realign", runs)
    config.preference.reference, config.data.references = "adapters_off", []
    training_config.validate(config)
    model_config, codec = make_model_config(config)  # new adapters, on the base
    round1 = tmp_path / "round1"
    write_model(round1, model_config.to_dict(), {}, codec)
    config.init_from, config.model.preset = str(round1), preset
    with pytest.raises(ValueError, match=f"'adapters_off': {round1} has a LoRA.*Merge it.*'sidec"):
        make_model_config(config)
    config.preference.reference = "sidecar"
    assert make_model_config(config)[0].lora == model_config.lora


def test_a_row_brings_the_manipulated_frames_its_kind_and_its_duration(runs):
    config, _, codec = load_model(runs / "base")
    dataset = PairedDataset("memory", runs / "pairs" / "pairs.jsonl")
    plans = build_pair_rows(dataset)
    bucket = scoring.pair_bucket(codec, config, plans, 8, 4)
    builder = row_builder(codec, config, bucket, contrast=True)
    row = builder.build(plans[1], 0)
    example = plans[1].branches[0].example
    wanted = dataset.frames(example.video_id, np.array(example.targets["manipulated_indices"]))
    np.testing.assert_array_equal(row["contrast_frames"], wanted)
    times = dataset.video_info(example.video_id).timestamps
    manipulated = times[example.targets["manipulated_indices"]]
    np.testing.assert_array_equal(row["contrast_frame_times"], manipulated)
    assert row["contrast_frame_valid"].all() and row["pair_duration"] == 12.0
    assert row["pair_kind"] == kind_id(example.turns[0].kind) != kind_id("")
    assert "reference_contrast_logps" not in row
    np.testing.assert_array_equal(row["contrast_prefix_tokens"], row["prefix_tokens"])
    targets = example.targets  # both clips and their times are in the digest of the pair
    indices = [*targets["frame_indices"], -1, *targets["manipulated_indices"]]
    want = np.stack([indices, times[indices]], axis=1)
    np.testing.assert_array_equal(builder.shown_frames(plans[1]), want)


def test_contrast_needs_as_many_manipulated_frames_as_the_pair_shows(runs, tmp_path, capsys):
    write_pairs(tmp_path / "pairs" / "pairs.jsonl", manipulated_indices=[1, 2])
    score = ["score", f"--model={runs / 'base'}", "--data=memory", "--contrast"]
    pairs = tmp_path / "pairs" / "pairs.jsonl"
    assert preferences.main([*score, f"--pairs={pairs}", f"--out={tmp_path}/r.npz"]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "manipulated_indices: [1, 2], expected 8 frames" in error


def test_a_fingerprint_is_of_the_kernel_for_rows_that_devices_share(runs, tmp_path, monkeypatch):
    """On a GPU another one than for whole rows, so whoever scores has to say how many share."""
    monkeypatch.setattr(sidecar, "best_backend", lambda *about: f"kernel for {about[-1]}")
    config = get_config("longva_tpo.py", "recipe=realign", runs)
    for context, name in ((1, "kernel for 1"), (2, "kernel for 2"), (-1, "kernel for 8")):
        config.mesh.update(data=1, fsdp=1, context=context)
        with pytest.raises(sidecar.SidecarMismatch, match=f"this run '{name}'"):
            references.read_references(config)
    made = {}
    monkeypatch.setattr(scoring, "Parts", lambda out, fingerprint, *_: made.update(f=fingerprint))
    with pytest.raises(AttributeError):  # of None
        score(runs, tmp_path / "r.npz", "--context=2")
    assert made["f"].attention == "kernel for 2"


@pytest.mark.parametrize("weights", [(1,), (1, 63), (1, 1, 1)])
def test_references_are_checked_in_every_bucket(weights):
    """However rare it is: each is a program of its own."""
    sizes = {"batch_size": 2, "branches": 2, "branch_tokens": 8, "answers": 4}
    buckets = [Bucket(f"pairs{frames}", "video", frames=frames, weight=weight, **sizes)
               for frames, weight in enumerate(weights, start=4)]  # fmt: skip
    schedule = BucketSchedule(buckets)
    for seed in range(10):
        steps = list(references.sample_steps(schedule, seed))
        named = [schedule(step)[0].name for step in steps]
        assert set(named) == {bucket.name for bucket in buckets}
        assert 2 <= len(steps) <= 2 + len(buckets) - 1
        assert steps == list(references.sample_steps(schedule, seed))


def test_every_dtype_has_a_tolerance():
    assert set(references.TOLERANCE) == set(DTYPES)


def test_bfloat16_of_another_program_is_within_the_tolerance_and_not_more_is(runs, tmp_path):
    """Scored by eights, in rows as short as the pairs; held against the longer rows of training."""
    score(runs, tmp_path / "good.npz", "--contrast", "--dtype=bfloat16", "--batch_size=8")
    good = sidecar.read(tmp_path / "good.npz")
    config = get_config("longva_tpo.py", "recipe=realign", runs)
    config.model.dtype, file = "bfloat16", tmp_path / "shifted.npz"
    config.data.references = [str(file)]
    model_config, codec = make_model_config(config)
    program = make_program(config, model_config, make_mesh({}, jax.devices()[:1]))
    params = initial_params(config, program, model_config, print)

    def with_logps(logps):
        sidecar.write(file, sidecar.Sidecar(good.fingerprint, good.digests, logps))
        options = pipeline_options(config, model_config, codec)
        return Pipeline(training_config.to_dict(config)["data"]["train"], **options)

    def verify(pipeline):
        """(mean, largest) difference, as said."""
        said = []
        with Preemption() as preemption:
            references.verify_references(
                program, pipeline, params, seed=0, files=[file], say=said.append,
                preemption=preemption,
            )  # fmt: skip
        return [float(x) for x in re.findall(r"[\d.]+e[-+]\d+", said[0])]

    def one_token(by):
        logps = good.logps[sampled].copy()
        logps[0, 0] -= by
        return with_logps(good.logps | {sampled: logps})

    def all_tokens(by):
        return with_logps({pair: x - by * (x != 0) for pair, x in good.logps.items()})

    pipeline = with_logps(good.logps)
    step = next(references.sample_steps(pipeline.schedule, 0))
    (sampled,) = pipeline.describe_batch(step)[1][0]["examples"]
    mean, largest = verify(pipeline)
    limit, mean_limit = references.TOLERANCE["bfloat16"]
    assert 0.01 < largest < limit and 0.001 < mean < mean_limit
    assert verify(one_token(limit - 1.1 * largest))[1] > limit - 2.2 * largest
    for shifted in (one_token(limit + 1.1 * largest), all_tokens(mean_limit + 1.1 * mean)):
        with pytest.raises(sidecar.SidecarMismatch, match="for bfloat16 are 0.5 and 0.05"):
            verify(shifted)


@pytest.mark.parametrize(
    ("file", "recipe", "loss", "beta", "sft", "rate", "steps", "frames", "warmup"),
    [
        ("longva_tpo.py", "tpo", "sigmoid", 0.3, 0.5, 4e-6, 157, 32, 0.1),
        ("llava_video_tpo.py", "tpo", "sigmoid", 0.2, 1.0, 3e-7, 157, 32, 0.1),
        ("longva_tpo.py", "hound,pairs=17000", "sigmoid", 0.1, 0.0, 5e-7, 399, 10, 0.1),
        ("longva_tpo.py", "realign", ["sigmoid", "conditional"], 0.1, 0.0, 1e-6, 157, 32, 0.03),
        ("longva_tpo.py", "mdpo", ["sigmoid", "conditional", "anchor"], 0.1, 0.0, 1e-5, 938, 32,
         0.1),
        ("llava_video_tpo.py", "rrpo", {"sigmoid": 1.0, "vocabulary_kl": 0.01}, 0.1, 0.0, 5e-6, 313,
         16, 0.03),
    ],
)  # fmt: skip
def test_published_numbers(file, recipe, loss, beta, sft, rate, steps, frames, warmup):
    config = runpy.run_path(str(CONFIGS / file))["get_config"](f"recipe={recipe}")
    training_config.validate(config)
    got = config.preference.to_dict()
    assert (got["loss"], got["beta"], got["sft"], config.steps) == (loss, beta, sft, steps)
    pairs, batch_size = 17_000 if "pairs" in recipe else 10_000, config.buckets.pairs.batch_size
    assert config.steps == -(-pairs * config.data.epochs // batch_size)
    assert config.trainable[0][1] == rate and config.optimizer.warmup == warmup
    assert config.buckets.pairs.frames == frames
    assert (got["reference"] == "sidecar") == bool(config.data.references)


@pytest.mark.parametrize(
    ("recipe", "adapted", "rank", "decay", "b2", "schedule"),
    [
        ("tpo", "", 0, 0.0, 0.999, "cosine"),
        ("hound", "", 0, 0.0, 0.999, "linear"),
        ("realign", "k o q v", 128, 0.0, 0.999, "cosine"),
        ("mdpo", "down gate k o q up v", 64, 0.05, 0.98, "cosine"),
        ("rrpo", "down gate k o q up v", 128, 0.0, 0.999, "cosine"),
    ],
)
def test_published_optimizers_and_adapters(recipe, adapted, rank, decay, b2, schedule):
    """Of the released scripts; docs/preferences.md names them."""
    config = runpy.run_path(str(CONFIGS / "longva_tpo.py"))["get_config"](f"recipe={recipe}")
    optimizer, lora = config.optimizer, config.lora.to_dict()
    got = (optimizer.weight_decay, optimizer.b2, optimizer.schedule, optimizer.min_lr_ratio)
    assert got == (decay, b2, schedule, 0.0)
    assert (lora["rank"], lora["alpha"]) == (rank, 2.0 * rank)
    assert lora["dropout"] == (0.05 if rank else 0.0)
    if rank:
        lora["rank"] = 2
        model_config = dataclasses.replace(PRESETS["micro"](), lora=LoraConfig(**lora))
        paths = flatten(FunctionalModel(model_config).abstract())
        places = {path.removesuffix("/lora_b") for path in paths if path.endswith("/lora_b")}
        assert {path.split("/")[0] for path in places} == {"language"}
        names = {path.split("/")[-1] for path in places}
        assert names == {f"{name}_proj" for name in adapted.split()}


@pytest.mark.parametrize("frames", [8, 16, 32, 64, 96, 128, 256, 512])
@pytest.mark.parametrize(
    ("file", "preset", "a_frame"),
    [("longva_tpo.py", "longva_7b", 144), ("llava_video_tpo.py", "llava_video_7b", 210)],
)
def test_every_number_of_frames_can_be_declared(file, preset, a_frame, frames):
    get_config = runpy.run_path(str(CONFIGS / file))["get_config"]
    config = get_config(f"frames={frames},context=4")
    training_config.validate(config)
    assert config.mesh.context == 4
    model_config = PRESETS[preset]()
    assert frames <= model_config.vision.max_frames
    bucket = Bucket.from_config("pairs", config.buckets.pairs.to_dict())
    prefix = batch_spec(bucket, model_config)["prefix_tokens"].shape[1]
    held = model_config.visual_offset + frames * a_frame + 1 + bucket.question
    assert held <= prefix < held + 128 and (prefix == held or prefix % 128 == 0)


def test_several_numbers_of_frames_are_a_bucket_each():
    get_config = runpy.run_path(str(CONFIGS / "longva_tpo.py"))["get_config"]
    config = get_config("frames=64+8+16,recipe=hound")
    training_config.validate(config)
    frames = {name: bucket.frames for name, bucket in config.buckets.items()}
    assert frames == {"pairs8": 8, "pairs16": 16, "pairs64": 64}
    assert {bucket.weight for bucket in config.buckets.values()} == {1.0}
    with pytest.raises(training_config.ConfigError, match="unknown key '16'; known: .*frames"):
        get_config("frames=8,16")


def test_an_unknown_recipe_is_named():
    get_config = runpy.run_path(str(CONFIGS / "longva_tpo.py"))["get_config"]
    with pytest.raises(training_config.ConfigError, match="recipe=dpo: expected tpo, hound"):
        get_config("recipe=dpo")
