"""Every reader: the sample as it should be read, and what it says of each kind of bad record."""

import copy
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from format_samples import SAMPLES, read, read_sample
from media_samples import write_media
from pycocotools import mask as coco_mask

from tpo_jax.data import formats
from tpo_jax.data.example_checks import check_example
from tpo_jax.data.ingest.statistics import count_examples
from tpo_jax.data.media import MediaFolder
from tpo_jax.data.problems import Invalid
from tpo_jax.data.records import Example, Turn


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    return MediaFolder(write_media(tmp_path_factory.mktemp("media")))


def test_videochat2(media):
    a, b, c = read_sample("videochat2", media)
    options = ("the red circle", "the blue square", "nothing")
    assert a.video_id == "clip_a.mp4" and a.task == "conversation" and a.media == "video"
    # The instruction heads the conversation, whose turns are asked one by one.
    question = "Answer the question. What moves first?"
    assert a.turns[0] == Turn(question, "the blue square", options, "")
    question = "Answer the question. How many shapes are there?"
    assert a.turns[1] == Turn(question, "two", (), "counting")
    assert (b.start, b.end) == (0.5, 1.5)
    assert b.turns == (Turn("Describe the clip.", "A square moves.", (), "caption"),)
    assert (c.media, c.video_id, c.end) == ("image", "still.png", 0)


def test_qvhighlights(media):
    a, b = read_sample("qvhighlights", media)
    assert a.task == "temporal" and a.video_id == "clip_a.mp4"
    assert "The red circle hits the square" in a.turns[0].question
    assert a.turns[0].answer.count("<temporal>") == 1
    assert a.targets["windows"] == [[1, 3]]
    assert a.targets["saliency"] == [0.5, 1.0] and a.targets["saliency_interval"] == 2
    assert b.targets == {"windows": [[0, 1], [2, 3.5]]}


def test_qvhighlights_has_whole_clips_as_the_benchmark_counts(tmp_path):
    """int(duration / 2); what is left at the end is no clip, and its rating a problem."""
    line = json.loads((SAMPLES / "qvhighlights.jsonl").read_text().splitlines()[0])
    file = tmp_path / "a.jsonl"
    for duration, clips in ((150, 75), (149, 74), (149.9, 74), (148, 74), (1.5, 1)):
        windows = {"relevant_windows": [[0, 1]], "relevant_clip_ids": [clips - 1]}
        rated = line | windows | {"saliency_scores": [[4, 4, 4]], "duration": duration}
        file.write_text(json.dumps(rated))
        ((example,), problems) = read("qvhighlights", file, None)
        assert problems == [] and len(example.targets["saliency"]) == clips
        file.write_text(json.dumps(rated | {"relevant_clip_ids": [clips]}))
        examples, (problem,) = read("qvhighlights", file, None)
        assert examples == [] and f"has clips 0..{clips - 1} of 2 s" in problem.reason


def test_refcoco(media):
    a, b, c = read_sample("refcoco", media)
    assert (a.media, a.targets) == ("image", {"boxes": [[0.1, 0.25, 0.6, 0.75]], "times": [0]})
    assert "the red circle" in a.turns[0].question and "the round thing" in b.turns[0].question
    assert (c.media, c.targets) == ("video", {"boxes": [[0, 0, 0.5, 0.5]], "times": [1.5]})
    assert "1.5 s" in c.turns[0].question


def test_mevis(media):
    one, both = read_sample("mevis", media)
    assert one.task == "mask" and one.targets["times"] == [0, 0.5, 1]
    assert one.targets["rles"][2] is None and both.targets["rles"][2] is None
    decode = [coco_mask.decode(example.targets["rles"][0]) for example in (one, both)]
    assert decode[0][5:20, 2:12].all() and decode[0].sum() == 150
    assert decode[1][5:20, 30:40].all() and decode[1].sum() == 300
    assert both.targets["rles"][1] == one.targets["rles"][1]


def test_got10k(media):
    (a,) = read_sample("got10k", media)
    assert a.task == "tracking" and a.turns[0].question.count("<box>") == 1
    assert "circle" not in a.turns[0].question and a.turns[0].answer.count("<mask>") == 1
    assert a.targets["times"] == [0, 0.5, 1, 1.5]
    assert a.targets["input_box"] == [0, 0, 0.25, 1 / 3]
    assert a.targets["boxes"][2] is None
    np.testing.assert_allclose(a.targets["boxes"][3], [3 / 64, 0, 19 / 64, 1 / 3])
    assert a.targets["size"] == [48, 64]


