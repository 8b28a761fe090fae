"""Targets written into answers: examples made by hand, and a pipeline that trains on them."""

import dataclasses
import pickle

import numpy as np
import pytest
import tiny_run
from pycocotools import mask as coco_mask

from tpo_jax.data.pipeline import Pipeline
from tpo_jax.data.records import Example, PreparedDataset, Turn
from tpo_jax.data.task_text import TextDataset, with_text
from tpo_jax.data.text import TextCodec
from tpo_jax.models.presets import preset
from tpo_jax.training.config import bucket_config, source_config


def example(task, answer, targets, question="Where?", start=0.0, end=10.0):
    turns = (Turn(question, answer),)
    return Example("e", "v", "video", task, "test", start, end, turns, targets)


def rle(rows, columns, size=20):
    mask = np.zeros((size, size), np.uint8)
    mask[slice(*rows), slice(*columns)] = 1
    return coco_mask.encode(np.asfortranarray(mask))


def answer_of(*arguments, **more):
    return with_text(example(*arguments, **more)).turns[0].answer


def test_each_marker_becomes_its_own_target():
    targets = {"boxes": [[0.1, 0.2, 0.3, 1.0], [0.004, 0.0, 0.5, 0.996]], "times": [0.0, 1.0]}
    answer = answer_of("region", "Here <region> and <region>.", targets)
    assert answer == "Here [10,20,30,100] and [0,0,50,100]."
    box = with_text(example("tracking", "no", {"input_box": [0, 0.5, 0.25, 0.75]}, "At <box>?"))
    assert box.turns[0].question == "At [0,50,25,75]?"


def test_windows_are_cut_to_the_clip_and_in_order():
    windows = {"windows": [[7.25, 14.0], [-1, 2.5], [20, 30]]}
    assert (
        answer_of("temporal", "At <temporal>.", windows) == "At 0.0 s to 2.5 s and 7.2 s to 10.0 s."
    )


def test_a_mask_is_its_first_middle_and_last_box():
    boxes = [rle((2, 6), (4, 8)), None, rle((0, 20), (10, 20)), rle((0, 1), (0, 1))]
    targets = {"times": [0.0, 4.0, 6.0, 12.0], "rles": boxes}  # the last is beyond the clip
    said = "0.0 s [20,10,40,30], 4.0 s absent, 6.0 s [50,0,100,100]"
    assert answer_of("mask", "<mask>", targets) == said
    longer = targets | {"times": [0.0, 1.0, 2.0, 3.0, 4.0], "rles": [boxes[0], *boxes]}
    said = "0.0 s [20,10,40,30], 2.0 s absent, 4.0 s [0,0,5,5]"
    assert answer_of("mask", "<mask>", longer) == said
    empty = {"times": [0.0], "rles": [rle((0, 0), (0, 0))]}
    assert answer_of("mask", "<mask>", empty) == "0.0 s absent"
    track = {"times": [0.0, 1.0], "boxes": [[0, 0, 0.5, 0.5], None]}
    assert answer_of("tracking", "<mask>", track) == "0.0 s [0,0,50,50], 1.0 s absent"


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match=r"'e'.*<region>.*lacks.*'boxes'"):
        answer_of("region", "<region>", {"times": [0.0]})
    with pytest.raises(ValueError, match=r"no target of <temporal> lies in the clip"):
        answer_of("temporal", "<temporal>", {"windows": [[11, 12]]})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_data(tmp_path_factory.mktemp("text"))


def test_a_text_dataset_is_the_same_folder_without_markers(data):
    plain = PreparedDataset(data / "train")
    text = pickle.loads(pickle.dumps(TextDataset(plain)))
    assert text.videos == plain.videos and text.path == plain.path
    for video in plain.videos:
        answers = {e.task: e.turns[0].answer for e in text.examples(video)}
        (box,) = (e.targets["boxes"][0] for e in plain.examples(video) if e.task == "region")
        assert answers["region"] == "It is [" + ",".join(f"{100 * v:.0f}" for v in box) + "]."
        assert answers["temporal"] == "It is 0.0 s to 2.0 s."
        assert answers["conversation"].startswith("It is ")


def test_a_model_without_heads_trains_on_them(data):
    codec = TextCodec.load(data)
    config = preset("micro")
    language = dataclasses.replace(config.language, num_tokens=codec.vocab_size)
    config = dataclasses.replace(config, language=language)
    sources = [source_config(str(data / "train"), tasks={"region": 1.0, "temporal": 1.0})]
    shape = {"media": "video", "batch_size": 2, "frames": 4, "branches": 2, "answers": 40}
    buckets = {"video": bucket_config(branch_tokens=72, **shape)}
    pipeline = Pipeline(sources, codec, config, (), buckets, seed=0, task_text=True)
    _, batch = pipeline.batch(0)
    assert batch["slots"] == {}
    said = {codec.decode(ids).strip() for ids in batch["answer_tokens"].reshape(-1, 40)}
    written = {
        e.turns[0].answer
        for video in pipeline.mixtures["video"].entries[0]
        for e in TextDataset(PreparedDataset(data / "train")).examples(video[0])
    }
    assert len(said) > 1 and said <= written
