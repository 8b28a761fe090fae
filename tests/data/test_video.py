import collections

import av
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from media_samples import (
    picture,
    rotate_clockwise,
    steady,
    write_header,
    write_image,
    write_pictures,
    write_video,
)
from PIL import Image

from tpo_jax.data import video
from tpo_jax.data.video import VideoError, read_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("video")


@pytest.fixture(scope="module")
def clip(folder):
    return write_video(folder / "clip.mp4", steady(4, 8))


def brightness(frames):
    """Mean of a grey corner, which tells the source frame."""
    return frames[:, -8:, -8:].mean(axis=(1, 2, 3))


def test_all_frames_with_their_times(clip):
    decoded = read_video(clip)
    assert decoded.frames.shape == (32, 48, 64, 3) and decoded.frames.dtype == np.uint8
    np.testing.assert_allclose(decoded.timestamps, np.arange(32) / 8)
    assert decoded.duration == pytest.approx(4.0)
    np.testing.assert_allclose(decoded.frames[0], picture(), atol=40)
    np.testing.assert_allclose(brightness(decoded.frames), 40 + np.arange(32), atol=2.5)


def test_ticks_take_every_fourth_frame(clip):
    decoded = read_video(clip, fps=2)
    np.testing.assert_allclose(decoded.timestamps, np.arange(8) / 2)
    np.testing.assert_allclose(brightness(decoded.frames), 40 + 4 * np.arange(8), atol=2.5)


def test_more_ticks_than_frames_repeat_nothing(clip):
    assert len(read_video(clip, fps=50).timestamps) == 32


def test_start_and_end_show_what_is_on_screen(clip):
    decoded = read_video(clip, fps=2, start=1.05, end=2.6)
    np.testing.assert_allclose(decoded.timestamps, [1.0, 1.5, 2.0, 2.5])
    np.testing.assert_allclose(brightness(decoded.frames), 40 + 8 * decoded.timestamps, atol=2.5)


def test_variable_frame_rate_keeps_what_was_shown_longest(folder):
    times = [0, 0.1, 0.2, 2.0, 2.1, 5.0]
    path = write_video(folder / "variable.mp4", times)
    np.testing.assert_allclose(read_video(path).timestamps, times, atol=1e-4)
    decoded = read_video(path, fps=2)
    # At 0.5, 1.0 and 1.5 s the frame of 0.2 s is on screen; at 0.1 s no tick looks.
    np.testing.assert_allclose(decoded.timestamps, [0, 0.2, 2.0, 2.1, 5.0], atol=1e-4)
    np.testing.assert_allclose(brightness(decoded.frames), 40 + np.array([0, 2, 3, 4, 5]), atol=1.5)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    gaps=st.lists(st.integers(3, 3000), min_size=1, max_size=30),
    last=st.integers(3, 3000),
    fps=st.sampled_from([0.5, 1, 2, 3, 8, 30]),
    start=st.integers(0, 4000),
)
def test_ticks_agree_with_the_definition(clip, gaps, last, fps, start):
    """Against the plain definition: for every tick, the last frame not later than the tick."""
    times = np.concatenate([[0], np.cumsum(gaps)]) / 1000
    end, start = times[-1] + last / 1000, start / 1000
    hypothesis.assume(start < end - 2e-3)
    decoder = video.Decoder(clip, fps, start)
    decoder.duration = end
    got = [time for time, _ in decoder._at_ticks((time, None) for time in times)]
    ticks = start + np.arange(int((end - start) * fps) + 2) / fps
    near = np.abs(ticks[:, None] - np.append(times, end)[None]).min(1)
    hypothesis.assume((near[(near > 1e-9)] > 2e-3).all())  # roundings are not what is tested
    shown = times[np.searchsorted(times, ticks[ticks < end - 1e-9] + 1e-6, side="right") - 1]
    np.testing.assert_allclose(got, np.unique(shown))


def test_rotation_is_applied(folder):
    path = write_video(folder / "phone.mp4", steady(1))
    rotate_clockwise(path)
    decoded = read_video(path)
    assert decoded.frames.shape[1:] == (64, 48, 3)
    np.testing.assert_allclose(decoded.frames[0], np.rot90(picture(), -1), atol=40)
    probed = video.probe(path)
    assert (probed.width, probed.height, probed.rotation) == (48, 64, 270)
    assert read_video(path, size=(20, 30)).frames.shape[1:] == (20, 30, 3)


@pytest.mark.parametrize("options", [{}, {"movflags": "+faststart"}])
def test_truncated_at_random_bytes(folder, options):
    """Whatever is cut, either every frame is there or a VideoError names the file."""
    whole = write_video(folder / "whole.mp4", steady(4), options).read_bytes()
    reference = read_video(folder / "whole.mp4").frames
    cut = folder / "cut.mp4"
    outcomes = collections.Counter()
    for length in np.random.default_rng(0).integers(0, len(whole), 40):
        cut.write_bytes(whole[:length])
        try:
            frames = read_video(cut).frames
        except VideoError as error:
            assert error.file == str(cut) and error.fix and error.reason
            outcomes["error"] += 1
        else:
            np.testing.assert_array_equal(frames, reference)
            outcomes["whole"] += 1
    assert outcomes["error"] >= 33


