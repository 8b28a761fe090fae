"""Which runs a config file asks for, their names, and how far they are."""

import json
import pathlib

import fake_sweep
import pytest
import swept

from experiments.sweeps import runs
from experiments.sweeps.runs import expand, found_in, progress, write_config
from tpo_jax.training.config import ConfigError

SWEPT = swept.__file__
ROOT = pathlib.Path(__file__).resolve().parents[2]


def config_file(tmp_path, body):
    """A file with the config of swept.py and another sweep."""
    path = tmp_path / "experiment.py"
    path.write_text(f"from swept import get_config\n{body}\n")
    return str(path)


def test_runs_are_named_by_what_varies_and_nothing_else(tmp_path):
    found = expand(f"{SWEPT}:somewhere", tmp_path)
    assert [run.name for run in found] == [
        "seed=0,trainable.0.1=0.001", "seed=1,trainable.0.1=0.001",
        "seed=0,trainable.0.1=0.003", "seed=1,trainable.0.1=0.003",
    ]  # fmt: skip
    assert found[1].varied == {"seed": 1, "trainable[0][1]": 1e-3}
    assert found[1].config["seed"] == 1 and found[1].config["trainable"] == [[".*", 1e-3]]
    assert found[1].config["data"]["train"][0]["path"] == "somewhere/train"  # the argument


def test_a_reference_follows_its_option_in_every_run(tmp_path):
    file = config_file(tmp_path, "def sweep(add):\n  add(steps=10)\n  add(steps=30)")
    found = expand(file, tmp_path / "out")
    assert [run.config["checkpoint"]["every"] for run in found] == [5, 15]
    assert [run.name for run in found] == ["steps=10", "steps=30"]


def test_the_argument_reaches_a_sweep_that_asks_for_it(tmp_path):
    file = config_file(tmp_path, "def sweep(add, arg):\n  add(seed=len(arg))")
    (run,) = expand(f"{file}:abc", tmp_path / "out")
    assert run.config["seed"] == 3 and run.name == "run"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "has no sweep"),
        ("def sweep(add): pass", "added no run"),
        ("def sweep(add): add(sede=1)", "run 0 .*no option 'sede'"),
        ("def sweep(add): add(steps=0)", "(?s)run 0 .*steps = 0: too small"),
        ("def sweep(add):\n  add(seed=1)\n  add(seed=1)", "two runs have the config"),
    ],
)
def test_a_wrong_sweep_says_which_run_and_why(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        expand(config_file(tmp_path, body), tmp_path / "out")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing.py: no such config file"):
        expand(str(tmp_path / "nothing.py"), tmp_path)


def test_a_run_keeps_its_folder_when_the_sweep_grows_or_its_logging_changes(tmp_path):
    out = tmp_path / "out"
    short = config_file(tmp_path, "def sweep(add):\n  add(seed=0)\n  add(seed=1)")
    for run in expand(short, out):
        write_config(run)
    grown = config_file(
        tmp_path,
        "def sweep(add):\n  for clip in (1.0, 2.0):\n    for seed in range(2):\n"
        "      add(seed=seed, **{'optimizer.clip': clip, 'log_every': 3})",
    )
    found = expand(grown, out)
    assert [run.name for run in found] == ["seed=0", "seed=1", "seed=0,clip=2", "seed=1,clip=2"]
    assert found[0].varied == {"seed": 0, "optimizer.clip": 1.0}


def test_a_run_keeps_its_folder_when_the_program_has_a_new_option(tmp_path):
    (run, *_) = expand(SWEPT, tmp_path)
    write_config(run)
    old = {key: value for key, value in run.config.items() if key != "accumulation"}
    run.config_path.write_text(json.dumps(old))
    assert expand(SWEPT, tmp_path)[0].name == run.name


def test_a_folder_of_the_same_name_with_another_config_is_left_alone(tmp_path):
    out = tmp_path / "out"
    for steps in (8, 12):
        file = config_file(
            tmp_path, f"def sweep(add):\n  for s in (0, 1): add(seed=s, steps={steps})"
        )
        found = expand(file, out)
        for run in found:
            write_config(run)
    assert found[0].name.startswith("seed=0~") and len(list(out.iterdir())) == 4


@pytest.mark.parametrize(
    ("varied", "name"),
    [
        ({}, "run"),
        ({"init_from": "gs://b/x y"}, "init_from=gs_b_x_y"),
        ({"a.clip": 1.0, "b.clip": True}, "a.clip=1,b.clip=true"),
        ({"data.train[0].weight": 0.5}, "weight=0.5"),
        ({"trainable[0][1]": 1e-5, "trainable[1][1]": 0.25},
         "trainable.0.1=1e-05,trainable.1.1=0.25"),
        ({"init_missing": []}, "init_missing=_"),
    ],
)  # fmt: skip
def test_names_are_short_and_safe_in_a_path(varied, name):
    assert runs.name_of(varied) == name


def test_long_names_are_cut_and_stay_different():
    one, other = ({"tokenizer": "x" * 300 + end} for end in "ab")
    assert runs.name_of(one) != runs.name_of(other)
    assert len(runs.name_of(one)) <= runs.LONGEST_NAME


@pytest.mark.parametrize(
    ("config", "count"), [("configs/demo.py:stage=2", 3), ("configs/seven_b.py:tiny", 6)]
)
def test_shipped_sweeps_are_valid(tmp_path, config, count):
    found = expand(str(ROOT / config), tmp_path)
    assert len({run.name for run in found}) == count


def test_progress_is_what_the_run_and_its_launcher_left(tmp_path):
    (run, *_) = fake_sweep.write(tmp_path, seeds=1)
    workdir = tmp_path / run.name
    assert progress(run).state == "finished" and progress(run).restarts == 1
    fake_sweep.write_ledger(workdir, 40, finished=False)
    assert (progress(run).state, progress(run).step) == ("stopped", 40)
    (workdir / "exit_status").write_text("75\n")
    assert progress(run).state == "stopped"
    (workdir / "exit_status").write_text("1\n")
    assert progress(run).state == "failed"
    (workdir / "ledger.json").unlink()
    assert progress(run).state == "failed"
    (workdir / "exit_status").unlink()
    assert progress(run).state == "started"
    (workdir / "metrics.jsonl").unlink()
    assert progress(run).state == "new"


def test_folders_alone_tell_what_varies(tmp_path):
    fake_sweep.write(tmp_path, seeds=2)
    found = found_in(tmp_path)
    assert set(found[0].varied) == {"seed", "trainable[0][1]", "optimizer.clip"}
    with pytest.raises(ConfigError, match="holds no run"):
        found_in(tmp_path / "nothing")


def test_config_json_is_the_whole_config(tmp_path):
    (run, *_) = expand(SWEPT, tmp_path)
    write_config(run)
    assert json.loads((tmp_path / run.name / "config.json").read_text()) == run.config
