"""Pixels against `transformers`' own Pillow processors."""

import av
import numpy as np
import pytest

from tests.parity.towers import difference
from tpo_jax.data.preprocess import anyres_tiles, crop, stretch
from tpo_jax.generation import draw
from tpo_jax.generation.requests import Clip, Request

pytestmark = pytest.mark.parity


def _image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", [(40, 70), (70, 40), (25, 23), (100, 30)])
def test_onevision_tiles(size):
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    grid = [[24 * rows, 24 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": 24, "width": 24}, image_grid_pinpoints=grid, image_mean=[0.5] * 3,
        image_std=[0.5] * 3, do_pad=False,
    )  # fmt: skip
    image = _image(*size)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    ours = anyres_tiles(image, [tuple(pair) for pair in grid], 24) / 127.5 - 1
    assert difference(ours.transpose(0, 3, 1, 2), expected) < 1e-6


@pytest.mark.parametrize("size", [(40, 70), (71, 40), (24, 24)])
def test_clip_crop(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_normalize=False
    )
    image = _image(*size)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    assert difference(crop(image[None], 24)[0].transpose(2, 0, 1) / 255, expected) < 1e-6


def test_siglip_stretch():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": 24, "width": 24}, do_normalize=False)
    processor.resample = 3  # bicubic, as LLaVA's SigLIP processor has it
    image = _image(40, 70)
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    assert difference(stretch(image[None], 24)[0].transpose(2, 0, 1) / 255, expected) < 1e-6


@pytest.mark.parametrize("height, width", [(720, 1280), (1280, 720), (240, 320)])
def test_predict_gives_the_processor_the_decoded_frames(tmp_path, height, width):
    """From the file to the tower's pixels: nothing shrinks a frame before the published resize."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    path = tmp_path / "clip.mp4"
    draw.write_mp4(path, [_image(height, width, seed) for seed in range(2)], 1.0)
    with av.open(str(path)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    processor = SiglipImageProcessorPil(size={"height": 384, "width": 384}, do_normalize=False)
    processor.resample = 3  # bicubic, as LLaVA's SigLIP processor has it
    expected = np.stack(processor(decoded, return_tensors="np")["pixel_values"])
    ours = stretch(Clip.read(Request("x", path, "?")).frames("x", np.arange(2)), 384)
    assert difference(ours.transpose(0, 3, 1, 2) / 255, expected) < 1e-6
