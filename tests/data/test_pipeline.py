"""Batches of a pipeline on an in-memory data set, and what it refuses."""

import dataclasses

import grain
import jax
import numpy as np
import pytest
from fake_dataset import FakeDataset, example, fake_dataset, video_info
from small_pipeline import HEADS, IMAGE, PAIR, TASKS, VIDEO, make

from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.data.mixture import Source
from tpo_jax.data.pipeline import Pipeline, blank_batch, row_builder
from tpo_jax.data.records import RecordError, Turn, task_number
from tpo_jax.data.rows import RowError, row_id, stack_rows, video_number
from tpo_jax.models.presets import micro


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- random access, hosts, iterator ---


@pytest.mark.parametrize("hosts", [2, 4])
def test_global_batch_does_not_depend_on_the_number_of_hosts(codec, model, hosts):
    one = make(codec, model)
    many = [make(codec, model, process_index=i, process_count=hosts) for i in range(hosts)]
    for step in range(8):
        name, whole = one.batch(step)
        parts = [pipeline.batch(step) for pipeline in many]
        assert {part[0] for part in parts} == {name}
        assert_same(jax.tree.map(lambda *x: np.concatenate(x), *[part[1] for part in parts]), whole)


def test_a_bucket_beside_another_is_part_of_its_batch(codec, model):
    joint = dataclasses.replace(VIDEO, beside="image")
    pipeline = make(codec, model, buckets=(joint, IMAGE, PAIR))
    assert set(pipeline.builders) == {"video", "pair"}
    steps = (step for step in range(64) if pipeline.batch(step)[0] == "video")
    rows = pipeline.rows(at := next(steps))
    _, first = pipeline.batch(at)
    _, second = pipeline.batch(next(steps))
    assert first["beside"]["frames"].shape[1] == 1 and first["frames"].shape[1] == 8
    assert first["beside"]["branch_segments"].any()
    assert (first["beside"]["example_ids"] != second["beside"]["example_ids"]).all()
    shapes = jax.tree.map(np.shape, blank_batch(pipeline.builders["video"]))
    assert shapes == jax.tree.map(np.shape, first)
    alone = make(codec, model, buckets=(VIDEO, IMAGE, PAIR))
    step = next(step for step in range(64) if alone.batch(step)[0] == "image")
    assert_same(first["beside"], alone.batch(step)[1])
    # Its rows follow the others.
    assert [name for name, _, _ in rows] == ["video"] * 4 + ["image"] * 4
    for _, plan, row in rows:
        assert row["video_ids"] == video_number(plan.video_id)
    assert_same(stack_rows([row for _, _, row in rows[4:]]), first["beside"])


def test_batches_are_a_function_of_seed_and_step(codec, model):
    first, second = make(codec, model), make(codec, model)
    steps = [7, 0, 3, 7]  # any order, repeats
    for step in steps:
        assert first.batch(step)[0] == second.batch(step)[0]
        assert_same(first.batch(step)[1], second.batch(step)[1])
    other = make(codec, model, seed=1)
    assert any((other.batch(s)[1]["branch_tokens"] != first.batch(s)[1]["branch_tokens"]).any()
               for s in range(3) if other.batch(s)[0] == "video")


def test_batch_must_divide_over_hosts(codec, model):
    with pytest.raises(ValueError, match="buckets.video.batch_size: 4 rows do not divide.*3 hosts"):
        make(codec, model, process_index=0, process_count=3)


def test_iterator_equals_batches_and_restores_on_other_host_counts(codec, model):
    one = make(codec, model)
    iterator = one.iterator(2)
    assert isinstance(iterator, grain.DatasetIterator)
    for step in (2, 3):
        name, batch = next(iterator)
        assert name == one.batch(step)[0]
        assert_same(batch, one.batch(step)[1])
    state = iterator.get_state()
    assert state == {"next_index": 4}
    parts = []
    for i in range(2):
        host = make(codec, model, process_index=i, process_count=2).iterator()
        next(host)
        host.set_state(state)
        parts.append(next(host)[1])
    assert_same(jax.tree.map(lambda *x: np.concatenate(x), *parts), one.batch(4)[1])


