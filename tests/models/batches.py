"""Random batches in the shape of the data pipeline's."""

import numpy as np


def model_batch(config, *, B, F, K, R, S=1, W=2, seed=0, heads=None):
    """A full batch for `config`; in branch 0 a box at index 1, then one valid slot a head."""
    rng = np.random.default_rng(seed)
    visual, size, m = config.num_visual_tokens(F), config.vision.image_size, config.mask_size
    P = config.visual_offset + visual + 1
    heads = config.heads if heads is None else heads

    def slots(number):
        valid = np.zeros((B, S), bool)
        valid[:, 0] = True
        return {
            "branch": np.zeros((B, S), np.int32),
            "index": np.full((B, S), 1 + number, np.int32),
            "valid": valid,
        }

    def boxes():
        low = rng.uniform(0.05, 0.4, (B, S, 2))
        return np.concatenate([low, low + rng.uniform(0.2, 0.5, (B, S, 2))], -1).astype(np.float32)

    def windows():
        low = rng.uniform(0.0, 0.5, (B, S, W, 1))
        return np.concatenate([low, low + rng.uniform(0.2, 0.4, low.shape)], -1).astype(np.float32)

    targets = {
        "region": lambda: {
            "boxes": boxes(), "frame": rng.integers(0, F, (B, S)).astype(np.int32)
        },
        "temporal": lambda: {
            "windows": windows(),
            "window_valid": np.arange(W) < rng.integers(1, W + 1, (B, S, 1)),
            "saliency": rng.uniform(0, 1, (B, S, F)).astype(np.float32),
        },
        "mask": lambda: {
            "masks": rng.integers(0, 2, (B, S, F, m, m)).astype(np.uint8),
            "labelled": np.ones((B, S, F), bool),
        },
    }  # fmt: skip
    batch = {
        "frames": rng.integers(0, 256, (B, F, size, size, 3)).astype(np.uint8),
        "frame_valid": np.ones((B, F), bool),
        "frame_times": np.tile(np.arange(F, dtype=np.float32) / 2, (B, 1)),
        "prefix_tokens": rng.integers(5, 900, (B, P)).astype(np.int32),
        "prefix_positions": np.tile(np.arange(P, dtype=np.int32), (B, 1)),
        "prefix_segments": np.ones((B, P), np.int32),
        "branch_tokens": rng.integers(5, 900, (B, K, R)).astype(np.int32),
        "branch_positions": np.tile(np.arange(P, P + R, dtype=np.int32), (B, K, 1)),
        "branch_segments": np.ones((B, K, R), np.int32),
        "answer_positions": np.ones((B, K, 1), np.int32),  # the question ends at the box
        "slots": {
            name: slots(1 + i) | targets[name]() for i, name in enumerate(heads)
        },
    }
    if heads:
        drawn = {"boxes": boxes(), "frame": np.zeros((B, S), np.int32)}
        batch["slots"]["box"] = slots(0) | drawn
    return batch
