"""Vision towers against `transformers`, on tiny random models: every hidden state within 2e-4."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.towers import difference, randomise, run, tensors_of, with_weights
from tpo_jax.interop.families.towers import clip_rows, siglip_rows
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.towers.registry import TOWERS
from tpo_jax.models.vision import to_patches

pytestmark = pytest.mark.parity
TOLERANCE = 2e-4
# Two heads of 72, as in SigLIP-so400m; 33 pixels leave a row and a column of pixels over.
SIZES = {
    "image_size": 33, "patch_size": 8, "width": 144, "depth": 3, "heads": 2, "mlp_width": 96,
    "max_frames": 4,
}  # fmt: skip


def tower_config(kind, **changes):
    activation = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}.get(kind, "gelu")
    fields = {"kind": kind, "activation": activation, "epsilon": 1e-5, "layer": -2}
    return TowerConfig(**SIZES | fields | changes)


@functools.cache
def pair(kind):
    """Their tower, and ours with its weights."""
    import transformers

    sizes = {
        "hidden_size": SIZES["width"], "intermediate_size": SIZES["mlp_width"],
        "num_hidden_layers": SIZES["depth"], "num_attention_heads": SIZES["heads"],
        "image_size": SIZES["image_size"], "patch_size": SIZES["patch_size"],
        "layer_norm_eps": 1e-5, "attn_implementation": "eager",
    }  # fmt: skip
    config = tower_config(kind)
    sizes["hidden_act"] = config.activation
    if kind == "clip":
        module = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
        rows = clip_rows("", "")
    elif kind == "siglip":
        settings = transformers.SiglipVisionConfig(**sizes, vision_use_head=False)
        module, rows = transformers.SiglipVisionModel(settings), siglip_rows("", "")
    else:
        del sizes["image_size"]
        settings = transformers.Siglip2VisionConfig(**sizes, num_patches=16)
        settings.vision_use_head = False
        module = transformers.Siglip2VisionModel(settings)
        rows = siglip_rows("", "", linear_patches=True)
    module = randomise(module)
    ours = functools.partial(TOWERS[kind], config)
    return module, with_weights(ours, rows, tensors_of(module))


def pixels(height, width, frames=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(1, frames, height, width, 3)).astype(np.float32)


def as_torch(frames):
    import torch

    return torch.from_numpy(frames.reshape(-1, *frames.shape[2:]).transpose(0, 3, 1, 2).copy())


def all_states(ours, frames):
    valid = jnp.ones(frames.shape[:2], bool)
    _, output, states = run(ours, jnp.asarray(frames), valid, method="run", keep=True)
    return output, states


def check_states(theirs, ours_states, output):
    assert len(theirs) == len(ours_states)
    for index, (a, b) in enumerate(zip(ours_states, theirs, strict=True)):
        assert difference(a[0], b) < TOLERANCE, index
    assert difference(output[0], theirs[-2]) < TOLERANCE


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("size", [(33, 33), (41, 26)])
def test_every_hidden_state(kind, size):
    theirs, ours = pair(kind)
    frames = pixels(*size)
    expected = theirs(
        as_torch(frames), interpolate_pos_encoding=size[0] != 33, output_hidden_states=True
    )
    output, states = all_states(ours, frames)
    check_states(expected.hidden_states, states, output)


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_the_output_is_the_hidden_state_that_the_config_names(kind):
    theirs, ours = pair(kind)
    frames = pixels(33, 33)
    expected = theirs(as_torch(frames), output_hidden_states=True).hidden_states[-2]
    found = run(ours, jnp.asarray(frames), jnp.ones((1, 2), bool))
    assert found.patches.shape == (1, 2, 4, 4, 144)
    patches = expected[:, 1:] if kind == "clip" else expected
    assert difference(found.patches.reshape(2, 16, 144), patches) < TOLERANCE
    if kind == "clip":
        assert difference(found.class_token[0], expected[:, 0]) < TOLERANCE


@pytest.mark.parametrize("size", [(32, 32), (48, 24), (24, 40)])
def test_siglip2_of_any_aspect_ratio(size):
    import torch

    theirs, ours = pair("siglip2")
    frames = pixels(*size)
    patches = np.asarray(to_patches(jnp.asarray(frames[0]), 8)).reshape(2, -1, 192)
    shapes = torch.tensor([[size[0] // 8, size[1] // 8]] * 2)
    expected = theirs(
        torch.from_numpy(patches.copy()), pixel_attention_mask=torch.ones(patches.shape[:2]),
        spatial_shapes=shapes, output_hidden_states=True,
    )  # fmt: skip
    output, states = all_states(ours, frames)
    check_states(expected.hidden_states, states, output)
