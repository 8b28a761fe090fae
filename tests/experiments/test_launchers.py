"""The scripts of the cloud launchers: word for word, and what they do with programs that answer
like gcloud, xpk and sbatch."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest
from etils import epath

from experiments import launchers
from experiments.launchers.command import resource_name
from experiments.launchers.queued_resources import QueuedResources
from experiments.launchers.slurm import Slurm
from experiments.launchers.xpk import Xpk
from experiments.sweep import make_launcher
from experiments.sweeps.runs import Run
from tpo_jax.training.config import ConfigError

GOLDEN = pathlib.Path(__file__).parent / "golden"
PLACE = {"project": "my-project", "zone": "us-west4-a"}
QUEUED = QueuedResources(
    **PLACE, accelerator="v5litepod-16", runtime="v2-alpha-tpuv5-lite", poll=0
)
XPK = Xpk(**PLACE, cluster="pod", tpu_type="v5litepod-16", image="gcr.io/me/tpo", restarts=9)
SLURM = Slurm(nodes=2, partition="gpu")


def run_of(out: str) -> Run:
    name = "clip=0.5,seed=1"
    return Run(name, epath.Path(out) / name, {}, {})


@pytest.mark.parametrize(
    ("launcher", "out", "golden"),
    [
        (QUEUED, "gs://bucket/sweep", "queued_resources.sh"),
        (XPK, "gs://bucket/sweep", "xpk.sh"),
        (SLURM, "/shared/sweep", "slurm.sh"),
    ],
)
def test_scripts_are_the_golden_ones(launcher, out, golden):
    """After a wanted change: run this file as a program, and read the difference."""
    assert launcher.script(run_of(out)) == (GOLDEN / golden).read_text()


def test_no_launcher_imports_anything_of_a_cloud():
    ours = {"experiments", "tpo_jax"}
    for file in pathlib.Path(launchers.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= ours | sys.stdlib_module_names, file


@pytest.fixture
def cloud(tmp_path):
    """Runs a script with stand-ins for programs; each notes its arguments in calls.txt."""
    programs = tmp_path / "programs"
    programs.mkdir()

    def program(name: str, body: str) -> None:
        path = programs / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls.txt\n{body}\n')
        path.chmod(0o755)

    def start(script: str) -> tuple[int, list[str]]:
        environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True, timeout=60
        )
        return done.returncode, (tmp_path / "calls.txt").read_text().splitlines()

    return program, start


# A slice exists once it is created; training answers with the next status of a list, and a status
# of 255 means that the slice is gone.
GCLOUD = """
case "$*" in
  *create*) echo x > slice; echo ACTIVE > state ;;
  *delete*) [ -e slice ] || exit 1; rm slice state ;;
  *describe*) [ ! -e state ] || cat state ;;
  *tpo_jax.train*)
    status=$(head -n 1 statuses); sed -i 1d statuses
    [ "$status" != 255 ] || echo SUSPENDED > state
    exit "$status" ;;
