"""The causal mask of the splash kernel: JAX's own, in fewer steps."""

import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask,
    splash_attention_mask_info,
)

from tpo_jax.models.splash_mask import CausalMask
from tpo_jax.parallel.context import ContextLayout

BLOCK = 128


def placed(mask, queries, devices):
    """With the queries of a prefix that is split over `devices`."""
    if devices > 1:
        mask.q_sequence = ContextLayout(queries, devices).order
    return mask


@pytest.mark.parametrize(
    ("queries", "keys", "offset", "devices"),
    [(1024, 1024, 0, 1), (256, 1280, 1024, 1), (256, 1280, 1000, 1), (1024, 1024, 0, 2)],
)
def test_the_kernel_gets_what_jax_would_give_it(queries, keys, offset, devices):
    base = splash_attention_mask.CausalMask((queries, keys), offset)
    found = []
    for mask in (base, CausalMask((queries, keys), offset)):
        heads = splash_attention_mask.MultiHeadMask([placed(mask, queries, devices)] * 2)
        for process in ("process_mask", "process_mask_dkv"):
            function = getattr(splash_attention_mask_info, process)
            found.append(function(heads, (BLOCK, BLOCK), q_seq_shards=devices)[0])
    for ours, theirs in zip(found[2:], found[:2], strict=True):
        for name, wanted in theirs._asdict().items():
            np.testing.assert_array_equal(getattr(ours, name), wanted, err_msg=name)


def test_only_blocks_on_the_diagonal_are_evaluated(monkeypatch):
    evaluated = []
    of_base = splash_attention_mask.CausalMask.__getitem__

    def record(self, index):
        evaluated.append(index)
        return of_base(self, index)

    monkeypatch.setattr(splash_attention_mask.CausalMask, "__getitem__", record)
    mask = CausalMask((1024, 1024))
    cuts = [slice(i, i + BLOCK) for i in range(0, 1024, BLOCK)]
    whole = np.block([[mask[rows, columns] for columns in cuts] for rows in cuts])
    np.testing.assert_array_equal(whole, np.tri(1024, dtype=bool))
    assert evaluated == [(cut, cut) for cut in cuts]
