"""What a run minimises: from model outputs and a batch to named sums.

An objective has two halves. `predict` runs the model; `terms` and `metrics` are pure functions of
its predictions and the batch.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.data.rows import CONTRAST_FIELDS, kind_id
from tpo_jax.errors import UserError
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import HEADS
from tpo_jax.models.layers import Linear
from tpo_jax.objectives.language import answer_accuracy, language_loss, token_accuracy
from tpo_jax.objectives.logps import TokenScores, gather_positions, token_scores
from tpo_jax.objectives.preference import PairTokens, PreferenceConfig, preference_losses
from tpo_jax.objectives.preference.metrics import grouped_metrics, preference_metrics
from tpo_jax.objectives.preference.registry import scores_of
from tpo_jax.parallel.weighted_sum import WeightedSum

Batch = dict[str, Any]
Sums = dict[str, WeightedSum]


class Objective(Protocol):
    """The interface of `training.step`.

    weights is {term: weight in the total}. An objective may also name, in `coupled`, the terms
    whose value over a batch is not the mean over its micro-batches: they are not accumulated.
    """

    @property
    def weights(self) -> Mapping[str, float]: ...

    def predict(self, model: Any, batch: Batch, keys: jax.Array | None) -> Any:
        """What `terms` and `metrics` read. keys: key[B], one a row, for dropout; None for none."""

    def terms(self, predictions: Any, batch: Batch) -> Sums: ...

    def metrics(self, predictions: Any, batch: Batch) -> Sums: ...


def answer_scores(
    model: Any,
    outputs: Any,
    batch: Batch,
    chunk: int = 512,
    collision: bool = False,
    reference: tuple[jax.Array, jax.Array] | None = None,
) -> TokenScores:
    """TokenScores float32[B, K, A] of the answer tokens; the LM head runs on those only.

    reference: hidden states `answer_hidden` and output table of the reference, for the KL to it.
    """
    language = model.language
    return token_scores(
        answer_hidden(outputs, batch),
        language.table,
        batch["answer_tokens"],
        vocab_size=language.config.num_tokens,
        chunk=chunk,
        collision=collision,
        reference=reference,
    )


def answer_hidden(outputs: Any, batch: Batch) -> jax.Array:
    """float[B, K, A, D], the hidden states that predict the answer tokens."""
    return gather_positions(outputs.branch_hidden, batch["answer_positions"])


@dataclasses.dataclass(frozen=True)
class SftObjective:
    """Language loss on answers plus the losses of every head on its slots.

    weights is config.losses: {"language": w, "<head>/<term>": w}. Every term that a head returns
    needs a weight (0 reports it only), and every weight needs a term.
    """

    weights: Mapping[str, float]

    def predict(self, model: Any, batch: Batch, keys: jax.Array | None) -> dict[str, Any]:
        """"scores" (TokenScores of float32[B, K, A]) and "heads" {head: its predictions}."""
        outputs = model(batch, keys)
        return {
            "scores": answer_scores(model, outputs, batch),
            "heads": model.run_heads(outputs, batch),
        }

    def terms(self, predictions: dict[str, Any], batch: Batch) -> Sums:
        terms = {"language": language_loss(predictions["scores"].logp, batch["answer_weights"])}
        for name, prediction in predictions["heads"].items():
            slots = batch["slots"][HEADS[name].task]
            terms |= HEADS[name].loss(prediction, slots, slots["valid"])
        for term in sorted(set(terms) - set(self.weights)):
            raise UserError(
                f"config.losses has no weight for {term!r}; set losses['{term}'] (0 reports it "
                f"only). Terms of this model: {', '.join(sorted(terms))}"
            )
        present = {"language", *predictions["heads"]}
        for term in sorted(set(self.weights) - set(terms)):
            if term.split("/")[0] in present:
                raise UserError(
                    f"config.losses[{term!r}] names no term; remove it. "
                    f"Terms of this model: {', '.join(sorted(terms))}"
                )
        return terms

    def metrics(self, predictions: dict[str, Any], batch: Batch) -> Sums:
        scored = predictions["scores"].correct, batch["answer_weights"]
        return {
            "token_accuracy": token_accuracy(*scored),
            "answer_accuracy": answer_accuracy(*scored),
            "padding": padding(batch),
        }


class PreferenceScores(NamedTuple):
    """What the model says about a row of pairs.

    tokens: of all answers, float32[B, K, A]. reference: log-probabilities of the same, or None.
    contrast, contrast_reference: float32[B, 1, A], log-probabilities of the chosen answer under the
    manipulated frames, or None.
    """

    tokens: TokenScores
    reference: jax.Array | None
    contrast: jax.Array | None
    contrast_reference: jax.Array | None


@dataclasses.dataclass(frozen=True)
class PreferenceObjective:
    """Preference losses on pairs: K branches, chosen then rejected (one, or several).

    Beside the arrays of every batch it reads pair_valid bool[B], reference_logps float32[B, K, A]
    (unless no loss needs it), and where the batch has them pair_kind uint32[B] and pair_duration
    float32[B]. A contrast loss needs contrast_* of every name in CONTRAST_FIELDS, the manipulated
    clip and the prefix that tells its times, and reference_contrast_logps float32[B, A].

    With reference="adapters_off" the log-probabilities of the reference are those of the model
    without its LoRA, in the same step, and the batch's are not read. A loss that reads the KL over
    the vocabulary needs that.
    """

    config: PreferenceConfig
    reference: str = "sidecar"

    @property
    def weights(self) -> Mapping[str, float]:
        return {f"preference/{name}": weight for name, weight in self.config.weights.items()}

    @property
    def coupled(self) -> tuple[str, ...]:
        return tuple(f"preference/{name}" for name in self.config.coupled)

    def predict(self, model: Any, batch: Batch, keys: jax.Array | None) -> PreferenceScores:
        """Scores float32[B, K, A] of all answers, and what the losses of the config read beside."""
        self._check(batch)
        contrast = contrast_reference = None
        off = live = None
        if self.config.needs_reference and self.reference == "adapters_off":
            off = without_adapters(model)
            if self.config.needs_vocabulary_kl:
                live = answer_hidden(off(batch, None), batch), off.language.table
        scores = answer_scores(
            model, model(batch, keys), batch, collision=self.config.wpo, reference=live
        )
        reference = scores.reference_logp
        if off is not None and live is None:
            reference = _fixed_logps(off, batch)
        if self.config.needs_contrast:
            other = contrast_batch(batch)
            contrast = answer_scores(model, model(other, keys), other).logp
            contrast_reference = None if off is None else _fixed_logps(off, other)
        return PreferenceScores(scores, reference, contrast, contrast_reference)

    def terms(self, predictions: PreferenceScores, batch: Batch) -> Sums:
        losses = preference_losses(self._tokens(predictions, batch), self.config)
        return {f"preference/{name}": value for name, value in losses.items()}

    def metrics(self, predictions: PreferenceScores, batch: Batch) -> Sums:
        pair = scores_of(self._tokens(predictions, batch), self.config)
        beta, reference = self.config.beta, self.config.needs_reference
        metrics = preference_metrics(pair, beta, reference=reference)
        if reference:
            metrics |= grouped_metrics(
                pair,
                beta,
                kinds={kind: kind_id(kind) for kind in self.config.kinds},
                pair_kind=batch.get("pair_kind"),
                pair_duration=batch.get("pair_duration"),
            )
        weights = batch["answer_weights"] * batch["pair_valid"][:, None, None]
        chosen = token_accuracy(predictions.tokens.correct[:, 0], weights[:, 0])
        named = {f"preference/{k}": v for k, v in metrics.items()}
        return named | {"token_accuracy": chosen, "padding": padding(batch)}

    def _check(self, batch: Batch) -> None:
        live = self.reference == "adapters_off"
        if self.config.needs_vocabulary_kl and not live:
            raise UserError(
                f"preference.reference={self.reference!r}, but preference.loss="
                f"{self.config.loss!r} reads the reference's whole distributions; train a LoRA "
                "with reference='adapters_off', or use 'chosen_kl', the estimate from a sidecar"
            )
        if self.config.needs_reference and not live and "reference_logps" not in batch:
            raise UserError(
                f"batch/reference_logps is missing, but preference.loss={self.config.loss!r} reads "
                "it; score the pairs with `python -m tpo_jax.preferences score`"
            )
        if self.config.needs_contrast:
            wanted = [f"contrast_{name}" for name in CONTRAST_FIELDS]
            wanted += () if live else ("reference_contrast_logps",)
            if missing := [name for name in wanted if name not in batch]:
                raise UserError(
                    f"batch/{', '.join(missing)} missing, but preference.loss={self.config.loss!r} "
                    "scores the chosen answer under the manipulated frames of its pair; use a loss "
                    "without 'conditional', or a pipeline that gives these fields"
                )

    def _tokens(self, predictions: PreferenceScores, batch: Batch) -> PairTokens:
        logps = predictions.tokens.logp
        reference, contrast_reference = predictions.reference, batch.get("reference_contrast_logps")
        if reference is None:
            reference = batch.get("reference_logps", jnp.zeros_like(logps))
        if predictions.contrast_reference is not None:
            contrast_reference = predictions.contrast_reference[:, 0]
        return PairTokens(
            policy=logps,
            reference=reference,
            weights=batch["answer_weights"],
            valid=batch["pair_valid"],
            log_collision=predictions.tokens.log_collision,
            contrast_policy=None if predictions.contrast is None else predictions.contrast[:, 0],
            contrast_reference=contrast_reference,
            vocabulary_kl=predictions.tokens.kl,
        )


def contrast_batch(batch: Batch) -> Batch:
    """The chosen branch of every row, about the manipulated clip.

    It comes behind a prefix that may be longer or shorter: the times of frames are told in words.
    """
    of_branches = [name for name in batch if name.startswith(("branch_", "answer_"))]
    chosen = {name: batch[name][:, :1] for name in of_branches}
    other = {name: batch[f"contrast_{name}"] for name in CONTRAST_FIELDS}
    before, now = ((x["prefix_segments"] > 0).sum(1) for x in (batch, other))
    moved = (now - before)[:, None, None] * (chosen["branch_segments"] > 0)
    chosen["branch_positions"] = chosen["branch_positions"] + moved
    return batch | chosen | other


def without_adapters(model: Any) -> Any:
    """A copy of the model without its LoRA; parameters are shared."""
    copy = nnx.clone(model)
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, Linear):
            module.lora_a = module.lora_b = None
    return copy


def _fixed_logps(model: Any, batch: Batch) -> jax.Array:
    """float32[B, K, A] without dropout and without a gradient."""
    return jax.lax.stop_gradient(answer_scores(model, model(batch, None), batch).logp)


def check_adapters_off(model_config: ModelConfig, trainable: Iterable[str]) -> None:
    """Refuses to take the model without its LoRA for the reference where training changes it.

    Raises:
      ValueError: there is no LoRA, or a parameter outside of it is trained; names the parameter.
    """
    where = "preference.reference='adapters_off'"
    if model_config.lora is None:
        raise UserError(
            f"{where}: the model has no LoRA to switch off; set config.lora, or score a sidecar "
            "with `python -m tpo_jax.preferences score` and set preference.reference='sidecar'"
        )
    if moving := sorted(p for p in trainable if p.split("/")[-1] not in ("lora_a", "lora_b")):
        raise UserError(
            f"{where}: {moving[0]} is trained (and {len(moving) - 1} other parameters outside the "
            "LoRA), so that the model without LoRA is no longer the reference; freeze them (for "
            "example trainable=[['.*lora_', 1e-5]]) or score a sidecar and set "
            "preference.reference='sidecar'"
        )


def padding(batch: Batch) -> WeightedSum:
    """Share of the decoder's positions that hold no token: what a bucket wastes."""
    segments = [batch["prefix_segments"], batch["branch_segments"]]
    empty = sum((x == 0).sum(dtype=jnp.float32) for x in segments)
    return WeightedSum(empty, jnp.float32(sum(x.size for x in segments)))


def denominators(
    objective: Objective,
    functional_model: Any,
    params: Any,
    batch: Batch,
    keys: jax.Array | None,
) -> dict[str, jax.Array]:
    """{term: float32[]} weight of every term over a whole batch.

    Written as a forward pass of which only the weights are kept. Weights count labels, so the
    compiler drops the model (a test asserts it); a weight that did depend on predictions would
    still be exact, at the price of that forward pass.
    """
    predictions = objective.predict(functional_model.bind(params), batch, keys)
    return {name: term.weight for name, term in objective.terms(predictions, batch).items()}