esac
"""


@pytest.mark.parametrize(
    ("statuses", "result", "trainings", "slices"),
    [
        ((0,), 0, 1, 1),
        ((75, 75, 0), 0, 3, 1),  # told to stop: again on the same slice
        ((255, 0), 0, 2, 2),  # taken away before it could say so: again on a new one
        ((1, 0), 1, 1, 1),  # any other status ends the run
        ((75, 139, 0), 139, 2, 1),
    ],
)
def test_a_queued_run_restarts_after_75_and_where_its_slice_is_gone(
    cloud, tmp_path, statuses, result, trainings, slices
):
    program, start = cloud
    program("gcloud", GCLOUD)
    (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    status, calls = start(QUEUED.script(run_of("gs://bucket/sweep")))
    assert status == result
    assert sum("tpo_jax.train" in call for call in calls) == trainings
    assert sum("queued-resources create" in call for call in calls) == slices
    assert not (tmp_path / "slice").exists()  # given back


def test_a_request_that_fails_is_not_repeated(cloud, tmp_path):
    program, start = cloud
    program("gcloud", GCLOUD.replace("echo ACTIVE", "echo FAILED"))
    status, calls = start(QUEUED.script(run_of("gs://bucket/sweep")))
    assert status == 1 and sum("create" in call for call in calls) == 1
    assert not any("tpo_jax.train" in call for call in calls)


def test_a_queued_run_that_is_told_to_stop_saves_gives_back_and_ends_with_75(cloud, tmp_path):
    """The stand-in for training signals the script, as the sweep would, and waits to be told."""
    os.mkfifo(tmp_path / "told")
    program, start = cloud
    training = '*pkill*) echo > told ;;\n  *tpo_jax.train*) kill -TERM "$(cat pid)"; '
    training += "read -r line < told; exit 75 ;;\n  *nothing*)"
    program("gcloud", GCLOUD.replace("*tpo_jax.train*)", training))
    status, calls = start("echo $$ > pid\n" + QUEUED.script(run_of("gs://bucket/sweep")))
    assert status == 75
    assert sum("pkill -TERM" in call for call in calls) == 1
    assert not (tmp_path / "slice").exists()


@pytest.mark.parametrize(("ended", "seen"), [(0, 0), (75, 75), (1, 1), (42, 1), (139, 1), (137, 1)])
def test_what_xpk_would_restart_by_itself_looks_like_a_failure(cloud, tmp_path, ended, seen):
    program, start = cloud
    program("xpk", 'for word; do case "$word" in --command=*) bash -c "${word#*=}";; esac; done')
    program("python", f"exit {ended}")
    status, calls = start(XPK.script(run_of("gs://bucket/sweep")))
    assert status == seen
    assert sum(call.startswith("python -m tpo_jax.train") for call in calls) == 1
    assert "--restart-on-exit-codes=75" in calls[0]


@pytest.mark.parametrize("ended", [0, 1, 75])
def test_a_slurm_job_requeues_itself_after_75_only(cloud, tmp_path, ended):
    program, start = cloud
    program("sbatch", "SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n[1-2] bash")
    program("srun", 'shift; SLURM_NTASKS=2 SLURM_PROCID=1 "$@"')
    program("scontrol", '[ "$1" != show ] || printf "n1\\nn2\\n"')
    program("python", f"exit {ended}")
    status, calls = start(SLURM.script(run_of("/shared/sweep")))
    assert status == ended
    (train,) = (call for call in calls if call.startswith("python"))
    assert train.endswith("--coordinator=n1:12321 --num_processes=2 --process_id=1")
    assert ("scontrol requeue 7" in calls) == (ended == 75)


def test_options_are_typed_and_missing_ones_are_named():
    launcher = make_launcher("queued_resources", "project=p,zone=z,spot=false,poll=5")
    assert (launcher.project, launcher.spot, launcher.poll) == ("p", False, 5)
    with pytest.raises(ConfigError, match="accelerator=...,runtime=... is needed"):
        launcher.script(run_of("gs://bucket/sweep"))
    with pytest.raises(ConfigError, match="unknown key 'zones'"):
        make_launcher("xpk", "zones=z")
    with pytest.raises(ConfigError, match="unknown key"):
        make_launcher("local", "parallel=3")


@pytest.mark.parametrize("launcher", [QUEUED, XPK])
def test_a_workdir_that_a_cloud_cannot_see_is_refused(launcher):
    with pytest.raises(ConfigError, match="give a gs:// folder"):
        launcher.script(run_of("/home/me/sweep"))


def test_names_of_resources_are_short_legal_and_different():
    names = {
        resource_name(run_of(out), 40) for out in ("gs://b/One_sweep", "gs://c/One_sweep", "/2/3")
    }
    assert len(names) == 3
    assert all(len(name) <= 40 and name[0].isalpha() for name in names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


if __name__ == "__main__":
    for one, where, file in ((QUEUED, "gs://bucket/sweep", "queued_resources.sh"),
                             (XPK, "gs://bucket/sweep", "xpk.sh"),
                             (SLURM, "/shared/sweep", "slurm.sh")):  # fmt: skip
        (GOLDEN / file).write_text(one.script(run_of(where)))
