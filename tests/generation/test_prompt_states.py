"""A head that reads the question sees the same of it in generation as in training."""

import dataclasses

import jax
import numpy as np
import pytest
from micro_model import MemoryDataset, make_codec, make_params, that_says

from tpo_jax.data.buckets import Bucket
from tpo_jax.data.pipeline import row_builder
from tpo_jax.data.records import Example, Turn
from tpo_jax.data.rows import BranchPlan, RowPlan, stack_rows
from tpo_jax.generation.routing import Router
from tpo_jax.generation.sampler import Sampler, Sampling, branch_keys
from tpo_jax.models.config import TextFeaturesConfig
from tpo_jax.models.heads import HEADS, ClipInfo
from tpo_jax.models.presets import preset
from tpo_jax.models.video_language import FunctionalModel

NAMES = ("region", "cg_detr", "mask")
QUESTIONS = ("What does the red circle do?", "it blinks and grows")


def _rows(builder, dataset, answer):
    rows = []
    for video in dataset.videos[:2]:
        branches = []
        for number, question in enumerate(QUESTIONS):
            turn = Turn(question, "<temporal>", (), "temporal")
            example = Example(f"{video}/{number}", video, "video", "temporal", "test", 0.0, 12.0,
                              (turn,), {"windows": [[2.0, 5.0]]})  # fmt: skip
            branches.append(BranchPlan(example, 0, question, answer))
        rows.append(builder.build(RowPlan(dataset, video, 0.0, 12.0, tuple(branches)), 0))
    return stack_rows(rows)


class Texts:
    """Text features of every question, another one of each."""

    def __init__(self, width):
        self.about = TextFeaturesConfig(width, 5, "by hand")

    def has(self, video_id, question):
        return True

    def read(self, video_id, question):
        tokens = 3 + QUESTIONS.index(question)
        rng = np.random.default_rng(tokens)
        return rng.normal(size=(tokens, self.about.width)).astype(np.float32)


@pytest.mark.long
@pytest.mark.parametrize("given", [False, True])
def test_generated_calls_equal_labelled_ones_and_losses_change_no_prediction(given):
    codec = make_codec(NAMES)
    config = preset("micro", NAMES, codec.task_tokens)
    texts = Texts(config.language.width) if given else None
    language = dataclasses.replace(config.language, num_tokens=codec.vocab_size)
    about = texts and texts.about
    model = FunctionalModel(dataclasses.replace(config, language=language, text_features=about))
    ids = codec.special_ids
    params = that_says(make_params(model), codec, ids["<time_begin>"], ids["<temp>"], codec.eos_id)
    bucket = Bucket("calls", "video", batch_size=2, frames=4, branches=2, branch_tokens=40,
                    answers=8, slots={"temporal": 2}, windows=1, mask_size=16)  # fmt: skip
    builder, dataset = row_builder(codec, model.config, bucket), MemoryDataset()
    dataset.texts = texts
    prompts, labelled = (_rows(builder, dataset, answer) for answer in (None, "<temporal>"))
    assert prompts["video_ids"][0] != prompts["video_ids"][1]

    sampler = Sampler(model, codec, Sampling(max_new=6, events=2))
    context = sampler.prefill(params, prompts)
    generation = sampler.generate(
        params, context, prompts, branch_keys(0, np.zeros((2, 2), np.uint32))
    )
    clips = [ClipInfo(0.0, 12.0, prompts["frame_times"][i], prompts["frame_valid"][i], 32, 32)
             for i in range(2)]  # fmt: skip
    answers = Router(model, codec).route(params, context, prompts, generation, clips)

    def forced(for_losses):
        def run(params, batch):
            bound = model.bind(params)
            return bound.run_heads(bound(batch), batch, for_losses=for_losses)["cg_detr"]

        return jax.device_get(jax.jit(run)(params, labelled))

    plain, training = forced(False), forced(True)
    for name, value in plain.items():
        np.testing.assert_allclose(training[name], value, atol=1e-4, err_msg=name)
    results = []
    for row in range(2):
        for branch in range(2):
            assert answers[row][branch].marked == "<temporal>"
            (event,) = answers[row][branch].events
            assert event.task == "temporal" and " s to " in answers[row][branch].text
            one = {name: value[row, branch] for name, value in plain.items() if value.ndim > 2}
            expected = HEADS["cg_detr"].decode(one, clips[row])
            np.testing.assert_allclose(event.result["windows"], expected["windows"], atol=1e-2)
            np.testing.assert_allclose(event.result["saliency"], expected["saliency"], atol=1e-3)
            results.append(event.result["saliency"])
    # The slot's own state says little under these weights: what differs is the question.
    assert np.abs(np.subtract(results[0], results[1])).max() > 1e-4
