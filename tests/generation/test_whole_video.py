"""Which frames of a file reach a head, in which order, and what becomes of its answers.

The heads here are stand-ins: a mask is full where its frame is bright, so that each answer tells
which frame was seen. The real ones: tests/test_predict.py, tests/models/heads/test_sam2.py.
"""

import json

import jax
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from tpo_jax.data import video
from tpo_jax.data.records import VideoInfo
from tpo_jax.errors import UserError
from tpo_jax.generation import draw, whole_video
from tpo_jax.generation.rles import Rles
from tpo_jax.generation.routing import Event, RoutedAnswer
from tpo_jax.generation.whole_video import Film, StoredFilm, WholeVideo
from tpo_jax.models.heads import ClipInfo

FRAMES, RATE = 22, 10.0
TIMES = np.arange(FRAMES) / RATE
SHOWN = np.array([2, 7, 12, 17])  # of the file; the row has one place more, which is a filling


def brightness(number):
    return 10 * number + 20


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Frame i is grey, `brightness(i)`."""
    path = tmp_path_factory.mktemp("film") / "clip.mp4"
    frames = [np.full((32, 48, 3), brightness(i), np.uint8) for i in range(FRAMES)]
    draw.write_mp4(path, iter(frames), RATE)
    return path


def film(file, fps=None, start=0.0, end=FRAMES / RATE):
    return Film(file, (32, 48), start, end, fps, lambda frames: frames[:, :16, :16])


def row():
    frames = np.zeros((1, 5, 16, 16, 3), np.uint8)
    for place, number in enumerate(SHOWN):
        frames[0, place] = brightness(number)
    times = np.append(SHOWN / RATE, 0)[None].astype(np.float32)
    return {"frames": frames, "frame_times": times, "frame_valid": times > 0}


def numbers(frames):
    """Which frame of the file each uint8[..., S, S, 3] is."""
    seen = (np.asarray(frames, float).mean((-3, -2, -1)) - 20) / 10
    assert np.abs(seen - np.rint(seen)).max() < 0.3
    return np.rint(seen).astype(int)


def answers(seen, slots):
    """Predictions of frames `seen`: slot s calls frame i present where (i + s) is even."""
    logits = np.array([[10.0 if (i + slot) % 2 == 0 else -10.0 for i in seen]
                       for slot in range(slots)])  # fmt: skip
    return {"masks": np.broadcast_to(logits[None, ..., None, None], (1, *logits.shape, 4, 4)),
            "presence": logits[None]}  # fmt: skip


CLIP = ClipInfo(0.0, 2.2, np.zeros(5), np.zeros(5, bool), 32, 48)


def asked(slots, box=None):
    return {"box": box, "states": np.zeros((1, slots, 2)), "branch": np.zeros((1, slots), int)}


def box_on(place, branch=0):
    return {"frame": np.array([[0, place]]), "valid": np.array([[False, True]]),
            "branch": np.array([[0, branch]])}  # fmt: skip


def spread(monkeypatch, film, box=None, shown=None):
    """(results, frames int[rounds, 5] seen, valid bool[rounds, 5])."""
    model, seen, valid = WholeVideo(None), [], []

    def run(params, row, given, *, name):
        seen.append(numbers(row["frames"][0]))
        valid.append(row["frame_valid"][0].copy())
        return answers(seen[-1], 2)

    monkeypatch.setattr(model, "_spread", run)
    found = model.results(None, "mask", shown or row(), asked(2, box), 2, film, CLIP)
    return found, np.array(seen), np.array(valid)


def expected(slot, of=range(FRAMES)):
    return [(i + slot) % 2 == 0 for i in of]


def test_every_place_shows_the_frames_of_its_run(file, monkeypatch):
    results, seen, valid = spread(monkeypatch, film(file))
    # 22 frames over 4 places: runs of 6, 6, 5 and 5; the last round shows what was shown first.
    assert seen[:, :4].tolist() == [
        [0, 6, 12, 17], [1, 7, 13, 18], [2, 8, 14, 19], [3, 9, 15, 20], [4, 10, 16, 21],
        [5, 11, 12, 17]]  # fmt: skip
    assert valid.tolist() == [[True] * 4 + [False]] * 6
    for slot, result in enumerate(results):
        np.testing.assert_allclose(result["times"], TIMES, atol=1e-6)
        assert [mask.all() for mask in result["masks"]] == expected(slot)
        assert [mask.any() for mask in result["masks"]] == expected(slot)
        assert [box is not None for box in result["boxes"]] == expected(slot)
        assert set(result) == {"masks", "boxes", "presence", "times"}


def test_a_frame_with_a_box_keeps_its_place(file, monkeypatch):
    (result, _), seen, _ = spread(monkeypatch, film(file), box_on(1))
    assert seen[:, 1].tolist() == [7] * 8
    assert seen[0].tolist()[:4] == [0, 7, 8, 15] and seen[7].tolist()[:4] == [7, 7, 12, 17]
    assert [mask.all() for mask in result["masks"]] == expected(0)  # frame 7 as well


def test_the_box_of_another_question_takes_no_place(file, monkeypatch):
    (result, _), seen, _ = spread(monkeypatch, film(file), box_on(1, branch=1))
    assert seen[0, :4].tolist() == [0, 6, 12, 17] and len(seen) == 6


def test_boxes_on_every_shown_frame_are_an_error(file, monkeypatch):
    full = {key: value[:, :2] for key, value in row().items()}
    both = {"frame": np.array([[0, 1]]), "valid": np.ones((1, 2), bool)}
    with pytest.raises(UserError, match="boxes are drawn on all 2 frames .* ask about fewer boxes"):
        spread(monkeypatch, film(file), both | {"branch": np.zeros((1, 2), int)}, full)


def test_one_shown_frame_with_a_box_leaves_the_others_a_place(file, monkeypatch):
    single = row()
    single["frame_valid"][:, 1:] = False
    (result, _), seen, valid = spread(monkeypatch, film(file), box_on(0), single)
    assert seen[:, 0].tolist() == [2] * FRAMES and seen[:, 1].tolist() == list(range(FRAMES))
    assert valid.tolist() == [[True, True, False, False, False]] * FRAMES
    assert len(result["times"]) == FRAMES


def test_a_rate_and_a_part_of_the_file(file, monkeypatch):
    part = film(file, fps=5.0, start=0.4, end=1.6)
    (result, _), *_ = spread(monkeypatch, part)
    np.testing.assert_allclose(result["times"], [0.4, 0.6, 0.8, 1.0, 1.2, 1.4], atol=1e-6)
    assert [mask.all() for mask in result["masks"]] == [True] * 6
    assert numbers(np.stack(list(part.pictures()))).tolist() == [4, 6, 8, 10, 12, 14]


def follow(monkeypatch, film, places):
    """(results, [(direction, frames that were there)])."""
    model, passes = WholeVideo(None), []
    start = np.array([places])

    def begin(params, row, given, *, name):
        seen = numbers(row["frames"][0])[start[0]]
        found = answers(seen, 2)
        own = {k: np.stack([v[0, s, s : s + 1] for s in range(2)])[None] for k, v in found.items()}
        return start, own, "carried"

    def go_on(params, followed, frames, start, given, count, direction, *, name):
        index, there = given
        assert followed == ("carried" if direction > 0 else "turned")
        assert frames.shape == (whole_video.WINDOW, 16, 16, 3)
        seen = numbers(frames)
        passes.append((int(direction), int(count), index[there].tolist(), seen[there].tolist()))
        return followed, answers(seen, 2)

    monkeypatch.setattr(model, "_begin", begin)
    monkeypatch.setattr(model, "_go_on", go_on)
    monkeypatch.setattr(model, "_turned", lambda params, followed, *, name: "turned")
    results = model.results(None, "sam2", row(), asked(2), 2, film, CLIP)
    return results, passes


@pytest.mark.parametrize("block", [64, 3])
def test_objects_are_followed_from_their_frames_to_both_ends(file, monkeypatch, block):
    monkeypatch.setattr(whole_video, "BLOCK", block)
    results, passes = follow(monkeypatch, film(file), [2, 1])
    forward = [i for direction, _, _, seen in passes if direction > 0 for i in seen]
    back = [i for direction, _, _, seen in passes if direction < 0 for i in seen]
    # From behind the earliest prompted frame (7), and before the latest (12).
    assert forward == list(range(8, 22)) and back == list(range(11, -1, -1))
    assert all(index == seen and count == FRAMES for _, count, index, seen in passes)
    assert [len(seen) for *_, seen in passes] == [8, 6, 8, 4]
    for slot, result in enumerate(results):
        np.testing.assert_allclose(result["times"], TIMES, atol=1e-6)
        assert [mask.all() for mask in result["masks"]] == expected(slot)


def test_following_at_a_rate_reads_the_prompted_frames_too(file, monkeypatch):
    results, passes = follow(monkeypatch, film(file, fps=2.5), [1, 1])
    # Ticks show frames 0, 4, 8, ...; the objects are prompted on 7, which nobody asked for.
    assert [(direction, seen) for direction, _, _, seen in passes] == [
        (1, [8, 12, 16, 20]), (-1, [4, 0])]  # fmt: skip
    for slot, result in enumerate(results):
        np.testing.assert_allclose(result["times"], [0, 0.4, 0.8, 1.2, 1.6, 2.0], atol=1e-6)
        assert [mask.all() for mask in result["masks"]] == expected(slot, range(0, 22, 4))


class Table:
    """70 frames, 10 a second, in records of 32; frame i is as bright as i."""

    def __init__(self):
        self.read = []

    def video_info(self, video_id):
        return VideoInfo("video", 7.0, 70, (np.arange(70) / 10).astype(np.float32), 32, 48)

    def frames(self, video_id, indices):
        self.read.append(np.asarray(indices).tolist())
        bright = np.uint8(indices)[:, None, None, None]
        return np.zeros((len(indices), 32, 48, 3), np.uint8) + bright


def test_a_prepared_folder_is_read_a_record_at_a_time(monkeypatch):
    table = Table()
    stored = StoredFilm(table, "v", 1.0, 6.5, lambda frames: frames[:, :16, :16])
    times = stored.times()
    np.testing.assert_allclose(times, np.arange(10, 66) / 10, atol=1e-6)
    played = np.stack(list(stored.play(times)))
    assert played.shape == (56, 16, 16, 3) and played[:, 0, 0, 0].tolist() == [*range(10, 66)]
    assert table.read == [[*range(10, 32)], [*range(32, 64)], [64, 65]]
    monkeypatch.setattr(whole_video, "BLOCK", 3)
    back = whole_video._play_back(stored, times[[40, 22, 21, 5]])
    assert [frame[0, 0, 0] for frame in back] == [50, 32, 31, 15]
    assert table.read[3:] == [[31], [32, 50], [15]]


def test_frames_that_are_not_found_again_are_an_error(file):
    with pytest.raises(video.VideoError, match="the frame at 0.750 s is not found again"):
        list(film(file).play([0.7, 0.75, 0.8]))


def test_results_stay_small_and_reach_json_and_pictures(file, monkeypatch):
    """RLEs in memory, RLEs in JSON, and masks where they are drawn."""
    (result, _), *_ = spread(monkeypatch, film(file))
    assert isinstance(result["masks"], Rles)
    sizes = jax.tree.map(lambda rle: len(rle["counts"]) if rle else 0, result["masks"].items,
                         is_leaf=lambda x: x is None or "counts" in x)  # fmt: skip
    assert sum(sizes) < 100  # of 22 * 32 * 48 pixels
    answer = RoutedAnswer("", "<mask>", True, (Event("mask", 1, result),)).to_json()
    masks = json.loads(json.dumps(answer))["events"][0]["result"]["masks"]
    assert masks[1] is None and coco_mask.decode(masks[2]).all()
    events = [{"task": "mask", "result": result}]
    plain, pages = ([*draw.annotate(film(file).pictures(), TIMES, "?", "!", given)]
                    for given in ([], events))  # fmt: skip
    assert [(a != b).any() for a, b in zip(plain, pages, strict=True)] == expected(0)
