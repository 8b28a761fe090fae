"""The published region MLP against float64 NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from fake_batches import micro
from flax import nnx

from tpo_jax.models.heads import ClipInfo, HeadInputs
from tpo_jax.models.heads.region_mlp import RegionMlpHead, decode, loss, published_weights
from tpo_jax.models.layers import Rngs

RNG = np.random.default_rng(0)


def test_boxes_are_those_of_two_layers_with_a_rectifier():
    head = RegionMlpHead(dataclasses.replace(micro(), heads=("region_mlp",)), rngs=Rngs(0))
    width = micro().language.width
    weights = {
        "fc1": (RNG.normal(size=(width // 2, width)), RNG.normal(size=width // 2)),
        "fc2": (RNG.normal(size=(4, width // 2)), RNG.normal(size=4)),
    }
    for name, (weight, bias) in weights.items():
        layer = getattr(head.mlp, name)
        assert layer.kernel.shape == weight.T.shape
        layer.kernel = nnx.Param(jnp.asarray(weight.T, jnp.float32))
        layer.bias = nnx.Param(jnp.asarray(bias, jnp.float32))
    states = RNG.normal(size=(2, 3, width))
    inputs = HeadInputs(jnp.asarray(states, jnp.float32), None, None, None, None)
    hidden = np.maximum(states @ weights["fc1"][0].T + weights["fc1"][1], 0)
    expected = hidden @ weights["fc2"][0].T + weights["fc2"][1]
    assert (hidden == 0).any() and np.abs(expected).max() > 1
    boxes = head(inputs)["boxes"]
    assert boxes.dtype == jnp.float32
    np.testing.assert_allclose(boxes, expected, rtol=1e-5, atol=1e-4)


def giou(one, other):
    """Of two boxes whose corners are in order, by the definition."""
    area = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = np.prod(np.maximum(high - low, 0))
    hull = np.prod(np.maximum(one[2:], other[2:]) - np.minimum(one[:2], other[:2]))
    union = sum(area) - shared
    return shared / union - (hull - union) / hull


def test_the_published_loss():
    """2 x the mean distance of coordinates and 0.2 x (1 - GIoU), over valid slots."""
    boxes, wanted = (np.sort(RNG.uniform(size=(2, 3, 2, 2)), axis=2) for _ in range(2))
    boxes, wanted = boxes.reshape(2, 3, 4), wanted.reshape(2, 3, 4)
    valid = np.array([[True, False, True], [True, True, False]])
    terms = loss({"boxes": jnp.asarray(boxes)}, {"boxes": jnp.asarray(wanted)}, jnp.asarray(valid))
    total = sum(weight * float(terms[name].mean()) for name, weight in published_weights().items())
    overlaps = [giou(b, w) for b, w in zip(boxes[valid], wanted[valid], strict=True)]
    expected = 2 * np.abs(boxes - wanted)[valid].mean() + 0.2 * (1 - np.mean(overlaps))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert terms.keys() == published_weights().keys()


def test_decode_puts_corners_in_order():
    clip = ClipInfo(
        start=0.0, end=1.0, times=np.array([0.5]), frame_valid=np.ones(1, bool), height=50,
        width=100,
    )  # fmt: skip
    result = decode({"boxes": np.array([0.5, 1.2, 0.1, 0.2])}, clip)
    assert result["box"] == [0.1, 0.2, 0.5, 1.0]
