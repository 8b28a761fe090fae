"""Runs a multimodal model here and the parts of its published folder in PyTorch, layer by layer.

Each part gets one input on both sides. The PyTorch side is filled from the published tensors by
name and not through our mapping. What puts the parts together (the glue) has a class for two
layouts, which is then run as a whole (check_whole.py); for the others tests/parity compares it, and
the report says what was left out.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tpo_jax.interop import folder, huggingface, peft, siglip
from tpo_jax.interop.check_language import compare_language, compare_parameters
from tpo_jax.interop.check_towers import (
    compare_qformer,
    compare_towers,
    difference,
    filled,
    named,
)
from tpo_jax.interop.check_whole import WHOLE, compare_whole
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.source import ADAPTER, read_config
from tpo_jax.interop.families.videochat import MISTRAL_7B
from tpo_jax.interop.tensors import read_file
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.connectors.config import QFormerConfig
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import unflatten

FRAMES = 2
# Names of a part's tensors over all layouts; the group is the name in transformers' class.
_PROJECTOR = r"(?:model\.)?(?:multi_modal_projector\.linear_{one}|mm_projector\.{zero})\.(.*)"
_LANGUAGE = (
    r"(?:language_model\.model\.|model\.language_model\.|model\.)((?:embed_tokens|layers|norm)\..*)"
)
_HEAD = r"(?:language_model\.)?(lm_head\.weight)"
# VideoChat2 keeps its language model in PEFT's wrapping.
_WRAPPED = r"lm\.(?:base_model\.model\.)?(.*)"


@dataclasses.dataclass(frozen=True)
class Compared:
    """differences: largest absolute difference, in float32, after each layer, in the order of
    computation. parts: {part: what stood on the other side}. glue: what was not compared."""

    differences: dict[str, float]
    parts: dict[str, str]
    glue: tuple[str, ...]


def compare_family(
    model: epath.PathLike, published: epath.PathLike, options: Mapping[str, Any], seed: int = 0
) -> Compared:
    """Runs every part of a family on both sides, and the whole where `transformers` has it.

    Args:
      model: model folder that `import` wrote.
      published: the folder that it came from, or that `export --like` wrote.
      options: entries of config.json that `published` lacks.

    Raises:
      FamilyError: the folder keeps adapters apart, or is not what it should be.
    """
    if (epath.Path(published) / ADAPTER).exists():
        raise FamilyError(
            f"{published}: has adapters apart, in {ADAPTER}/, which are not run here; export "
            "without --keep_adapters and check that"
        )
    family, _, data = read_config(published, options)
    config, params = _merged_params(model)
    tensors = huggingface.read_tensors(published)
    rng = np.random.default_rng(seed)
    module, frames = _module(config, params), _frames(config, rng)
    differences, vision = compare_towers(module.vision, tensors, frames)
    qformer = isinstance(config.connector, QFormerConfig)
    if qformer:
        more, connector = compare_qformer(module.connector, tensors, config.vision.width, rng)
    else:
        more, connector = _projector(module, tensors, rng)
    theirs = _language(family.name, data, tensors)
    adapted = ", its published adapters merged" if family.name == "videochat" else ""
    differences |= more | compare_parameters(
        config.language, unflatten(params)["language"], theirs, seed
    )
    parts = {
        "vision": vision,
        "connector": connector,
        "language": f"{type(theirs).__name__} of transformers{adapted}",
    }
    whole = family.name in WHOLE
    if whole:
        del theirs  # as large as the language model
        more, parts["whole"] = compare_whole(module, published, frames, rng)
        differences |= more
    return Compared(differences, parts, _glue(config, whole))


def compare_parts(model: epath.PathLike, exported: epath.PathLike, seed: int = 0) -> Compared:
    """Runs the parts of a model of two, as `siglip.export_parts` wrote them, on both sides."""
    exported = epath.Path(exported)
    config, params = _merged_params(model)
    rng, module = np.random.default_rng(seed), _module(config, params)
    tensors = {f"vision_tower.{key}": tensor
               for key, tensor in huggingface.read_tensors(exported / "vision").items()
               if key.startswith("vision_model.")}  # fmt: skip
    ours = read_file(exported / siglip.CONNECTOR)
    for layer in ("linear_1", "linear_2"):
        kernel, bias = (np.asarray(ours[f"connector/{layer}/{x}"]) for x in ("kernel", "bias"))
        tensors |= {f"multi_modal_projector.{layer}.weight": kernel.T,
                    f"multi_modal_projector.{layer}.bias": bias}  # fmt: skip
    differences, vision = compare_towers(module.vision, tensors, _frames(config, rng))
    more, connector = _projector(module, tensors, rng)
    differences |= more | compare_language(model, exported / "language_model", seed)
    language = "AutoModelForCausalLM of transformers"
    parts = {"vision": vision, "connector": connector, "language": language}
    return Compared(differences, parts, _glue(config))


def _merged_params(model: epath.PathLike) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A model's configuration and its parameters in float32, adapters merged."""
    config, leaves = folder.load_config(model), folder.open_leaves(model)
    leaves = peft.merged_leaves(leaves, config.lora) if config.lora else leaves
    return config, {path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}


