"""Masks and tracks on every stored frame: which are seen and scored, and what is written of them.

Language model and head are stand-ins: every answer calls the mask head, which finds a thing in the
left half of every third frame. The heads themselves: tests/generation/test_whole_video.py.
"""

import dataclasses
import json
import pathlib
from types import SimpleNamespace

import micro_model
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tpo_jax import evaluate, prepare
from tpo_jax.data.records import Example, PreparedDataset, Turn, VideoInfo
from tpo_jax.errors import UserError
from tpo_jax.evaluation import all_frames, floors, results, track_files
from tpo_jax.evaluation.evaluator import Evaluator, Settings
from tpo_jax.generation.sampler import Generation

LEFT, BOX = np.arange(32) < 16, [0.0, 0.0, 0.5, 1.0]
FOUND = 20 / 21  # success AUC of a frame that is met exactly


class Grey:
    """Videos of so many frames, 2 a second, frame i as bright as i; its left half is the thing."""

    path, settings = pathlib.Path("grey"), {"size": None}

    def __init__(self, **frames):
        self.count, self.videos = frames, list(frames)

    def video_info(self, video_id):
        n = self.count[video_id]
        return VideoInfo("video", n / 2, n, np.arange(n, dtype=np.float32) / 2, 32, 32)

    def frames(self, video_id, indices):
        bright = np.uint8(indices)[:, None, None, None]
        return np.zeros((len(indices), 32, 32, 3), np.uint8) + bright

    def examples(self, video_id):
        n = self.count[video_id]
        left = coco_mask.encode(np.asfortranarray(np.tile(LEFT, (32, 1)).astype(np.uint8)))
        left = {"size": [32, 32], "counts": left["counts"].decode()}
        targets = {"times": (np.arange(n) / 2).tolist()}
        mask = targets | {"rles": [left] * n}
        track = targets | {"boxes": [BOX] * n, "input_box": BOX}
        return [
            Example(f"grey/{video_id}/{i}", video_id, "video", task, "grey", 0.0, n / 2,
                    (Turn(question, "It is at <mask>.", (), ""),), given)
            for i, (task, question, given) in enumerate([
                ("mask", "Where is it?", mask), ("tracking", "Where is <box>?", track)])
        ]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """An evaluator without weights."""
    codec = micro_model.make_codec()
    return Evaluator(micro_model.make_model(codec).config, {}, codec, Settings())


def head(frames, slots):
    """Predictions of frames uint8[B, F, S, S, 3]: every third is found."""
    found = np.where(frames[..., 0, 0, 0] % 3 == 1, 10.0, -10.0)
    presence = np.repeat(found[:, None], slots, axis=1)
    masks = np.where(np.arange(4) < 2, 10.0, -10.0) * np.ones((*presence.shape, 4, 1))
    return {"masks": masks, "presence": presence}


def answers(codec, batch, said):
    """Every question is answered with "<mask>", or with nothing."""
    used = batch["branch_segments"].any(-1)
    ids = [codec.special_ids["<track_begin>"], codec.special_ids["<tracking>"], codec.eos_id]
    tokens = np.zeros((*used.shape, 3), np.int32) + np.int32(ids if said else ids[::-1])
    zeros, heads = np.zeros((*used.shape, 1, 32), np.float32), np.where(used & said, 2, -1)
    return Generation(tokens, used * (3 if said else 1), used, zeros, zeros, heads[..., None],
                      np.ones((*used.shape, 1), np.int32))  # fmt: skip


def evaluator(model, said=True, seen=None, **settings):
    scorer = model.with_params({})
    scorer.settings = Settings(batch_size=2, progress=False, **settings)
    context = SimpleNamespace(encoded=SimpleNamespace(features=None))
    scorer._scorer = SimpleNamespace(prefill=lambda params, batch: context)
    scorer._generate = lambda sampler, context, batch: answers(model.codec, batch, said)

    def shown(params, features, frames, valid, tokens, asked, *, name):
        return head(np.asarray(frames), asked["states"].shape[1])

    def spread(params, row, asked, *, name):
        seen.append(row["frames"][0, :, 0, 0, 0].tolist())
        assert row["frames"].shape == (1, 8, 32, 32, 3) and asked["states"].shape == (1, 1, 32)
        return head(row["frames"], 1)

    def forced(params, context, labels):
        slots = labels["slots"]["mask"]["branch"].shape
        return {"mask": head(labels["frames"], slots[1])}, {"mask": np.ones((*slots, 32))}

    scorer._router._run, scorer._router.over_video._spread = shown, spread
    scorer._router._tokenise, scorer._forced = lambda params, features: None, forced
    return scorer


