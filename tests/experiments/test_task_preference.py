"""Studies of Task Preference Optimization: verdicts and page by hand, configs, and `--tiny`."""

import dataclasses
import json
import pathlib
import re
import runpy

import jax
import numpy as np
import pytest
from processes import QUICK, finish, start
from pycocotools import mask as coco_mask

from experiments.steps import Steps
from experiments.task_preference import page
from experiments.task_preference.arms import Options, Study
from experiments.task_preference.claims import CLAIMS, Claim, Estimate, difference, verdict
from experiments.task_preference.relabelled import PIECE, drawn_boxes, first_frame
from experiments.task_preference.trained import trained
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.pipeline import read_buckets
from tpo_jax.data.records import Example, Turn
from tpo_jax.evaluation import results
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.config import to_dict, validate
from tpo_jax.training.program import make_program
from tpo_jax.training.start import make_model_config

CONFIG = runpy.run_path("configs/task_preference.py")
STUDIES = ("central", "temporal_head", "mask_loss")


def test_differences_are_paired_by_seed():
    arms = {"a": {"m": [0.1, 0.5, 0.9]}, "b": {"m": [0.2, 0.6, 1.0]}, "c": {"m": [0.3, 0.4, 0.9]}}
    found = difference(Claim("m", "a", "b"), arms)
    assert found.mean == pytest.approx(0.1) and found.error == pytest.approx(0, abs=1e-9)
    assert verdict(found) == "agrees"
    assert verdict(difference(Claim("m", "b", "a"), arms)) == "does not agree"
    # Differences 0.2, -0.1, 0: mean 1/30, deviation 0.1528, over the root of three 0.0882.
    found = difference(Claim("m", "a", "c"), arms)
    assert found.mean == pytest.approx(1 / 30) and found.error == pytest.approx(0.08819, abs=1e-5)
    assert verdict(found) == "undecided"
    assert found.percent(sign=True) == "+3.3 ± 8.8"
    assert verdict(Estimate.of([0.4])) == "one seed"


def test_runs_of_other_options_are_refused(tmp_path):
    options = Options(tmp_path / "runs", tmp_path, tmp_path / "base", 3, 100, 0.5, False)
    options.check()
    dataclasses.replace(options, seeds=5).check()
    with pytest.raises(ValueError, match="has runs of .*0.5.*expected .*1.0.*use another"):
        dataclasses.replace(options, steps=1.0).check()


def record(name):
    arms = {arm for claim in CLAIMS[name] for arm in (claim.worse, claim.better)}
    score = {arm: [0.1 * place, 0.1 * place + 0.02] for place, arm in enumerate(sorted(arms))}
    metrics = {claim.metric for claim in CLAIMS[name]}
    return {
        "command": f"python -m {name}", "seeds": [0, 1], "tiny": False,
        "arms": {arm: dict.fromkeys(metrics, score[arm]) for arm in arms},
        "floors": dict.fromkeys(metrics, [0.05, 0.07]), "cpu_seconds": 600.0,
        "training_cpu_seconds": {arm: [60.0, 120.0] for arm in arms},
        "trained": {arm: [trained_on(1.0), trained_on(3.0)] for arm in arms},
    } | SEARCHED.get(name, {})  # fmt: skip


# Both ways that a search can end.
HIGHEST, BETWEEN = {"0.5": 0.1, "1": 0.2, "2": 0.4}, {"0.5": 0.3, "1": 0.5, "2": 0.2}
SEARCHED = {
    "central": {
        "rates": {"text": 2.0, "heads": 1.0},
        "search": {"text": HIGHEST, "heads": BETWEEN},
        "words_at_best": {"temporal/r1@0.5": [1.0, 1.0], "mask/j&f": [0.66, 0.68]},
    },
    "temporal_head": {
        "rates": {"temporal_mlp": 2.0, "cg_detr": 1.0, "temporal": 1.0},
        "search": {"temporal_mlp": HIGHEST, "cg_detr": BETWEEN, "temporal": BETWEEN},
    },
}


