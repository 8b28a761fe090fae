"""What a dry run finds, on the micro model and data that are right or wrong in one thing."""

import copy
import dataclasses
import json
import types

import jax
import numpy as np
import pytest
import tiny_run
from absl import flags

from tpo_jax import train
from tpo_jax.data.pipeline import Pipeline
from tpo_jax.data.records import PreparedDataset
from tpo_jax.errors import UserError
from tpo_jax.interop.folder import save_model
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.training import sidecar
from tpo_jax.training.checkpoint import Checkpoint, CheckpointError, Checkpoints
from tpo_jax.training.config import ConfigError, to_dict
from tpo_jax.training.config_flag import read_json
from tpo_jax.training.dry_run import DryRun, DryRunError
from tpo_jax.training.save_policy import Save, SavePolicy
from tpo_jax.training.start import make_model_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data):
    config = tiny_run.get_config(f"data={data}")
    for bucket in config.buckets.values():
        bucket.batch_size = 8
    return config


def zeros(abstract):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)


def findings(config, workdir="", topology="v5e:2x4"):
    """{name: (good, text)}, and whether all is good."""
    dry_run = DryRun(config, str(workdir), topology, lambda finding: None)
    good = dry_run.run()
    return {f.name: (f.good, f.text) for f in dry_run.findings}, good


def the_wrong_one(config, **options):
    found, good = findings(config, **options)
    assert not good
    ((name, text),) = ((name, text) for name, (fine, text) in found.items() if not fine)
    return name, text


def test_a_good_run_is_good_everywhere(config, tmp_path):
    before = {id(array) for array in jax.live_arrays()}
    found, good = findings(config, tmp_path)
    assert good, found
    allocated = sum(a.size for a in jax.live_arrays() if id(a) not in before)
    assert allocated < 1000  # no weights
    assert list(found) == ["config", "model", "sharding", "batches", "init_from", "references",
                           "losses", "data.train", "data.validation", "workdir"]  # fmt: skip
    assert "mesh data 8, fsdp 1," in found["sharding"][1]
    assert "of 16 GiB a chip" in found["sharding"][1]
    assert "long: 6 clips, short: 6 clips" in found["data.train"][1]
    assert "a new run" in found["workdir"][1]
    assert not list(tmp_path.iterdir())


def test_what_no_bucket_shows_is_told_with_the_data(config, monkeypatch):
    real = PreparedDataset.video_info

    def one_image(self, video):
        info = real(self, video)
        return dataclasses.replace(info, media="image") if video.endswith("video0") else info

    monkeypatch.setattr(PreparedDataset, "video_info", one_image)
    config.data.epochs = 1.0
    dry_run = DryRun(config, "", "", lambda finding: None)
    dry_run._config()
    dry_run._model()
    said = dry_run._data("train")
    assert "no bucket shows 1 image with a conversation example, of 6 videos" in said
    assert "WARNING: 12 steps make" in said and "of the 5 videos of" in said
    assert "WARNING" not in dry_run._data("validation")


def test_a_wrong_option_comes_first_and_alone(config):
    config.optimizer.clip = -1.0
    config.steps = 0
    assert list(findings(config)[0]) == ["config"]


def test_rows_that_do_not_divide_name_bucket_and_multiple(config):
    config.buckets.short.batch_size = 12
    name, text = the_wrong_one(config)
    assert name == "batches" and "buckets.short" in text and "multiple of 8" in text
    assert "buckets.long" not in text


def test_a_bucket_of_another_model_is_named(config):
    config.buckets.short.frames = 1000
    found, good = findings(config)
    assert not good and "losses" not in found
    limit = "but the model has vision.max_frames = 8; set it to that, or less."
    assert found["batches"] == (False, f"buckets.short.frames: 1000, {limit}")


def test_a_large_model_must_divide_and_fit_into_its_chips(config):
    config.model.preset = "7b"
    for bucket in config.buckets.values():
        bucket.frames = 1
    dry_run = DryRun(config, "", "v5e:1x8", lambda finding: None)
    assert not dry_run.run()
    wrong = {f.name: f.text for f in dry_run.findings if not f.good}
    assert list(wrong) == ["sharding"]
    assert "of 16 GiB a chip; give mesh.fsdp" in wrong["sharding"]  # every chip has all of it
    config.mesh, dry_run.topology = {"data": 1, "fsdp": 3, "context": 1, "tensor": 1}, "v5e:1x3"
    with pytest.raises(DryRunError) as error:
        dry_run._sharding()
    lines = str(error.value).split("\n")
    assert len(lines) > 5 and all("does not divide over fsdp=3" in line for line in lines)


