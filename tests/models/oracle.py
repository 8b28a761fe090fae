"""Slow, obvious versions that the tests compare with. A dense mask exists only here."""

import numpy as np


def dense_attention(q, k, v, mask):
    """q float[T, N, H], k and v float[S, G, H], mask bool[T, S] -> float64[T, N, H]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    T, N, H = q.shape
    group = N // k.shape[1]
    out = np.zeros((T, N, H))
    for n in range(N):
        for t in range(T):
            seen = np.flatnonzero(mask[t])
            logits = k[seen, n // group] @ q[t, n] / np.sqrt(H)
            weights = np.exp(logits - logits.max())
            out[t, n] = (weights / weights.sum()) @ v[seen, n // group]
    return out


def visible(q_segments, kv_segments, causal_offset, window=None):
    """bool[T, S] from the rule in words: same segment, j <= i + offset, and less than `window`
    tokens back."""
    mask = np.zeros((len(q_segments), len(kv_segments)), bool)
    for i, a in enumerate(q_segments):
        for j, b in enumerate(kv_segments):
            mask[i, j] = a == b and (causal_offset is None or j <= i + causal_offset)
            if window is not None and i + causal_offset - j >= window:
                mask[i, j] = False
    return mask
