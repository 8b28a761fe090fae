"""How many prefills the answers about some videos take, and that they are the same answers."""

import pytest
from micro_model import COLOURS, MemoryDataset, conversation

from tpo_jax.data.records import Turn
from tpo_jax.generation import pairs
from tpo_jax.generation.answers import AnswerGenerator, Settings, longest_texts, shuffled_videos

LONG = "it moves left then right and it blinks and grows and it moves left"


@pytest.fixture(scope="module")
def generator(model, params, codec):
    """Three videos with seven questions each, of which two have long answers."""
    dataset = MemoryDataset(3)
    turns = [Turn(f"{word} does the {colour} circle do?", LONG if word == "Why" else "it blinks")
             for word in ("What", "Why") for colour in COLOURS][:7]
    dataset._examples = {v: [conversation(v, turns)] for v in dataset.videos}
    settings = Settings(pairs.EvidenceSettings(8, mix=0.0), pairs.FilterSettings(), temperature=1.0,
                        top_p=1.0, max_new=6, samples=1, batch_size=2, branches=2)
    prompt, _ = longest_texts(dataset, codec)
    return AnswerGenerator(model, params, codec, dataset, settings, prompt)


def test_a_clip_is_prefilled_once_for_all_of_its_questions(generator, monkeypatch):
    questions = [q for video in shuffled_videos(generator.dataset, 0)
                 for q in pairs.questions_of(generator.dataset, video, 16, 0)]
    evidence = [pairs.plan_evidence(q, generator.dataset.video_info("video0"),
                                    generator.settings.evidence) for q in questions]
    assert len(questions) == 21
    prefill, prefilled = generator.sampler.prefill, []
    monkeypatch.setattr(generator.sampler, "prefill", lambda params, batch: (
        prefilled.append((batch["prefix_segments"].any(-1)).sum()), prefill(params, batch))[1])

    def tokens(numbers):
        found, batches = {}, 0
        for _, drawn, _ in generator.answers(
                [questions[n] for n in numbers], [evidence[n] for n in numbers], "chosen"):
            found |= {numbers[n]: out[1].tolist() for (n, _), out in drawn.items()}
            batches += 1
        return found, batches

    together, batches = tokens(range(21))
    assert prefilled == [2, 1]  # three clips, two at a time
    assert batches == 2 * 4  # two of four short answers, two of three long ones; for each of both
    assert len({tuple(answer) for answer in together.values()}) > 5
    # One question of each video at a time: seven times the prefills, the same answers.
    alone = {}
    for start in range(7):
        alone |= tokens(range(start, 21, 7))[0]
    assert prefilled[2:] == [2, 1] * 7 and alone == together
