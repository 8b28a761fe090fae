import jax
import jax.numpy as jnp
import numpy as np

from tpo_jax.models.heads import ClipInfo, HeadInputs
from tpo_jax.models.heads.mask import (
    MaskHead,
    area_weights,
    bilinear_weights,
    decode,
    loss,
    mask_extent,
    resize_grid,
)
from tpo_jax.models.layers import Rngs
from tpo_jax.models.presets import micro


def _targets():
    """One slot, three frames of 4 x 4: an object, no object, not labelled."""
    masks = np.zeros((1, 1, 3, 4, 4), np.uint8)
    masks[0, 0, 0, 1:3, :2] = 1
    return {"masks": masks, "labelled": np.array([[[True, True, False]]])}


def test_perfect_masks_cost_nothing_and_count_their_frames():
    targets = _targets()
    logits = jnp.where(targets["masks"] > 0, 30.0, -30.0)
    presence = jnp.array([[[30.0, -30.0, 30.0]]])
    # Half of the object lies in each of two cells of 2 x 2 pixels, which costs log 2 at best.
    cells = jnp.array([[30.0, -30.0], [30.0, -30.0]]) * jnp.ones((1, 1, 3, 1, 1))
    predictions = {"masks": logits, "cells": cells, "presence": presence}
    terms = loss(predictions, targets, jnp.ones((1, 1), bool))
    least = {"mask/cells": np.log(2.0)}
    for name, term in terms.items():
        np.testing.assert_allclose(term.mean(), least.get(name, 0.0), atol=1e-5, err_msg=name)
    weights = {name: float(term.weight) for name, term in terms.items()}
    assert weights == {
        "mask/focal": 2.0, "mask/dice": 1.0, "mask/cells": 1.0, "mask/presence": 2.0
    }  # fmt: skip


def test_undecided_masks_cost_what_the_formulas_say():
    targets = _targets()
    zero = {
        "masks": jnp.zeros((1, 1, 3, 4, 4)), "cells": jnp.zeros((1, 1, 3, 2, 2)),
        "presence": jnp.zeros((1, 1, 3)),
    }  # fmt: skip
    terms = loss(zero, targets, jnp.ones((1, 1), bool))
    log2 = np.log(2.0)
    # alpha * (1/2)^2 * log 2 with 4 of 16 cells positive in the first frame, none in the second.
    focal = (4 * 0.25 + 12 * 0.75 + 16 * 0.75) / 32 * 0.25 * log2
    np.testing.assert_allclose(terms["mask/focal"].mean(), focal, rtol=1e-5)
    np.testing.assert_allclose(terms["mask/dice"].mean(), 1 - 5 / 13, rtol=1e-5)
    np.testing.assert_allclose(terms["mask/presence"].mean(), log2, rtol=1e-5)
    np.testing.assert_allclose(terms["mask/cells"].mean(), 2 * log2, rtol=1e-5)


def test_decode_resizes_drops_absent_frames_and_boxes_the_rest():
    logits = np.full((3, 2, 2), -5.0)
    logits[:2, 0, 0] = 5.0
    clip = ClipInfo(
        start=0.0, end=3.0, times=np.array([0.5, 1.5, 2.5]), height=4, width=8,
        frame_valid=np.array([True, True, False]),
    )  # fmt: skip
    result = decode({"masks": logits, "presence": np.array([4.0, -4.0, 4.0])}, clip)
    assert result["masks"].shape == (2, 4, 8) and result["masks"].dtype == bool
    assert result["boxes"] == [[0.0, 0.0, 0.5, 0.5], None]
    assert not result["masks"][1].any()
    assert result["times"] == [0.5, 1.5]


def test_extent_is_tight():
    mask = np.zeros((4, 8), bool)
    mask[1:3, 2:5] = True
    assert mask_extent(mask) == [2 / 8, 1 / 4, 5 / 8, 3 / 4]


def test_resampling_is_bilinear_with_half_pixel_centres():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    expected = jax.image.resize(x, (2, 8, 8, 3), "bilinear")
    np.testing.assert_allclose(resize_grid(x, 8), expected, atol=1e-5)
    np.testing.assert_allclose(bilinear_weights(5, 9).sum(axis=1), 1.0)
    np.testing.assert_allclose(bilinear_weights(4, 4), np.eye(4))


def test_area_weights_are_the_share_that_a_cell_covers():
    np.testing.assert_allclose(area_weights(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(area_weights(3, 2), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])
    np.testing.assert_allclose(area_weights(2, 4), [[1, 0], [1, 0], [0, 1], [0, 1]])


def test_an_object_that_comes_late_is_looked_up_on_the_frame_of_its_box():
    """The tokens in the box on that frame, and no others; nothing where there is no box."""
    head = MaskHead(micro(("mask",)), rngs=Rngs(0))
    grid, width = head.stem_grid, head.box_proj.kernel[...].shape[0]
    tokens = np.random.default_rng(0).normal(size=(1, 4, grid * grid, width)).astype(np.float32)
    box = np.array([0.0, 0.0, 1.0 / grid, 2.0 / grid], np.float32)  # two cells of the first column
    inputs = HeadInputs(
        None, None, None, None, None, tokens=tokens, boxes=np.broadcast_to(box, (1, 3, 4)),
        box_valid=np.array([[True, True, False]]), box_frame=np.array([[2, 0, 2]]),
    )  # fmt: skip
    found = np.asarray(head._drawn(inputs))[0]
    for slot, frame in ((0, 2), (1, 0)):
        seen = tokens[0, frame, [0, grid]].mean(0)
        np.testing.assert_allclose(found[slot], head.box_proj(seen), atol=1e-5)
    assert not found[2].any()
