"""Plug-ins of the pair pipeline: captions by rule, and answers of a model of one's own."""

import types

from micro_model import MemoryDataset, conversation

from tpo_jax.data.records import Turn
from tpo_jax.generation import pairs
from tpo_jax.generation.answers import Settings
from tpo_jax.generation.pipeline import model as pipeline_model
from tpo_jax.generation.pipeline import plugins


def test_rules_caption_parts_with_what_the_split_says_of_them():
    def caption(text, start, end, name):
        return conversation("video0", [Turn("What happens?", text, (), "caption")], start, end,
                            name)

    dataset = MemoryDataset(1, {"video0": [
        caption("it moves left", 0.0, 3.0, "a"), caption("it moves left, then right", 0.0, 12.0,
                                                          "b")]})
    jobs = [{"id": str(i), "video_id": "video0", "segment": [4.0 * i, 4.0 * i + 4]}
            for i in range(2)]
    found = dict(plugins.RuleCaptioner(dataset).caption(jobs, ()))
    assert found == {"0": {"caption": "it moves left"},
                     "1": {"caption": "it moves left, then right"}}
    empty = dict(plugins.RuleCaptioner(MemoryDataset(1)).caption(jobs[:1], ()))
    assert "no caption" in empty["0"]["failed"]


def test_a_number_of_frames_is_a_program_and_prompts_have_one_length(monkeypatch):
    made = []

    class Generator:
        def __init__(self, model, params, codec, dataset, settings, prompt, poll, mesh):
            made.append((settings.evidence.frames, settings.evidence.fewer, prompt))

        def answers(self, questions, evidence, side, skip):
            assert max(len(e.chosen_indices) for e in evidence) <= settings.evidence.frames
            for number in range(len(questions)):
                rows, text = [types.SimpleNamespace(questions=[number])], questions[number].asked
                drawn = {(number, 0): (pairs.Answer(text, 1, True, 0.0), [7])}
                yield rows, drawn, lambda sample, answers, rows: dict.fromkeys(answers, -2.0)

    monkeypatch.setattr(pipeline_model, "AnswerGenerator", Generator)
    own = pipeline_model.OwnModel(None, None, None, None, "none")
    settings = Settings(pairs.EvidenceSettings(8, fewer=(4,)), pairs.FilterSettings(), 6, samples=1)
    answerer = pipeline_model.ModelAnswerer(own, settings, prompt=21)
    jobs = [{"id": f"v{i}/talk/0", "video_id": f"v{i}", "source": "test", "question": f"q{i}",
             "asked": f"q{i}", "answer": "a", "options": [], "kind": "", "frame_indices": [0] * n}
            for i, n in enumerate((8, 3, 8, 5))]  # of 5 frames three are padding
    found = [(name, fields["answers"][0]["text"], *fields["chosen_logp"])
             for _ in range(2) for name, fields in answerer.preferred(jobs, ())]
    assert found == [(f"v{n}/talk/0", f"q{n}", -2.0) for n in (1, 0, 2, 3)] * 2
    assert made == [(4, (), 21), (8, (), 21)]
