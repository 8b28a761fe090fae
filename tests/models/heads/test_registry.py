"""The head that docs/heads.md shows is registered from that page and trains."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from fake_batches import train_config
from micro_model import MemoryDataset

from tpo_jax import prepare
from tpo_jax.data.buckets import Bucket
from tpo_jax.data.example_checks import check_example
from tpo_jax.data.pipeline import Pipeline, Source
from tpo_jax.data.records import Example, Turn
from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.evaluation import benchmarks
from tpo_jax.evaluation.evaluator import evaluable_tasks
from tpo_jax.generation.routing import inline
from tpo_jax.models.heads import HEADS, Head, register
from tpo_jax.models.presets import preset
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.config import bucket_config, validate
from tpo_jax.training.program import make_program

PAGE = pathlib.Path(__file__).resolve().parents[3] / "docs" / "heads.md"
SHAPES = {
    "media": "video", "batch_size": 2, "frames": 4, "branches": 1, "branch_tokens": 48,
    "answers": 24, "slots": {"count": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def count_head(tmp_path_factory):
    """The page's code as a module; registered only as long as these tests run."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
                if "register(HEAD)" in block)  # fmt: skip
    assert len(code.splitlines()) <= 60
    file = tmp_path_factory.mktemp("heads") / "count_head.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("count_head", file)
    module = sys.modules["count_head"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del HEADS["count"], sys.modules["count_head"]


def _example(video, count):
    turn = Turn("How often does it blink?", "It blinks <count> times.", (), "count")
    return Example(f"{video}/count", video, "video", "count", "train", 0.0, 12.0, (turn,),
                   {"count": count})  # fmt: skip


@pytest.fixture(scope="module")
def codec(count_head):
    tokenizer = train_tokenizer(["How often does it blink?", "It blinks times."], 300)
    add_task_tokens(tokenizer, ("count",))
    return TextCodec(tokenizer)


def test_the_head_of_the_docs_trains(count_head, codec):
    dataset = MemoryDataset(2, {"video0": [_example("video0", 5)],
                                "video1": [_example("video1", 1)]})  # fmt: skip
    config = preset("micro", ("count",), codec.task_tokens)
    language = dataclasses.replace(config.language, num_tokens=codec.vocab_size)
    config = dataclasses.replace(config, language=language)
    pipeline = Pipeline([Source(dataset, 1.0, {"count": 1.0})], codec, config, ("count",),
                        [Bucket("video", **SHAPES)], 0)  # fmt: skip
    _, batch = pipeline.batch(0)
    assert sorted(batch["slots"]["count"]["count"][:, 0]) == [1.0, 5.0]
    mesh = make_mesh({}, jax.devices()[:1])
    program = make_program(
        train_config(("count",), losses={"language": 1.0, "count/nll": 1.0}), config, mesh
    )
    step = program.compile_train_step(batch)
    state = program.init_state(program.init_params(0))
    history = []
    for _ in range(20):
        state, metrics = step(state, batch, program.base_key(0))
        history.append(float(metrics["count/nll"].mean()))
    # With one rate for both counts, 1 and 5, it is at least 3 - 3 log 3 = -0.3.
    assert history[0] > 0 and history[-1] < -0.1


def test_every_room_knows_it(count_head, codec):
    example = check_example(_example("video0", 5), 12.0)
    branch = codec.build_branch(example.turns[0].question, example.turns[0].answer)
    assert [slot.head for slot in branch.slots] == ["count"]
    assert "It blinks <count> times." in codec.decode(branch.ids)
    (call,) = benchmarks.find_calls(example, 0)
    result = count_head.decode({"log_rate": np.log(np.array([5.2]))}, None)
    assert inline("count", result) == "5"
    assert benchmarks.score_call(call, result, ()) == {"count/accuracy": 1.0}
    assert benchmarks.score_call(call, None, ()) == {"count/accuracy": 0.0}
    assert "count" in evaluable_tasks()
    config = train_config(("count",), losses={"language": 1.0, "count/nll": 1.0})
    config.tokenizer, config.eval_every = "tokenizer.json", 0
    config.data.train = [{"path": "clips", "weight": 1.0, "tasks": {"count": 1.0}, "kinds": [],
                          "pairs": ""}]  # fmt: skip
    config.buckets = {"video": bucket_config(**SHAPES)}
    validate(config)


def test_the_environment_lists_it_for_commands_that_import_no_config(
    count_head, tmp_path, monkeypatch, capsys
):
    turn = {"question": "How often does it blink?", "answer": "It blinks <count> times."}
    lines = tmp_path / "counts.jsonl"
    lines.write_text(json.dumps(
        {"video": "a.mp4", "task": "count", "turns": [turn], "targets": {"count": 3}}))  # fmt: skip
    command = ["check", "--format=native", f"--annotations={lines}"]
    (tmp_path / "empty_module.py").write_text("")
    (tmp_path / "broken_module.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(str(pathlib.Path(count_head.__file__).parent))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(HEADS, "count")
    monkeypatch.delitem(sys.modules, "count_head")
    assert prepare.main(command) == 1
    assert "task: 'count': expected one of conversation" in capsys.readouterr().out
    monkeypatch.setenv("TPO_JAX_HEADS", " count_head, ")
    assert prepare.main(command) == 0 and prepare.main(command) == 0
    assert "1 valid examples, 0 problems" in capsys.readouterr().out
    for name, reason in (
        ("count_hed", "'count_hed': there is no such module; .*PYTHONPATH"),
        ("empty_module", "'empty_module': it registers no head; call .*register"),
        ("broken_module", "'broken_module': it imports 'no_such_package'"),
    ):
        monkeypatch.setenv("TPO_JAX_HEADS", f"count_head,{name}")
        with pytest.raises(SystemExit, match="^2$"):
            prepare.main(command)
        assert re.match(f"error: TPO_JAX_HEADS: {reason}", capsys.readouterr().err)


def test_what_is_taken_or_missing_is_refused(count_head):
    for changes, error in [
        ({}, "the name is taken"),
        ({"name": "more"}, "tokens.*belong to 'count'"),
        ({"name": "more", "task": "temporal", "marker": "<temporal>"}, "'temporal' answers"),
        ({"name": "more", "task": "more", "marker": "<more>", "target": None,
          "routing_token": "<a>", "slot_token": "<b>"}, "task 'more' is new, so it needs a target"),
    ]:  # fmt: skip
        fields = {"task": "more", "marker": "<more>"} | changes if changes else {}
        with pytest.raises(ValueError, match=error):
            register(dataclasses.replace(count_head.HEAD, **fields))
    with pytest.raises(ValueError, match="marker='<counts>': must be '<more>'"):
        dataclasses.replace(count_head.HEAD, name="more", task="more", marker="<counts>")
    assert isinstance(HEADS["count"], Head)