def trained_on(share):
    """Of one seed, as `trained` gives it."""
    examples = {"conversation": round(share * 100), "mask": round(share * 10)}
    return {"steps": 120, "positions": round(share * 1e4), "examples": examples}


def test_the_page_is_made_of_what_is_there(tmp_path):
    page.write(tmp_path, "temporal_head", record("temporal_head"))
    text = (tmp_path / "README.md").read_text()
    row = next(line for line in text.splitlines() if "Charades-STA mIoU" in line)
    # Sorted: cg_detr 0 and 2 %, temporal 10 and 12 %, temporal_mlp 20 and 22 %.
    assert "temporal_mlp 21.0 ± 1.0 | cg_detr 1.0 ± 1.0 | -20.0 ± 0.0 | 6.0 ± 1.0" in row
    assert row.endswith("| does not agree |") and "15.4 -> 38.1" in row
    assert "Not run: `python -m experiments.task_preference.central`" in text
    assert (tmp_path / "temporal_head.png").stat().st_size > 1000
    page.write(tmp_path, "mask_loss", record("mask_loss"))
    assert "no published direction" in (tmp_path / "README.md").read_text()


def test_the_page_says_what_each_arm_was_trained_on():
    found = record("central")
    # Twice the positions of heads, 1.5 times the conversation and 0.8 of the masks.
    found["trained"]["text"] = [
        {"steps": 120, "positions": 40000, "examples": {"conversation": 300, "mask": 16}}
    ] * 2
    text = page.section("central", "Central", found)
    assert (
        "`text` 1.00 of the steps, 2.00 of the positions, 1.50 of the conversation questions, "
        "0.80 of the mask questions; `text_half` 1.00 of the steps" in text
    )
    head = "| trained on | conversation questions | mask questions | positions | steps |"
    assert f"{head} CPU seconds |" in text
    assert "| text | 300 | 16 | 40000 | 120 | 90 |" in text
    assert "| heads | 200 | 20 | 20000 | 120 | 90 |" in text


def test_the_page_says_how_rates_floors_and_words_are_meant():
    text = page.section("central", "Central", record("central"))
    assert (
        "`text` 2, the highest that was tried: a better one may lie beyond (0.5: 10.0, 1: 20.0, 2: "
        "40.0); `heads` 1, between others that were tried (0.5: 30.0, 1: 50.0, 2: 20.0). No others "
        "were searched: all other arms, `conversation` among them" in text
    )
    assert "| words at best |  | 100.0 ± 0.0 |  | 67.0 ± 1.0 |  |" in text
    assert "its highlight metrics come from the reader" in text
    assert "a model that was trained on conversation about the middle frame alone" in text
    assert ": 10. All studies together should take about 90 minutes on 2 cores, which is" in text
    text = page.section("mask_loss", "Masks", record("mask_loss"))
    assert "middle frame" not in text  # nothing is asked but masks: its floors know no such model
    assert "no conversation beside them" in text and "No rate was searched" in text
    text = page.section("temporal_head", "Heads", record("temporal_head"))
    assert "`temporal_mlp` 2, the highest that was tried" in text
    assert "No others were searched" not in text and "tuned for the light head" in text


def test_the_page_says_that_rates_were_searched_apart():
    """Where they were: not in the minutes, nor before the arms, as the command does it."""
    found = record("temporal_head")
    text = page.section("temporal_head", "Heads", found)
    assert "afterwards" not in text and "not kept" not in text
    text = page.section("temporal_head", "Heads", found | {"search_apart": {"commit": "abc1234"}})
    assert "done afterwards, at commit abc1234, by the same command in a folder of its own" in text
    assert ": 10. The search for rates is not among it: it was run later" in text
    assert "its processor time was not kept. All studies together should take about" in text