def test_thumos(media):
    (a,) = read_sample("thumos", media)  # clip_b has no action
    assert a.task == "action" and a.turns[0].answer == "CliffDiving, Diving"
    assert a.targets == {
        "segments": [[1.0, 2.5], [1.0, 2.5]],
        "labels": ["CliffDiving", "Diving"],
    }


def test_native(media):
    a, b, c, d, e = read_sample("native", media)
    assert a.turns[0] == Turn(
        "What moves first?", "the square", ("the circle", "the square"), "order"
    )
    tasks = [example.task for example in (a, b, c, d, e)]
    assert tasks == ["conversation", "temporal", "region", "tracking", "action"]
    assert (d.start, d.end) == (0.5, 2.0) and d.targets["boxes"][1] is None
    assert c.media == "image"


def test_native_reads_what_an_example_writes(media, tmp_path):
    examples = read_sample("native", media)
    lines = []
    for example in examples:
        line = example.to_json() | {example.media: example.video_id}
        line["end"] = None if line["end"] == float("inf") else line["end"]
        lines.append(json.dumps(line))
    (tmp_path / "again.jsonl").write_text("\n".join(lines))
    again, problems = read("native", tmp_path / "again.jsonl", media)
    assert problems == [] and again == examples


def put(data, path, value):
    """A copy of `data` with the value at a path of keys changed; DELETE removes it."""
    data = copy.deepcopy(data)
    *front, last = path
    target = data
    for key in front:
        target = target[key]
    if value is DELETE:
        del target[last]
    else:
        target[last] = value
    return data


DELETE = object()
JSON_FILES = {
    "videochat2": "videochat2.json",
    "refcoco": "refcoco.json",
    "thumos": "thumos.json",
}
# (format, where, what is put there, the field that the problem must name, a word of the reason)
BAD_JSON = [
    ("videochat2", (0, "vidoe"), "x", "vidoe", "unknown key"),
    ("videochat2", (0, "video"), "nowhere.mp4", "video", "unknown video"),
    ("videochat2", (0, "video"), "../clip_a.mp4", "video", "leaves the media folder"),
    ("videochat2", (0, "QA", 1, "a"), "  ", "QA[1].a", "not empty"),
    ("videochat2", (0, "QA", 1, "answer"), "x", "QA[1].answer", "unknown key"),
    ("videochat2", (0, "QA", 0, "a"), "Answer: (D) nothing", "QA[0].a", "disagrees"),
    ("videochat2", (0, "QA", 0, "a"), "Answer: (A) nothing", "QA[0].a", "disagrees"),
    ("videochat2", (0, "QA", 0, "a"), "perhaps", "QA[0].a", "Answer: (letter)"),
    ("videochat2", (0, "QA", 0, "q"), "Which?\nOptions:\n(A) x\n(C) y", "QA[0].q", "in order"),
    ("videochat2", (0, "QA"), [], "turns", "at least one"),
    ("videochat2", (1, "end"), 0.2, "start, end", "start < end"),
    ("videochat2", (1, "start"), "early", "start", "expected a number"),
    ("videochat2", (2, "end"), 3, "end", "an image has no"),
    ("refcoco", ("annotations", 0, "bbox"), [30, 5, 20, 10], "annotations.bbox", "outside the"),
    ("refcoco", ("annotations", 0, "bbox"), [4, 5, 0, 10], "annotations.bbox", "outside the"),
    ("refcoco", ("annotations", 0, "bbox"), [4, 5], "annotations.bbox", "[x, y, width, height]"),
    ("refcoco", ("annotations", 0, "image_id"), 9, "annotations.image_id", "no entry"),
    ("refcoco", ("refs", 0, "ann_id"), 99, "refs.ann_id", "no entry"),
    ("refcoco", ("refs", 0, "sentences", 0, "sent"), "", "refs.sentences[0].sent", "not empty"),
    ("refcoco", ("refs", 0, "colour"), "x", "refs.colour", "unknown key"),
    ("refcoco", ("images", 0, "file_name"), "/etc/x.png", "images.file_name", "leaves the"),
    (
        "thumos",
        ("database", "clip_a", "annotations", 0, "label"),
        "",
        "annotations[0].label",
        "not",
    ),
    (
        *("thumos", ("database", "clip_a", "annotations", 0, "segment"), [1, 7]),
        *("annotations[0].segment", "beyond the duration"),
    ),
    (
        *("thumos", ("database", "clip_a", "annotations", 0, "segment"), [2, 1]),
        *("annotations[0].segment", "start < end"),
    ),
    (
        *("thumos", ("database", "clip_z"), {"annotations": [], "subset": "validation"}),
        *("database", "unknown video"),
    ),
    ("thumos", ("database", "clip_a", "subst"), "x", "subst", "unknown key"),
]


