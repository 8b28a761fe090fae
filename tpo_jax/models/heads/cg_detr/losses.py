"""Losses of the CG-DETR head, each with the published form and weight.

Every term is a `WeightedSum` whose weight counts labels. COUPLED terms compare a slot with slots of
other videos in the whole batch; all others are sums over slots, pairs or clips. Differences from
the release, each of which it would depend on chance, padding or a slip without, are in
docs/heads.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from tpo_jax.models.heads.cg_detr.head import unit
from tpo_jax.models.heads.cg_detr.labels import FULL_MARKS, ClipLabels, clip_labels
from tpo_jax.models.heads.cg_detr.layers import MASKED
from tpo_jax.models.heads.geometry import span_giou
from tpo_jax.models.heads.matching import match
from tpo_jax.parallel.weighted_sum import WeightedSum

NAME = "cg_detr"
SPAN, GIOU, LABEL = 10.0, 1.0, 4.0  # in the matching cost and in the loss
_BACKGROUND = 0.1
_MARGIN = 0.2
_TAU = 0.5
_PADDING = -1e3  # what upstream gives clips that take no part, before the temperature
_SMALL = 1e-6

COUPLED = frozenset(
    f"{NAME}/{term}"
    for term in ("rank", "negative", "attention_rank", "attention_negative", "align")
)


def published_weights(saliency: float = 4.0, scale: float = 1.0) -> dict[str, float]:
    """{term: weight} for config.losses.

    Args:
      saliency: 4 for Charades-STA and TACoS, 1 for QVHighlights.
      scale: of all terms; 0.05 beside a language loss, as in Task Preference Optimization.
    """
    spans = {"l1": SPAN, "giou": GIOU, "label": LABEL}
    family = ("margin", "rank", "negative")
    weights = spans | {f"earlier_{term}": weight for term, weight in spans.items()}
    weights |= dict.fromkeys((*family, *(f"attention_{term}" for term in family)), saliency)
    weights |= {"attention_bce": saliency}
    weights |= dict.fromkeys(("align", "clips", "distill", "orthogonal"), 1.0)
    return {f"{NAME}/{term}": scale * weight for term, weight in weights.items()}


def loss(predictions: Mapping, targets: Mapping, valid: jax.Array) -> dict[str, WeightedSum]:
    """All terms; see the functions below.

    Args:
      predictions: of `CgDetrHead`, in which frames are the clips.
      targets: "windows" float[B, S, W, 2] normalised to the clip, "window_valid" bool[B, S, W],
        "saliency" float[B, S, F], below 0 where a frame has no label.
      valid: bool[B, S], slots in use.
    """
    frame_valid = predictions["frame_valid"]
    labels = clip_labels(targets, valid, frame_valid)
    slots = valid & jnp.any(labels.relevant, axis=-1)
    window_valid = targets["window_valid"] & valid[..., None]
    windows = targets["windows"].astype(jnp.float32)
    # Of padding, any window with a length keeps the (unused) gradient finite.
    windows = jnp.where(window_valid[..., None], windows, jnp.array([0.25, 0.75]))
    terms = span_terms(predictions["logits"], predictions["spans"], windows, window_valid)
    terms |= score_terms(
        predictions["saliency"], predictions["negative_saliency"], predictions, labels, slots
    )
    terms["negative"] = WeightedSum.of(
        jnp.sum(jax.nn.softplus(predictions["negative_saliency"]) * frame_valid[:, None], axis=-1),
        predictions["negative"],
    )
    relevance, other = predictions["relevance"], predictions["negative_relevance"]
    attention = score_terms(relevance, other, predictions, labels, slots)
    terms |= {f"attention_{name}": term for name, term in attention.items()}
    terms["attention_negative"] = WeightedSum.of(
        jnp.sum(-_log(1 - other) * frame_valid[:, None], axis=-1), predictions["negative"]
    )
    bce = -jnp.where(labels.relevant, _log(relevance), _log(1 - relevance))
    terms["attention_bce"] = WeightedSum.of(_mean(bce, labels.judged), slots)
    terms["align"] = align_term(predictions, labels, slots)
    match_logits = predictions["clip_match"]
    clips = jax.nn.softplus(match_logits) - match_logits * labels.relevant
    terms["clips"] = WeightedSum.of(_mean(clips, labels.judged), slots)
    terms["distill"] = WeightedSum.of(distill(predictions), labels.relevant & slots[..., None])
    terms["orthogonal"] = WeightedSum.of(predictions["overlap"], valid)
    return {f"{NAME}/{name}": term for name, term in terms.items()}


def span_terms(
    logits: jax.Array, spans: jax.Array, windows: jax.Array, window_valid: jax.Array
) -> dict[str, WeightedSum]:
    """Matched queries against their windows, and foreground against background.

    Args:
      logits: float[B, S, layers, Q, 2], foreground first; spans: the same, centre and width.
      windows: float[B, S, W, 2], start and end; window_valid: bool[B, S, W].

    Returns: of the last layer "l1" (mean of centre and width) and "giou", a unit of weight a
      window; "label", cross-entropy with background at a tenth, mean over queries, a unit a slot
      with windows. The same as "earlier_...", summed over the layers before, each of which is
      matched anew.
    """
    layers = logits.shape[2]
    windows = jnp.repeat(windows[:, :, None], layers, axis=2)
    per_layer = jnp.repeat(window_valid[:, :, None], layers, axis=2)
    ends = _ends(spans)
    wanted = jnp.stack([windows.mean(-1), windows[..., 1] - windows[..., 0]], axis=-1)
    distance = jnp.abs(wanted[..., :, None, :] - spans[..., None, :, :])  # [..., W, Q, 2]
    _, giou = span_giou(windows[..., :, None, :], ends[..., None, :, :])
    foreground = jax.nn.softmax(logits)[..., 0]
    cost = SPAN * jnp.sum(distance, -1) - GIOU * giou - LABEL * foreground[..., None, :]
    query = match(cost, per_layer)
    chosen = jax.nn.one_hot(query, logits.shape[-2])  # all 0 for padding
    distance = jnp.sum(jnp.mean(distance, axis=-1) * chosen, axis=-1)
    giou = jnp.sum(giou * chosen, axis=-1)
    taken = jnp.any(chosen > 0, axis=-2)
    log_p = jax.nn.log_softmax(logits)
    label = jnp.where(taken, -log_p[..., 0], -_BACKGROUND * log_p[..., 1])
    found = {
        "l1": (distance, window_valid),
        "giou": (1 - giou, window_valid),
        "label": (jnp.mean(label, axis=-1), jnp.any(window_valid, axis=-1)),
    }
    terms = {}
    for name, (values, weights) in found.items():
        terms[name] = WeightedSum.of(values[:, :, -1], weights)
        terms[f"earlier_{name}"] = WeightedSum.of(jnp.sum(values[:, :, :-1], axis=2), weights)
    return terms


def score_terms(
    scores: jax.Array, other: jax.Array, predictions: Mapping, labels: ClipLabels, slots: jax.Array
) -> dict[str, WeightedSum]:
    """"margin" and "rank" of scores of clips float[B, S, F]; `other` are those for the negative."""
    clips = jnp.concatenate([scores, other], axis=-1)
    shown = jnp.broadcast_to(predictions["frame_valid"][:, None], other.shape)
    takes_part = jnp.concatenate(
        [labels.judged, shown & predictions["negative"][..., None]], axis=-1
    )
    grade = jnp.concatenate([labels.grade, jnp.zeros_like(labels.grade)], axis=-1)
    has_pairs = slots & jnp.any(labels.judged & ~labels.relevant, axis=-1)
    return {
        "margin": WeightedSum.of(margin(scores, labels), has_pairs),
        "rank": WeightedSum.of(rank_contrastive(clips, grade, takes_part), slots),
    }


def margin(scores: jax.Array, labels: ClipLabels) -> jax.Array:
    """float[B, S]: hinges of an easy pair and of a hard one.

    Easy: relevant against not relevant, the mean over all pairs, which is what the release draws
    pairs from. Hard: the best rated clip against the worst rated relevant one. Where all relevant
    clips are rated alike, there are two easy pairs.
    """
    hinge = jax.nn.relu(_MARGIN + scores[..., None, :] - scores[..., :, None])
    pairs = labels.relevant[..., :, None] & (labels.judged & ~labels.relevant)[..., None, :]
    flat = (*pairs.shape[:-2], -1)
    easy = _mean(hinge.reshape(flat), pairs.reshape(flat))
    best = jnp.argmax(labels.grade, axis=-1, keepdims=True)
    low = jnp.where(labels.relevant, labels.grade, jnp.inf)
    worst = jnp.argmin(low, axis=-1, keepdims=True)
    above, below = (jnp.take_along_axis(scores, i, axis=-1)[..., 0] for i in (best, worst))
    hard = jax.nn.relu(_MARGIN + below - above)
    graded = jnp.max(labels.grade, axis=-1) > jnp.min(low, axis=-1)
    return easy + jnp.where(graded, hard, easy)


def rank_contrastive(scores: jax.Array, grade: jax.Array, takes_part: jax.Array) -> jax.Array:
    """float[..., n] -> float[...]: clips of at least a grade against all, for grades 1 to 11."""
    logits = jnp.where(takes_part, scores, _PADDING) / _TAU
    log_p = jax.nn.log_softmax(logits, axis=-1)
    thresholds = jnp.arange(1, FULL_MARKS)[:, None]
    positive = (grade[..., None, :] >= thresholds) & takes_part[..., None, :]
    return -jnp.sum(_mean(log_p[..., None, :], positive), axis=-1) / FULL_MARKS


def align_term(predictions: Mapping, labels: ClipLabels, slots: jax.Array) -> WeightedSum:
    """Cross-entropies of moment tokens with sentences, and with dummy sentences.

    A moment should be like its own sentence; neither like those of other videos nor, in place of
    the moment, the rest of the video like any sentence. Dummies the other way round: the moment
    should be like anything but its own dummy sentence.

    Args:
      predictions: of the B * S slots in turn, "moment", "other", "sentence" and
        "dummy_sentence" float[B * S, C], and "video" [B * S], equal for slots of one video.
      slots: bool[B, S] with a relevant clip; each has one unit of weight.
    """
    n = slots.size
    moment, other, sentence, dummy = (
        unit(predictions[name]).reshape(n, -1)
        for name in ("moment", "other", "sentence", "dummy_sentence")
    )
    video, usable = predictions["video"].reshape(n), slots.reshape(n)
    own = jnp.eye(n, dtype=bool)
    apart = (video[:, None] != video[None]) & usable[None]
    has_other = jnp.any(labels.judged & ~labels.relevant, axis=-1).reshape(n, 1)
    columns = jnp.concatenate([own | apart, (own | apart) & has_other], axis=1)
    own = jnp.concatenate([own, jnp.zeros_like(own)], axis=1)

    def log_p(names: jax.Array) -> jax.Array:
        alike = jnp.concatenate([moment @ names.T, other @ names.T], axis=1)
        return jax.nn.log_softmax(jnp.where(columns, alike, MASKED), axis=1)

    with_own = jnp.sum(jnp.where(own, log_p(sentence), 0.0), axis=1)
    with_rest = _mean(log_p(dummy), columns & ~own)
    return WeightedSum.of(-with_own - with_rest, usable)


def distill(predictions: Mapping) -> jax.Array:
    """float[B, S, F]: KL of what clips are like from what they attend to, mean over keys."""
    wanted, valid = predictions["attention_target"], predictions["key_valid"][..., None, :]
    log_wanted = jnp.log(jnp.maximum(wanted, 1e-30))
    each = wanted * (log_wanted - jnp.log(predictions["attention"] + _SMALL))
    return _mean(each, valid)


def _ends(spans: jax.Array) -> jax.Array:
    """float[..., 2] centre and width -> start and end."""
    centre, half = spans[..., :1], spans[..., 1:] / 2
    return jnp.concatenate([centre - half, centre + half], axis=-1)


def _log(x: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(x, _SMALL))


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the last axis of the entries in `mask`; 0 where there is none."""
    count = jnp.sum(mask, axis=-1)
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1) / jnp.maximum(count, 1)