def scores(scorer):
    """{metric: [value a video]}"""
    found = scorer.results.table.item_scores()
    return {metric: pytest.approx(list(of.values)) for metric, of in found.items()}


@pytest.mark.parametrize("said", [True, False])
def test_every_stored_frame_is_seen_and_every_annotated_one_scored(model, said):
    """24 frames of which 1, 4, ... are shown, just those that the head finds; and 70, in three
    records, of which 4, 13, 22, 31, 39, 48, 57 and 66 are."""
    dataset, seen = Grey(a=24, b=70), []
    shown, every = (evaluator(model, said, seen, mask_frames=m) for m in ("shown", "all"))
    shown.heads(dataset, ("mask", "tracking"))
    assert not seen
    expected = {"mask/j": [1, 4 / 8], "tracking/auc": [FOUND, 3 / 7 * FOUND]}
    # The first frame of a track is not scored.
    of_all = {"mask/j": [8 / 24, 23 / 70], "tracking/auc": [8 / 23 * FOUND, 23 / 69 * FOUND]}
    every.heads(dataset, ("mask", "tracking"))
    # The toolkits' files repeat the last box where there is none, here always that of the label;
    # LaSOT's does not count labels at the border as met.
    held = dict.fromkeys(("tracking/ao", "tracking/sr@0.5", "tracking/sr@0.75"), [1, 1])
    held |= {"tracking/lasot_p_norm": [1, 1], "tracking/lasot_auc": [0, 0]}
    for scorer, values in ((shown, expected), (every, of_all)):
        values = values | {"mask/f": values["mask/j"], "mask/j&f": values["mask/j"]} | held
        forced = {f"forced/{metric}": value for metric, value in values.items()}
        free = values if said else dict.fromkeys(values, [0, 0])
        assert free | forced == scores(scorer)
    counts = {"annotated": 94, "scored": 16}
    assert shown.results.frames == {"mask": counts, "tracking": counts}
    assert every.results.frames == dict.fromkeys(("mask", "tracking"), counts | {"scored": 94})
    # A round shows a frame of each run. The box of the track is on the first shown frame, which
    # stays; of the seven other runs the last four are a frame shorter.
    assert seen[:3] == [list(range(first, 24, 3)) for first in range(3)]
    assert seen[3] == [1, 0, 4, 8, 12, 15, 18, 21] and seen[6] == [1, 3, 7, 11, 13, 16, 19, 22]


def test_nothing_changes_where_every_stored_frame_is_shown(model):
    found = []
    for mask_frames in all_frames.MASK_FRAMES:
        scorer = evaluator(model, mask_frames=mask_frames)
        scorer.heads(Grey(a=8, b=3), ("mask", "tracking"))
        found.append((scorer.results.table.rows, scorer.results.frames, scorer.results.samples))
    assert found[0] == found[1]
    assert found[0][1]["mask"] == {"annotated": 11, "scored": 11}


@pytest.mark.parametrize(
    "start, end, frames", [(1.0, 4.5, None), (1.0, 5.0, range(2, 11)), (0.0, 12.0, range(24))]
)
def test_a_film_is_of_the_part_that_is_asked_about(start, end, frames):
    """Frames 2 to 9 are shown, those from 1 s to 4.5 s."""
    builder = SimpleNamespace(frame_indices=lambda plan: np.arange(2, 10), prepare=lambda x: x)
    plan = SimpleNamespace(dataset=Grey(a=24), video_id="a", start=start, end=end)
    film = all_frames.stored_film(builder, plan)
    assert (film is None) == (frames is None)
    if film:
        assert film.times().tolist() == [frame / 2 for frame in frames]


