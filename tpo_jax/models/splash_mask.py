"""The causal rule for the splash kernel, told quickly where a block of it is all or nothing."""

from __future__ import annotations

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask


class CausalMask(splash_attention_mask.CausalMask):
    """The same values and the same kernel as its base, which evaluates every entry.

    To place its blocks the kernel asks for each of them, four times: 330,000 blocks in a prefix of
    512 LongVA frames, a minute of Python before anything is compiled. All but those on the diagonal
    are all visible or all hidden, which their corners tell.
    """

    def __init__(self, shape: tuple[int, int], offset: int = 0):
        super().__init__(shape, offset)
        self._ends: dict[tuple[int, int], tuple[int, int]] = {}
        self._constant: dict[tuple[bool, int, int], np.ndarray] = {}

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """bool[T, S] of the queries and keys of two slices with start and stop."""
        queries, keys = index
        first, last = self._reach(queries)
        if last < keys.start:
            return self._all(False, queries, keys)
        if first >= keys.stop - 1:
            return self._all(True, queries, keys)
        return super().__getitem__(index)

    def _reach(self, queries: slice) -> tuple[int, int]:
        """The last key that the first of these queries sees, and that the last of them sees."""
        where = queries.start, queries.stop
        if where not in self._ends:
            order = self.q_sequence[queries]  # of a placed prefix, not in order
            self._ends[where] = int(order.min()) + self.offset, int(order.max()) + self.offset
        return self._ends[where]

    def _all(self, value: bool, queries: slice, keys: slice) -> np.ndarray:
        kind = value, queries.stop - queries.start, keys.stop - keys.start
        if kind not in self._constant:
            self._constant[kind] = np.full(kind[1:], value)
        return self._constant[kind]
