"""Captions: BLEU-1 ... 4 and CIDEr as pycocoevalcap defines them, METEOR by pycocoevalcap itself.

Captions are tokenised text, words between blanks; published scores tokenise with the Penn Treebank
tokenizer first (`pycocoevalcap.tokenizer`). Every item has one candidate and one or more
references. CIDEr weighs words by how rare they are among the references given, so its values are
only comparable on the same set of items.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

MAX_ORDER = 4
CIDER_SIGMA = 6.0
# pycocoevalcap's guards against 0/0; part of its numbers.
_TINY, _SMALL = 1e-15, 1e-9


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often n-grams of one order occur in captions: sorted by (caption, n-gram).

    Attributes:
      caption: int[rows] index of the caption.
      ngram: int[rows] number of the n-gram, the same in candidates and references.
      count: int[rows], at least 1.
    """

    caption: np.ndarray
    ngram: np.ndarray
    count: np.ndarray


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Candidates, captions 0..items-1, and after them the references of all items in order.

    Attributes:
      length: int[captions] words.
      item: int[captions] item of each caption.
      counts: of the n-grams of order 1, 2, 3, 4.
    """

    length: np.ndarray
    item: np.ndarray
    counts: tuple[Counts, ...]

    @property
    def items(self) -> int:
        return int(self.item[-1]) + 1

    def split(self, order: int) -> tuple[Counts, Counts]:
        """The n-gram counts of the candidates and of the references."""
        counts = self.counts[order]
        cut = np.searchsorted(counts.caption, self.items)
        first, second = slice(None, cut), slice(cut, None)
        return tuple(
            Counts(counts.caption[s], counts.ngram[s], counts.count[s]) for s in (first, second)
        )


def read_corpus(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Corpus:
    """Counts the n-grams of one candidate and one or more references an item."""
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"references: expected one list an item and at least one item, got {len(references)} "
            f"for {len(candidates)} candidates"
        )
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references[{index}]: expected a list of captions, got {texts!r}")
    words = [text.split() for text in itertools.chain(candidates, *references)]
    length = np.array([len(w) for w in words])
    numbers: dict[str, int] = {}
    token = np.array(
        [numbers.setdefault(word, len(numbers)) for word in itertools.chain(*words)], np.int64
    )
    items = np.arange(len(candidates))
    item = np.concatenate([items, np.repeat(items, [len(texts) for texts in references])])
    caption = np.repeat(np.arange(len(words)), length)
    left = np.repeat(np.cumsum(length), length) - np.arange(len(token))  # words from here on
    ngram, counts = token, []
    for order in range(1, MAX_ORDER + 1):
        rows = np.flatnonzero(left >= order)
        if order > 1:
            # `ngram` numbers what starts at each word with one word less.
            longer = np.zeros(len(token), np.int64)
            longer[rows] = ngram[rows] * len(numbers) + token[rows + order - 1]
            _, found = np.unique(longer[rows], return_inverse=True)
            longer[rows] = found
            ngram = longer
        counts.append(_count(caption[rows], ngram[rows]))
    return Corpus(length, item, tuple(counts))


def bleu(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """BLEU-1 ... 4 of the corpus float64[4] and of each item float64[items, 4].

    Clipped precision against the reference that has most of an n-gram; brevity penalty against the
    reference closest in length, the shorter of two.
    """
    test = corpus.length[: corpus.items]
    item, length = corpus.item[corpus.items :], corpus.length[corpus.items :]
    order = np.lexsort((length, np.abs(length - test[item]), item))
    closest = length[order[np.flatnonzero(np.diff(item[order], prepend=-1))]]
    right = np.zeros((corpus.items, MAX_ORDER))
    for n in range(MAX_ORDER):
        hypothesis, reference = corpus.split(n)
        of_item = item[reference.caption - corpus.items]
        most = _largest(of_item, reference.ngram, reference.count)
        row, found = _look_up(most, hypothesis.caption, hypothesis.ngram)
        clipped = np.minimum(hypothesis.count[found], most.count[row])
        right[:, n] = np.bincount(hypothesis.caption[found], clipped, corpus.items)
    guessed = np.maximum(test[:, None] - np.arange(MAX_ORDER), 0)
    of_items = _bleu(right, guessed, test[:, None], closest[:, None])
    whole = _bleu(right.sum(axis=0), guessed.sum(axis=0), test.sum(), closest.sum())
    return whole, of_items


def cider(corpus: Corpus) -> tuple[float, np.ndarray]:
    """CIDEr-D of the corpus, the mean over items, and of each item float64[items]."""
    item = corpus.item[corpus.items :]
    bigrams = np.maximum(corpus.length - 1, 0)
    difference = bigrams[: corpus.items][item] - bigrams[corpus.items :]
    penalty = np.exp(-(difference.astype(np.float64) ** 2) / (2 * CIDER_SIGMA**2))
    similarity = np.zeros(len(item))
    for n in range(MAX_ORDER):
        hypothesis, reference = corpus.split(n)
        of_item = item[reference.caption - corpus.items]
        in_items = _largest(of_item, reference.ngram, reference.count).ngram
        kinds = 1 + corpus.counts[n].ngram.max(initial=0)
        rarity = np.log(corpus.items) - np.log(np.maximum(np.bincount(in_items, None, kinds), 1))
        weights = hypothesis.count * rarity[hypothesis.ngram]
        ref_weights = reference.count * rarity[reference.ngram]
        row, found = _look_up(hypothesis, of_item, reference.ngram)
        caption = reference.caption - corpus.items
        product = np.minimum(weights[row], ref_weights[found]) * ref_weights[found]
        dot = np.bincount(caption[found], product, len(item))
        norm = np.sqrt(np.bincount(hypothesis.caption, weights**2, corpus.items))[item]
        norm *= np.sqrt(np.bincount(caption, ref_weights**2, len(item)))
        similarity += np.divide(dot, norm, out=np.zeros(len(item)), where=norm > 0)
    total = np.bincount(item, similarity * penalty, corpus.items)
    of_items = 10 * total / MAX_ORDER / np.bincount(item, None, corpus.items)
    return float(of_items.mean()), of_items


def meteor(
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, np.ndarray]:
    """METEOR 1.5 of the corpus and of each item float64[items]; needs pycocoevalcap and Java."""
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError as error:
        raise ValueError("METEOR: pip install 'tpo_jax[captions]' (pycocoevalcap)") from error
    try:
        scorer = Meteor()
    except FileNotFoundError as error:
        raise ValueError("METEOR: install Java; the command `java` was not found") from error
    whole, of_items = scorer.compute_score(
        {index: list(texts) for index, texts in enumerate(references)},
        {index: [text] for index, text in enumerate(candidates)},
    )
    return float(whole), np.array(of_items)


def _bleu(
    right: np.ndarray, guessed: np.ndarray, length: np.ndarray, closest: np.ndarray
) -> np.ndarray:
    """float64[..., 4]: geometric mean of the precisions up to each order, times the penalty."""
    precision = (right + _TINY) / (guessed + _SMALL)
    score = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (length + _TINY) / (closest + _SMALL)
    return score * np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)


def _count(caption: np.ndarray, ngram: np.ndarray) -> Counts:
    kinds = int(ngram.max(initial=0)) + 1
    key, count = np.unique(caption * kinds + ngram, return_counts=True)
    return Counts(key // kinds, key % kinds, count)


def _largest(item: np.ndarray, ngram: np.ndarray, count: np.ndarray) -> Counts:
    """Largest count of each n-gram in any caption of each item."""
    order = np.lexsort((ngram, item))
    item, ngram = item[order], ngram[order]
    first = np.ones(len(item), bool)
    first[1:] = (np.diff(item) != 0) | (np.diff(ngram) != 0)
    starts = np.flatnonzero(first)
    most = np.maximum.reduceat(count[order], starts) if starts.size else count
    return Counts(item[starts], ngram[starts], most)


def _look_up(
    table: Counts, caption: np.ndarray, ngram: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of the table hold (caption, n-gram) pairs: (row of the table, index of pair)."""
    kinds = 1 + max(table.ngram.max(initial=0), ngram.max(initial=0))
    keys, wanted = table.caption * kinds + table.ngram, caption * kinds + ngram
    row = np.searchsorted(keys, wanted)
    found = np.flatnonzero(keys[np.minimum(row, len(keys) - 1)] == wanted) if len(keys) else row[:0]
    return row[found], found