def test_truncated_matroska(folder):
    whole = write_video(folder / "whole.mkv", steady(4)).read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    with pytest.raises(VideoError, match="cut.mkv"):
        read_video(folder / "cut.mkv")


def test_avi_that_counts_the_frames_it_left_out(folder):
    """A recorder that saw no change writes empty chunks: 8 pictures of 3,625 stated frames."""
    whole = write_video(folder / "sparse.avi", steady(4, fps=2), codec="mpeg4")
    with av.open(str(whole)) as container:
        assert container.streams.video[0].frames > 3000
    np.testing.assert_allclose(read_video(whole).timestamps, steady(4, fps=2), atol=0.01)
    data = whole.read_bytes()
    for part in (0.6, 0.9):
        (folder / "cut.avi").write_bytes(data[: int(part * data.index(b"idx1"))])
        with pytest.raises(VideoError, match="cut.avi: it is truncated"):
            read_video(folder / "cut.avi")


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(data=st.binary(max_size=300))
def test_any_bytes_are_a_video_error(folder, data):
    for name in ("junk.mp4", "junk.png", "junk.gif"):
        (folder / name).write_bytes(data)
        with pytest.raises(VideoError, match="junk"):
            read_video(folder / name)


def test_errors_name_file_reason_and_fix(folder, clip):
    empty = folder / "empty.mp4"
    empty.touch()
    for path, reason in [
        (empty, "0 bytes"),
        (folder / "missing.mp4", "does not exist"),
        (folder / "notes.txt", "not a known"),
        (folder, "does not say its frame rate"),
    ]:
        with pytest.raises(VideoError, match=reason) as caught:
            read_video(path)
        assert caught.value.file == str(path) and caught.value.fix
    with pytest.raises(VideoError, match="no frame is on screen"):
        read_video(clip, start=9, end=10)
    with pytest.raises(ValueError, match="start < end"):
        read_video(clip, start=3, end=2)


def test_a_video_of_no_length_is_named(folder, clip):
    """A header, and nothing after it; or nothing that a decoder knows."""
    header = write_header(folder / "header.mp4")
    unknown = folder / "unknown.mp4"
    unknown.write_bytes(clip.read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    for path, reason in (
        (header, "it has no frame"),
        (unknown, "its video stream has no usable codec header (truncated, or an unknown codec)"),
    ):
        for read in (read_video, video.probe):
            with pytest.raises(VideoError) as caught:
                read(path)
            assert (caught.value.file, caught.value.reason) == (str(path), reason)
            assert caught.value.fix.startswith("copy or download it again")


def test_video_error_survives_pickling(folder):
    import pickle

    error = VideoError("a.mp4", "why", "how")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.file, copy.reason, copy.fix) == ("a.mp4", "why", "how")


def test_image(folder):
    path = write_image(folder / "still.png", 20, 40)
    decoded = read_video(path)
    assert decoded.media == "image" and decoded.duration == 0
    np.testing.assert_array_equal(decoded.frames[0], picture(20, 40))
    assert read_video(path, size=10).frames.shape == (1, 10, 10, 3)


def test_image_orientation(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # display needs a quarter turn clockwise
    Image.fromarray(picture(20, 40)).save(folder / "phone.png", exif=exif)
    frame = read_video(folder / "phone.png").frames[0]
    np.testing.assert_array_equal(frame, np.rot90(picture(20, 40), -1))
    probed = video.probe(folder / "phone.png")
    assert (probed.width, probed.height) == (20, 40)


def test_truncated_image(folder):
    data = write_image(folder / "big.png", 200, 300).read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="cut.png"):
        read_video(folder / "cut.png")


def test_animation_is_a_video(folder):
    pictures = [Image.fromarray(picture() + np.uint8(40 * i)) for i in range(4)]
    pictures[0].save(
        folder / "anim.webp", save_all=True, append_images=pictures[1:], duration=250, lossless=True
    )
    decoded = read_video(folder / "anim.webp")
    assert decoded.media == "video" and decoded.duration == pytest.approx(1.0)
    np.testing.assert_allclose(decoded.timestamps, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(brightness(decoded.frames), [40, 80, 120, 160], atol=1)


def test_folder_of_pictures_is_a_video(folder):
    strip = write_pictures(folder / "strip", ["a_0007.png", "a_0012.png", "a_0017.png"])
    frames = list(video.Decoder(strip, frame_rate=10))
    np.testing.assert_allclose([time for time, _ in frames], [0, 0.5, 1.0])
    assert [int(frame[-1, -1, 0]) for _, frame in frames] == [40, 41, 42]
    decoder = video.Decoder(strip, fps=1, size=16, frame_rate=10)
    assert [frame.shape for _, frame in decoder] == [(16, 16, 3)] * 2
    assert decoder.media == "video" and decoder.duration == 1.5
    probe = video.probe(strip)
    assert (probe.media, probe.width, probe.height, probe.frames) == ("video", 64, 48, 3)


@pytest.mark.parametrize(
    ("names", "reason"),
    [([], "no picture"), (["a.png"], "no number"), (["a1.png", "b1.png"], "number of its own")],
)
def test_bad_folder_of_pictures(names, reason, tmp_path):
    with pytest.raises(VideoError, match=reason):
        list(video.Decoder(write_pictures(tmp_path / "strip", names), frame_rate=10))