def _frames(config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    side = config.vision.image_size
    return rng.integers(0, 256, (1, FRAMES, side, side, 3), np.uint8)


def _glue(config: ModelConfig, whole: bool = False) -> tuple[str, ...]:
    """What a comparison by parts leaves out, or one by parts and of the `whole`."""
    glue = ["sampling and resizing of frames", "the template"]
    if whole:
        glue.append("images and their tiles")
    else:
        glue.append("the order of the clip's tokens" if isinstance(config.connector, QFormerConfig)
                    else "pooling, newlines and tiles of visual tokens")  # fmt: skip
        glue.append("their place in the prompt")
    return (*glue, f"heads ({', '.join(config.heads)})") if config.heads else tuple(glue)


def _module(config: ModelConfig, params: Mapping[str, np.ndarray]) -> Any:
    """Our model; adapters are merged into `params`."""
    return FunctionalModel(dataclasses.replace(config, lora=None)).bind(
        jax.tree.map(jnp.asarray, unflatten(dict(params)))
    )


def _projector(
    module: Any, tensors: Mapping[str, Any], rng: np.random.Generator
) -> tuple[dict[str, float], str]:
    import torch

    first, second = (
        named(tensors, _PROJECTOR.format(one=one, zero=zero)) for one, zero in ((1, 0), (2, 2))
    )
    x = rng.normal(size=(4, first["weight"].shape[1])).astype(np.float32)
    with torch.no_grad():
        hidden = torch.nn.functional.linear(torch.from_numpy(x), first["weight"], first["bias"])
        out = torch.nn.functional.linear(
            torch.nn.functional.gelu(hidden), second["weight"], second["bias"]
        )
    ours = module.connector
    return {
        "connector/linear_1": difference(ours.linear_1(jnp.asarray(x)), hidden),
        "connector/linear_2": difference(ours.project(jnp.asarray(x)), out),
    }, "two linear layers of PyTorch, on random patches"


def _language(name: str, data: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """`transformers`' language model with the published weights of the family `name`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if name == "videochat":
        text = dict(data.get("llm_config") or MISTRAL_7B)
        found = _merged(named(tensors, _WRAPPED), data["model_config"]["llm"])
    else:
        text = dict(data.get("text_config") or data)
        found = {f"model.{key}": tensor for key, tensor in named(tensors, _LANGUAGE).items()}
        found |= named(tensors, _HEAD)
    kind = {"llava_qwen": "qwen2", "video_llava_original": "llama"}.get(name, text["model_type"])
    # Two tables, whatever config.json says: a tied model whose files hold both is what they hold.
    own = ("model_type", "dtype", "torch_dtype", "tie_word_embeddings")
    options = {k: v for k, v in text.items() if k not in own}
    config = AutoConfig.for_model(kind, tie_word_embeddings=False, **options)
    if data.get("tie_word_embeddings") or text.get("tie_word_embeddings"):
        found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    make = functools.partial(AutoModelForCausalLM.from_config, dtype=torch.float32)
    return filled(make(config), found, r".*inv_freq")


def _merged(tensors: Mapping[str, Any], llm: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors in PEFT's wrapping, each kernel with its adapter added."""
    merged = {}
    for key, tensor in tensors.items():
        if ".base_layer." in key:
            low, high = (tensors[key.replace("base_layer", f"lora_{x}.default")] for x in "AB")
            tensor = tensor + llm["lora_alpha"] / llm["lora_r"] * high @ low
        merged[key.replace(".base_layer", "")] = tensor
    return merged