def test_worker_processes_give_the_same_batches(codec, model):
    pipeline = make(codec, model)
    iterator = pipeline.iterator(3, workers=1)
    for step in (3, 4):
        name, batch = next(iterator)
        assert name == pipeline.batch(step)[0]
        assert_same(batch, pipeline.batch(step)[1])
    assert iterator.get_state() == {"next_index": 5}


def test_every_batch_of_a_bucket_has_the_declared_shapes(codec, model):
    pipeline = make(codec, model)
    shapes = {name: jax.tree.map(lambda x: (x.shape, x.dtype), blank_batch(builder))
              for name, builder in pipeline.builders.items()}
    for step in range(10):
        name, batch = pipeline.batch(step)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == shapes[name]
    shape, dtype = shapes["video"]["slots"]["mask"]["masks"]
    assert (shape, dtype) == ((4, 1, 8, 16, 16), np.uint8)
    assert shapes["video"]["prefix_tokens"][0] == (4, 2 + 8 + 1)
    assert shapes["pair"]["prefix_tokens"][0] == (4, 2 + 8 + 1 + 16)
    assert "reference_logps" not in shapes["pair"] and "pair_valid" in shapes["pair"]


def test_example_ids_are_stable_and_distinct(codec, model):
    pipeline = make(codec, model)
    ids = np.concatenate([pipeline.batch(s)[1]["example_ids"] for s in range(20)])
    assert ids.dtype == np.uint32 and len(set(ids)) == len(ids)
    assert row_id("video", 0) == 3838010768  # part of what a resumed run must repeat


def test_preference_data_needs_a_preference_bucket(codec, model):
    with pytest.raises(ValueError, match="'preference' has a weight, but no bucket"):
        make(codec, model, buckets=[VIDEO])
    with pytest.raises(RowError, match="bucket 'pair': no video with a preference example"):
        Pipeline([Source(fake_dataset(), 1.0, {"conversation": 1.0})], codec, model, HEADS,
                 [VIDEO, PAIR], 0)


# --- tasks: what a branch asks, what is idle, and the weights in words ---


def test_every_branch_says_which_task_it_is_of(codec, model):
    pipeline = make(codec, model)
    seen = set()
    for step in range(8):
        name, batch = pipeline.batch(step)
        _, _, plans = pipeline.plans(step)
        for row, plan in zip(batch["branch_tasks"], plans, strict=True):
            tasks = [branch.example.task for branch in plan.branches]
            if name == "pair":
                assert tasks == ["preference"] * 2
                tasks = tasks[:1]  # one pair
            assert row.tolist() == [task_number(t) for t in tasks] + [0] * (len(row) - len(tasks))
            seen.update(tasks)
    assert seen == set(TASKS)
    assert task_number("conversation") == 1
    with pytest.raises(RecordError, match="task 'depth' is unknown"):
        task_number("depth")


def test_an_idle_task_has_no_slots_and_is_not_asked(codec, model):
    idle = dataclasses.replace(VIDEO, slots={"region": 3}, idle=("mask", "temporal"))
    tasks = {"conversation": 1.0, "region": 1.0}
    pipeline = Pipeline([Source(fake_dataset(), 1.0, tasks)], codec, model, HEADS, [idle], 0)
    _, batch = pipeline.batch(0)
    assert batch["slots"]["mask"]["masks"].shape == (4, 0, 8, 16, 16)
    assert batch["slots"]["temporal"]["valid"].shape == (4, 0)
    spec = batch_spec(pipeline.builders["video"].bucket, model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), spec) == jax.tree.map(
        lambda x: (x.shape, x.dtype), batch)
    with pytest.raises(RowError, match="1 <mask> slots, but the bucket has 0. Take 'mask' out of "
                                       "buckets.video.idle"):
        Pipeline([Source(fake_dataset(), 1.0, {"mask": 1.0})], codec, model, HEADS, [idle], 0)