@pytest.mark.parametrize(("name", "where", "value", "field", "reason"), BAD_JSON)
def test_bad_json_record(name, where, value, field, reason, media, tmp_path):
    good = json.loads((SAMPLES / JSON_FILES[name]).read_text())
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(put(good, where, value)))
    examples, problems = read(name, file, media)
    assert [problem.field for problem in problems] == [field]
    assert reason in problems[0].reason and problems[0].fix and problems[0].record
    assert problems[0].file == str(file)
    expected = len(read(name, SAMPLES / JSON_FILES[name], media)[0])
    assert 0 < len(examples) < expected or where[:2] == ("database", "clip_a") or "_z" in where[1]


BAD_LINES = [
    ("qvhighlights", 0, ("relevant_window",), [[1, 2]], "relevant_window", "unknown key"),
    ("qvhighlights", 0, ("relevant_windows",), [[1, 9]], "relevant_windows[0]", "beyond the"),
    ("qvhighlights", 0, ("relevant_windows",), [[3, 1]], "relevant_windows[0]", "start < end"),
    ("qvhighlights", 0, ("relevant_windows",), [], "targets.windows", "at least one"),
    ("qvhighlights", 0, ("vid",), "clip_c", "vid", "unknown video"),
    ("qvhighlights", 0, ("query",), "", "query", "not empty"),
    ("qvhighlights", 0, ("duration",), -1, "duration", "expected a number"),
    ("qvhighlights", 0, ("relevant_clip_ids",), [0, 5], "relevant_clip_ids[1]", "clips 0..1"),
    ("qvhighlights", 0, ("relevant_clip_ids",), [0], "saliency_scores", "one list of ratings"),
    ("qvhighlights", 0, ("saliency_scores", 0), [1, 9, 1], "saliency_scores[0]", "from 0 to 4"),
    ("native", 0, ("turns", 0, "answer"), "", "turns[0].answer", "not empty"),
    ("native", 0, ("turns", 0, "answer"), "the star", "turns[0].answer", "none of the options"),
    ("native", 0, ("turns", 0, "question"), "Is it <mask>?", "turns[0].question", "no place"),
    ("native", 0, ("turns", 0, "speaker"), "me", "turns[0].speaker", "unknown key"),
    ("native", 0, ("turns",), [], "turns", "at least one"),
    ("native", 0, ("video",), DELETE, "video", "either 'video' or 'image'"),
    ("native", 0, ("video",), "still.png", "video", "not video"),
    ("native", 0, ("video",), "nope.mp4", "video", "unknown video"),
    ("native", 0, ("task",), "juggling", "task", "expected one of"),
    ("native", 0, ("format_version",), 7, "format_version", "expected 1"),
    ("native", 0, ("targets",), {"boxes": []}, "targets.boxes", "unknown key"),
    ("native", 0, ("turns", 0, "question"), "At <box>?", "turns", "for 0 targets.input_box"),
    ("native", 0, ("targets",), {"input_box": [0, 0, 1, 1]}, "turns", "stands 0 times"),
    ("native", 1, ("turns", 0, "answer"), "At one.", "turns", "it is there 0 times"),
    ("native", 1, ("targets", "windows"), DELETE, "targets.windows", "missing"),
    ("native", 1, ("targets", "windows", 0), [1, "x"], "targets.windows[0]", "a number"),
    ("native", 2, ("targets", "boxes", 0), [0.1, 0.2, 1.5, 0.9], "targets.boxes[0]", "outside"),
    ("native", 2, ("targets", "boxes", 0), [0.5, 0.2, 0.5, 0.9], "targets.boxes[0]", "empty"),
    ("native", 2, ("targets", "times"), [0, 1], "targets", "as many"),
    ("native", 3, ("targets", "input_box"), [0, 0, 2, 1], "targets.input_box", "outside"),
    ("native", 3, ("targets", "input_time"), -1.0, "targets.input_time", "at least 0"),
    ("native", 0, ("targets",), {"input_time": 1.0}, "targets.input_time", "no targets.input_box"),
    ("native", 3, ("turns", 0, "question"), "Follow it.", "turns[0].question", "<box> once"),
    ("native", 3, ("start",), 2.5, "start, end", "start < end"),
    ("native", 3, ("targets", "size"), [48, 0], "targets.size", "[height, width]"),
    ("native", 2, ("targets", "size"), [48, 64], "targets.size", "unknown key"),
    ("native", 4, ("targets", "labels"), [""], "targets.labels[0]", "not empty"),
]


