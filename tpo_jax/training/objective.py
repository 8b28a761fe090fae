"""What a run minimises: from model outputs and a batch to named sums.

An objective has two halves. `predict` runs the model; `terms` and `metrics` are pure functions of
its predictions and the batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from tpo_jax.models.heads import HEADS
from tpo_jax.objectives.language import language_loss, token_accuracy
from tpo_jax.objectives.logps import TokenScores, gather_positions, token_scores
from tpo_jax.objectives.preference import (
    PreferenceConfig,
    pair_scores,
    preference_losses,
    preference_metrics,
)
from tpo_jax.parallel.weighted_sum import WeightedSum

Batch = dict[str, Any]
Sums = dict[str, WeightedSum]


class Objective(Protocol):
    """The interface of `training.step`; weights is {term: weight in the total}."""

    @property
    def weights(self) -> Mapping[str, float]: ...

    def predict(self, model: Any, batch: Batch, keys: jax.Array | None) -> Any: ...

    def terms(self, predictions: Any, batch: Batch) -> Sums: ...

    def metrics(self, predictions: Any, batch: Batch) -> Sums: ...


def answer_scores(model: Any, outputs: Any, batch: Batch, chunk: int = 512) -> TokenScores:
    """TokenScores float32[B, K, A] of the answer tokens; the LM head runs on those only."""
    hidden = gather_positions(outputs.branch_hidden, batch["answer_positions"])
    language = model.language
    return token_scores(
        hidden,
        language.table,
        batch["answer_tokens"],
        vocab_size=language.config.num_tokens,
        chunk=chunk,
    )


@dataclasses.dataclass(frozen=True)
class SftObjective:
    """Language loss on answers plus the losses of every head on its slots.

    weights is config.losses: {"language": w, "<head>/<term>": w}. Every term that a head returns
    needs a weight (0 reports it only), and every weight needs a term.
    """

    weights: Mapping[str, float]

    def predict(self, model: Any, batch: Batch, keys: jax.Array | None) -> dict[str, Any]:
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
            raise ValueError(
                f"config.losses has no weight for {term!r}; set losses['{term}'] (0 reports it "
                f"only). Terms of this model: {', '.join(sorted(terms))}"
            )
        present = {"language", *predictions["heads"]}
        for term in sorted(set(self.weights) - set(terms)):
            if term.split("/")[0] in present:
                raise ValueError(
                    f"config.losses[{term!r}] names no term; remove it. "
                    f"Terms of this model: {', '.join(sorted(terms))}"
                )
        return terms

    def metrics(self, predictions: dict[str, Any], batch: Batch) -> Sums:
        correct = predictions["scores"].correct
        return {"token_accuracy": token_accuracy(correct, batch["answer_weights"])}


@dataclasses.dataclass(frozen=True)
class PreferenceObjective:
    """Preference losses on pairs: K = 2 branches, chosen then rejected."""

    config: PreferenceConfig

    @property
    def weights(self) -> Mapping[str, float]:
        return {f"preference/{name}": weight for name, weight in self.config.weights.items()}

    def predict(self, model: Any, batch: Batch, keys: jax.Array | None) -> TokenScores:
        return answer_scores(model, model(batch, keys), batch)

    def terms(self, predictions: TokenScores, batch: Batch) -> Sums:
        losses = preference_losses(self._pair(predictions, batch), self.config)
        return {f"preference/{name}": value for name, value in losses.items()}

    def metrics(self, predictions: TokenScores, batch: Batch) -> Sums:
        metrics = preference_metrics(self._pair(predictions, batch), self.config.beta)
        weights = batch["answer_weights"] * batch["pair_valid"][:, None, None]
        chosen = token_accuracy(predictions.correct[:, 0], weights[:, 0])
        return {f"preference/{k}": v for k, v in metrics.items()} | {"token_accuracy": chosen}

    def _pair(self, predictions: TokenScores, batch: Batch) -> Any:
        if self.config.needs_reference and "reference_logps" not in batch:
            raise ValueError(
                f"batch/reference_logps is missing, but preference.loss={self.config.loss!r} reads "
                "it; score the pairs with `python -m tpo_jax.preferences score`"
            )
        reference = batch.get("reference_logps", jnp.zeros_like(predictions.logp))
        return pair_scores(
            predictions.logp, reference, batch["answer_weights"], batch["pair_valid"]
        )


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
