"""Extracted features against the encoder run clip by clip on frames that are chosen by hand."""

import dataclasses
import json

import gcs_server
import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from tpo_jax import prepare
from tpo_jax.data.clip_features import ABOUT, FeatureStore
from tpo_jax.data.ingest.plan import MediaItem
from tpo_jax.data.preprocess import area
from tpo_jax.data.video import VideoError, read_video
from tpo_jax.generation import draw
from tpo_jax.generation.clip_features import Extractor, encoder_name, extract, on_screen
from tpo_jax.interop.folder import save_model
from tpo_jax.models.config import LoraConfig
from tpo_jax.models.presets import preset

SECONDS, FRAMES = 1.5, 3  # of a clip


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Videos of 20 and 13 frames at 4 a second, an image, and a video that is cut off."""
    path = tmp_path_factory.mktemp("media")
    frames = np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), np.uint8)
    draw.write_mp4(path / "long.mp4", list(frames), 4.0)
    (path / "part").mkdir()
    draw.write_mp4(path / "part" / "short.mp4", list(frames[:13]), 4.0)
    Image.fromarray(frames[0]).save(path / "still.png")
    (path / "cut.mp4").write_bytes((path / "long.mp4").read_bytes()[:500])
    return path


def item(media, name):
    return MediaItem(media / name, name, ())


@pytest.fixture(scope="module")
def extractor(model, params):
    options = dict(clip_seconds=SECONDS, frames=FRAMES, batch_size=2)
    return Extractor(model.config, params["vision"], **options)


def test_features_are_the_mean_of_what_the_encoder_sees_in_each_clip(
    extractor, model, params, media
):
    encode = jax.jit(lambda p, *clip: model.bind(p).encode(*clip).features.patches)
    for name, clips in (("long.mp4", 4), ("part/short.mp4", 3)):
        video = read_video(media / name)
        got = extractor.features(item(media, name))
        assert got.shape == (clips, model.config.vision.width) and got.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
        for clip in range(clips):
            ticks = [clip * SECONDS + i * SECONDS / FRAMES for i in range(FRAMES)]
            ticks = [tick for tick in ticks if tick < video.duration - 1e-3]
            shown = [np.flatnonzero(video.timestamps <= tick + 1e-3)[-1] for tick in ticks]
            frames = np.zeros((1, FRAMES, 32, 32, 3), np.uint8)
            frames[0, : len(shown)] = area(video.frames[shown], 32)
            valid = (np.arange(FRAMES) < len(shown))[None]
            patches = np.asarray(encode(params, frames, valid, 0.0 * valid), np.float64)
            mean = patches[0, : len(shown)].mean(axis=(0, 1, 2))
            np.testing.assert_allclose(got[clip], mean / np.linalg.norm(mean), atol=2e-5)


class Uneven:
    """A decoder whose second frame stays, and whose third one is short."""

    fps, duration = 2.0, 2.6

    def __iter__(self):
        return iter([(0.0, "a"), (0.4996, "b"), (1.7, "c")])


def test_every_tick_has_the_frame_that_is_on_screen():
    assert list(on_screen(Uneven(), str.upper)) == ["A", "B", "B", "B", "C", "C"]


def test_a_run_that_was_stopped_goes_on_and_what_cannot_be_read_is_named(
    extractor, media, tmp_path, monkeypatch
):
    store = FeatureStore.create(tmp_path / "out", extractor.about)
    items = [item(media, name) for name in ("long.mp4", "cut.mp4", "part/short.mp4")]
    real, read = Extractor.features, []

    def features(self, item):
        read.append(item.video_id)
        if len(read) == 3:
            raise KeyboardInterrupt
        return real(self, item)

    monkeypatch.setattr(Extractor, "features", features)
    with pytest.raises(KeyboardInterrupt):
        extract(extractor, items, store, progress=False)
    assert {p.name for p in store.path.iterdir()} == {ABOUT, "long.npz"}
    (error,) = extract(extractor, items, store, progress=False)
    assert isinstance(error, VideoError) and "cut.mp4" in str(error)
    assert read[3:] == ["cut.mp4", "part/short.mp4"]
    for name in ("long.mp4", "part/short.mp4"):
        duration = read_video(media / name).duration
        written = store.read(store.file(name), duration)
        np.testing.assert_array_equal(written, extractor.features(item(media, name)))
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_encoders_name_tells_what_changes_features(model, params):
    config, vision = model.config, params["vision"]
    name = encoder_name(config, vision, 4)
    faster = dataclasses.replace(config.vision, remat="full", unroll=True, max_frames=99)
    assert encoder_name(dataclasses.replace(config, vision=faster), vision, 4) == name
    language = dataclasses.replace(config.language, depth=9)
    assert encoder_name(dataclasses.replace(config, language=language), vision, 4) == name
    changed = jax.tree.map(np.array, vision)
    changed["position"][0, 0] += 1
    assert encoder_name(config, changed, 4) != name != encoder_name(config, vision, 3)
    adapted = vision | {"q_proj": {"lora_a": np.zeros((2, 2), np.float32)}}
    scales = [dataclasses.replace(config, lora=LoraConfig("vision", 2, a)) for a in (2.0, 4.0)]
    assert len({encoder_name(each, adapted, 4) for each in scales}) == 2
    half = dataclasses.replace(config, dtype="bfloat16")
    assert encoder_name(half, vision, 4) != name


def test_frames_are_those_that_the_encoder_takes(model, params):
    assert Extractor(model.config, params["vision"]).frames == 4
    bind = preset("video_llava_tiny")  # its positions in time are as many
    assert Extractor(bind, {"table": np.zeros(2)}).frames == bind.vision.frames > 0
    for frames in (9, -1):
        with pytest.raises(ValueError, match=f"--frames={frames}: expected 1 to 8"):
            Extractor(model.config, params["vision"], frames=frames)
    with pytest.raises(ValueError, match="--clip_seconds=0: expected more than 0"):
        Extractor(model.config, params["vision"], clip_seconds=0)


def test_the_command_reads_a_folder_or_what_annotations_are_about(
    model, params, codec, media, tmp_path, monkeypatch, capsys
):
    save_model(tmp_path / "model", model.config, params, codec)
    common = ["features", f"--model={tmp_path / 'model'}", "--frames=3"]
    assert prepare.main([*common, f"--media={media}", f"--out={tmp_path / 'all'}"]) == 1
    printed = capsys.readouterr()
    assert "cut.mp4" in printed.err and "2 videos, 32 numbers for every 2 s" in printed.out
    about = json.loads((tmp_path / "all" / ABOUT).read_text())
    assert about["encoder"] == encoder_name(model.config, params["vision"], 3)
    names = {str(p.relative_to(tmp_path / "all")) for p in (tmp_path / "all").rglob("*.npz")}
    assert names == {"long.npz", "part/short.npz"}

    world = tmp_path / "world"
    world.mkdir()
    (world / "media").symlink_to(media)
    asked = {"video": "part/short.mp4", "turns": [{"question": "?", "answer": "!"}]}
    picture = {"image": "still.png", "turns": [{"question": "?", "answer": "!"}]}
    (world / "a.jsonl").write_text(f"{json.dumps(asked)}\n{json.dumps(picture)}\n")
    listed = [{"format": "native", "path": "a.jsonl"}]
    manifest = {"name": "w", "media": "media", "annotations": listed}
    (world / "dataset.json").write_text(json.dumps(manifest))
    out = tmp_path / "one"
    assert prepare.main([*common, f"--data={world}", f"--out={out}"]) == 0
    assert (out / "part/short.npz").read_bytes() == (tmp_path / "all/part/short.npz").read_bytes()
    assert {p.name for p in out.rglob("*") if p.is_file()} == {ABOUT, "short.npz"}
    gcs_server.install(monkeypatch)
    gcs_server.put(tmp_path / "model", "gs://bucket/model")
    bucket = ["features", "--model=gs://bucket/model", "--frames=3", "--out=gs://bucket/features"]
    assert prepare.main([*bucket, f"--data={world}"]) == 0
    for name in (ABOUT, "part/short.npz"):
        assert (epath.Path("gs://bucket/features") / name).read_bytes() == (out / name).read_bytes()

    for change, message in (
        (["--clip_seconds=1"], "clip_seconds: 2.0: expected 1.0"),
        (["--frames=9"], "--frames=9: expected 1 to 8"),
        (["--model=nowhere"], "nowhere is not a complete model folder"),
    ):
        assert prepare.main([*common, f"--data={world}", f"--out={out}", *change]) == 2
        assert message in capsys.readouterr().err
    assert prepare.main([*common, f"--media={tmp_path / 'no'}", f"--out={out}"]) == 2
    assert "does not exist" in capsys.readouterr().err
