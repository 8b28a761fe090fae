"""What a run starts from: the model that its config asks for, and weights at step 0."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import tokenizers
from etils import epath
from ml_collections import ConfigDict

from tpo_jax.data import files
from tpo_jax.data.clip_features import config_of_folders
from tpo_jax.data.text import ChatTemplate, TextCodec, add_task_tokens
from tpo_jax.errors import UserError
from tpo_jax.interop.families.source import is_family
from tpo_jax.interop.folder import (
    added_tokens,
    holds_language_only,
    load_codec,
    load_config,
    load_into,
)
from tpo_jax.models.config import VOCABULARY_MULTIPLE, LoraConfig, ModelConfig
from tpo_jax.models.heads import head
from tpo_jax.models.presets import preset
from tpo_jax.models.sam2_config import sam2_size
from tpo_jax.parallel.paths import flatten, unflatten
from tpo_jax.training.config import to_dict
from tpo_jax.training.program import Program, needs_contrast, run_as
from tpo_jax.training.references import read_references


def make_model_config(config: ConfigDict) -> tuple[ModelConfig, TextCodec]:
    """The model that the config asks for, and its tokenizer with the tokens of its heads.

    Raises:
      ValueError: init_from is not what the config takes it for.
    """
    options = init_options(config)
    if config.init_from:
        codec = load_codec(config.init_from, options)
    else:
        text = files.read_text(config.tokenizer, "config.tokenizer")
        template = ChatTemplate(time_instruction=config.time_instruction)
        codec = TextCodec(tokenizers.Tokenizer.from_str(text), template)
    heads = tuple(config.model.heads)
    add_task_tokens(codec.tokenizer, heads)
    codec = TextCodec(codec.tokenizer, codec.template)
    base = preset(config.model.preset) if config.model.preset else None
    if config.init_from and (base is None or holds_language_only(config.init_from)):
        base = load_config(config.init_from, base, options)
    used = codec.vocab_size
    if config.init_from:
        # A published table has rows that no id of its tokenizer uses (Qwen2-7B: some 400). They
        # are part of the checkpoint, take part in its softmax and go back out with it.
        there = load_config(config.init_from, base, options)
        used = max(used, there.language.num_tokens)
        if config.objective == "preference" and there.lora:
            refuse_trained_adapters(config)
    rows = -(-used // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    language = dataclasses.replace(
        base.language, num_tokens=used, vocab_size=max(base.language.vocab_size, rows)
    )
    tokens = codec.task_tokens
    lora = LoraConfig(**config.lora.to_dict()) if config.lora.rank else base.lora
    sam2 = sam2_size(config.sam2) if config.sam2 else base.sam2
    changes = {
        "language": language, "heads": heads, "tokens": tokens, "lora": lora, "sam2": sam2,
    }  # fmt: skip
    for kind in ("clip_features", "text_features"):
        if config[kind]:
            changes[kind] = config_of_folders([s["path"] for s in config.data.train], kind)
        elif not any(getattr(head(name), f"reads_{kind}") for name in heads):
            changes[kind] = None  # init_from had a head that read them
    return run_as(config, dataclasses.replace(base, **changes)), codec


def init_options(config: ConfigDict) -> dict[str, Any]:
    """What the config says for the config.json of the published folder in init_from.

    Raises:
      UserError: init_from is another folder, which says everything itself.
    """
    options = config.init_options.to_dict()
    missing = config.init_from and not epath.Path(config.init_from).exists()  # reported elsewhere
    if options and not missing and not is_family(config.init_from):
        raise UserError(
            f"init_options={options}: init_from={config.init_from!r} is not the published folder "
            "of a multimodal family, and says everything itself; leave init_options empty"
        )
    return options


def refuse_trained_adapters(config: ConfigDict) -> None:
    """Raises ValueError where a LoRA of init_from would be switched off for the reference.

    It belongs to the model that training starts from: without it the reference is the model before
    the last round.
    """
    if config.preference.reference == "adapters_off":
        raise UserError(
            f"preference.reference='adapters_off': {config.init_from} has a LoRA of its own, which "
            "is switched off as well: the reference would be the model before it, not the one "
            "that training starts from. Merge it (`python -m tpo_jax.convert export`, then "
            "`import`) and start from the merged folder, or score a sidecar with `python -m "
            "tpo_jax.preferences score` and set preference.reference='sidecar'"
        )


def pipeline_options(
    config: ConfigDict, model_config: ModelConfig, codec: TextCodec
) -> dict[str, Any]:
    """What the config says about the `Pipeline` of its training and its validation data alike.

    Args:
      model_config, codec: of `make_model_config`.
    """
    return {
        "codec": codec,
        "model_config": model_config,
        "heads": model_config.heads,
        "buckets": to_dict(config)["buckets"],
        "seed": config.seed,
        "reference": read_references(config),
        "evidence": config.data.evidence,
        "task_text": config.data.task_text,
        "contrast": needs_contrast(config),
    }


def may_be_missing(config: ConfigDict) -> list[str]:
    """Regexes of parameters that init_from need not have: those that the config names, and new
    adapters, which change nothing yet."""
    missing = list(config.init_missing)
    if config.lora.rank:
        alone = holds_language_only(config.init_from)
        if alone or load_config(config.init_from, options=init_options(config)).lora is None:
            missing.append(r".*/lora_[ab]$")
    return missing


def initial_params(
    config: ConfigDict, program: Program, model_config: ModelConfig, say: Callable[[str], None]
) -> Any:
    """Weights at step 0, on the mesh: those of init_from, freshly drawn where it has none.

    Args:
      say: told what was read and what is new.
    """
    if not config.init_from:
        return program.init_params(config.seed)
    options = init_options(config)
    there = load_config(config.init_from, model_config, options)
    loaded = load_into(
        program.abstract_state.params,
        config.init_from,
        init_missing=may_be_missing(config),
        new_tokens=added_tokens(there, model_config),
        options=options,
    )
    say(f"weights from {config.init_from}: {len(loaded.leaves)} leaves")
    shardings = flatten(program.param_shardings)

    def draw_missing(key: jax.Array) -> dict[str, jax.Array]:
        leaves = flatten(program.model.init(key))
        return {name: leaves[name] for name in loaded.missing}

    draw = jax.jit(draw_missing, out_shardings={name: shardings[name] for name in loaded.missing})
    drawn = draw(jax.random.key(config.seed)) if loaded.missing else {}
    for part, leaves in itertools.groupby(sorted(drawn), _part):
        sizes = [drawn[name].size for name in leaves]
        say(f"  new: {part}, {len(sizes)} leaves, {sum(sizes):,} parameters")
    return unflatten({name: (loaded.leaves | drawn)[name] for name in shardings})


def _part(path: str) -> str:
    """The part of the model that a parameter belongs to, such as heads/mask."""
    return "/".join(path.split("/")[:2])
