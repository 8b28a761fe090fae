"""Runs a multimodal model here and the parts of its published folder in PyTorch, layer by layer.

Towers and language model are `transformers`' classes, filled from the published tensors by name
and not through our mapping; the connector's two matrices are PyTorch's. What puts them together
(pooling, newlines, tiles) has no class that takes every layout: tests/parity compares it.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tpo_jax.interop import folder, huggingface, peft
from tpo_jax.interop.check_language import compare_parameters
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.interop.families.source import read_config
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.towers.registry import normalise_pixels
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.paths import unflatten

FRAMES = 2
# Names of a part's tensors over all layouts; the group is the name in transformers' class.
_TOWER = r"(?:model\.)?{name}\.(?:{name}\.)?(?:vision_model\.)?(.*)"
_PROJECTOR = r"(?:model\.)?(?:multi_modal_projector\.linear_{one}|mm_projector\.{zero})\.(.*)"
_LANGUAGE = (
    r"(?:language_model\.model\.|model\.language_model\.|model\.)((?:embed_tokens|layers|norm)\..*)"
)
_HEAD = r"(?:language_model\.)?(lm_head\.weight)"


def compare_family(
    model: epath.PathLike, published: epath.PathLike, options: Mapping[str, Any], seed: int = 0
) -> dict[str, float]:
    """Largest absolute difference, in float32, after each layer, in the order of computation.

    Args:
      model: model folder that `import` wrote.
      published: the folder that it came from, or that `export --like` wrote.
      options: entries of config.json that `published` lacks.

    Raises:
      FamilyError: a family whose tower PyTorch's transformers does not have.
    """
    family, _, data = read_config(published, options)
    config = folder.load_config(model)
    towers = {"siglip": {"vision_tower": ""}, "clip": {"vision_tower": ""},
              "languagebind": {"image_tower": "image_tower/", "video_tower": "video_tower/"},
              }  # fmt: skip
    if config.vision.kind not in towers or config.vision.frames:
        raise FamilyError(
            f"{published}: `transformers` has no tower like that of {family.name} "
            f"(vision.kind={config.vision.kind!r}, attention over time: "
            f"{bool(config.vision.frames)}); tests/models/towers compares it with NumPy"
        )
    leaves = folder.open_leaves(model)
    leaves = peft.merged_leaves(leaves, config.lora) if config.lora else leaves
    params = {path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
    tensors = huggingface.read_tensors(published)
    side = config.vision.image_size
    frames = np.random.default_rng(seed).integers(0, 256, (1, FRAMES, side, side, 3), np.uint8)
    module = _module(config, params)
    differences = {}
    for name, prefix in towers[config.vision.kind].items():
        tower = module.vision if not prefix else getattr(module.vision, name)
        differences |= _tower(tower, name, _named(tensors, _TOWER.format(name=name)), frames)
    differences |= _projector(module, tensors, seed)
    text = dict(data.get("text_config") or data)
    text["model_type"] = {"llava_qwen": "qwen2"}.get(text["model_type"], text["model_type"])
    return differences | compare_parameters(
        config.language, unflatten(params)["language"], _language(text, tensors), seed
    )


def _module(config: ModelConfig, params: Mapping[str, np.ndarray]) -> Any:
    return FunctionalModel(config).bind(jax.tree.map(jnp.asarray, unflatten(dict(params))))


def _named(tensors: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """Tensors whose whole name matches, by the group of the pattern, as float32 of PyTorch."""
    import torch

    found = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(pattern, key):
            found[match[1]] = torch.from_numpy(np.array(tensor, np.float32))
    return found


def _load(module: Any, tensors: Mapping[str, Any], optional: str) -> Any:
    """Fills a PyTorch module; every parameter has to be there, by its name below vision_model."""
    own = {key.removeprefix("vision_model."): key for key in module.state_dict()}
    wrong = sorted(name for name in own if name not in tensors and not re.fullmatch(optional, name))
    if wrong:
        raise FamilyError(
            f"the published folder lacks {len(wrong)} tensors of {type(module).__name__}, "
            f"such as {wrong[0]}"
        )
    state = {own[name]: tensor for name, tensor in tensors.items() if name in own}
    module.load_state_dict(state, strict=False)
    return module.eval()


def _tower(
    ours: Any, name: str, tensors: Mapping[str, Any], frames: np.ndarray
) -> dict[str, float]:
    import torch
    import transformers

    config = ours.config
    kind = "Siglip" if config.kind == "siglip" else "CLIP"
    make, describe = (getattr(transformers, f"{kind}Vision{part}") for part in ("Model", "Config"))
    options = {
        "image_size": config.image_size, "patch_size": config.patch_size,
        "hidden_size": config.width, "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads, "intermediate_size": config.mlp_width,
        "hidden_act": config.activation, "layer_norm_eps": config.epsilon,
    }  # fmt: skip
    if kind == "Siglip":
        options["vision_use_head"] = False
    theirs = _load(make(describe(**options)), tensors, r".*position_ids|head\..*")
    pixels = np.asarray(normalise_pixels(config, jnp.asarray(frames)))
    valid = np.ones(frames.shape[:2], bool)
    _, _, states = ours.run(jnp.asarray(pixels), valid, keep=True)
    with torch.no_grad():
        flat = torch.from_numpy(np.moveaxis(pixels[0], -1, -3).copy())
        expected = theirs(flat, output_hidden_states=True).hidden_states
    return {
        f"vision/{name}/{f'layer {i - 1}' if i else 'embed'}": difference(state[0], expected[i])
        for i, state in enumerate(states)
    }


def _projector(module: Any, tensors: Mapping[str, Any], seed: int) -> dict[str, float]:
    import torch

    first, second = (
        _named(tensors, _PROJECTOR.format(one=one, zero=zero)) for one, zero in ((1, 0), (2, 2))
    )
    x = np.random.default_rng(seed).normal(size=(4, first["weight"].shape[1])).astype(np.float32)
    with torch.no_grad():
        hidden = torch.nn.functional.linear(torch.from_numpy(x), first["weight"], first["bias"])
        out = torch.nn.functional.linear(
            torch.nn.functional.gelu(hidden), second["weight"], second["bias"]
        )
    ours = module.connector
    return {
        "connector/linear_1": difference(ours.linear_1(jnp.asarray(x)), hidden),
        "connector/linear_2": difference(ours.project(jnp.asarray(x)), out),
    }


def _language(text: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """`transformers`' language model with the published weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {k: v for k, v in text.items() if k not in ("model_type", "dtype", "torch_dtype")}
    config = AutoConfig.for_model(text["model_type"], **options)
    found = {f"model.{name}": tensor for name, tensor in _named(tensors, _LANGUAGE).items()}
    found |= _named(tensors, _HEAD)
    if config.tie_word_embeddings:
        found["lm_head.weight"] = found["model.embed_tokens.weight"]
    make = functools.partial(AutoModelForCausalLM.from_config, dtype=torch.float32)
    return _load(make(config), found, r".*inv_freq")


def difference(ours: jax.Array, theirs: Any) -> float:
    """Largest absolute difference of two [...] of one shape, in float64."""
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs.detach().numpy())))
