import av
import numpy as np
import pytest
from PIL import Image

from tpo_jax.generation import draw

TIMES = np.array([0.0, 1.0, 2.0, 3.0], np.float32)
FRAMES = np.full((4, 48, 64, 3), 60, np.uint8)
REGION = {"task": "region", "result": {"box": [0.25, 0.25, 0.75, 0.75], "time": 2.0}}
TEMPORAL = {"task": "temporal", "result": {
    "windows": [[1.0, 2.0, 0.9]], "saliency": [0.1, 0.9, 0.8, 0.2], "times": TIMES.tolist()}}


def mask_event():
    masks = np.zeros((4, 48, 64), bool)
    masks[1, :24] = True
    boxes = [None, [0.0, 0.0, 1.0, 0.5], None, None]
    return {"task": "mask", "result": {"masks": masks, "boxes": boxes, "times": TIMES.tolist()}}


def pages(events):
    return list(draw.annotate(FRAMES, TIMES, "Where is it?", "It is here.", events))


@pytest.mark.parametrize("shape, expected", [
    ((48, 64), (288, 384)), ((31, 383), (62, 766)), ((360, 512), (360, 512)),
    ((720, 1280), (288, 512)), ((1920, 1080), (512, 288)), ((3, 2001), (2, 512))])  # fmt: skip
def test_pages_are_neither_tiny_nor_huge(shape, expected):
    assert draw.paper(np.zeros((*shape, 3), np.uint8)).size[::-1] == expected


def test_region_is_drawn_on_its_frame_only():
    plain, drawn = pages([]), pages([REGION])
    assert [(a != b).any() for a, b in zip(plain, drawn, strict=True)] == [
        False, False, True, False]
    height, width = draw.paper(FRAMES[0]).size[::-1]
    changed = (plain[2] != drawn[2]).any(-1)[:height]
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert abs(rows[0] / height - 0.25) < 0.02 and abs(rows[-1] / height - 0.75) < 0.02
    assert abs(columns[0] / width - 0.25) < 0.02 and abs(columns[-1] / width - 0.75) < 0.02


def test_mask_covers_its_pixels_on_its_frame():
    plain, drawn = pages([]), pages([mask_event()])
    height = draw.paper(FRAMES[0]).size[1]
    changed = (plain[1] != drawn[1]).any(-1)[:height]
    assert changed[: height // 2].all() and not changed[height // 2 + 4 :].any()
    assert not (plain[0] != drawn[0]).any()


def test_timeline_appears_for_temporal_results_and_its_cursor_moves():
    plain, drawn = pages([]), pages([TEMPORAL])
    assert drawn[0].shape[0] - plain[0].shape[0] == draw.TIMELINE_HEIGHT
    assert (drawn[0] != drawn[3]).any()


def test_long_text_wraps_and_makes_the_page_higher():
    words = "many words " * 40
    page = next(draw.annotate(FRAMES, TIMES, words, words, []))
    assert page.shape[0] > pages([])[0].shape[0] and page.shape[0] % 2 == 0
    assert "".join(draw.wrap(words, 200)).replace(" ", "") == words.replace(" ", "")


@pytest.mark.parametrize("height, width", [(31, 33), (48, 64), (360, 640)])
def test_mp4_has_every_page_and_leaves_nothing_else(tmp_path, height, width):
    frames = np.random.default_rng(0).integers(0, 255, (3, height, width, 3), np.uint8)
    drawn = list(draw.annotate(frames, TIMES[:3], "?", "!", [TEMPORAL]))
    draw.write_mp4(tmp_path / "out.mp4", drawn, 2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = list(container.decode(video=0))
    assert len(decoded) == 3
    assert (decoded[0].height, decoded[0].width) == drawn[0].shape[:2]
    assert [f.time for f in decoded] == pytest.approx([0.0, 0.5, 1.0])


def test_png_is_the_page(tmp_path):
    page = pages([REGION])[2]
    draw.write_png(tmp_path / "page.png", page)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "page.png")), page)
