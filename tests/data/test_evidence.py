"""What blind and middle-frame batches hide, and that nothing else changes."""

import numpy as np
import pytest

from tpo_jax.data.evidence import apply_evidence, middle_frame

OFFSET, FRAMES, PER_FRAME = 2, 5, 3


def batch(valid_frames=(5, 3)):
    """Two rows: prefix of 2 tokens, 15 visual ones, a closing token, a question, padding."""
    rows = len(valid_frames)
    rng = np.random.default_rng(0)
    tokens = np.zeros((rows, 24), np.int32)
    tokens[:, :2] = (1, 5)
    tokens[:, 17:20] = (6, 40, 41)
    segments = (np.arange(24) < 20).astype(np.int32) * np.ones((rows, 1), np.int32)
    valid = np.arange(FRAMES) < np.array(valid_frames)[:, None]
    hidden = np.repeat(~valid, PER_FRAME, axis=1)
    segments[:, OFFSET : OFFSET + 15][hidden] = 0
    return {
        "frames": rng.integers(1, 256, (rows, FRAMES, 4, 4, 3), np.uint8),
        "frame_valid": valid,
        "prefix_tokens": tokens,
        "prefix_segments": segments,
        "branch_tokens": rng.integers(0, 9, (rows, 2, 6)),
        "slots": {"region": {"valid": np.ones((rows, 1), bool)}},
    }


def test_full_is_the_same_batch():
    given = batch()
    assert apply_evidence(given, "full") is given


def test_blind_hides_every_frame_and_only_the_frames():
    given, out = batch(), apply_evidence(batch(), "blind")
    assert not out["frames"].any() and out["frames"].dtype == np.uint8
    assert not out["frame_valid"].any()
    assert not out["prefix_segments"][:, OFFSET : OFFSET + 15].any()
    text = np.r_[0:2, 17:24]
    np.testing.assert_array_equal(
        out["prefix_segments"][:, text], given["prefix_segments"][:, text]
    )
    for name in ("prefix_tokens", "branch_tokens"):
        np.testing.assert_array_equal(out[name], given[name])
    np.testing.assert_array_equal(out["slots"]["region"]["valid"], [[True], [True]])


def test_middle_frame_keeps_the_middle_of_the_valid_frames():
    given, out = batch((5, 3)), apply_evidence(batch((5, 3)), "middle_frame")
    np.testing.assert_array_equal(np.flatnonzero(out["frame_valid"][0]), [2])
    np.testing.assert_array_equal(np.flatnonzero(out["frame_valid"][1]), [1])
    for row, frame in ((0, 2), (1, 1)):
        seen = np.flatnonzero(out["prefix_segments"][row, OFFSET : OFFSET + 15])
        np.testing.assert_array_equal(seen, np.arange(3) + PER_FRAME * frame)
        np.testing.assert_array_equal(out["frames"][row, frame], given["frames"][row, frame])
        assert not np.delete(out["frames"][row], frame, axis=0).any()


def test_the_given_batch_is_left_alone():
    given, copy = batch(), batch()
    apply_evidence(given, "blind")
    for name in ("frames", "frame_valid", "prefix_segments"):
        np.testing.assert_array_equal(given[name], copy[name])


def test_middle_of_even_counts_one_frame_and_no_frame():
    valid = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(middle_frame(valid), [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="evidence: got 'half', expected one of full, blind"):
        apply_evidence(batch(), "half")
    wrong = batch()
    wrong["prefix_tokens"][:, 2] = 9
    with pytest.raises(ValueError, match="14, 14.* visual tokens, expected a multiple of the 5"):
        apply_evidence(wrong, "blind")
