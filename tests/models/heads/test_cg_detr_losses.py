"""Every term against its NumPy reference, on random predictions."""

import functools

import cg_detr_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpo_jax.models.heads import HEADS
from tpo_jax.models.heads.cg_detr import losses
from tpo_jax.models.heads.cg_detr.head import overlap
from tpo_jax.models.heads.cg_detr.labels import clip_labels, next_of_another_video

B, S, F, W, Q, LAYERS, C, K = 3, 2, 6, 3, 10, 3, 8, 7
VIDEOS = np.array([5, 5, 9])
TERMS = tuple(sorted(losses.published_weights()))


@functools.cache
def data():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=(B, S, *shape)).astype(np.float32)

    def attention():
        weights = np.exp(normal(F, K))
        weights[..., -2:] = 0  # padding
        return weights / weights.sum(-1, keepdims=True)

    frame_valid = np.arange(F) < np.array([[6], [4], [5]])
    predictions = {
        "logits": normal(LAYERS, Q, 2), "spans": rng.uniform(0.1, 0.9, (B, S, LAYERS, Q, 2)),
        "saliency": normal(F), "relevance": rng.uniform(0.05, 0.95, (B, S, F)),
        "negative": np.array([[True, False], [False, True], [True, False]]),
        "negative_saliency": normal(F), "negative_relevance": rng.uniform(0.05, 0.95, (B, S, F)),
        "video": np.repeat(VIDEOS[:, None], S, 1), "moment": normal(C), "other": normal(C),
        "sentence": normal(C), "dummy_sentence": normal(C), "clip_match": normal(F),
        "attention": attention(), "attention_target": attention(),
        "key_valid": np.broadcast_to(np.arange(K) < K - 2, (B, S, K)), "overlap": normal() ** 2,
        "frame_valid": frame_valid,
    }  # fmt: skip
    start = rng.uniform(0.0, 0.4, (B, S, W))
    saliency = np.full((B, S, F), -1.0)
    saliency[0] = [[0.0, 0.25, 1.0, 0.5, 0.0, -1.0], [0.0, 0.5, 0.5, 0.0, 0.0, 0.0]]
    targets = {
        "windows": np.stack([start, start + rng.uniform(0.1, 0.4, start.shape)], -1),
        "window_valid": np.arange(W) < np.array([[[1], [3]], [[2], [1]], [[1], [1]]]),
        "saliency": saliency, "valid": np.array([[True, True], [True, True], [True, False]]),
    }  # fmt: skip
    as_floats = functools.partial(jax.tree.map, lambda x: x.astype(np.float32)
                                  if x.dtype == np.float64 else x)  # fmt: skip
    return as_floats(predictions), as_floats(targets)


@functools.cache
def program():
    """(continuous predictions, the others, weights of terms) -> gradient, terms."""
    _, targets = data()

    def total(continuous, others, weights):
        terms = losses.loss(continuous | others, targets, targets["valid"])
        return sum(weights[name] * term.mean() for name, term in terms.items()), terms

    return jax.jit(jax.grad(total, has_aux=True))


def run(weights):
    predictions, _ = data()
    # What is distilled is constant: the head gives it without a gradient.
    given = {name for name, value in predictions.items() if value.dtype == np.float32}
    given -= {"attention_target"}
    continuous, others = (
        {name: value for name, value in predictions.items() if (name in given) == wanted}
        for wanted in (True, False)
    )
    weights = {name: np.float32(weights.get(name, 0)) for name in TERMS}
    return jax.device_get(program()(continuous, others, weights))


@functools.cache
def found():
    return {name: (float(t.total), float(t.weight)) for name, t in run({})[1].items()}


def labels_of(b, s):
    """grade and judged of a slot, by the rule in words."""
    predictions, targets = data()
    shown = predictions["frame_valid"][b]
    saliency = targets["saliency"][b, s]
    if (saliency[shown] >= 0).any():
        return np.round(saliency * 12), shown & (saliency >= 0)
    centres = (np.arange(F) + 0.5) / shown.sum()
    grade = np.zeros(F)
    for (start, end), ok in zip(targets["windows"][b, s], targets["window_valid"][b, s],
                                strict=True):  # fmt: skip
        inside = [t for t in np.flatnonzero(shown) if start <= centres[t] <= end]
        nearest = min(np.flatnonzero(shown), key=lambda t: abs(centres[t] - (start + end) / 2))
        if ok:
            grade[inside or [nearest]] = 1
    return grade, shown