def test_a_loss_without_a_weight_is_named(config):
    config.losses = {}
    name, text = the_wrong_one(config)
    assert name == "losses" and "set losses['language']" in text


def test_an_example_that_fits_no_bucket_is_named(config):
    for bucket in config.buckets.values():
        bucket.answers = 2
    found, good = findings(config)
    assert not good and not found["data.train"][0] and not found["data.validation"][0]
    assert "seed0/video0/conversation" in found["data.train"][1]
    assert "seed1/video0" in found["data.validation"][1]


def test_a_folder_that_is_not_there_is_named(config):
    config.data.train[0]["path"] = "nowhere"
    name, text = the_wrong_one(config)
    assert name == "data.train" and "nowhere is not a prepared folder" in text


def test_validation_that_no_run_reads_is_not_looked_at(config):
    config.eval_every, config.data.validation[0]["path"] = 0, "nowhere"
    found, good = findings(config)
    assert good and "data.train" in found and "data.validation" not in found


def test_weights_to_start_from_must_fit_by_name_and_shape(config, data, tmp_path):
    model_config, codec = make_model_config(config)
    params = zeros(FunctionalModel(model_config).abstract())
    save_model(tmp_path / "model", model_config, params, codec)
    config = tiny_run.get_config(f"data={data},heads=True,init_from={tmp_path / 'model'}")
    config.mesh.data = 4
    dry_run = DryRun(config, "", "v5e:2x2", lambda finding: None)
    assert not dry_run.run()
    (wrong,) = (finding for finding in dry_run.findings if not finding.good)
    assert wrong.name == "init_from"
    assert "heads/region" in wrong.text and "init_missing" in wrong.text
    config.init_missing = ["task_tokens/", "box_encoder/", "heads/"]
    assert "; new: " in dry_run._init_from()


def test_a_checkpoint_of_another_run_is_refused_without_being_touched(config, tmp_path):
    dry_run = DryRun(config, "", "", lambda finding: None)
    config.mesh = {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}
    assert dry_run.run()
    state = zeros(dry_run.program.abstract_state)
    checkpoints = Checkpoints(tmp_path / "checkpoints", SavePolicy(1, 1))
    checkpoints.save(
        7, Checkpoint(state, {"next_step": 7}, {}, {}, to_dict(config), {}), Save(("permanent",))
    )
    checkpoints.close()
    leftover = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    leftover.mkdir()  # of a run that is saving
    dry_run.workdir = tmp_path
    assert "resumes at step 7 of 12" in dry_run._resume()
    config.steps = 13
    with pytest.raises(DryRunError, match="steps: checkpoint has 12, this command has 13"):
        dry_run._resume()
    config.optimizer.name = "muon"  # whose state is another
    dry_run._sharding()
    with pytest.raises(CheckpointError, match="(?s)  opt_state/.*in the checkpoint only"):
        dry_run._resume()
    assert leftover.exists()


def pairs_config(data, tmp_path):
    """A preference run on two pairs, with the sidecar of its own weights."""
    config = tiny_run.get_config(f"data={data}")
    model_config, codec = make_model_config(config)
    params = zeros(FunctionalModel(model_config).abstract())
    save_model(tmp_path / "model", model_config, params, codec)
    lines = []
    for i in range(2):
        name = f"seed0/video{i}"
        lines.append(json.dumps({
            "format_version": 1, "example_id": f"{name}/pair", "video_id": name, "media": "video",
            "task": "preference", "source": "test", "start": 0.0, "end": 4.0,
            "turns": [{"question": tiny_run.QUESTION, "answer": "", "options": [], "kind": ""}],
            "targets": {"chosen": "It is red.", "rejected": "It is blue."},
        }))  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    config.objective, config.init_from, config.tokenizer = "preference", str(tmp_path / "model"), ""
    config.data.train = [{"path": f"{data}/train", "weight": 1.0, "tasks": {"preference": 1.0},
                          "kinds": [], "pairs": str(tmp_path / "pairs.jsonl")}]  # fmt: skip
    config.eval_every, config.data.validation = 0, []
    config.buckets = {"pairs": config.buckets.short.copy_and_resolve_references()}
    config.buckets["pairs"].update(question=32, batch_size=8)
    config.data.references = [str(tmp_path / "reference.npz")]
    return config, model_config, params, codec