@pytest.mark.parametrize(
    "heads, called, task_text, message",
    [
        (("region", "mask"), {"mask"}, True, "with --task_text places are read from words"),
        (("region", "mask"), {"region"}, False, r"the questions call \['region'\], .* add mask or"),
        (("region",), {"mask"}, False, r"no head of the model, \['region'\], answers frame by"),
    ],
)
def test_where_it_means_nothing_it_is_refused(heads, called, task_text, message):
    with pytest.raises(UserError, match=f"--mask_frames=all: .*{message}"):
        all_frames.check(heads, called, task_text=task_text)
    all_frames.check(("region", "mask"), {"region", "mask"}, task_text=False)


def run(model, monkeypatch, tmp_path, dataset, *more):
    """The command with the stand-ins; returns its record."""
    def make(config, params, codec, settings, poll):
        return evaluator(model, seen=[], mask_frames=settings.mask_frames)

    monkeypatch.setattr(evaluate, "load_model", lambda path: (model.config, {}, model.codec))
    monkeypatch.setattr(evaluate, "PreparedDataset", lambda path: dataset)
    monkeypatch.setattr(evaluate, "Evaluator", make)
    out = tmp_path / "out.json"
    command = ["--model=m", "--data=grey", f"--out={out}", "--tasks=mask,tracking", *more]
    return evaluate.main(command), results.read_json(out) if out.exists() else None


def test_the_command_says_which_frames_are_scored_and_writes_submissions(
    model, monkeypatch, tmp_path, capsys
):
    folder = tmp_path / "mevis"
    more = ["--mask_frames=all", "--benchmark=mevis", f"--submission={folder}"]
    status, record = run(model, monkeypatch, tmp_path, Grey(a=24), *more)
    assert status == 0 and record["mask_frames"] == "all"
    assert record["frames_of_masks"]["mask"] == {"annotated": 24, "scored": 24}
    assert record["metrics"]["mask/j"] == pytest.approx(8 / 24, abs=1e-6)
    printed = capsys.readouterr().out
    assert "frames of mask: 24 of 24 annotated are scored\n" in printed
    assert f"{folder}: 24 files" in printed
    pictures = sorted(folder.rglob("*"))
    assert [str(p.relative_to(folder)) for p in pictures if p.is_file()] == [
        f"a/0/{i:05d}.png" for i in range(24)]  # fmt: skip
    for i in range(24):
        picture = np.asarray(Image.open(folder / f"a/0/{i:05d}.png"))
        assert (picture == np.where(LEFT & (i % 3 == 1), 255, 0)).all()
    status, record = run(model, monkeypatch, tmp_path, Grey(a=24))
    assert record["mask_frames"] == "shown" and record["metrics"]["mask/j"] == 1
    assert "frames of mask" not in capsys.readouterr().out
    assert record["frames_of_masks"]["mask"] == {"annotated": 24, "scored": 8}


def test_frames_that_are_not_stored_are_told_of():
    counts = {"mask": {"annotated": 24, "scored": 8}, "tracking": {"annotated": 2, "scored": 2}}
    assert results.format_frames({"frames_of_masks": counts, "data": "d"}).splitlines() == [
        "frames of mask: 8 of 24 annotated are scored; the others are not stored in d: prepare it "
        "with --fps of the annotations' rate",
        "frames of tracking: 2 of 2 annotated are scored",
    ]