@pytest.mark.parametrize(("name", "line", "where", "value", "field", "reason"), BAD_LINES)
def test_bad_json_line(name, line, where, value, field, reason, media, tmp_path):
    lines = [json.loads(text) for text in (SAMPLES / f"{name}.jsonl").read_text().splitlines()]
    lines[line] = put(lines[line], where, value)
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    examples, problems = read(name, file, media)
    assert [(p.field, p.record, p.file) for p in problems] == [
        (field, f"line {line + 1}", str(file))
    ]
    assert reason in problems[0].reason and problems[0].fix
    assert len(examples) == len(lines) - 1


def test_any_question_may_be_about_a_box():
    """Its slot is an input, whatever the answer calls."""
    for task, answer, targets in [
        ("conversation", "a cat", {}),
        ("region", "Here: <region>.", {"boxes": [[0.2, 0.2, 0.4, 0.4]], "times": [1.0]}),
        ("temporal", "At <temporal>.", {"windows": [[1.0, 2.0]]}),
    ]:
        turn = Turn("What is at <box>?", answer)
        targets = targets | {"input_box": [0.1, 0.1, 0.5, 1.001]}
        example = Example("a", "v", "video", task, "train", 0.0, 4.0, (turn,), targets)
        checked = check_example(example, 4.0)
        assert checked.targets == targets | {"input_box": [0.1, 0.1, 0.5, 1.0]}
        timed = dataclasses.replace(example, targets=targets | {"input_time": 4.3})
        assert check_example(timed, 4.0).targets["input_time"] == 4.0


TRACKS = {
    "each": [{"times": [0, 1], "boxes": [[0, 0, 0.5, 0.5], None]},
             {"times": [1], "boxes": [[0.5, 0.5, 1, 1]], "rles": [None], "size": [48, 64]}],
    "input_boxes": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], "input_times": [None, 1.0],
}  # fmt: skip
SEVERAL = [
    ("temporal", "When?", "First at <temporal>, then at <temporal>.",
     {"each": [{"windows": [[0, 1]]}, {"windows": [[1, 2], [3, 4]]}]}),
    ("mask", "Which?", "<mask> and <mask>", {"each": [{"times": [0], "rles": [None]}] * 2}),
    ("tracking", "Follow <box> and <box>.", "<mask> and <mask>", TRACKS),
    ("conversation", "Is <box> left of <box>?", "yes",
     {key: TRACKS[key] for key in ("input_boxes", "input_times")}),
]  # fmt: skip


def several(task, question, answer, targets):
    return Example("a", "v", "video", task, "train", 0.0, 4.0, (Turn(question, answer),), targets)


@pytest.mark.parametrize("given", SEVERAL, ids=[given[0] for given in SEVERAL])
def test_an_example_may_have_several_of_one_kind(given):
    example = several(*given)
    assert check_example(example, 4.0) == example
    assert Example.from_json(json.loads(json.dumps(example.to_json()))) == example


def test_statistics_count_what_is_in_them():
    counts = count_examples(several(*given) for given in SEVERAL)
    assert (counts["windows"]["count"], counts["windows"]["sum"]) == (3, 3.0)
    assert (counts["boxes"], counts["masks"]) == (2, 0)


