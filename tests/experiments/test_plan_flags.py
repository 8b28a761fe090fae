"""Planned cells as they are typed: flags of the table, of docstrings and of docs/families.md."""

import functools
import json
import math
import pathlib
import re
import shlex

import pytest
from absl import flags
from jax.sharding import AbstractMesh, AxisType

from experiments import plan_table, plans
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.pipeline import read_buckets
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import AXES, check_batch_divides, mesh_shape
from tpo_jax.parallel.paths import flatten
from tpo_jax.parallel.rules import param_shardings
from tpo_jax.parallel.topologies import parse_topology
from tpo_jax.training import config as training_config
from tpo_jax.training.config_flag import define_config
from tpo_jax.training.optimizer import assign_groups
from tpo_jax.training.start import make_model_config

RESULTS = pathlib.Path(plans.__file__).parent / "results" / "plans"
ROOT = RESULTS.parents[2]
PLANNED = json.loads((RESULTS / "plans.json").read_text())
CELLS = {cell.name: cell for cell in plans.cells()}


def typed(command):
    """(config, topology or "") of a command line, as `plan` and `train` read it."""
    argv = [word for word in shlex.split(command) if word.startswith("--")]
    values = flags.FlagValues()
    define_config("config", flag_values=values, sys_argv=argv)
    for name in ("topology", "workdir"):
        flags.DEFINE_string(name, "", "", flag_values=values)
    values(["plan", *argv])
    return values["config"].value, values["topology"].value


def commands(text, name):
    """Those of `python -m tpo_jax.NAME` in a text, of one line each, with C put in."""
    text = text.replace("\\\n", " ")
    if short := re.search(r"^ *C=(\S+)$", text, re.MULTILINE):
        text = text.replace("$C", short[1])
    return [line for line in text.splitlines() if f"python -m tpo_jax.{name} " in line]


def cell_of(command, trained):
    """The cell that a command names; one without a topology names the only one."""
    file, _, arg = re.search(r"--config=configs/(\w+)\.py(:(\S+))?", command).groups()
    arg = ",".join(a for a in (arg or "").split(",") if a and not a.startswith("init="))
    place = re.search(r"--topology=(\S+)", command)
    start = f"{file}{':' if arg else ''}{arg} {trained} "
    found = [name for name in PLANNED if name.startswith(start)]
    (name,) = [name for name in found if not place or name.endswith(f" {place[1]}")]
    return name


@functools.cache
def model_of(config, arg, trained):
    cell = next(c for c in CELLS.values() if (c.config, c.arg, c.trained) == (config, arg, trained))
    model_config, codec = make_model_config(plans.cell_config(cell))
    return model_config, codec, FunctionalModel(model_config).abstract()


@pytest.mark.parametrize("config", sorted({cell.config for cell in CELLS.values()}))
def test_every_planned_cell_divides_over_the_mesh_of_its_flags(config):
    """Parameters and rows of all buckets, on as many chips as its topology has."""
    cells = {name: cell for name, cell in CELLS.items() if cell.config == config}
    assert cells and cells.keys() <= PLANNED.keys()
    for name, cell in cells.items():
        estimate = PLANNED[name]["estimate"]
        arg = f"frames={cell.frames}" if cell.frames else cell.arg
        words = plan_table.planned_flags(estimate)
        found, _ = typed(" ".join([f"--config=configs/{config}.py:{arg}", *words]))
        _, sizes = parse_topology(cell.topology)
        shape = mesh_shape(found.mesh.to_dict(), math.prod(sizes))
        assert {axis: size for axis, size in shape.items() if size > 1} == estimate["mesh"], name
        assert found.accumulation == estimate["accumulation"]
        types = (AxisType.Auto,) * len(AXES)
        mesh = AbstractMesh(tuple(shape.values()), AXES, axis_types=types)
        model_config, codec, abstract = model_of(cell.config, cell.arg, cell.trained)
        param_shardings(abstract, mesh)
        for bucket in read_buckets(training_config.to_dict(found)["buckets"], codec):
            check_batch_divides(batch_spec(bucket, model_config), mesh, found.accumulation)


