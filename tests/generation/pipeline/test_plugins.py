"""Plug-ins of the pair pipeline: captions by rule, what judges are told, and answers of a model of
one's own."""

import dataclasses
import types

import pytest
from etils import epath
from fake_pipeline import OPTIONS, VIDEOS, Answerer, Speaker, pipeline_of, read, run
from micro_model import MemoryDataset, conversation

from tpo_jax import preferences
from tpo_jax.data.records import Turn
from tpo_jax.generation import pairs
from tpo_jax.generation.answers import Settings
from tpo_jax.generation.pipeline import command, plugins
from tpo_jax.generation.pipeline import model as pipeline_model
from tpo_jax.generation.pipeline.shards import Work
from tpo_jax.generation.pipeline.stages import report


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


class Listener(Speaker):
    """Keeps what it is told as a judge, by the id of the pair."""

    def __init__(self):
        super().__init__()
        self.told = {}

    def reply(self, request):
        if request.id.endswith("/judge"):
            self.told[request.id.removesuffix("/judge")] = request.text
        return super().reply(request)


def test_notes_on_a_part_are_those_that_a_question_about_it_was_written_from(tmp_path):
    judge = Listener()
    run(tmp_path, judge)
    manipulation = {q["id"]: q.get("manipulation") for q in read(tmp_path, "questions")}
    told = {(manipulation[name.rpartition("/")[0]], text.partition("\n")[0])
            for name, text in judge.told.items()}
    assert told == {("localized", "Notes on a part of a video:"),
                    ("comprehensive", "Notes on a video:")}


def split_with_captions_of_video0():
    """Questions about 4 to 8 s, of which the evidence is localized."""
    turns = [Turn(f"What does circle {n} do?", "it moves", (), "action") for n in range(8)]
    told = Turn("What happens?", "it moves, then it blinks", (), "caption")
    talks = {name: [conversation(name, turns, 4.0, 8.0)] for name in VIDEOS[:2]}
    talks["video0"].append(conversation("video0", [told], name="told"))
    return MemoryDataset(2, talks)


def test_a_judge_of_the_splits_questions_gets_all_captions_and_is_not_asked_without(tmp_path):
    dataset, judge = split_with_captions_of_video0(), Listener()
    answerer = Answerer(judge)
    answerer.settings = dataclasses.replace(
        answerer.settings, evidence=pairs.EvidenceSettings(4, mix=1.0))
    with Work(epath.Path(tmp_path), VIDEOS[:2], 2, OPTIONS).whole() as folder:
        dataclasses.replace(
            pipeline_of(folder, judge), dataset=dataset, answerer=answerer,
            captioner=plugins.RuleCaptioner(dataset), writer=plugins.RuleWriter(dataset, 9, 0),
        ).run(VIDEOS[:2], 99)
        counts = report(folder, 99)
    assert {q["manipulation"] for q in read(tmp_path, "questions")} == {"localized"}
    assert len(judge.told) > 2 and {name.partition("/")[0] for name in judge.told} == {"video0"}
    notes = "\n".join(f"[{s}-{s + 4} s] it moves, then it blinks" for s in (0, 4, 8))
    assert all(text.startswith(f"Notes on a video:\n{notes}\n\n") for text in judge.told.values())
    reasons = [r["reason"] for r in read(tmp_path, "filter") if r["video_id"] == "video1"]
    assert set(reasons) == {"identical", "judge: no captions"}
    assert counts["dropped"]["judge: no captions"] == reasons.count("judge: no captions") > 2
    assert counts["generated"] == sum(counts["dropped"].values()) + counts["kept"]


def test_a_judge_is_refused_where_the_split_has_no_captions():
    """Before anything is answered: of `own` nothing but its split is looked at."""

    def flags(*more):
        parsed = preferences.parse(["generate", "--model=m", "--data=d", "--out=o", *more])
        command.check(parsed, lambda: None)
        return parsed

    def check(dataset, *more):
        command.check_notes(flags(*more), dataset, dataset.videos)

    own = types.SimpleNamespace(dataset=MemoryDataset(1))
    with pytest.raises(ValueError, match="^--judge=model: .*--captioner=rules finds none.*memory "
                       "is of kind 'caption'. Give --captioner=endpoint"):
        command.run(flags("--judge=model"), own, None, 2)
    check(split_with_captions_of_video0(), "--judge=model")
    check(MemoryDataset(1), "--judge=model", "--captioner=model")
    check(MemoryDataset(1), "--judge=none")
    # Folders of such judges from before they were told so are not gone on with.
    options = [command.stage_options(flags(*more), Answerer(Speaker()).settings, "none")["filter"]
               for more in (["--judge=model"], ["--judge=model", "--writer=model"], [])]
    assert ["notes" in of for of in options] == [True, False, False]


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