@pytest.mark.parametrize(("kind", "change", "field", "reason"), [
    (0, {"each": [{"windows": [[0, 1]]}]}, "targets.each", "1 entries for 2 <temporal>"),
    (0, {"each": []}, "targets.each", "0 entries for 2"),
    (0, {"each": {}}, "targets.each", "a list"),
    (0, {"each": [{"windows": [[0, 1]]}, {"windows": [[3, 9]]}]},
     "targets.each[1].windows[0]", "beyond the duration"),
    (0, {"each": [{"windows": [[0, 1]]}, {"window": [[3, 4]]}]},
     "targets.each[1].window", "unknown key"),
    (0, {"windows": [[0, 1]]}, "targets.windows", "unknown key"),
    (1, {"each": [{"times": [0], "rles": [None]}, {"times": [0], "rles": [None, None]}]},
     "targets.each[1]", "as many"),
    (2, {"input_boxes": TRACKS["input_boxes"][:1]}, "turns", "stands 2 times"),
    (2, {"input_times": [1.0]}, "targets", "as many"),
    (2, {"input_box": [0, 0, 1, 1]}, "targets.input_box", "input_boxes as well"),
    (2, {"input_boxes": [[0, 0, 2, 1]] * 2}, "targets.input_boxes[0]", "outside"),
])
def test_bad_entries_of_several_are_named(kind, change, field, reason):
    task, question, answer, targets = SEVERAL[kind]
    with pytest.raises(Invalid) as error:
        check_example(several(task, question, answer, targets | change), 4.0)
    assert error.value.field == field and reason in error.value.reason


def test_tracks_and_boxes_of_a_turn_belong_together():
    example = several("tracking", "Follow <box>.", "<mask> and <mask>", TRACKS)
    turns = (*example.turns, Turn("And <box>?", "As well."))
    with pytest.raises(Invalid, match="1 <box> in the question for 2 <mask>"):
        check_example(dataclasses.replace(example, turns=turns), 4.0)


def damaged(tmp_path, folder):
    return pathlib.Path(shutil.copytree(SAMPLES / folder, tmp_path / folder))


@pytest.mark.parametrize(
    ("file", "where", "value", "field", "reason"),
    [
        ("mask_dict.json", ("1", 0, "counts"), "o1", "targets.rles[0].counts", "the size"),
        ("mask_dict.json", ("1", 0, "counts"), "é", "targets.rles[0].counts", "the size"),
        ("mask_dict.json", ("1", 0, "size"), [48], "targets.rles[0].size", "height, width"),
        ("mask_dict.json", ("1",), [None], "anno_id", "1 masks for 3 frames"),
        ("mask_dict.json", ("2",), DELETE, "anno_id", "no such id"),
        (
            *("meta_expressions.json", ("videos", "clip_a", "expressions", "0", "exp"), ""),
            *("exp", "not empty"),
        ),
        ("meta_expressions.json", ("videos", "clip_a", "rate"), 3, "rate", "unknown key"),
        ("meta_expressions.json", ("videos", "clip_q"), {}, "frames", "missing"),
    ],
)
def test_bad_mevis(file, where, value, field, reason, media, tmp_path):
    folder = damaged(tmp_path, "mevis")
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(put(data, where, value)))
    _, problems = read("mevis", folder / "meta_expressions.json", media)
    assert problems[0].field == field
    assert reason in problems[0].reason


@pytest.mark.parametrize(
    ("file", "text", "field", "reason"),
    [
        ("groundtruth.txt", "0,0,16\n", "groundtruth.txt line 1", "[x, y, width, height]"),
        ("groundtruth.txt", "0,0,16,x\n", "groundtruth.txt line 1", "x,y,w,h"),
        ("groundtruth.txt", "0,0,9,9\n\n1,0,9,9\n", "groundtruth.txt line 2", "a blank line"),
        ("groundtruth.txt", "\n0,0,9,9\n1,0,9,9\n", "groundtruth.txt line 1", "a blank line"),
        ("groundtruth.txt", "60,0,16,16\n", "groundtruth.txt line 1", "outside the frame"),
        ("absence.label", "0\n", "absence.label", "4 frames"),
        ("absence.label", "1\n1\n1\n1\n", "groundtruth.txt", "in no frame"),
        ("meta_info.ini", "no section", "meta_info.ini", "not an INI"),
    ],
)
def test_bad_got10k(file, text, field, reason, media, tmp_path):
    folder = damaged(tmp_path, "got10k")
    (folder / "clip_a" / file).write_text(text)
    if file == "groundtruth.txt":
        (folder / "clip_a" / "absence.label").unlink()
    examples, problems = read("got10k", folder, media)
    assert examples == [] and [problem.field for problem in problems] == [field]
    assert problems[0].record == "clip_a" and reason in problems[0].reason