SLOTS = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def expected(term):
    """(total, weight) of a term over all slots."""
    predictions, targets = data()
    total = weight = 0.0
    for b, s in SLOTS:
        p = {name: value[b, s] for name, value in predictions.items() if value.ndim > 2}
        shown, has_negative = predictions["frame_valid"][b], predictions["negative"][b, s]
        grade, judged = labels_of(b, s)
        family, _, kind = term.rpartition("_")
        if kind in ("l1", "giou", "label"):
            windows = targets["windows"][b, s][targets["window_valid"][b, s]]
            for layer in range(LAYERS - 1) if family else [LAYERS - 1]:
                total += reference.span_terms(p["logits"][layer], p["spans"][layer], windows)[kind]
            weight += 1 if kind == "label" else len(windows)
        elif kind in ("margin", "rank", "negative"):
            own, other = ("relevance", "negative_relevance") if family else (
                "saliency", "negative_saliency")  # fmt: skip
            other = p[other] if has_negative else None
            if kind == "margin":
                total += reference.margin(p[own], grade, judged)
            elif kind == "rank":
                total += reference.rank(p[own], grade, judged, other, shown)
            elif has_negative:
                function = reference.attention_negative if family else reference.negative
                total += function(other, shown)
            weight += has_negative if kind == "negative" else 1
        elif term == "attention_bce":
            total += reference.attention_bce(p["relevance"], grade, judged)
            weight += 1
        elif term == "clips":
            total += reference.clips(p["clip_match"], grade, judged)
            weight += 1
        elif term == "distill":
            for t in np.flatnonzero(judged & (grade > 0)):
                total += reference.distill(
                    p["attention_target"][t], p["attention"][t], predictions["key_valid"][b, s]
                )
                weight += 1
        elif term == "orthogonal":
            total += predictions["overlap"][b, s]
            weight += 1
        elif term == "align":
            own = next(x for x in token_slots() if x["at"] == (b, s))
            total += reference.align(own, token_slots())
            weight += 1
    return total, weight


@functools.cache
def token_slots():
    predictions, _ = data()
    slots = []
    for b, s in SLOTS:
        grade, judged = labels_of(b, s)
        names = ("moment", "other", "sentence", "dummy_sentence")
        tokens = {name: predictions[name][b, s].astype(np.float64) for name in names}
        has_other = bool((judged & (grade <= 0)).any())
        slots.append(tokens | {"at": (b, s), "video": VIDEOS[b], "has_other": has_other})
    return slots


@pytest.mark.parametrize("term", TERMS)
def test_a_term_is_its_reference(term):
    total, weight = expected(term.removeprefix("cg_detr/"))
    assert weight > 0 and total > 0
    assert found()[term] == pytest.approx((total, weight), rel=2e-5)


READS = {
    "l1": {"spans"}, "giou": {"spans"}, "label": {"logits"},
    "margin": {"saliency"}, "rank": {"saliency", "negative_saliency"},
    "negative": {"negative_saliency"}, "attention_margin": {"relevance"},
    "attention_rank": {"relevance", "negative_relevance"},
    "attention_negative": {"negative_relevance"}, "attention_bce": {"relevance"},
    "align": {"moment", "other", "sentence", "dummy_sentence"}, "clips": {"clip_match"},
    "distill": {"attention"}, "orthogonal": {"overlap"},
}  # fmt: skip


@pytest.mark.parametrize("term", TERMS)
def test_a_term_has_a_gradient_in_what_it_reads(term):
    gradient, _ = run({term: 1.0})
    assert all(np.all(np.isfinite(value)) for value in gradient.values())
    moved = {name for name, value in gradient.items() if np.any(value)}
    assert moved == READS[term.removeprefix("cg_detr/").removeprefix("earlier_")]


def test_there_are_no_other_terms_and_coupled_ones_exist():
    assert set(found()) == set(TERMS)
    assert HEADS["cg_detr"].coupled < set(TERMS)


def test_published_weights():
    """10, 1 and 4 on every layer, 4 (or 1) on the saliency family, 1 on the rest, all times 0.05
    beside a language loss."""
    weights = losses.published_weights(scale=0.05)
    assert weights["cg_detr/l1"] == weights["cg_detr/earlier_l1"] == 0.5
    assert weights["cg_detr/giou"] == weights["cg_detr/distill"] == 0.05
    assert weights["cg_detr/label"] == weights["cg_detr/attention_bce"] == 0.2
    assert losses.published_weights(saliency=1.0)["cg_detr/rank"] == 1.0


def test_overlap_is_the_mean_cosine_with_one_side_constant():
    vectors = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
    value, gradient = jax.jit(jax.value_and_grad(overlap))(vectors)
    assert float(value) == pytest.approx(reference.overlap(vectors), rel=1e-5)
    # Where one vector moves alone, its own row changes and its column does not.
    for axis in range(4):
        step = 1e-4 * np.eye(4)[axis]
        changed = [
            sum(abs(reference.cosine(one, v)) for i, v in enumerate(vectors) if i != 2) / 25
            for one in (vectors[2] + step, vectors[2] - step)
        ]
        numeric = (changed[0] - changed[1]) / 2e-4
        assert float(gradient[2, axis]) == pytest.approx(numeric, abs=1e-5)
    assert np.abs(gradient[2]).max() > 1e-3


def test_the_negative_is_the_next_valid_slot_of_another_video():
    valid = np.array([[True, False], [True, True], [True, False], [False, True]])
    index, has = next_of_another_video(jnp.array(valid), jnp.array([7, 7, 8, 9]))
    assert has.tolist() == valid.reshape(-1).tolist()
    assert [int(i) for i, ok in zip(index, has, strict=True) if ok] == [4, 4, 4, 7, 0]
    _, has = next_of_another_video(jnp.array(valid), jnp.array([7, 7, 7, 7]))
    assert not has.any()


def test_labels_are_ratings_where_there_are_any_and_windows_elsewhere():
    predictions, targets = data()
    labels = jax.jit(clip_labels)(targets, targets["valid"], predictions["frame_valid"])
    for b, s in SLOTS:
        grade, judged = labels_of(b, s)
        np.testing.assert_array_equal(labels.judged[b, s], judged)
        np.testing.assert_array_equal(labels.grade[b, s], np.where(judged, grade, 0))
    assert not labels.judged[2, 1].any() and not labels.relevant[2, 1].any()