def test_the_mixture_in_words(codec, model):
    sources = [Source(fake_dataset(), 1.0, {"region": 1.0, "mask": 0.0}),
               Source(fake_dataset(), 3.0, {"conversation": 3.0, "temporal": 1.0})]
    buckets = [VIDEO, dataclasses.replace(IMAGE, weight=1.0)]
    pipeline = Pipeline(sources, codec, model, HEADS, buckets, 0)
    first, *text = pipeline.describe_mixture(steps=64).splitlines()
    assert first.startswith("mixture: ") and "epochs in 64 steps" in first
    path = fake_dataset().path
    assert text == [
        "  video: 75.0% of steps, 4 rows",  # 48 steps, 192 rows
        f"    25.0% {path}: 5 videos, 9.6 epochs; region 100.0%",
        f"    75.0% {path}: 5 videos, 28.8 epochs; conversation 75.0%, temporal 25.0%",
        "  image: 25.0% of steps, 4 rows",
        f"    25.0% {path}: 2 images, 8.0 epochs; region 100.0%",
        f"    75.0% {path}: 2 images, 24.0 epochs; conversation 75.0%, temporal 25.0%",
    ]


def test_pairs_that_are_shown_more_often_than_was_asked_are_named(codec, model):
    """Steps were counted for another number of pairs; what fills the last batch is not told."""
    pipeline = make(codec, model, buckets=[PAIR])
    pairs = len(pipeline.mixtures["pair"].entries[0])
    whole = -(-2 * pairs // PAIR.batch_size)
    assert whole * PAIR.batch_size > 2 * pairs > pairs > PAIR.batch_size
    assert pipeline.describe_repeats(whole, epochs=2) == ""
    assert pipeline.describe_repeats(100 * whole, epochs=0) == ""
    (said,) = pipeline.describe_repeats(whole + 1, epochs=2).splitlines()
    made = (whole + 1) * PAIR.batch_size / pairs
    assert said.startswith(f"WARNING: {whole + 1} steps make {made:.1f} epochs of the {pairs} "
                           "pairs of fake/train in bucket pair, but data.epochs=2.")
    assert f": {pairs} pairs, {made:.1f} epochs; " in pipeline.describe_mixture(whole + 1)


def test_what_no_bucket_shows_is_said_with_counts(codec, model):
    """By source, and only of what its tasks would draw."""
    tasks = {"conversation": 1.0}
    sources = [Source(fake_dataset(path="a"), 1.0, tasks),
               Source(fake_dataset(path="b", images=0), 1.0, tasks),
               Source(fake_dataset(path="c"), 1.0, {"mask": 1.0})]
    said = Pipeline(sources, codec, model, HEADS, [VIDEO], 0).describe_unseen()
    assert said == "a: no bucket shows 2 images with a conversation example, of 7 videos and images"
    assert Pipeline(sources, codec, model, HEADS, [VIDEO, IMAGE], 0).describe_unseen() == ""
    pairs = make(codec, model, fake_dataset(videos=3, images=1), [PAIR]).describe_unseen()
    assert "1 image with a conversation example, 3 videos with a conversation example" in pairs


def test_a_source_that_no_bucket_shows_is_refused(codec, model):
    tasks = {"conversation": 1.0}
    sources = [Source(fake_dataset(path="a"), 1.0, tasks),
               Source(fake_dataset(path="b", videos=0), 1.0, tasks)]
    with pytest.raises(ValueError, match="data source b: no bucket shows anything of it, which is "
                                         "2 images with a conversation example. Add a bucket"):
        Pipeline(sources, codec, model, HEADS, [VIDEO], 0)
    Pipeline(sources, codec, model, HEADS, [VIDEO, IMAGE], 0)


# --- errors name file, example, bucket and fix ---


def one_turn(question, answer, task="conversation", targets=None, options=()):
    examples = [example("good", "v", "conversation", [Turn("What happens?", "2")]),
                example("bad", "v", task, [Turn(question, answer, tuple(options))], targets)]
    return FakeDataset("data/train", {"v": examples}, {"v": video_info()})


@pytest.mark.parametrize("dataset, message", [
    (one_turn("Q?", "0123456789" * 5),
     "the answer has 51 tokens.*answers = 40.*Raise buckets.video.answers"),
    (one_turn("0123456789" * 5, "01234"),
     "question and answer has 58 tokens.*Raise buckets.video.branch_tokens"),
    (one_turn("Q?", ""), "answer: empty"),
    (one_turn("Q?", "<box>"), "marker '<box>'"),
    (one_turn("Q?", "a", options=("b", "c")), "answer 'a' is not one of the options"),
    (one_turn("Where?", "<region>" * 4, "region", {"boxes": [[0, 0, 1, 1]] * 4, "times": [0] * 4}),
     "4 <region> slots, but the bucket has 3. Raise buckets.video.slots.region"),
    (one_turn("When?", "<temporal>", "temporal", {"windows": []}), "none of .* meets the clip"),
])
def test_examples_that_do_not_fit_are_refused_by_name(codec, model, dataset, message):
    with pytest.raises(RowError, match=message) as error:
        source = Source(dataset, 1.0, {k: v for k, v in TASKS.items() if k != "preference"})
        Pipeline([source], codec, model, HEADS, [VIDEO], 0)
    assert "data/train: example 'bad', turn 0, bucket 'video'" in str(error.value)
    assert str(error.value).startswith("1 examples do not fit")


def test_all_offending_examples_are_reported_up_to_a_limit(codec, model):
    examples = [example(f"bad{i}", "v", "conversation", [Turn("Q?", " ")]) for i in range(30)]
    dataset = FakeDataset("d", {"v": examples}, {"v": video_info()})
    with pytest.raises(RowError, match="30 examples.*") as error:
        make(codec, model, dataset, [VIDEO, PAIR])
    assert str(error.value).count("answer: empty") == 20 and "10 more" in str(error.value)


def test_tasks_that_are_not_drawn_are_not_checked(codec, model):
    dataset = one_turn("When?", "<temporal>", "temporal", {"windows": []})
    Pipeline([Source(dataset, 1.0, {"conversation": 1.0})], codec, model, HEADS, [VIDEO], 0)


def test_head_that_the_model_lacks_is_named(codec):
    source = Source(fake_dataset(), 1.0, {"conversation": 1.0, "mask": 1.0})
    model = micro(("region",), {t: i for t, i in codec.task_tokens.items() if "track" not in t}
                  | {"<track_box>": codec.task_tokens["<track_box>"]})
    with pytest.raises(RowError, match="marker <mask>, but model.heads has no 'mask'"):
        Pipeline([source], codec, model, ("region",), [VIDEO], 0)


@pytest.mark.parametrize("bucket, message", [
    (dataclasses.replace(VIDEO, mask_size=8), "mask_size: 8, but the mask head answers at 16"),
    (dataclasses.replace(VIDEO, windows=0), "windows: 0, but the model has a temporal head"),
    (dataclasses.replace(VIDEO, frames=9), "frames: 9, but the model has vision.max_frames = 8"),
])
def test_buckets_must_fit_the_model(codec, model, bucket, message):
    with pytest.raises(ValueError, match=message):
        row_builder(codec, model, bucket)


def test_tokenizer_must_be_that_of_the_model(codec):
    with pytest.raises(ValueError, match="tokenizer: '<.*>' is .*, but the model has tokens"):
        row_builder(codec, micro(HEADS), VIDEO)


@pytest.mark.parametrize("entry, message", [
    ({"path": "nowhere", "weight": 1.0}, "unknown keys \\['tasks'\\]"),
    ({"path": "nowhere", "weight": 1.0, "tasks": {"conversation": 1.0}}, "nowhere"),
])
def test_wrong_sources_are_named(codec, model, entry, message):
    with pytest.raises(ValueError, match=message):
        Pipeline([entry], codec, model, HEADS, [VIDEO], 0)
