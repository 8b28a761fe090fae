"""COCO's run-length codes of any mask."""

import hypothesis
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from tpo_jax.data.formats.masks import encode
from tpo_jax.data.rles import merge_rles, rle_pixels
from tpo_jax.generation.rles import Rles

# bool[n, h, w]: from nothing set to all set, of any shape, also one pixel wide.
MASKS = arrays.arrays(
    bool,
    arrays.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=40),
    elements=st.booleans(),
    fill=st.booleans(),
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(masks=MASKS)
def test_masks_come_back_as_they_were(masks):
    rles = Rles.of(masks)
    assert len(rles) == len(masks)
    for mask, rle, back in zip(masks, rles.items, rles, strict=True):
        np.testing.assert_array_equal(back, mask)
        assert rle == encode(mask) and (rle is None) == (not mask.any())
        if rle is not None:
            assert coco_mask.area(rle) == mask.sum() and rle_pixels(rle["counts"]) == mask.size
    given = [rle for rle in rles.items if rle is not None]
    if given:
        union = coco_mask.decode(merge_rles(given))
        np.testing.assert_array_equal(union, masks.any(axis=0))