def test_the_table_prints_the_flags_of_each_row():
    text = (RESULTS / "README.md").read_text()
    start = "| llava_onevision | published | v5e:8x8, fsdp 64 |"
    (row,) = [line for line in text.splitlines() if line.startswith(start)]
    assert row.endswith("| `--config.mesh.fsdp=64 --config.accumulation=2` |")
    estimate = {"mesh": {"data": 2, "fsdp": 128}, "accumulation": 1}
    assert plan_table.planned_flags(estimate) == ["--config.mesh.data=2", "--config.mesh.fsdp=128"]


@pytest.mark.parametrize("name", ["llava_onevision", "llava_video", "longva", "video_llava"])
def test_plans_in_docstrings_are_those_of_rows_that_fit(name):
    (command,) = commands((plans.CONFIGS / f"{name}.py").read_text().split('"""')[1], "plan")
    check_typed(command, "published")


def check_typed(command, trained):
    """The row fits, and the config has its mesh and its micro-batches."""
    name = cell_of(command, trained)
    config, _ = typed(command)
    estimate = PLANNED[name]["estimate"]
    _, sizes = parse_topology(CELLS[name].topology)
    shape = mesh_shape(config.mesh.to_dict(), math.prod(sizes))
    assert plan_table.fits(PLANNED[name])
    assert {axis: size for axis, size in shape.items() if size > 1} == estimate["mesh"]
    assert config.accumulation == estimate["accumulation"]
    return config, plans.cell_config(CELLS[name])


def section():
    text = (ROOT / "docs" / "families.md").read_text()
    return text.split("## What they need on a pod\n")[1].split("\n## ")[0]


def test_the_plan_of_the_docs_is_that_of_a_row():
    (command,) = commands(section(), "plan")
    check_typed(command, "published")


def rates(config, model_config):
    """{path: learning rate} of what a config trains."""
    groups = [(pattern, rate) for pattern, rate in config.trainable]
    paths = list(flatten(FunctionalModel(model_config).abstract()))
    return {path: groups[i][1] for path, i in assign_groups(groups, paths).items()}


def test_adapters_as_typed_in_the_docs_are_those_that_were_planned():
    """The two commands, and what the text says of the other families."""
    two, one = commands(section(), "train")
    four = shlex.join(word for word in shlex.split(two) if ".trainable" in word)
    others = [
        two.replace("configs/llava_video", "configs/llava_onevision").replace("n=16", "n=8"),
        two.replace("configs/llava_video", "configs/longva").replace("n=16", "n=2"),
        one.replace("configs/video_llava.py:", "configs/longva_tpo.py:frames=32,")
        + " --topology=v5e:4x4",
        f"python --config=configs/videochat2.py {four} --config.mesh.fsdp=16",
    ]
    for command in (two, one, *others):
        config, planned = check_typed(command, "lora")
        model_config, _ = make_model_config(planned)
        trained = rates(config, model_config)
        assert trained == rates(planned, model_config) and set(trained.values()) == {2e-4}
        assert config.lora.to_dict() == planned.lora.to_dict()


@pytest.mark.parametrize("config, group", [("video_llava.py:stage=2", 0), ("videochat2.py", 1)])
def test_full_rows_as_typed_in_the_docs(config, group):
    flag = f"'--config.trainable[{group}][0]=.*'"
    assert f"`{flag}`" in section().replace("\n", " ")
    command = f"python --config=configs/{config} --topology=v4:2x2x4 {flag} --config.mesh.fsdp=16"
    found, planned = check_typed(command, "full")
    model_config, _ = make_model_config(planned)
    assert rates(found, model_config) == rates(planned, model_config)
