import dataclasses
import json

import av
import gcs_server
import memory_bucket
import micro_model
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tpo_jax import predict
from tpo_jax.data import files, video
from tpo_jax.data.sampling import SAMPLERS
from tpo_jax.data.text import TextCodec
from tpo_jax.generation import draw
from tpo_jax.generation.requests import Clip, Request, RequestError, make_request, read_list
from tpo_jax.generation.rles import Rles
from tpo_jax.generation.routing import Event, RoutedAnswer
from tpo_jax.interop.folder import load_model, save_model
from tpo_jax.models.sam2_config import sam2_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that answers every question with "it <temporal> <region>"."""
    codec = micro_model.make_codec()
    model = micro_model.make_model(codec)
    ids = codec.special_ids
    said = [codec.encode("it")[0], ids["<time_begin>"], ids["<temp>"], ids["<box_begin>"],
            ids["<boxes>"], codec.eos_id]
    params = micro_model.that_says(micro_model.make_params(model), codec, *said)
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(path, model.config, params, codec)
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    path = tmp_path_factory.mktemp("media")
    frames = np.random.default_rng(0).integers(0, 255, (16, 64, 96, 3), np.uint8)
    draw.write_mp4(path / "clip.mp4", list(frames), 4.0)
    Image.fromarray(frames[0]).save(path / "still.png")
    (path / "cut.mp4").write_bytes((path / "clip.mp4").read_bytes()[:500])
    return path


def run(folder, out, *more):
    return predict.main([f"--model={folder}", f"--out={out}", "--max_new=8", *more])


def test_video_gives_json_and_annotated_mp4_with_several_head_calls(folder, media, tmp_path,
                                                                    capsys):
    assert run(folder, tmp_path, f"--video={media / 'clip.mp4'}", "--prompt=When at 3 s?") == 0
    record = json.loads((tmp_path / "clip.json").read_text())
    assert [event["task"] for event in record["events"]] == ["temporal", "region"]
    assert record["marked"] == "it<temporal><region>" and record["finished"]
    temporal, region = (event["result"] for event in record["events"])
    assert all(0 <= s < e <= 4.0 for s, e, _ in temporal["windows"])
    assert abs(region["time"] - 3.0) < 0.3  # the frame that the prompt names
    pixels = np.array(region["box"]) * [96, 64, 96, 64]
    np.testing.assert_allclose(region["box_pixels"], pixels)
    assert record["text"] in capsys.readouterr().out
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert len(list(container.decode(video=0))) == 8  # the frames that the model saw
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.json", "clip.mp4"]
    # Another question about the same video takes the place of the first one.
    assert run(folder, tmp_path, f"--video={media / 'clip.mp4'}", "--prompt=When at 1 s?") == 0
    region = json.loads((tmp_path / "clip.json").read_text())["events"][1]["result"]
    assert abs(region["time"] - 1.0) < 0.3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.json", "clip.mp4"]


@pytest.mark.parametrize("fps, times", [
    (None, np.arange(16) / 4), (1.0, np.arange(4.0)), (0.0, np.arange(8) / 2)])
def test_masks_are_of_every_frame_of_the_file_and_drawn_on_them(folder, media, tmp_path, fps,
                                                               times):
    """The model is shown 8 of the 16 frames; what it says of their pixels is in test_routing.py."""
    predictor = predict.Predictor(*load_model(folder), prompt_tokens=48, batch_size=1, max_new=8,
                                  mask_fps=fps)
    request = make_request("line", {"id": "x", "video": "clip.mp4", "prompt": "What?"}, media)
    clip, builder = Clip.read(request), predictor.builder("video", 0)
    plan = predict._plan(request, clip)
    film, shown = predictor._film(clip, plan, builder), builder.frame_indices(plan)
    assert (film is None) == (fps == 0)
    if film:
        np.testing.assert_allclose(film.times(film.fps), times, atol=1e-6)
        again = film.play(clip.times[shown])
        np.testing.assert_array_equal(np.stack(list(again)), builder.build(plan, 0)["frames"])
    masks = np.ones((len(times), 64, 96), bool)
    result = {"masks": Rles.of(masks) if film else masks, "boxes": [[0, 0, 1, 1]] * len(times),
              "presence": [1.0] * len(times), "times": times.tolist()}
    answer = RoutedAnswer("", "<mask>", True, (Event("mask", 1, result),))
    frames, drawn_at = predictor._to_draw(answer, film, clip, shown)
    assert len(drawn_at) == len(times)
    out = epath.Path(tmp_path)
    record = predict.write_prediction(out, request, answer, frames, drawn_at, "video")
    assert len(record["events"][0]["result"]["masks"]) == len(times)
    with av.open(str(tmp_path / "x.mp4")) as container:
        drawn = list(container.decode(video=0))
    assert [frame.time for frame in drawn] == pytest.approx(times, abs=0.3)
    # An answer without a mask is drawn on what the language model is shown.
    plain = dataclasses.replace(answer, events=())
    assert len(predictor._to_draw(plain, film, clip, shown)[1]) == 8


def write_list(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_list_reports_failures_and_is_resumed(folder, media, tmp_path, monkeypatch, capsys):
    entries = [
        {"id": "a", "video": "clip.mp4", "prompt": "What happens?"},
        {"id": "bad", "video": "cut.mp4", "prompt": "What happens?"},
        {"id": "b", "video": "still.png", "prompt": "Where is it?"},
        {"id": "c", "video": "clip.mp4", "prompt": "Where does <box> go?",
         "box": [0.1, 0.1, 0.5, 0.5], "box_time": 2.5, "start": 1.0, "end": 3.0},
    ]
    path = write_list(media / "list.jsonl", *entries)
    out = tmp_path / "out"
    assert run(folder, out, f"--input={path}", "--batch_size=2") == 1
    records = {r["id"]: r for r in map(
        json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert set(records) == {"a", "bad", "b", "c"}
    assert "cut.mp4" in records["bad"]["error"]
    assert sorted(p.name for p in out.iterdir()) == [
        "a.mp4", "b.png", "c.mp4", "results.jsonl", "settings.json"]
    assert json.loads((out / "settings.json").read_text())["frames"] == 8  # as the model takes
    assert records["b"]["media"] == "image"
    windows = records["c"]["events"][0]["result"]["windows"]
    assert all(1.0 <= s < e <= 3.0 for s, e, _ in windows)
    # A killed run leaves a cut line; the rest is not answered again, the failure is.
    with (out / "results.jsonl").open("a") as file:
        file.write('{"id": "c", "tex')
    (media / "cut.mp4").write_bytes((media / "clip.mp4").read_bytes())
    asked, real = [], predict.Predictor.answer

    def answer(self, requests, clips):
        asked.extend(request.id for request in requests)
        return real(self, requests, clips)

    monkeypatch.setattr(predict.Predictor, "answer", answer)
    assert run(folder, out, f"--input={path}", "--batch_size=2") == 0
    assert asked == ["bad"]
    again = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {r["id"]: r for r in again if r["id"] != "bad"} == {
        i: r for i, r in records.items() if i != "bad"}
    # The same id for another question is refused.
    write_list(media / "list.jsonl", entries[0] | {"prompt": "Something else?"})
    assert run(folder, out, f"--input={path}") == 2
    # So are answers that would be made otherwise.
    write_list(path, *entries)
    capsys.readouterr()
    assert run(folder, out, f"--input={path}", "--batch_size=2", "--mask_fps=0") == 2
    assert "mask_fps: there None, now 0.0\ngive another --out" in capsys.readouterr().err
    assert run(folder, out, f"--input={path}", "--batch_size=2", "--max_calls=1") == 2
    assert "max_calls: there 4, now 1\n" in capsys.readouterr().err
    assert run(folder, out, f"--input={path}", "--batch_size=2", "--frames=4") == 2
    assert "frames: there 8, now 4\n" in capsys.readouterr().err
    assert run(folder, out, f"--input={path}", "--frames=9") == 2
    assert "--frames=9: the model takes at most 8" in capsys.readouterr().err


def test_an_answer_makes_no_more_calls_than_it_may(folder, media, tmp_path, capsys):
    asked = [f"--video={media / 'still.png'}", "--prompt=Where?"]
    assert run(folder, tmp_path, *asked, "--max_calls=1") == 0
    record = json.loads((tmp_path / "still.json").read_text())
    assert [event["task"] for event in record["events"]] == ["temporal"]
    with pytest.raises(SystemExit):
        run(folder, tmp_path, *asked, "--max_calls=0")
    assert "--max_calls: 0, expected 1 or more" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_twice_fails_alone(media, tmp_path, monkeypatch):
    """Masks of every frame read it again; the others of its batch are answered."""
    (media / "odd.mp4").write_bytes((media / "clip.mp4").read_bytes())
    requests = [
        make_request("line", {"id": name, "video": file, "prompt": "What?"}, media)
        for name, file in (("a", "clip.mp4"), ("odd", "odd.mp4"), ("b", "clip.mp4"))
    ]

    class Once:
        features, kinds, tiled, batch_size, frames = None, (), False, 3, 8

        def shape_of(self, clip):
            return "video", 0

        def answer(self, requests, clips):
            for clip in clips:
                if clip.path.name == "odd.mp4":
                    raise video.VideoError(clip.path, "the frame is not found again", "convert it")
            return [(request.id,) for request in requests]

    monkeypatch.setattr(predict, "write_prediction", lambda out, request, answer, media: {
        "id": request.id, "text": answer, "media": media})  # fmt: skip
    (records,) = predict.records_of(Once(), requests, tmp_path)
    assert [record["id"] for record in records] == ["odd", "a", "b"]
    assert "odd.mp4: the frame is not found again; convert it" in records[0]["error"]
    assert records[1:] == [{"id": name, "text": name, "media": "video"} for name in "ab"]


def test_a_bucket_has_what_a_folder_has_after_a_kill_at_any_batch(folder, media, tmp_path,
                                                                 monkeypatch):
    """Model, list and outputs under gs://. Killed after one batch, and while one is written."""
    entries = [{"id": name, "video": str(media / "clip.mp4"), "prompt": f"What is {name}?"}
               for name in "abcde"]
    path = write_list(tmp_path / "list.jsonl", *entries)
    assert run(folder, tmp_path / "out", f"--input={path}", "--batch_size=2") == 0
    memory_bucket.install(monkeypatch)
    monkeypatch.chdir(tmp_path)  # where a gs:// path that is taken for a local one would end
    monkeypatch.setattr(files, "SECONDS_BETWEEN_REWRITES", 1e9)  # what batches write themselves
    gcs_server.put(folder, "gs://bucket/model")
    epath.Path("gs://bucket/list.jsonl").write_text(path.read_text())
    asked, real = [], predict.Predictor.answer
    left, draw_mp4 = [0], draw.write_mp4

    def answer(self, requests, clips):
        asked.append("".join(request.id for request in requests))
        return real(self, requests, clips)

    def write_mp4(path, *more):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        draw_mp4(path, *more)

    monkeypatch.setattr(predict.Predictor, "answer", answer)
    monkeypatch.setattr(draw, "write_mp4", write_mp4)
    monkeypatch.setattr(files.Lines, "close", lambda self: None)  # as if by SIGKILL
    command = ["gs://bucket/model", "gs://bucket/out", "--input=gs://bucket/list.jsonl",
               "--batch_size=2"]
    for drawn in (4, 2):  # the second of "cd", and again
        left[0] = drawn
        with pytest.raises(KeyboardInterrupt):
            run(*command)
    left[0] = -1
    assert run(*command) == 0
    assert asked == ["ab", "cd", "cd", "cd", "e"]
    out = epath.Path("gs://bucket/out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {file.name for file in out.iterdir()} == names and len(names) == 7
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"list.jsonl", "out"}
    one = [f"--video={media / 'still.png'}", "--prompt=What?"]
    assert run("gs://bucket/model", "gs://bucket/one", *one) == 0
    assert {file.name for file in epath.Path("gs://bucket/one").iterdir()} == {
        "still.json", "still.png"}