def test_sidecars_must_belong_to_the_weights_and_to_every_pair(data, tmp_path):
    config, model_config, params, codec = pairs_config(data, tmp_path)
    fingerprint = sidecar.Fingerprint.of(model_config, params, codec, 4, platform="tpu")
    seen = {}

    def note(pair, frames, stored, prefix, tokens):
        seen[pair] = sidecar.hash_row(frames, stored, prefix, tokens, pad_id=codec.pad_id)
        return np.zeros((2, 16), np.float32)

    Pipeline(to_dict(config)["data"]["train"], codec, model_config, (),
             to_dict(config)["buckets"], 0, reference=note)  # fmt: skip
    logps = {pair: np.full((2, 16), -1.0, np.float32) for pair in seen}
    sidecar.write(tmp_path / "reference.npz", sidecar.Sidecar(fingerprint, seen, logps))
    dry_run = DryRun(config, "", "v5e:2x4", lambda finding: None)
    assert dry_run.run(), dry_run.findings
    one = dict(list(seen.items())[:1])
    missing = sidecar.Sidecar(fingerprint, one, {pair: logps[pair] for pair in one})
    (tmp_path / "reference.npz").unlink()
    sidecar.write(tmp_path / "reference.npz", missing)
    dry_run._references()
    with pytest.raises(ValueError, match="was never scored"):
        dry_run._data("train")
    config.model.attention = "xla"  # another kernel than that of the TPUs
    with pytest.raises(sidecar.SidecarMismatch, match="sidecar 'splash', this run 'xla'"):
        dry_run._references()
    config.model.attention = "auto"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sidecar, "best_backend", lambda *about: f"{about[0]} for {about[-1]}")
        config.mesh.context = 2
        with pytest.raises(sidecar.SidecarMismatch, match="this run 'tpu for 2'"):
            dry_run._references()
    config.mesh.context = 1
    params["language"]["embed"]["table"] = params["language"]["embed"]["table"] + 1
    save_model(tmp_path / "model", model_config, params, codec)
    with pytest.raises(sidecar.SidecarMismatch, match="weights: sidecar"):
        dry_run._references()


@pytest.mark.parametrize(
    ("given", "value"),
    [([], ""), (["--dry_run"], "check"), (["--dry_run=compile"], "compile"), (["--nodry_run"], "")],
)
def test_the_flag_stands_alone_or_says_compile(given, value):
    values = flags.FlagValues()
    values["dry_run"] = copy.deepcopy(flags.FLAGS["dry_run"])
    values(["train", *given])
    assert values.dry_run == value
    with pytest.raises(flags.IllegalFlagValueError, match="expected nothing, or compile"):
        values(["train", "--dry_run=all"])


def test_compile_plans_the_very_config_and_only_a_good_one(config, monkeypatch):
    planned = []

    def plan(command):
        (path,) = (word.removeprefix("--config=") for word in command if "--config" in word)
        planned.append((read_json(path), command[-2:]))
        return types.SimpleNamespace(returncode=1)

    monkeypatch.setattr(train.subprocess, "run", plan)
    for good, status in ((False, 1), (True, 1)):
        monkeypatch.setattr(train.DryRun, "run", lambda self, good=good: good)
        assert train.dry_run(config, "", "compile", "v5e:2x4", 2) == status
    ((found, where),) = planned
    assert to_dict(found) == to_dict(config)
    assert where == ["--topology=v5e:2x4", "--num_slices=2"]
    assert train.dry_run(config, "", "check", "v5e:2x4") == 0 and len(planned) == 1
    with pytest.raises(UserError, match="needs --topology"):
        train.dry_run(config, "", "compile", "")


def test_the_config_of_a_workdir_is_read_locked_and_a_wrong_file_is_named(config, tmp_path):
    parser = flags.FLAGS["config"].parser
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    found = parser.parse(str(path))
    assert to_dict(found) == to_dict(config) and found.is_locked
    with pytest.raises(ConfigError, match="nothing.json: no such config"):
        parser.parse(str(tmp_path / "nothing.json"))
    path.write_text("{")
    with pytest.raises(ConfigError, match="config.json: not JSON"):
        parser.parse(str(path))
    assert parser.parse(f"{tiny_run.__file__}:steps=7").steps == 7  # Python, as ml_collections does
