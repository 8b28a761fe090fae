import jax.numpy as jnp
import numpy as np

from tpo_jax.models.heads import ClipInfo
from tpo_jax.models.heads.region import decode, loss


def test_loss_is_coordinate_errors_one_minus_giou_and_the_cells_of_the_box():
    predictions = {
        "boxes": jnp.array([[[0.1, 0.1, 0.3, 0.3], [0.0, 0.0, 1.0, 1.0]]]),
        "cells": jnp.zeros((1, 2, 4, 4)),
    }
    targets = {"boxes": jnp.array([[[0.2, 0.1, 0.4, 0.3], [0.0, 0.0, 0.0, 0.0]]])}
    terms = loss(predictions, targets, jnp.array([[True, False]]))
    np.testing.assert_allclose(terms["region/l1"].mean(), 0.2, rtol=1e-5)
    # Intersection 0.02, union and hull 0.06.
    np.testing.assert_allclose(terms["region/giou"].mean(), 1 - 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(terms["region/cells"].mean(), np.log(16), rtol=1e-5)
    assert all(term.weight == 1 for term in terms.values())


def test_decode_clips_to_the_frame_and_gives_pixels_and_time():
    clip = ClipInfo(
        start=2.0, end=6.0, times=np.array([2.5, 3.5]), frame_valid=np.ones(2, bool),
        height=50, width=100, frame=1,
    )  # fmt: skip
    result = decode({"boxes": np.array([-0.1, 0.2, 0.5, 1.2])}, clip)
    assert result == {
        "box": [0.0, 0.2, 0.5, 1.0], "box_pixels": [0.0, 10.0, 50.0, 50.0], "time": 3.5
    }  # fmt: skip