def test_what_a_run_was_trained_on_is_read_from_its_log(tmp_path):
    """Rates are those of the steps since the last line: 10 of 40 positions, 10 of 60, 3 of 40."""
    lines = [
        {"step": 10, "train/loss": 3.0, "time/tokens_per_second": 80.0, "time/steps_per_second": 2,
         "train/examples/mask": 4},
        {"step": 20, "train/loss": 2.0, "time/tokens_per_second": 30.0,
         "time/steps_per_second": 0.5, "train/examples/mask": 9, "train/examples/region": 1},
        {"step": 23, "train/loss": 2.0, "time/tokens_per_second": 40.0, "time/steps_per_second": 1,
         "train/examples/mask": 11, "train/examples/region": 3},
        {"step": 23, "validation/loss": 2.0},
    ]  # fmt: skip
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert trained(tmp_path) == {
        "steps": 23, "positions": 1120, "examples": {"mask": 11, "region": 3}
    }  # fmt: skip
    file.write_text(json.dumps(lines[-1]) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl: no record of a training step"):
        trained(tmp_path)


def test_the_record_has_what_the_chosen_run_was_trained_on(tmp_path):
    """Of the folder of its rate, by the name of its evaluation."""
    study = Study(Options(tmp_path, tmp_path, tmp_path / "base", 1, 100, 1.0, True))
    seed, version = tmp_path / "seed0", {"format_version": results.FORMAT_VERSION}
    files = {
        "text_rate2/metrics.jsonl": {
            "step": 4, "train/loss": 1.0, "time/tokens_per_second": 60.0,
            "time/steps_per_second": 2.0, "train/examples/mask": 7,
        },
        "steps.jsonl": {"step": "train text_rate2", "cpu_seconds": 5.0},
        "eval/text_rate2_test.json": {"metrics": {"mask/j": 0.5}} | version,
        "eval/floors.json": {"floors": {"mask/j": 0.25}} | version,
    }  # fmt: skip
    for name, content in files.items():
        (seed / name).parent.mkdir(parents=True, exist_ok=True)
        (seed / name).write_text(json.dumps(content) + "\n")
    study._steps[0] = Steps(seed)
    found = study.record(
        {"text": {0: seed / "eval/text_rate2_test.json"}}, {0: seed / "eval/floors.json"}
    )
    assert found["arms"] == {"text": {"mask/j": [0.5]}} and found["floors"] == {"mask/j": [0.25]}
    assert found["training_cpu_seconds"] == {"text": [5.0]} and found["cpu_seconds"] == 5.0
    assert found["trained"] == {"text": [{"steps": 4, "positions": 120, "examples": {"mask": 7}}]}


def test_the_committed_page_is_made_of_the_committed_records():
    folder = pathlib.Path("experiments/results/task_preference")
    apart = {name for name in STUDIES
             if "search_apart" in json.loads((folder / f"{name}.json").read_text())}
    assert apart == {"temporal_head"}
    assert page.page(folder) == (folder / "README.md").read_text()


@pytest.mark.parametrize("arm", list(CONFIG["ARMS"]))
def test_every_arm_is_a_valid_config(arm):
    config = CONFIG["get_config"](f"arm={arm},data=d,rate=0.5,steps=0.5")
    validate(config)
    assert [s["path"] for s in config.data.train] == ["d/train"]
    whole = CONFIG["get_config"](f"arm={arm},data=d")
    assert config.steps == pytest.approx(whole.steps / 2, abs=1)
    halved = [[pattern, 0.5 * rate] for pattern, rate in whole.trainable]
    assert config.trainable == halved


# One of the arms with the same head is enough, but for losses of their own.
@pytest.mark.parametrize(
    "arm", ["heads", "T", "cg_detr", "temporal_mlp", "tracker", "tracker_pairs", "first_frame_box"]
)
def test_every_term_of_an_arm_has_a_weight(arm):
    config = CONFIG["get_config"](f"arm={arm},tiny")
    model_config, codec = make_model_config(config)
    program = make_program(config, model_config, make_mesh({"data": 1}, jax.devices()[:1]))
    bucket = {b.name: b for b in read_buckets(to_dict(config)["buckets"], codec)}["video"]
    spec = batch_spec(bucket, model_config)
    sums = jax.eval_shape(program.eval_step, program.abstract_state.params, spec)
    assert set(config.losses) == set(sums) - {"token_accuracy", "answer_accuracy", "padding"}


def test_arms_ask_what_heads_asks():
    """Expected questions of a task in all rows of the bucket that most are in, if none runs out.

    `text` reads twice as much and asks more, which the page of the study says.
    """

    def asked(arm):
        config = CONFIG["get_config"](f"arm={arm}")
        tasks, video = config.data.train[0]["tasks"], config.buckets.video
        weights = {name: b.weight for name, b in config.buckets.items() if b != video.beside}
        steps = config.steps * video.weight / sum(weights.values())
        total = sum(tasks.values())
        per_task = steps * video.batch_size * video.branches / total
        return {task: per_task * weight for task, weight in tasks.items()}, config

    most, heads = asked("heads")
    times = dict.fromkeys(("temporal", "cg_detr", "temporal_mlp"), 4)
    for arm in ("TRM", "T", "R", "M", "conversation", *times):
        (rows, config), n = asked(arm), times.get(arm, 1)
        long = "conversation" in rows
        assert config.steps == n * (heads.steps if long else round(heads.steps * 6 / 7))
        assert ("video_long" in config.buckets) == long
        for task, count in rows.items():
            assert count == pytest.approx(n * most[task], rel=0.07)
    text = CONFIG["get_config"]("arm=text")
    assert text.steps == heads.steps and text.trainable == [["language/", heads.trainable[1][1]]]
    assert text.data.task_text and not text.model.heads
    short, long = text.buckets.video, text.buckets.video_long
    assert short.beside == "video_long" and long.batch_size == short.batch_size
    shown = (short, long, heads.buckets.video, heads.buckets.video_long)
    positions = [b.branches * b.branch_tokens for b in shown]
    assert positions == [760, 700, 720, 768]  # both of the first in every step, one of the others
    half, halves = CONFIG["get_config"]("arm=text_half"), text.to_dict() | {"buckets": None}
    assert half.to_dict() | {"buckets": None} == halves
    assert [b.weight for b in half.buckets.values()] == [1, 1] and not half.buckets.video.beside


def labelled(task="mask", **targets):
    return Example("e", "v", "video", task, "t", 0.0, 6.0, (Turn("Which?", "<mask>"),), targets)


def rle(pixels):
    mask = np.zeros((10, 20), np.uint8)
    mask[pixels] = 1
    return coco_mask.encode(np.asfortranarray(mask))


def test_what_the_first_frame_teaches():
    rles = [rle(np.s_[2:4, 5:10]), None]
    (found,) = first_frame(labelled(times=[0.0, 0.5], rles=rles))
    assert found.targets == {"times": [0.0], "rles": rles[:1]}
    (absent,) = first_frame(labelled(times=[0.0, 0.5], rles=rles[::-1]))
    assert absent.targets == {"times": [0.0], "rles": [None]}
    box = [0, 0, 1, 1]
    (track,) = first_frame(labelled(times=[1.0, 2.0], boxes=[box, None], input_box=box))
    assert track.targets == {"times": [1.0], "boxes": [box], "input_box": box}
    assert first_frame(labelled(times=[1.0, 2.0], boxes=[None, box], input_box=box)) == []


def test_what_a_drawn_box_follows():
    seen, empty, later = rle(np.s_[2:4, 5:10]), rle(np.s_[:0, :0]), rle(np.s_[0:10, 0:2])
    times = [0.0, 1.0, 3.0, 4.0, 5.0]
    first, second = drawn_boxes(labelled(times=times, rles=[None, seen, empty, later, None]))
    box = [0.25, 0.2, 0.5, 0.4]
    assert (first.task, first.start, first.end) == ("tracking", 0.0, PIECE)
    assert first.targets == {
        "times": times[:3], "rles": [None, seen, empty], "boxes": [None, box, None],
        "input_box": box, "input_time": 1.0,
    }  # fmt: skip
    assert "<box>" in first.turns[0].question and "<mask>" in first.turns[0].answer
    assert (second.start, second.end, second.targets["input_time"]) == (4.0, 6.0, 4.0)
    assert second.targets["input_box"] == [0.0, 0.0, 0.1, 1.0]
    assert len({first.example_id, second.example_id}) == 2
    (only,) = drawn_boxes(labelled(times=times, rles=[None, empty, None, later, None]))
    assert only.start == 4.0
    assert drawn_boxes(labelled("tracking", times=times, boxes=[box] * 5, input_box=box)) == []


def test_an_arm_of_masks_learns_from_the_masks_or_from_the_first_box():
    def taught(arm):
        config = CONFIG["get_config"](f"arm={arm}")
        return {t for t, w in config.losses.items() if w and t != "language"}, config.trainable

    masks = {f"sam2/{kind}{term}" for kind in ("", "still_")
             for term in ("focal", "dice", "iou", "presence")}  # fmt: skip
    paths = [f"heads/sam2/{part}/fc1/kernel" for part in ("adapter", "box_readout", "network")]
    tracks = {term for term in masks if "/still_" not in term}
    for arm, terms, learns in (
        ("tracker_stills", tracks, [False, False, True]),
        ("tracker", tracks, [False, False, True]), ("sam2", masks, [True, True, False]),
        ("first_frame_box", {"sam2/prompt", "sam2/box"}, [True, True, False]),
        ("sam2_all", masks | {"sam2/prompt", "sam2/box"}, [True, True, False]),
    ):  # fmt: skip
        found, groups = taught(arm)
        assert found == terms
        assert [any(re.match(group, path) for group, _ in groups) for path in paths] == learns


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A micro model that has seen the words, if little more."""
    out = tmp_path_factory.mktemp("base")
    commands = [
        ("tpo_jax.data.moving_shapes", "--out", out / "world", "--videos", 12, "--seed", 1000,
         "--images", 4, "--splits", "train:8,validation:4"),
        *(("tpo_jax.prepare", "run", "--data", out / "world" / split, "--out", out / "data" / split)
          for split in ("train", "validation")),
        ("tpo_jax.prepare", "tokenizer", "--data", out / "data" / "train",
         "--out", out / "data" / "tokenizer.json"),
        ("tpo_jax.train", f"--config=configs/tiny_base.py:runs={out},tiny", "--config.steps=4",
         "--config.eval_every=0", f"--workdir={out}/run"),
    ]  # fmt: skip
    for command in commands:
        run(*command)
    return out / "run" / "model"


def run(module, *arguments):
    (ended,) = finish([start("-m", module, *arguments, flags=QUICK)], timeout=1800)
    assert ended.status == 0, ended.out
    return ended.out


@pytest.mark.long
@pytest.mark.parametrize("study", STUDIES)
def test_a_study_runs_and_goes_on_where_it_stopped(base, study, tmp_path):
    options = ("--tiny", "--seeds", 1, "--base", base, "--out", tmp_path / "runs",
               "--results", tmp_path / "results")  # fmt: skip
    module = f"experiments.task_preference.{study}"
    run(module, *options)
    found = json.loads((tmp_path / "results" / f"{study}.json").read_text())
    for claim in CLAIMS[study]:
        for arm in (claim.worse, claim.better):
            (value,) = found["arms"][arm][claim.metric]
            assert 0 <= value <= 1
    assert found["tiny"] and found["floors"]
    for arm, (seen,) in found["trained"].items():
        assert seen["steps"] == CONFIG["get_config"](f"arm={arm},tiny").steps
        assert seen["positions"] > 0 and sum(seen["examples"].values()) > 0
    text = (tmp_path / "results" / "README.md").read_text()
    assert "these figures mean nothing" in text
    assert "one seed" in text or study == "mask_loss"
    again = run(module, *options)
    assert "was done in" in again and "] python -m" not in again
