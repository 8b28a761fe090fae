"""The names of the preference losses, what each needs, and their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from tpo_jax.objectives.preference import losses
from tpo_jax.objectives.preference.pair import (
    DIVERGENCES,
    PairScores,
    PairTokens,
    pair_scores,
)
from tpo_jax.parallel.weighted_sum import WeightedSum


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """A registered loss.

    Attributes:
      function: (PairScores, *needs) -> float32[B] per pair, or a WeightedSum where the mean is not
        over pairs.
      needs: options that the function takes by keyword, of `PreferenceConfig`.
      reference: whether it reads reference log-probabilities; if none of the losses in use does, a
        batch without `reference_logps` is accepted.
      divergence: whether it takes other f-divergences than reverse KL: reads the scores s in their
        difference alone, in which the normaliser of a question cancels, or not at all. It cancels
        in `ipo` and `sigmoid_norm`, on token means, where both answers have one length only; they
        are taken all the same, as in TRL.
      contrast: whether it reads log-probabilities under manipulated frames.
      sums: whether it reads sums over an answer's tokens, those that `ld_alpha` desensitises to its
        length.
      mean: whether it reads the mean log-probability of an answer's tokens under the policy alone.
      vocabulary: whether it reads the KL over the vocabulary, for which the reference's whole
        distributions have to be in the step.
      coupled: whether pairs change one another's loss beyond a mean, so that the loss of a batch
        is not the mean over its micro-batches.
      ranked: whether a term belongs to a rank in the batch instead of a pair.
    """

    function: Callable[..., jax.Array | WeightedSum]
    needs: tuple[str, ...] = ("beta",)
    reference: bool = True
    divergence: bool = False
    contrast: bool = False
    sums: bool = True
    mean: bool = False
    vocabulary: bool = False
    coupled: bool = False
    ranked: bool = False


_SMOOTHED = ("beta", "label_smoothing")

PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(losses.sigmoid, divergence=True),
    "cdpo": PreferenceLoss(losses.cdpo, _SMOOTHED, divergence=True),
    "robust": PreferenceLoss(losses.robust, _SMOOTHED, divergence=True),
    "hinge": PreferenceLoss(losses.hinge, divergence=True),
    "exo_pair": PreferenceLoss(losses.exo_pair, _SMOOTHED, divergence=True),
    "discopop": PreferenceLoss(losses.discopop, ("beta", "discopop_tau"), divergence=True),
    "rpo": PreferenceLoss(losses.rpo, ("beta", "rpo_alpha"), divergence=True),
    "ipo": PreferenceLoss(losses.ipo, divergence=True),
    "sigmoid_norm": PreferenceLoss(losses.sigmoid_norm, divergence=True),
    "nca_pair": PreferenceLoss(losses.nca_pair),
    "bco_pair": PreferenceLoss(losses.bco_pair),
    "sppo_hard": PreferenceLoss(losses.sppo_hard),
    "apo_zero": PreferenceLoss(losses.apo_zero),
    "apo_down": PreferenceLoss(losses.apo_down),
    "simpo": PreferenceLoss(
        losses.simpo, ("beta", "simpo_gamma"), reference=False, sums=False, mean=True
    ),
    "orpo": PreferenceLoss(losses.orpo, (), reference=False, sums=False, mean=True),
    "sft": PreferenceLoss(losses.sft, (), reference=False, divergence=True, sums=False),
    "conditional": PreferenceLoss(losses.conditional, contrast=True),
    "anchor": PreferenceLoss(losses.anchor),
    "chosen_kl": PreferenceLoss(losses.chosen_kl, (), divergence=True, sums=False),
    "vocabulary_kl": PreferenceLoss(
        losses.vocabulary_kl, (), divergence=True, sums=False, vocabulary=True
    ),
    "aot": PreferenceLoss(losses.aot, _SMOOTHED, coupled=True, ranked=True),
    "aot_unpaired": PreferenceLoss(losses.aot_unpaired, _SMOOTHED, coupled=True, ranked=True),
    "kto_pair": PreferenceLoss(losses.kto_pair, coupled=True),
    "bco": PreferenceLoss(losses.bco, coupled=True),
}


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """config.preference: total = losses by weight + sft * (token mean of -log pi(chosen)).

    Attributes:
      beta: strength of the tie to the reference (0.3 LongVA-TPO, 0.2 LLaVA-Video-TPO), of reported
        rewards and margins too.
      loss: a name in PREFERENCE_LOSSES, several names, or {name: weight}.
      sft: weight alpha of the sft term; 0 reports it without training on it.
      label_smoothing: assumed share of wrong labels, for cdpo, robust, exo_pair, aot, aot_unpaired.
      simpo_gamma: wanted margin of simpo.
      rpo_alpha: weight of the likelihood in rpo.
      discopop_tau: temperature of discopop's mixture.
      ld_alpha: weight of tokens beyond the shorter answer's length (LD-DPO); 1 for all losses as
        they are.
      wpo: multiplies each pair's losses by how likely the policy is to write its answers
        (WPO, 2406.11827 eq. 2, sampled alignment); not those of `sft`, a mean over tokens.
      divergence: one of DIVERGENCES. divergence_alpha: of "alpha".
      kinds: kinds of question whose margin and accuracy are reported one by one.
    """

    beta: float
    loss: str | Sequence[str] | Mapping[str, float] = "sigmoid"
    sft: float = 0.0
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    rpo_alpha: float = 1.0
    discopop_tau: float = 0.05
    ld_alpha: float = 1.0
    wpo: bool = False
    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5
    kinds: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.weights:
            if name not in PREFERENCE_LOSSES:
                raise ValueError(
                    f"preference.loss={name!r} is unknown; known: {', '.join(PREFERENCE_LOSSES)}"
                )
        for name in ("beta", "discopop_tau"):
            if getattr(self, name) <= 0:
                raise ValueError(f"preference.{name}={getattr(self, name)}: must be positive")
        if not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"preference.ld_alpha={self.ld_alpha}: must be in [0, 1]")
        if self.ld_alpha != 1 and (means := [n for n in self._used if PREFERENCE_LOSSES[n].mean]):
            raise ValueError(
                f"preference.ld_alpha={self.ld_alpha}: {', '.join(means)} is of means over whole "
                "answers, which have no sums to desensitise; use another loss or set ld_alpha=1.0"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"preference.label_smoothing={self.label_smoothing}: must be in [0, 0.5); half or "
                "more of the labels wrong means that chosen and rejected are exchanged"
            )
        if "exo_pair" in self.weights and not self.label_smoothing:
            raise ValueError(
                "preference.label_smoothing=0.0: exo_pair takes its logarithm; give a small number "
                "such as 1e-3 (its paper's)"
            )
        self._refuse_options_without_effect()
        self._refuse_divergence()
        if self.wpo and (ranked := [n for n in self._used if PREFERENCE_LOSSES[n].ranked]):
            raise ValueError(
                f"preference.wpo=True: {', '.join(ranked)} sorts the batch, so that no term "
                "belongs to a pair whose weight it could take; use another loss or set wpo=False"
            )

    def require_branches(self, branches: int) -> None:
        """Raises ValueError unless the losses are defined for rows of so many answers."""
        if branches < 2:
            raise ValueError(
                f"buckets.*.branches={branches}: a preference row is the branches (chosen, "
                "rejected, ...); give 2, or 1 more than a pair has rejected answers"
            )
        ranked = [name for name in self.weights if PREFERENCE_LOSSES[name].ranked]
        if branches > 2 and ranked:
            raise ValueError(
                f"buckets.*.branches={branches}: {', '.join(ranked)} sorts pairs, and cannot count "
                "several of one row as one; give 2, or use another loss"
            )

    def _refuse_options_without_effect(self) -> None:
        used = {option for name in self.weights for option in PREFERENCE_LOSSES[name].needs}
        if self.divergence == "alpha":
            used.add("divergence_alpha")
        for field in dataclasses.fields(self):
            optional = ("label_smoothing", "simpo_gamma", "rpo_alpha", "discopop_tau",
                        "divergence_alpha")  # fmt: skip
            value = getattr(self, field.name)
            if field.name in optional and field.name not in used and value != field.default:
                takers = [n for n, loss in PREFERENCE_LOSSES.items() if field.name in loss.needs]
                takers = takers or ["divergence 'alpha'"]
                raise ValueError(
                    f"preference.{field.name}={value} has no effect on {self.loss!r}; set it to "
                    f"{field.default} or use one of: {', '.join(takers)}"
                )
        if self.ld_alpha != 1 and not any(PREFERENCE_LOSSES[name].sums for name in self.weights):
            takers = [name for name, loss in PREFERENCE_LOSSES.items() if loss.sums]
            raise ValueError(
                f"preference.ld_alpha={self.ld_alpha} has no effect on {self.loss!r}; set it to "
                f"1.0 or use one of: {', '.join(takers)}"
            )
        if self.wpo and set(self.weights) == {"sft"}:
            raise ValueError(
                f"preference.wpo=True has no effect on {self.loss!r}, a mean over tokens and not "
                "over pairs; set it to False or use another loss"
            )

    def _refuse_divergence(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"preference.divergence={self.divergence!r} is unknown; known: "
                f"{', '.join(DIVERGENCES)}"
            )
        undefined = [name for name in self._used if not PREFERENCE_LOSSES[name].divergence]
        if self.divergence != "reverse_kl" and undefined:
            defined = [name for name, loss in PREFERENCE_LOSSES.items() if loss.divergence]
            raise ValueError(
                f"preference.divergence={self.divergence!r}: {', '.join(undefined)} is defined for "
                f"reverse_kl only; use reverse_kl or one of {', '.join(defined)}"
            )

    @property
    def weights(self) -> dict[str, float]:
        """{loss name: weight}, sft included."""
        if isinstance(self.loss, str):
            named = {self.loss: 1.0}
        elif isinstance(self.loss, Mapping):
            named = dict(self.loss)
        else:
            named = dict.fromkeys(self.loss, 1.0)
        return named | {"sft": named.get("sft", 0.0) + self.sft}

    @property
    def _used(self) -> list[str]:
        return [name for name, weight in self.weights.items() if weight]

    @property
    def needs_reference(self) -> bool:
        return any(PREFERENCE_LOSSES[name].reference for name in self.weights)

    @property
    def needs_contrast(self) -> bool:
        """Whether the chosen answer is scored under the manipulated frames as well."""
        return any(PREFERENCE_LOSSES[name].contrast for name in self.weights)

    @property
    def needs_vocabulary_kl(self) -> bool:
        """Whether the reference has to be in the step: no sidecar holds its distributions."""
        return any(PREFERENCE_LOSSES[name].vocabulary for name in self.weights)

    @property
    def coupled(self) -> tuple[str, ...]:
        """The losses in use that accumulation would change."""
        return tuple(name for name in self._used if PREFERENCE_LOSSES[name].coupled)


def preference_losses(tokens: PairTokens, config: PreferenceConfig) -> dict[str, WeightedSum]:
    """One WeightedSum per loss in `config.weights` (unweighted).

    Under jit the arrays are those of the global batch, however it is sharded, and so are the
    statistics of coupled losses.
    """
    config.require_branches(tokens.weights.shape[1])
    pair = scores_of(tokens, config)
    terms = {}
    for name in config.weights:
        loss = PREFERENCE_LOSSES[name]
        value = loss.function(pair, **{option: getattr(config, option) for option in loss.needs})
        if not isinstance(value, WeightedSum):
            value = WeightedSum.of(value * pair.wpo if config.wpo else value, pair.valid)
        terms[name] = value
    return terms


def scores_of(tokens: PairTokens, config: PreferenceConfig) -> PairScores:
    """`pair_scores` with the options of a config."""
    return pair_scores(
        tokens,
        ld_alpha=config.ld_alpha,
        divergence=config.divergence,
        divergence_alpha=config.divergence_alpha,
    )