@pytest.mark.parametrize(
    "more, size, message",
    [
        (["--benchmark=mevis"], None, "wants every annotated frame; add --mask_frames=all"),
        (["--benchmark=lasot", "--mask_frames=all", "--tasks=mask"], None,
         "is about the task tracking, but --tasks are mask; add tracking"),
        (["--benchmark=got10k", "--mask_frames=all"], 64,
         "boxes in pixels of the videos, but grey was prepared with --size=64; prepare it without"),
    ],
)  # fmt: skip
def test_submissions_that_cannot_be_written_are_refused_before_scoring(
    model, monkeypatch, tmp_path, capsys, more, size, message
):
    dataset = Grey(a=24)
    dataset.settings = {"size": size}
    status, _ = run(model, monkeypatch, tmp_path, dataset, "--submission=s", *more)
    assert status == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, message",
    [
        (["--floors_from=t", "--mask_frames=all"], "--mask_frames=all belongs to --model"),
        (["--floors_from=t", "--submission=s"], "--submission belongs to --model"),
        (["--model=m", "--submission=s"], "--benchmark: None is not one that --submission is for"),
        (["--model=m", "--submission=s", "--benchmark=activitynet"], "known: mevis, ref_youtube"),
        (["--model=m", "--model=n", "--out=p", "--submission=s"], "is of one model, got 2"),
        (["--predictions=p", "--annotations=a", "--benchmark=mevis"], "known: qvhighlights, next"),
    ],
)
def test_options_that_do_not_go_together(given, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse([*given, "--data=d", "--out=o"])
    assert message in capsys.readouterr().err


def rle(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def sample(dataset, number, result):
    """What an evaluator keeps of an answer about example `number` of its video."""
    (video,) = dataset.videos
    example = dataset.examples(video)[number]
    events = [] if result is None else [{"task": "mask", "result": result}]
    return {"task": example.task, "video": video, "example": example.example_id,
            "item": f"{example.example_id}/0/0", "place": 0, "occurrence": 0,
            "answer": {"events": events}}  # fmt: skip


class Tracks(Grey):
    """One video of four annotated frames and two tracked objects, v/3 and v/7."""

    def __init__(self):
        super().__init__(v=4)

    def examples(self, video_id):
        targets = {"times": [0.0, 0.5, 1.0, 1.5], "boxes": [BOX] * 4, "input_box": BOX}
        return [Example(f"x/v/{n}", "v", "video", "tracking", "x", 0.0, 2.0,
                        (Turn("", "<mask>", (), ""),), targets) for n in (3, 7)]  # fmt: skip


def test_objects_of_a_video_share_its_pictures_and_the_surer_one_wins(tmp_path):
    full, left = rle(np.ones((32, 32))), rle(np.tile(LEFT, (32, 1)))
    # Frames 0 and 1 are stored: the others have what is said of the nearest.
    first = {"times": [0.0, 0.5], "masks": [full, full], "boxes": [BOX] * 2, "presence": [0.9, 0.6]}
    second = first | {"masks": [left, left], "presence": [0.8, 0.7]}
    samples = [sample(Tracks(), 0, first), sample(Tracks(), 1, second)]
    assert track_files.write(tmp_path, "davis", Tracks(), samples) == 4
    for i, row in enumerate([np.full(32, 3)] + [np.where(LEFT, 7, 3)] * 3):
        picture = Image.open(tmp_path / f"v/{i:05d}.png")
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), np.tile(row, (32, 1)))


@pytest.mark.parametrize("layout, name", [("got10k", "3/3_001.txt"), ("lasot", "3.txt")])
def test_boxes_are_lines_and_what_is_absent_repeats_the_last(tmp_path, layout, name):
    boxes = [None, [0.25, 0.5, 0.5, 1.0], None, [0.0, 0.0, 1.0, 0.125]]
    result = {"times": [0.0, 0.5, 1.0, 1.5], "masks": [None] * 4, "boxes": boxes,
              "presence": [0.5] * 4}  # fmt: skip
    assert track_files.write(tmp_path, layout, Tracks(), [sample(Tracks(), 0, result)]) == 1
    seen = "8.000,16.000,8.000,16.000"
    assert (tmp_path / name).read_text().splitlines() == [
        "0.000,0.000,16.000,32.000", seen, seen, "0.000,0.000,32.000,4.000"]  # fmt: skip
    # Where the head is not called: the box of the question.
    track_files.write(tmp_path, layout, Tracks(), [sample(Tracks(), 0, None)])
    assert (tmp_path / name).read_text() == "0.000,0.000,16.000,32.000\n" * 4


def test_pictures_have_the_names_and_the_size_of_the_labels(tmp_path):
    """Half a second is 15 pictures of Ref-YouTube-VOS; what is stored is half as wide and high."""
    small = rle(np.tile(np.arange(16) < 8, (16, 1)))
    result = {"times": [0.0, 0.5], "masks": [small, None], "boxes": [BOX, None],
              "presence": [1.0, 0.0]}  # fmt: skip
    track_files.write(tmp_path, "ref_youtube_vos", Grey(v=2), [sample(Grey(v=2), 0, result)])
    left, nothing = np.tile(np.where(LEFT, 255, 0), (32, 1)), np.zeros((32, 32))
    expected = {"00000.png": left, "00015.png": nothing}
    found = {p.name: np.asarray(Image.open(p)) for p in (tmp_path / "v/0").iterdir()}
    assert found.keys() == expected.keys()
    for file, picture in expected.items():
        np.testing.assert_array_equal(found[file], picture)


