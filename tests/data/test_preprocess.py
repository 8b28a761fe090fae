import numpy as np
import pytest
from PIL import Image

from tpo_jax.data import preprocess


def _image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("size, box", [
    ((40, 70), (21 - 12, 0)), ((70, 40), (0, 21 - 12)),
])  # fmt: skip
def test_crop_is_the_middle_of_the_short_side_resized(size, box):
    image = _image(*size)
    long = int(24 * 70 / 40)
    height, width = (24, long) if size[0] == 40 else (long, 24)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))
    left, top = box
    expected = resized[top : top + 24, left : left + 24]
    np.testing.assert_array_equal(preprocess.crop(image[None], 24)[0], expected)


def test_stretch_ignores_the_aspect_ratio_and_keeps_what_fits():
    frames = np.stack([_image(24, 24, seed) for seed in range(2)])
    np.testing.assert_array_equal(preprocess.stretch(frames, 24), frames)
    assert preprocess.stretch(_image(10, 50)[None], 24).shape == (1, 24, 24, 3)


def test_tiles_are_the_padded_image_cut_up():
    image = np.full((20, 50, 3), 200, np.uint8)
    tiles = preprocess.anyres_tiles(image, [(24, 24), (24, 48), (48, 48)], 24)
    assert tiles.shape == (3, 24, 24, 3) and (tiles[0] == 200).all()
    # 20 x 50 becomes 20 x 48: two black rows above and below.
    assert (tiles[1:, 2:22] == 200).all()
    assert (tiles[1:, :2] == 0).all() and (tiles[1:, 22:] == 0).all()


def test_a_square_of_one_colour_around_the_image():
    square = preprocess.pad_to_square(np.zeros((2, 5, 3), np.uint8), (1, 2, 3))
    assert square.shape == (5, 5, 3)
    assert (square[1:3] == 0).all() and (square[0] == [1, 2, 3]).all() and (square[4] == 3).any()


def test_padding_is_for_images_and_videos_are_cropped():
    wide = np.zeros((1, 12, 24, 3), np.uint8)
    wide[:, :, :2] = 250  # what a crop does not show
    shown = preprocess.resize_of("pad", "image", (0.4, 0.5, 0.6))(wide, 24)
    assert shown.shape == (1, 24, 24, 3) and shown[0, 12, 0, 0] == 250
    assert (shown[0, 0] == [102, 127, 153]).all() and (shown[0, 12, 12] == 0).all()
    assert (preprocess.resize_of("pad", "video", (0.4, 0.5, 0.6))(wide, 12) == 0).all()
    assert preprocess.resize_of("crop", "image", (0.5,) * 3) is preprocess.crop