def test_a_clip_has_the_times_of_every_frame_of_its_part(media):
    clip = Clip.read(Request("x", media / "clip.mp4", "?"))
    np.testing.assert_allclose(clip.times, np.arange(16) / 4)
    part = Clip.read(Request("x", media / "clip.mp4", "?", start=1.0, end=2.0))
    np.testing.assert_allclose(part.times, [1.0, 1.25, 1.5, 1.75])


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """193 frames, 30 a second: neither is a multiple of what samplers take."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    pixels = np.random.default_rng(1).integers(0, 255, (193, 32, 48, 3), np.uint8)
    draw.write_mp4(path, list(pixels), 30.0)
    return path


@pytest.mark.parametrize("start, end", [(0.0, None), (1.51, 5.2)])
@pytest.mark.parametrize("method", SAMPLERS)
def test_the_model_is_shown_the_frames_that_its_sampler_finds_in_the_file(
        folder, long_clip, monkeypatch, method, start, end):
    """Among all frames of the file, and no others are made."""
    whole = video.read_video(long_clip, start=start, end=end or np.inf)
    expected = SAMPLERS[method](whole.timestamps, 8, start, end or whole.duration)
    made, make = [], video._to_array

    def counting(frame, *more):
        made.append(frame.time)
        return make(frame, *more)

    monkeypatch.setattr(video, "_to_array", counting)
    config, params, codec = load_model(folder)
    codec = TextCodec(codec.tokenizer, dataclasses.replace(codec.template, sampling=method))
    predictor = predict.Predictor(config, params, codec, prompt_tokens=48, batch_size=1, max_new=8)
    request = Request("x", long_clip, "What?", start=start, end=end)
    clip, builder = Clip.read(request), predictor.builder("video", 0)
    assert not made
    plan = predict._plan(request, clip)
    row, shown = builder.build(plan, 0), builder.frame_indices(plan)
    np.testing.assert_allclose(
        row["frame_times"][row["frame_valid"]], whole.timestamps[expected], atol=1e-6)
    frames, times = predictor._to_draw(RoutedAnswer("", "", True, ()), None, clip, shown)
    np.testing.assert_allclose(times, whole.timestamps[expected], atol=1e-6)
    np.testing.assert_array_equal(frames, whole.frames[expected])
    assert made == pytest.approx(sorted(set(times)))  # once each, though they were asked for twice


def test_a_box_is_drawn_on_the_frame_of_its_time(folder, media):
    entry = {"id": "x", "video": "clip.mp4", "prompt": "Where does <box> go?",
             "box": [0.1, 0.1, 0.5, 0.5], "start": 1.0, "end": 3.0}
    config, params, codec = load_model(folder)
    predictor = predict.Predictor(config, params, codec, prompt_tokens=48, batch_size=1, max_new=8)
    for time, frame in ((None, 0), (1.0, 0), (2.1, 4), (3.0, 7)):
        request = make_request("line", entry | {"box_time": time}, media)
        clip = Clip.read(request)
        row = predictor.builder("video", 0).build(predict._plan(request, clip), 0)
        assert row["slots"]["box"]["frame"][0] == frame, (time, row["frame_times"])
    for time in (0.5, 3.5):
        request = make_request("line", entry | {"box_time": time}, media)
        with pytest.raises(RequestError, match=f"box_time: {time}, expected .* from 1 to 3"):
            Clip.read(request)


def test_several_boxes_and_points_reach_the_batch(folder, media):
    entry = {"id": "x", "video": "clip.mp4", "prompt": "Where do <box> and <box> go?",
             "box": [[0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.4, 0.9]], "box_time": [None, 3.1],
             "points": [[0.5, 0.25], [0.75, 1, 0]]}
    pointing = {"id": "y", "video": "clip.mp4", "prompt": "What?", "points": [[0, 0]],
                "point_time": 1.1}  # fmt: skip
    requests = [make_request("line", given, media) for given in (entry, pointing)]
    predictor = predict.Predictor(*load_model(folder), prompt_tokens=48, batch_size=3, max_new=8,
                                  boxes=2, points=2)
    builder = predictor.builder("video", 0)
    rows = [builder.build(predict._plan(request, Clip.read(request)), 0) for request in requests]
    box = rows[0]["slots"]["box"]
    assert box["valid"].tolist() == [True, True] and box["frame"].tolist() == [0, 6]
    np.testing.assert_allclose(box["boxes"], entry["box"])
    points = predictor._points(requests, rows)
    np.testing.assert_allclose(points["points"][:2], [[[0.5, 0.25], [0.75, 1]], [[0, 0], [0, 0]]])
    assert points["labels"].tolist() == [[1, 0], [1, -1], [-1, -1]]
    assert points["frame"].tolist() == [0, 2, 0]  # of the first box; 1.25 s is near
    with pytest.raises(RequestError, match=r"x: points: .* read none; .* \['sam2'\]"):
        predict.most_points(predictor.config, requests)
    sam2 = dataclasses.replace(
        predictor.config, heads=("region", "sam2"), sam2=sam2_size("micro"))
    assert predict.most_points(sam2, requests) == 2
    late = make_request("line", pointing | {"point_time": 9.0}, media)
    with pytest.raises(RequestError, match="point_time: 9.0, expected seconds of the clip"):
        Clip.read(late)


@pytest.mark.parametrize("change, message", [
    ({"prompt": ""}, "prompt: ''"),
    ({"video": 3}, "video: 3"),
    ({"video": "gs://b/x.mp4"}, "video: 'gs://b/x.mp4', expected a local file"),
    ({"id": "../x"}, "id: '../x'"),
    ({"box": [0.5, 0.5, 0.2, 0.9]}, r"box: \[0.5"),
    ({"box": [0.1, 0.2, 0.3]}, r"box: \[0.1"),
    ({"box": ["a", 0.2, 0.3, 0.4]}, r"box: \['a'"),
    ({"box": [0.1, 0.2, 0.3, 0.4]}, "prompt: 0 places <box> for 1 box"),
    ({"prompt": "Where is <box>?"}, "prompt: 1 places <box> for 0 box"),
    ({"time": -1}, "time: -1"),
    ({"box_time": "x"}, "box_time: 'x'"),
    ({"box_time": 1.0}, "box_time: 1.0 without a box"),
    ({"end": "late"}, "end: 'late'"),
    ({"box": [[0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1]], "prompt": "<box> <box>"}, r"box: \[0, 0, 0, 1"),
    ({"box": [[0.1, 0.2, 0.3, 0.4]] * 2, "prompt": "<box>"}, "prompt: 1 places <box> for 2 box"),
    ({"box": [[0.1, 0.2, 0.3, 0.4]] * 2, "box_time": [1], "prompt": "<box> <box>"},
     "box_time: 1 times for 2 boxes"),
    ({"points": [[0.5, 1.2]]}, r"points\[0\]: \[0.5, 1.2\] is outside the frame"),
    ({"points": [[0.5, 0.5], [-3, 0.1]]}, r"points\[1\]: \[-3, 0.1\] is outside"),
    ({"points": [[0.5, 0.5, 2]]}, r"points\[0\]: \[0.5, 0.5, 2\], expected x and y"),
    ({"points": [0.5, 0.5]}, r"points\[0\]: 0.5, expected"),
    ({"points": []}, r"points: \[\], expected a list"),
    ({"points": [[0.5, 0.5, 0]]}, "points: .* none is on the thing"),
    ({"point_time": 1.0}, "point_time: 1.0: there are no points"),
    ({"points": [[0.5, 0.5]], "point_time": 1.0, "box": [0.1, 0.2, 0.3, 0.4], "prompt": "<box>"},
     "point_time: 1.0: box_time is that of both"),
])
def test_bad_requests_name_the_field(media, change, message):
    entry = {"id": "a", "video": "clip.mp4", "prompt": "What?"}
    with pytest.raises(RequestError, match=f"^line: {message}"):
        make_request("line", entry | change, media)


@pytest.mark.parametrize("text, message", [
    ("{", "list.jsonl:1: not JSON"),
    ('{"video": "a", "prompt": "b", "boxx": 1}', "list.jsonl:1: expected an object with some of"),
    ('{"id": "x", "video": "a", "prompt": "b"}\n' * 2, "list.jsonl:2: id 'x' occurs twice"),
    ("", "no lines"),
])
def test_bad_lists_name_the_line(tmp_path, text, message):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(RequestError, match=message):
        read_list(tmp_path / "list.jsonl")


def test_prompt_with_an_unknown_marker_is_an_error_not_a_crash(folder, media, tmp_path, capsys):
    prompt = "--prompt=What is <thing>?"
    assert run(folder, tmp_path, f"--video={media / 'clip.mp4'}", prompt) == 2
    assert "<thing>" in capsys.readouterr().err
