"""Two processes (gloo) write pairs and score a sidecar together: what one process writes."""

import json

import micro_model
import numpy as np
import processes
import pytest

from tpo_jax.data.records import Example, Turn
from tpo_jax.generation import sidecar
from tpo_jax.interop.folder import save_model

# The command on videos in memory.
PROGRAM = """
import sys
sys.path.insert(0, "tests")
import micro_model
from tpo_jax import preferences
from tpo_jax.data import pairs
from tpo_jax.data.records import Turn
from tpo_jax.generation import scoring
turns = [Turn(question, "it moves left") for question in micro_model.QUESTIONS]
examples = {f"video{i}": [micro_model.conversation(f"video{i}", turns)] for i in range(3)}
preferences.PreparedDataset = pairs.PreparedDataset = (
    lambda path: micro_model.MemoryDataset(3, examples))
scoring.PART_BATCHES = 1
sys.exit(preferences.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    codec = micro_model.make_codec(())
    model = micro_model.make_model(codec, ())
    params = micro_model.make_params(model)
    save_model(folder / "base", model.config, params, codec)
    drawing = micro_model.that_draws(params, codec, "it moves left", "right")
    save_model(folder / "drawing", model.config, drawing, codec)
    answers = {"chosen": "it moves left then right", "rejected": "it blinks and grows"}
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(7):
            turn = Turn(micro_model.QUESTIONS[i % 4], "it moves left", (), "action")
            example = Example(f"pair{i}", f"video{i % 3}", "video", "preference", "test", 0.0, 12.0,
                              (turn,), answers)  # fmt: skip
            file.write(json.dumps(example.to_json()) + "\n")
    return folder


def run(count, *arguments):
    address = f"localhost:{processes.free_port()}"
    running = []
    for index in range(count):
        environment = {}
        if count > 1:
            environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count),
                           "JAX_PROCESS_ID": str(index)}  # fmt: skip
        running.append(processes.start(
            "-c", PROGRAM, *arguments, "--data=memory", "--batch_size=4", "--data_parallel=-1",
            flags=processes.QUICK, environment=environment,
        ))  # fmt: skip
    ended = processes.finish(running, timeout=900)
    assert [process.status for process in ended] == [0] * count


@pytest.mark.long
def test_two_processes_write_the_sidecar_of_one(folder, tmp_path):
    for count in (1, 2):
        run(count, "score", f"--model={folder / 'base'}", f"--out={tmp_path / f'{count}.npz'}",
            f"--pairs={folder / 'pairs.jsonl'}")  # fmt: skip
    one, two = (sidecar.read(tmp_path / f"{n}.npz") for n in (1, 2))
    assert one.fingerprint == two.fingerprint and one.digests == two.digests
    assert len(one.logps) == 7 and sorted(p.name for p in tmp_path.iterdir()) == ["1.npz", "2.npz"]
    for pair, logps in one.logps.items():
        np.testing.assert_allclose(two.logps[pair], logps, atol=1e-5)


@pytest.mark.long
def test_two_processes_write_the_pairs_of_one(folder, tmp_path):
    for count in (1, 2):
        run(count, "generate", f"--model={folder / 'drawing'}", f"--out={tmp_path / str(count)}",
            "--judge=none", "--gap=-99", "--temperature=1", "--max_new=16",
            "--length_ratio=99")  # fmt: skip
    one, two = (
        [json.loads(line) for line in (tmp_path / n / "pairs.jsonl").read_text().splitlines()]
        for n in "12")  # fmt: skip
    assert len(one) > 5
    for pair, other in zip(one, two, strict=True):
        for name, value in pair.pop("targets").items():
            same = pytest.approx(value, abs=1e-3) if "logp" in name else value
            assert other["targets"][name] == same
        assert pair == {name: other[name] for name in pair}
