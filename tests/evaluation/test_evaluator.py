"""The evaluator on rendered videos with an untrained micro model: what counts, what cannot."""

import dataclasses
import json
import os
import signal
from typing import ClassVar

import jax
import micro_model
import numpy as np
import pytest

from experiments.task_preference.ceilings import words_at_best
from tpo_jax import evaluate
from tpo_jax.data import evaluation_rows, sampling
from tpo_jax.data.pipeline import row_builder
from tpo_jax.data.records import Example, PreparedDataset, Turn
from tpo_jax.data.rows import BranchPlan, RowPlan
from tpo_jax.data.task_text import with_text
from tpo_jax.data.text import TextCodec, add_task_tokens, train_tokenizer
from tpo_jax.evaluation import benchmarks, results
from tpo_jax.evaluation.all_frames import Watched
from tpo_jax.evaluation.asked import frames_asked
from tpo_jax.evaluation.evaluator import Evaluator, Settings
from tpo_jax.generation.routing import Event, RoutedAnswer
from tpo_jax.generation.sampler import Sampler
from tpo_jax.interop.folder import save_model
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.training.step import make_score_step

HEADS = ("region", "temporal", "mask")
TASKS = ("temporal", "region", "mask", "tracking")


@dataclasses.dataclass(frozen=True)
class SomeVideos:
    """Some videos of a split; `pairs` replaces their examples, and noise their frames: all, or
    all but the middle one."""

    dataset: PreparedDataset
    videos: list[str]
    noise: bool = False
    noise_outside_middle: bool = False
    pairs: tuple[Example, ...] = ()

    @property
    def path(self):
        return self.dataset.path

    def video_info(self, video_id):
        return self.dataset.video_info(video_id)

    def examples(self, video_id):
        if self.pairs:
            return [pair for pair in self.pairs if pair.video_id == video_id]
        return self.dataset.examples(video_id)

    def frames(self, video_id, indices):
        frames = self.dataset.frames(video_id, indices)
        noise = np.random.default_rng(0).integers(0, 256, frames.shape, np.uint8)
        if self.noise_outside_middle:
            (middle,) = sampling.uniform(self.dataset.video_info(video_id).timestamps, 1)
            return np.where((indices == middle)[:, None, None, None], frames, noise)
        return noise if self.noise else frames


@pytest.fixture(scope="module")
def dataset(prepared):
    split = PreparedDataset(prepared / "test")
    videos = [video for video in split.videos if split.video_info(video).media == "video"]
    return SomeVideos(split, videos[:2])


@pytest.fixture(scope="module")
def model(dataset):
    """(config, params, codec) with random weights."""
    examples = [e for video in dataset.videos for e in dataset.examples(video)]
    texts = [t for e in examples for x in e.turns for t in (x.question, x.answer, *x.options)]
    tokenizer = train_tokenizer(texts, 400)
    add_task_tokens(tokenizer, HEADS)
    codec = TextCodec(tokenizer)
    config = preset("micro", HEADS, codec.task_tokens)
    language = dataclasses.replace(config.language, num_tokens=codec.vocab_size)
    config = dataclasses.replace(config, language=language)
    return config, jax.jit(FunctionalModel(config).init)(jax.random.key(0)), codec


def evaluator(model, **settings):
    return Evaluator(*model, Settings(batch_size=2, progress=False, **settings))


def option_logps(model, dataset, **settings):
    scorer = evaluator(model, **settings)
    scorer.questions(dataset)
    return {s["item"]: s["option_logps"] for s in scorer.results.samples}


def test_options_are_scored_as_training_scores_them(model, dataset):
    config, params, codec = model
    scores = option_logps(model, dataset)
    asked = [(e, i) for v in dataset.videos for e in dataset.examples(v)
             for i, turn in enumerate(e.turns) if turn.options]  # fmt: skip
    assert set(scores) == {f"{e.example_id}/{i}" for e, i in asked}
    builder = row_builder(codec, config, evaluator(model)._bucket(
        dataset, "video", [codec.build_branch("x" * 60, "y" * 12)], branches=8,
        frames=config.vision.max_frames,
    ))  # fmt: skip
    rows = evaluation_rows.build_option_rows(dataset, builder)[:2]
    batch, _ = next(evaluation_rows.batches(builder, [row.plan for row in rows]))
    expected = jax.jit(make_score_step(FunctionalModel(config)))(params, batch)
    expected = np.asarray(expected * batch["answer_weights"]).sum(-1)
    for row, sums in zip(rows, expected, strict=True):
        for option, value in zip(row.branches, sums, strict=False):
            got = scores[f"{option.example_id}/{option.turn}"][option.option]
            assert got == pytest.approx(value, abs=1e-3)