@pytest.mark.parametrize("name", ["a/../../out", "/etc/a", "a//0", ".."])
def test_names_of_annotations_do_not_lead_out_of_the_folder(name, tmp_path):
    class Hostile(Grey):
        def examples(self, video_id):
            example, _ = super().examples(video_id)
            return [dataclasses.replace(example, example_id=f"{example.source}/{name}")]

    samples = [sample(Hostile(v=2), 0, None)]
    with pytest.raises(UserError, match="lead out of the folder"):
        track_files.write(tmp_path / "s", "mevis", Hostile(v=2), samples)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["v/dog", "v/0", "v/256"])
def test_records_that_are_no_objects_of_davis_are_refused(name, tmp_path):
    class Other(Tracks):
        def examples(self, video_id):
            example, _ = super().examples(video_id)
            return [dataclasses.replace(example, example_id=f"x/{name}")]

    with pytest.raises(UserError, match="expected VIDEO/NUMBER"):
        track_files.write(tmp_path / "s", "davis", Other(), [sample(Other(), 0, None)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layout", "names", "place"),
    [
        ("davis", ("one/v/3", "two/v/03"), "v/3"),
        ("mevis", ("one/v/3", "two/v/3"), "v/3"),
        ("lasot", ("one/a/3", "one/b/3"), "3.txt"),
    ],
)
def test_what_is_asked_twice_is_refused_by_both_names(layout, names, place, tmp_path):
    class Twice(Tracks):
        def examples(self, video_id):
            task = track_files.LAYOUTS[layout].task
            both = zip(super().examples(video_id), names, strict=True)
            return [dataclasses.replace(example, example_id=name, source=name[:3], task=task)
                    for example, name in both]  # fmt: skip

    samples = [sample(Twice(), i, None) for i in range(2)]
    message = f"{names[0]}/0/0 and {names[1]}/0/0 are both answers about {place};"
    with pytest.raises(UserError, match=message):
        track_files.write(tmp_path / "s", layout, Twice(), samples)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": [0.0, 0.5, 1.0], "boxes": [BOX] * 3}, "3/0/0 has 4 frames of .*7/0/0 has 3"),
        ({"times": [0.0, 0.5, 1.0, 2.0]}, "expected the same times"),
        ({"size": [16, 32]}, r"x/v/3/0/0 has 4 .* x/v/7/0/0 has 4 of \(16, 32\)"),
    ],
)
def test_objects_of_a_video_have_the_same_frames(changes, message, tmp_path):
    class Apart(Tracks):
        def examples(self, video_id):
            one, two = super().examples(video_id)
            return [one, dataclasses.replace(two, targets={**two.targets, **changes})]

    with pytest.raises(UserError, match=message):
        track_files.write(
            tmp_path / "s", "davis", Apart(), [sample(Apart(), i, None) for i in range(2)]
        )
    assert not list(tmp_path.iterdir())


# Splits without labels: prepared, asked and written as they are published.


def expressions(folder, frames):
    names = [f"{frame:05d}" for frame in frames]
    data = {"videos": {"v": {"frames": names, "expressions": {"0": {"exp": "the corner"}}}}}
    (folder / "meta_expressions.json").write_text(json.dumps(data))
    return folder / "meta_expressions.json"


def first_mask(folder):
    (folder / "v").mkdir()
    labels = np.zeros((48, 64), np.uint8)
    labels[:24, :32] = 5
    Image.fromarray(labels).save(folder / "v/00000.png")
    return folder


def first_box(folder):
    (folder / "v").mkdir()
    (folder / "v/groundtruth.txt").write_text("0,0,32,24\n")
    return folder


FRAMES = range(10, 58, 4)  # 12 pictures of which 8 are shown
SPLITS = [
    ("mevis", lambda f: expressions(f, range(12)), range(12), 6, "v/0/{:05d}.png"),
    ("ref_youtube_vos", lambda f: expressions(f, FRAMES), FRAMES, 7.5, "v/0/{:05d}.png"),
    ("davis", first_mask, range(12), 24, "v/{:05d}.png"),
    ("got10k", first_box, range(1, 13), 10, "v/v_001.txt"),
]


