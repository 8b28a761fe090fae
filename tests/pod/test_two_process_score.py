"""Two processes (gloo) write pairs and score a sidecar together: what one process writes."""

import json
import time

import micro_model
import numpy as np
import processes
import pytest
from chat_server import serving

from tpo_jax.data.records import Example, Turn
from tpo_jax.interop.folder import save_model
from tpo_jax.training import sidecar

# The command on videos in memory.
PROGRAM = """
import sys
sys.path.insert(0, "tests")
import micro_model
from tpo_jax import preferences
from tpo_jax.data import pairs
from tpo_jax.data.records import Turn
from tpo_jax.training import scoring
from tpo_jax.generation.pipeline import relay
turns = [Turn(question, "it moves left") for question in micro_model.QUESTIONS]
examples = {f"video{i}": [micro_model.conversation(f"video{i}", turns)] for i in range(3)}
preferences.PreparedDataset = pairs.PreparedDataset = (
    lambda path: micro_model.MemoryDataset(3, examples))
scoring.PART_BATCHES, relay.BEAT = 1, 0.2
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


def run(count, *arguments, status=0):
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
    assert [process.status for process in ended] == [status] * count


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


def answer(text):
    """As captioner, writer and judge, some time after it was asked."""
    time.sleep(0.3)
    if "Answer 2:" in text:
        return "better=1\ncorrect=both\nunclear=no"
    question = f"Question: {micro_model.QUESTIONS[0]}\nAnswer: it moves left"
    return question if "Topic" in text else "a"


@pytest.mark.long
def test_two_processes_ask_an_endpoint_once_and_write_the_records_of_one(folder, tmp_path):
    """Every reply takes longer than a beat; and both end with the status of a budget."""
    asked, options = {}, ("--captioner=endpoint", "--writer=endpoint", "--judge=endpoint",
                          "--endpoint_model=m", "--key_variable=", "--gap=-99", "--temperature=1",
                          "--max_new=16", "--length_ratio=99", "--questions=2", "--parts=2",
                          "--caption_frames=4")  # fmt: skip
    for count in (1, 2):
        with serving() as server:
            server.answer = answer
            about = ("generate", f"--model={folder / 'drawing'}", f"--endpoint={server.url}",
                     *options, f"--out={tmp_path / str(count)}")  # fmt: skip
            if count == 2:
                run(count, *about, "--max_tokens=210", status=3)
                assert 0 < len(server.requests) < len(asked[1])
                about = (*about, "--max_tokens=9999")
            run(count, *about)
            asked[count] = sorted(body["seed"] for _, _, body in server.requests)
    assert asked[1] == asked[2]
    names = ("videos", "captions", "questions", "filter", "pairs")
    for name in names:
        one, two = ((tmp_path / n / f"{name}.jsonl").read_text().splitlines() for n in "12")
        assert len(one) == len(two) > 0
        for record, other in zip(map(json.loads, one), map(json.loads, two), strict=True):
            record.pop("targets", None), other.pop("targets", None)
            assert other.pop("gap", 0.0) == pytest.approx(record.pop("gap", 0.0), abs=1e-3)
            # Digests are of log-probabilities too, which are equal up to round-off.
            if name == "filter":
                record.pop("input"), other.pop("input")
            assert record == other
    counts = [json.loads((tmp_path / n / "counts.json").read_text()) for n in "12"]
    assert counts[0]["endpoint"] == counts[1]["endpoint"] and counts[0]["endpoint"]["prompt_tokens"]