def test_got10k_takes_what_is_missing_from_the_file(media, tmp_path):
    folder = damaged(tmp_path, "got10k")
    (folder / "clip_a" / "meta_info.ini").unlink()
    ((example,), problems) = read("got10k", folder, media)
    assert problems == [] and example.targets["times"] == [0, 1 / 8, 2 / 8, 3 / 8]
    assert example.targets["input_box"] == [0, 0, 0.25, 1 / 3]


def test_got10k_reads_every_key_of_a_released_meta_info(media, tmp_path):
    """One of the release is quoted whole in the file that docs/formats.md names for `url`."""
    folder = damaged(tmp_path, "got10k")
    file = folder / "clip_a" / "meta_info.ini"
    keys = [line.split(":")[0] for line in file.read_text().splitlines()[1:]]
    assert keys == [
        *("url", "begin", "end", "anno_fps", "object_class", "motion_class", "major_class"),
        *("root_class", "motion_adverb", "resolution"),
    ]
    file.write_text(file.read_text() + "beginning: 00:00:01\n")
    examples, (problem,) = read("got10k", folder, media)
    assert examples == [] and problem.field == "meta_info.ini.beginning"
    assert "unknown key" in problem.reason


@pytest.mark.parametrize("name", list(formats.FORMATS))
def test_missing_and_broken_files(name, media, tmp_path):
    _, problems = read(name, tmp_path / "absent", media)
    assert len(problems) == 1 and problems[0].file == str(tmp_path / "absent")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert read(name, tmp_path / "deep.json", media)[1]
    (tmp_path / "cut.json").write_text('[{"video": "clip_a.mp4", "QA')
    _, problems = read(name, tmp_path / "cut.json", media)
    assert len(problems) == 1 and problems[0].fix


def test_known_noise_can_be_ignored(media, tmp_path):
    line = json.loads((SAMPLES / "native.jsonl").read_text().splitlines()[0]) | {"url": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    assert len(read("native", tmp_path / "a.jsonl", media)[1]) == 1
    examples, problems = read("native", tmp_path / "a.jsonl", media, ignore=["url"])
    assert len(examples) == 1 and problems == []


def test_links_do_not_lead_out_of_the_media_folder(tmp_path):
    inside, outside = write_media(tmp_path / "inside"), tmp_path / "outside"
    outside.mkdir()
    shutil.move(inside / "clip_b.mp4", outside / "secret.mp4")
    (inside / "clip_b.mp4").symlink_to(outside / "secret.mp4")
    _, problems = read("native", SAMPLES / "native.jsonl", MediaFolder(inside))
    assert len(problems) == 2 and all("leads out" in problem.reason for problem in problems)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x.mp4", "a/../../x.mp4", "C:\\x.mp4", "\\\\host\\x.mp4", "..\\x.mp4"],
)
def test_escaping_names(name, media, tmp_path):
    line = {"video": name, "turns": [{"question": "q", "answer": "a"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    for folder in (media, None):  # with and without media at hand
        examples, problems = read("native", tmp_path / "a.jsonl", folder)
        assert examples == [] and "leaves the media folder" in problems[0].reason


def test_ambiguous_name(tmp_path):
    folder = write_media(tmp_path / "media")
    shutil.copy(folder / "clip_a.mp4", folder / "clip_a.mkv")
    _, problems = read("qvhighlights", SAMPLES / "qvhighlights.jsonl", MediaFolder(folder))
    assert len(problems) == 1 and "ambiguous" in problems[0].reason


def test_rle_pixels_agree_with_pycocotools():
    from tpo_jax.data.rles import rle_pixels

    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 80, 2)
        mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        assert rle_pixels(counts) == height * width
        assert rle_pixels(counts[:-1]) != height * width
        assert rle_pixels(counts + "1") != height * width
    assert rle_pixels("") == rle_pixels("~~") == rle_pixels("o") == -1


def test_worked_example_of_the_documentation(tmp_path):
    page = (pathlib.Path(__file__).parents[2] / "docs" / "own_data.md").read_text("utf-8")
    block = page.split("A worked example")[1].split("```json\n")[1].split("```")[0]
    (tmp_path / "mine.jsonl").write_text(block)
    examples, problems = read("native", tmp_path / "mine.jsonl", None)
    assert len(examples) == 4 and [problem.record for problem in problems] == ["line 5"]