@pytest.mark.parametrize(("name", "annotate", "frames", "rate", "file"), SPLITS)
def test_a_split_without_labels_is_prepared_asked_and_written(
    name, annotate, frames, rate, file, model, monkeypatch, tmp_path, capsys
):
    (tmp_path / "a").mkdir()
    annotations, media = annotate(tmp_path / "a"), tmp_path / "media"
    (media / "v").mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.new("RGB", (64, 48), (i, i, i)).save(media / f"v/{frame:05d}.png")
    size = [] if name == "got10k" else ["--size=32"]
    command = ["run", f"--media={media}", f"--format={name}", f"--annotations={annotations}",
               f"--out={tmp_path / 'data'}", f"--fps={rate}", *size, "--unlabelled"]  # fmt: skip
    command += [] if name in ("ref_youtube_vos", "davis") else [f"--frame_rate={rate}"]
    assert prepare.main(command) == 0
    task, folder = track_files.LAYOUTS[name].task, tmp_path / "s"
    more = [f"--tasks={task}", "--mask_frames=all", f"--benchmark={name}", f"--submission={folder}"]
    dataset = PreparedDataset(tmp_path / "data")
    status, record = run(model, monkeypatch, tmp_path, dataset, *more)
    assert status == 0 and record["metrics"] == {} and record["unlabelled"] == {task: 1}
    assert record["frames_of_masks"] == {task: {"asked": 12, "answered": 12}}
    printed = capsys.readouterr().out
    assert f"1 of {task} are unlabelled: answered, in no metric\n" in printed
    assert f"frames of {task}: 12 of 12 asked are answered\n" in printed
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    if name == "got10k":  # picture i is found where i is 1 modulo 3, in its left half
        assert found == [file]
        lines = ["0.000,0.000,32.000,24.000\n", *["0.000,0.000,32.000,48.000\n"] * 11]
        assert (folder / file).read_text() == "".join(lines)
        return
    assert found == [file.format(frame) for frame in frames]
    for i, path in enumerate(found):
        picture, full = np.asarray(Image.open(folder / path)), 5 if name == "davis" else 255
        expected = np.where((np.arange(64) < 32) & (i % 3 == 1), full, 0)
        np.testing.assert_array_equal(picture, np.tile(expected, (48, 1)))


def test_labelled_and_unlabelled_together(model, monkeypatch, tmp_path, capsys):
    """Those without labels are in no metric, floor or forced pass; the others as before."""
    class Mixed(Grey):
        def examples(self, video_id):
            examples = super().examples(video_id)
            if video_id == "a":
                return examples
            targets = {"unlabelled": True, "size": [32, 32]}
            return [dataclasses.replace(e, targets=targets | {
                "times": e.targets["times"], "frames": list(range(24)), "input_box": BOX,
            }) for e in examples]  # fmt: skip

    alone, both = (run(model, monkeypatch, tmp_path, dataset, "--mask_frames=all")[1]
                   for dataset in (Grey(a=24), Mixed(a=24, b=24)))  # fmt: skip
    assert both["metrics"] == alone["metrics"] and both["items"] == alone["items"]
    assert both["unlabelled"] == {"mask": 1, "tracking": 1} and alone["unlabelled"] == {}
    counts = {"annotated": 24, "scored": 24, "asked": 24, "answered": 24}
    assert both["frames_of_masks"] == {"mask": counts, "tracking": counts}
    samples = results.read_samples(tmp_path / "out.json")
    assert [s["scores"] == {} for s in samples] == [s["video"] == "b" for s in samples]
    assert all(s["answer"]["events"] for s in samples) and len(samples) == 4
    best = [floors.best(floors.constant_floors(Grey(a=24), dataset, 8))
            for dataset in (Grey(a=24), Mixed(a=24, b=24))]  # fmt: skip
    assert best[0] == best[1] and best[0]["tracking/auc"] > 0
    with pytest.raises(UserError, match="d: no question .* nothing scored"):
        about = {"data": "d", "tasks": ["mask"], "unlabelled": {}}
        results.evaluation_record({}, routing={}, about=about)
