"""BLEU and CIDEr by hand; tests/parity holds them to pycocoevalcap."""

import numpy as np
import pytest

from tpo_jax.evaluation.metrics import captions


def test_bleu_by_hand():
    corpus = captions.read_corpus(
        ["the the cat", "a dog"], [["the cat sat here", "on the mat"], ["a dog", "dogs"]]
    )
    whole, of_items = captions.bleu(corpus)
    # "the" counts once, as often as in one reference; the reference of three words is the closest.
    assert of_items[0, 0] == pytest.approx(2 / 3)
    assert of_items[0, 1] == pytest.approx(np.sqrt(2 / 3 * 1 / 2))
    assert of_items[1, :2] == pytest.approx([1, 1])
    assert whole[0] == pytest.approx(4 / 5) and whole[1] == pytest.approx(np.sqrt(4 / 5 * 2 / 3))


def test_brevity_is_punished_against_the_closest_reference():
    corpus = captions.read_corpus(["a b c"], [["a b c d e", "a"]])
    _, of_items = captions.bleu(corpus)
    assert of_items[0, 0] == pytest.approx(1)  # of 5 and 1 words, equally far, the shorter counts
    corpus = captions.read_corpus(["a b c"], [["a b c d e"]])
    assert captions.bleu(corpus)[1][0, 0] == pytest.approx(np.exp(1 - 5 / 3))


def test_cider_by_hand():
    references = [["a red dog runs", "a dog"], ["a blue cat sits"], ["a sky"]]
    corpus = captions.read_corpus(["a red dog runs", "a", "zebra"], references)
    whole, of_items = captions.cider(corpus)
    # "a" is in every item and weighs nothing; n-grams of three and four words only in the first
    # reference. Against "a dog": the bigrams differ, and it has two fewer.
    weight = np.log(3)
    unigrams = weight**2 / (np.sqrt(3) * weight * weight)
    far = unigrams * np.exp(-(2**2) / (2 * 6**2))
    assert of_items[0] == pytest.approx(10 * (4 + far) / 4 / 2)
    np.testing.assert_array_equal(of_items[1:], 0)
    assert whole == pytest.approx(of_items.mean())


def test_one_item_and_empty_captions_score_zero():
    for candidate, references in (("a b", ["a b"]), ("", ["a b"]), ("a b", [""]), ("", [""])):
        corpus = captions.read_corpus([candidate], [references])
        assert captions.cider(corpus)[0] == 0  # log(1 item) is 0
        assert captions.bleu(corpus)[0][3] < 1e-3


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="at least one item"):
        captions.read_corpus([], [])
    with pytest.raises(ValueError, match=r"references\[1\]"):
        captions.read_corpus(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match=r"references\[0\]"):
        captions.read_corpus(["a"], ["a"])