def test_a_blind_model_cannot_see_and_a_full_one_does(model, dataset):
    noisy = dataclasses.replace(dataset, noise=True)
    assert option_logps(model, dataset, evidence="blind") == option_logps(
        model, noisy, evidence="blind"
    )
    assert option_logps(model, dataset) != option_logps(model, noisy)


def test_a_hidden_video_is_one_frame_whatever_is_asked_for(model, dataset):
    whole = option_logps(model, dataset, evidence="blind")
    assert option_logps(model, dataset, evidence="blind", frames=2) == whole
    assert option_logps(model, dataset, frames=2) != option_logps(model, dataset)


def test_a_middle_frame_model_sees_that_frame_and_no_other(model, dataset):
    scores = option_logps(model, dataset, evidence="middle_frame")
    assert scores != option_logps(model, dataset, evidence="blind")
    others = dataclasses.replace(dataset, noise_outside_middle=True)
    assert scores == option_logps(model, others, evidence="middle_frame")
    assert option_logps(model, dataset) != option_logps(model, others)


@pytest.fixture(scope="module")
def asked_heads(model, dataset):
    """Results of all heads when every answer begins with the temporal routing token."""
    codec, free = model[2], Sampler.generate

    def generate(self, params, context, batch, keys, first=None):
        forced = np.full(batch["branch_tokens"].shape[:2], codec.special_ids["<time_begin>"])
        return free(self, params, context, batch, keys, forced.astype(np.int32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "generate", generate)
        scorer = evaluator(model)
        scorer.heads(dataset, TASKS)
    return scorer.results


def test_only_the_head_that_was_called_scores(asked_heads):
    routing = benchmarks.routing_counts(asked_heads.pairs)
    assert routing["temporal"]["correct"] > 0
    assert routing["temporal"]["missing"] == routing["temporal"]["wrong"] == 0
    for task in ("region", "mask", "tracking"):
        assert routing[task]["wrong"] > 0
        assert routing[task]["correct"] == routing[task]["missing"] == 0
    scores = asked_heads.table.item_scores()
    for metric in ("region/acc@0.5", "region/miou", "mask/j", "mask/f", "tracking/auc"):
        assert scores[metric].mean() == 0
    assert scores["temporal/miou"].mean() > 0  # untrained, but long windows overlap


def test_forced_routing_scores_the_same_items_apart(asked_heads):
    scores = asked_heads.table.item_scores()
    free = {metric for metric in scores if not metric.startswith("forced/")}
    assert {f"forced/{metric}" for metric in free} == set(scores) - free
    for metric in free:
        assert set(scores[metric].items) == set(scores[f"forced/{metric}"].items)
    assert scores["forced/region/miou"].mean() > 0


def test_an_answer_may_call_as_often_as_the_labelled_one():
    """A model that calls the region head until it may not any more."""
    codec = micro_model.make_codec()
    made = micro_model.make_model(codec)
    begin, slot = codec.special_ids["<box_begin>"], codec.special_ids["<boxes>"]
    params = micro_model.that_says(micro_model.make_params(made), codec, begin, slot, begin)
    turn = Turn("Where is the red circle?", "<region> <region> <region>", (), "region")
    targets = {"boxes": [[0, 0, 1, 1]] * 3, "times": [1.0, 2.0, 3.0]}
    example = Example("e", "video0", "video", "region", "t", 0.0, 12.0, (turn,), targets)
    scorer = Evaluator(made.config, params, codec, Settings(batch_size=1, progress=False))
    scorer.heads(micro_model.MemoryDataset(1, {"video0": [example]}), ["region"])
    ((calls, events),) = scorer.results.pairs
    assert [task for task, _ in events] == ["region"] * len(calls) == ["region"] * 3


@pytest.mark.parametrize("as_labelled", [True, False])
def test_an_answer_as_labelled_is_not_forced_again(model, dataset, as_labelled):
    video = dataset.videos[0]
    example = next(e for e in dataset.examples(video) if e.task == "region")
    answer, box = example.turns[0].answer, example.targets["boxes"][0]
    plan = RowPlan(dataset, video, 0.0, 16.0, (BranchPlan(example, 0, "", answer),))
    said = answer if as_labelled else f"{answer} indeed"
    events = (Event("region", 0, {"box": box}),)
    scorer, watched = evaluator(model), Watched(np.zeros(1))
    same = scorer._score_answer(plan, example, 0, RoutedAnswer("", said, True, events), watched)
    assert len(same) == as_labelled
    if as_labelled:  # no prediction is there to be read
        scorer._score_forced(plan, 0, None, watched, None, same)
        scores = scorer.results.table.item_scores()
        assert scores["region/miou"].mean() == scores["forced/region/miou"].mean() > 0.99


def test_answers_in_words_are_read_and_scored(model, dataset, monkeypatch):
    """Each answer is the label in words, but every third is nothing of the kind."""
    given = iter(range(10**6))

    def answer(self, sampler, context, batch, clips):
        rows = []
        for ids in batch["branch_tokens"][: len(clips)]:
            asked = [self.codec.decode(branch).strip() for branch in ids]
            rows.append([RoutedAnswer(said(text), "", True, ()) if text else None
                         for text in asked])  # fmt: skip
        return rows

    def said(question):
        return answers[question] if next(given) % 3 else "I do not know."

    examples = [e for v in dataset.videos for e in dataset.examples(v) if e.task == "region"]
    answers = {e.turns[0].question: with_text(e).turns[0].answer for e in examples}
    monkeypatch.setattr(Evaluator, "_answer", answer)
    scorer = evaluator(model)
    scorer.task_text(dataset, ["region"])
    right = len(examples) - -(-len(examples) // 3)
    counts = {"correct": right, "missing": len(examples) - right, "wrong": 0}
    assert benchmarks.routing_counts(scorer.results.pairs) == {"region": counts}
    scores = scorer.results.table.item_scores()
    assert scores["region/acc@0.5"].mean() == pytest.approx(right / len(examples))
    assert 0.9 * right < scores["region/miou"].mean() * len(examples) < right
    assert not any(metric.startswith("forced/") for metric in scores)
    json.dumps(scorer.results.samples)


def test_every_region_of_an_answer_names_its_frame(dataset):
    """Frames at 0, 2, 4, 6 s; the last row shows two of them and fills up."""

    def plan(*times):
        turn = Turn("Where?", "<region>" * len(times), (), "region")
        targets = {"boxes": [[0, 0, 1, 1]] * len(times), "times": list(times)}
        example = Example("e", "v", "video", "region", "t", 0.0, 8.0, (turn,), targets)
        return RowPlan(dataset, "v", 0.0, 8.0, (BranchPlan(example, 0, "Where?", None),))

    batch = {
        "frame_times": np.array([[0.0, 2, 4, 6]] * 2 + [[0.0, 2, 2, 2]]),
        "frame_valid": np.array([[True] * 4] * 2 + [[True, True, False, False]]),
        "branch_tokens": np.zeros((3, 2, 5), np.int32),
    }
    asked = frames_asked([plan(6.0, 0.4, 3.9), plan(1.8), plan(6.0)], batch)
    assert asked.tolist() == [[[3, 0, 2], [0, 0, 0]], [[1, 1, 1], [0, 0, 0]], [[1, 1, 1], [0] * 3]]


def test_what_the_words_can_say_at_best(prepared):
    """The format's own limits: hundredths, three boxes a track, filled boxes for masks."""
    splits = [words_at_best(PreparedDataset(prepared / split), 16) for split in ("train", "test")]
    found = {metric: [v for split in splits for v in split[metric]] for metric in splits[0]}
    best = {name: np.mean(values) for name, values in found.items()}
    assert best["temporal/miou"] > 0.99 and best["highlight/hit@1"] > 0.6
    assert len(found["tracking/auc"]) == 5  # a track more or less is of some weight
    assert best["tracking/auc"] > 0.6 and best["mask/j"] > 0.4


def test_samples_can_be_written_and_drawn(asked_heads):
    samples = [json.loads(json.dumps(sample)) for sample in asked_heads.samples]
    assert {sample["task"] for sample in samples} == set(TASKS)
    result = next(s for s in samples if s["task"] == "temporal")["answer"]["events"][0]["result"]
    assert len(result["times"]) == len(result["saliency"]) == 8


def test_pairs_are_scored_with_and_without_the_video(model, dataset):
    def pair(number, chosen, rejected):
        targets = {"chosen": chosen, "rejected": rejected, "frame_indices": [0, 4, 8]}
        turn = Turn("What happens?", chosen, (), "caption")
        return Example(f"pair{number}", dataset.videos[number % 2], "video", "preference", "test",
                       0.0, 16.0, (turn,), targets)  # fmt: skip

    pairs = (pair(0, "the red circle grows", "the blue bar turns"), pair(1, "same", ["same"] * 2))
    found = []
    for noise in (False, True):
        scorer = evaluator(model)
        scorer.preferences(dataclasses.replace(dataset, pairs=pairs, noise=noise))
        found.append(scorer.results.table.item_scores())
    for scores in found:
        assert scores["preference/accuracy"].items == ("pair0", "pair1")
        assert scores["preference/accuracy"].values[1] == 0.5
    assert found[0]["preference/accuracy_blind"] == found[1]["preference/accuracy_blind"]


def test_the_command_writes_metrics_and_samples(model, dataset, prepared, tmp_path, capsys):
    config, params, codec = model
    save_model(tmp_path / "model", config, params, codec)
    other = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    save_model(tmp_path / "other", config, other, codec)
    out, beside = tmp_path / "eval" / "base.json", tmp_path / "eval" / "other.json"
    arguments = [f"--model={tmp_path / 'model'}", f"--data={prepared / 'test'}", f"--out={out}"]
    arguments += [f"--model={tmp_path / 'other'}", f"--out={beside}"]
    assert evaluate.main([*arguments, "--tasks=qa", "--limit=1", "--batch_size=2"]) == 0
    record, second = results.read_json(out), results.read_json(beside)
    assert [r["model"] for r in (record, second)] == [str(tmp_path / m) for m in ("model", "other")]
    one, two = ([s["option_logps"] for s in results.read_samples(f)] for f in (out, beside))
    assert len(one) == len(two) and one != two
    assert record["metrics"]["qa/accuracy"] == pytest.approx(
        np.mean(record["items"]["qa/accuracy"]["values"]), abs=1e-5
    )
    low, high = record["intervals"]["qa/accuracy"]
    assert 0 <= low <= record["metrics"]["qa/accuracy"] <= high <= 1
    assert record["counts"]["qa/accuracy"]["videos"] == 1
    # The first of the split is an image.
    assert "qa/accuracy_videos" not in record["items"]
    assert len(results.read_samples(out)) == record["counts"]["qa/accuracy"]["items"]
    assert "qa/accuracy" in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] and not list(out.parent.glob("*.tmp"))


def test_sigterm_stops_the_command_before_the_next_batch(model, prepared, tmp_path, monkeypatch):
    config, params, codec = model
    save_model(tmp_path / "model", config, params, codec)
    scored = []

    def option_logps(self, batch, *rows):
        scored.append(batch)
        os.kill(os.getpid(), signal.SIGTERM)
        return np.zeros(batch["branch_tokens"].shape[:2])

    monkeypatch.setattr(Evaluator, "_option_logps", option_logps)
    arguments = [f"--model={tmp_path / 'model'}", f"--data={prepared / 'test'}", "--tasks=qa"]
    out = tmp_path / "out.json"
    assert evaluate.main([*arguments, f"--out={out}", "--batch_size=1"]) == 75
    assert len(scored) == 1 and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_part_of_a_split_draws_questions_whatever_their_order():
    def example(number, task):
        turn = Turn("Where?", "It is at <region>.", (), "")
        return Example(f"{task}{number}", "v", "video", task, "test", 0.0, 1.0, (turn,), {})

    class Split:
        videos: ClassVar = ["v", "w", "x"]

        def __init__(self, order):
            self.order = order

        def examples(self, video_id):
            asked = [example(i, "region") for i in self.order]
            return [*asked, example(0, "mask"), *(example(i, "conversation") for i in range(4))]

    def kept(order):
        part = evaluate.Part(Split(order), count=2, calls=60)
        assert part.videos == ["v", "w"]
        return [e.example_id for e in part.examples("v")]

    names = kept(range(300))
    regions = [name for name in names if name.startswith("region")]
    assert len(regions) == 60 and set(regions) == set(kept(range(299, -1, -1))[:60])
    # Three questions a frame: none of them is favoured.
    places = [int(name.removeprefix("region")) % 3 for name in regions]
    assert min(places.count(place) for place in range(3)) >= 10
    assert names[60:] == ["mask0", *(f"conversation{i}" for i in range(4))]
    assert len(evaluate.Part(Split(range(5)), count=0, calls=0).examples("v")) == 10


@pytest.mark.parametrize("option", ["--limit", "--calls_per_video"])
def test_a_negative_count_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["--model=m", "--data=d", "--out=o", f"{option}=-1"])
    assert f"{option}: -1: expected 0 (all) or more" in capsys.readouterr().err
