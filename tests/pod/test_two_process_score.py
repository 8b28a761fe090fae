"""Two processes (gloo) score one sidecar together: the numbers of one process."""

import json

import micro_model
import numpy as np
import processes
import pytest

from tpo_jax.data.records import Example, Turn
from tpo_jax.generation import sidecar
from tpo_jax.interop.folder import save_model

# The score command on videos in memory.
PROGRAM = """
import sys
sys.path.insert(0, "tests")
import micro_model
from tpo_jax import preferences
from tpo_jax.data import pairs
from tpo_jax.generation import scoring
pairs.PreparedDataset = lambda path: micro_model.MemoryDataset(3)
scoring.PART_BATCHES = 1
sys.exit(preferences.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    codec = micro_model.make_codec(())
    model = micro_model.make_model(codec, ())
    save_model(folder / "base", model.config, micro_model.make_params(model), codec)
    answers = {"chosen": "it moves left then right", "rejected": "it blinks and grows"}
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(7):
            turn = Turn(micro_model.QUESTIONS[i % 4], "it moves left", (), "action")
            example = Example(f"pair{i}", f"video{i % 3}", "video", "preference", "test", 0.0, 12.0,
                              (turn,), answers)  # fmt: skip
            file.write(json.dumps(example.to_json()) + "\n")
    return folder


def score(folder, out, count):
    address = f"localhost:{processes.free_port()}"
    running = []
    for index in range(count):
        environment = {}
        if count > 1:
            environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
                           "JAX_PROCESS_ID": str(index)}  # fmt: skip
        running.append(processes.start(
            "-c", PROGRAM, "score", f"--model={folder / 'base'}", "--data=memory",
            f"--pairs={folder / 'pairs.jsonl'}", f"--out={out}", "--batch_size=4",
            "--data_parallel=-1", flags=processes.QUICK, environment=environment,
        ))  # fmt: skip
    ended = processes.finish(running, timeout=900)
    assert [process.status for process in ended] == [0] * count


@pytest.mark.long
def test_two_processes_write_the_sidecar_of_one(folder, tmp_path):
    for count in (1, 2):
        score(folder, tmp_path / f"{count}.npz", count)
    one, two = (sidecar.read(tmp_path / f"{n}.npz") for n in (1, 2))
    assert one.fingerprint == two.fingerprint and one.digests == two.digests
    assert len(one.logps) == 7 and sorted(p.name for p in tmp_path.iterdir()) == ["1.npz", "2.npz"]
    for pair, logps in one.logps.items():
        np.testing.assert_allclose(two.logps[pair], logps, atol=1e-5)
