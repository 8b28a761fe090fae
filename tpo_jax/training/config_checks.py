"""Checks of a config's model, objective and their options; training.config.validate calls them.

Each gives problems as "option = value: reason; fix".
"""

from typing import Any

from ml_collections import ConfigDict

from tpo_jax.models.checks import REMAT
from tpo_jax.models.config import ATTENTION_BACKENDS, DTYPES
from tpo_jax.objectives.preference import PreferenceConfig
from tpo_jax.training.optimizer import OptimizerConfig

OBJECTIVES = ("sft", "preference")
REFERENCES = ("sidecar", "adapters_off")  # of preference.reference
# Options of config.model that say how it runs.
_RUNNING = {"attention": ATTENTION_BACKENDS, "remat": REMAT, "dtype": ("", *DTYPES)}


def problem(option: str, value: Any, reason: str, fix: str) -> str:
    return f"{option} = {value!r}: {reason}; {fix}"


def check_running(config: ConfigDict) -> list[str]:
    """How the model runs; whether the devices can, training.program says."""
    problems = []
    for name, known in _RUNNING.items():
        if config.model[name] not in known:
            fix = f"one of {', '.join(map(repr, known))}"
            problems.append(problem(f"model.{name}", config.model[name], "unknown", fix))
    return problems


def check_optimizer(config: ConfigDict) -> list[str]:
    try:
        OptimizerConfig(**config.optimizer.to_dict())
    except ValueError as error:
        return [str(error)]
    return []


def check_objective(config: ConfigDict) -> list[str]:
    problems = []
    if config.objective not in OBJECTIVES:
        fix = f"one of {', '.join(OBJECTIVES)}"
        problems.append(problem("objective", config.objective, "unknown objective", fix))
    for term, weight in config.losses.items():
        head = term.split("/")[0]
        if head not in ("language", "preference") and head not in config.model.heads:
            fix = "add the head to model.heads or drop the term"
            problems.append(problem(f"losses.{term}", weight, "term of a missing head", fix))
        if weight < 0:
            problems.append(problem(f"losses.{term}", weight, "negative", "give a weight >= 0"))
    if config.objective == "preference":
        problems += _check_preference(config)
        answers = {name: bucket.answers for name, bucket in sorted(config.buckets.items())}
        if len(set(answers.values())) > 1:
            reason = "a pair goes by its frames to a bucket, which has to hold any answer"
            problems.append(problem("buckets.*.answers", answers, reason, "give equal ones"))
        if not config.init_from:
            fix = "name the model folder that scored the references"
            problems.append(problem("init_from", "", "the policy starts at the reference", fix))
        for name, bucket in config.buckets.items():
            if not bucket.question:
                reason = "the question of a pair stands in the prefix"
                problems.append(problem(f"buckets.{name}.question", 0, reason, "give its tokens"))
    return problems


def _check_preference(config: ConfigDict) -> list[str]:
    options = config.preference.to_dict()
    source = options.pop("reference")
    try:
        preference = PreferenceConfig(**options)
        for bucket in config.buckets.values():
            preference.require_branches(bucket.branches)
    except ValueError as error:
        return [str(error)]
    problems = []
    if source not in REFERENCES:
        fix = f"one of {', '.join(REFERENCES)}"
        problems.append(problem("preference.reference", source, "unknown", fix))
    elif source == "sidecar" and preference.needs_vocabulary_kl:
        reason = "'vocabulary_kl' reads the reference's whole distributions, which no sidecar holds"
        fix = (
            "train a LoRA alone with 'adapters_off', or use the loss 'chosen_kl', which estimates "
            "it from the answers' tokens"
        )
        problems.append(problem("preference.reference", source, reason, fix))
    elif source == "sidecar" and preference.needs_reference and not config.data.references:
        fix = "name the sidecars that `python -m tpo_jax.preferences score` wrote"
        problems.append(problem("data.references", [], "no reference model's scores", fix))
    elif source == "adapters_off" and config.data.references:
        fix = 'leave it empty, or set preference.reference="sidecar"'
        reason = "not read with preference.reference='adapters_off'"
        problems.append(problem("data.references", config.data.references, reason, fix))
    if preference.needs_contrast and config.data.evidence != "full":
        reason = "hides the pair's frames, not the manipulated ones that 'conditional' shows"
        problems.append(
            problem("data.evidence", config.data.evidence, reason, "use 'full' or another loss")
        )
    reason = f"would change {', '.join(preference.coupled)}, which compares a whole batch"
    if preference.coupled and config.accumulation > 1:
        fix = "set it to 1 (a smaller batch_size, or more devices)"
        problems.append(problem("accumulation", config.accumulation, reason, fix))
    if preference.coupled:
        problems += check_beside(config, reason)
    return problems


def check_beside(config: ConfigDict, reason: str) -> list[str]:
    """A problem for each bucket with another beside it: a step then has two batches of rows, and
    each would be compared by itself."""
    fix = "set it to '': each bucket then has steps of its own"
    return [
        problem(f"buckets.{name}.beside", bucket.beside, reason, fix)
        for name, bucket in config.buckets.items()
        if bucket.beside
    ]
