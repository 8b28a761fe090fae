"""What train refuses before its first step, and that nothing is left of it."""

import functools

import jax
import numpy as np
import pytest
import tiny_run
from etils import epath

import tpo_jax.train
from tpo_jax.errors import UserError
from tpo_jax.interop import output
from tpo_jax.interop.tensors import lazy, write_file
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.ledger import Ledger
from tpo_jax.training.preemption import Preemption


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    mesh = functools.partial(make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(tpo_jax.train, "make_mesh", mesh)


def refused(config, workdir, message):
    with Preemption() as preemption, pytest.raises(UserError, match=message):
        tpo_jax.train.train(config, epath.Path(workdir), preemption, Ledger())


@pytest.mark.parametrize("split", ["train", "validation"])
def test_data_that_is_not_there_leaves_no_workdir(data, tmp_path, split):
    config = tiny_run.get_config(f"data={data}")
    config.data[split][0]["path"] = str(tmp_path / "nowhere")
    refused(config, tmp_path / "run", "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_model_folder_that_is_not_of_the_run_is_refused(data, tmp_path):
    """The model of the run would take its place in the end."""
    theirs = tmp_path / "run/model"
    theirs.mkdir(parents=True)
    (theirs / "model.safetensors").write_bytes(b"downloaded")
    config = tiny_run.get_config(f"data={data}")
    refused(config, tmp_path / "run", "run/model: holds files and is no model folder")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["model", "model.safetensors"]


def test_a_run_does_not_start_from_the_folder_that_it_will_write(data, tmp_path):
    start = tmp_path / "best_model"
    start.mkdir()
    leaves = {"scale": lazy(np.zeros(2, np.float32))}
    write_file(start / "model-00001-of-00001.safetensors", leaves, output.MODEL_METADATA)
    config = tiny_run.get_config(f"data={data},init_from={start}")
    refused(config, tmp_path, "best_model: is, holds or lies in .*/best_model, which is read")
    assert [path.name for path in tmp_path.iterdir()] == ["best_model"]
