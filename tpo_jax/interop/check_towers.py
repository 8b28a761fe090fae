"""Vision towers and the Q-Former here and in PyTorch on the same input, layer by layer.

The PyTorch side is filled from the published tensors by name. `transformers` has SigLIP, CLIP and
the Q-Former; what it lacks (LanguageBind's attention over time, UMT) is written here once more with
PyTorch's own functions, from the published names and not from our modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tpo_jax.interop.families.base import FamilyError
from tpo_jax.models.connectors.config import QFormerConfig
from tpo_jax.models.towers.config import TowerConfig
from tpo_jax.models.towers.registry import normalise_pixels

# Names of a tower's tensors over all layouts; the group is the name in transformers' class.
_TOWER = r"(?:model\.)?{name}\.(?:{name}\.)?(?:vision_model\.)?(.*)"
_UMT = r"(vision_encoder\.encoder\..*|vision_layernorm\..*)"
_QFORMER = r"qformer\.bert\.(.*)"
_TOWERS = {
    "siglip": {"vision_tower": ""}, "siglip2": {"vision_tower": ""}, "clip": {"vision_tower": ""},
    "languagebind": {"image_tower": "image_tower", "video_tower": "video_tower"},
    "umt": {"vision_encoder": ""},
}  # fmt: skip

_SIGLIP = {"siglip": "Siglip", "siglip2": "Siglip2"}  # names of their classes in `transformers`


def named(tensors: Mapping[str, Any], pattern: str) -> dict[str, Any]:
    """Tensors whose whole name matches, by the group of the pattern, as float32 of PyTorch."""
    import torch

    found = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(pattern, key):
            found[match[1]] = torch.from_numpy(np.array(tensor, np.float32))
    return found


def filled(module: Any, tensors: Mapping[str, Any], optional: str) -> Any:
    """A PyTorch module with the tensors; every parameter has to be there, by its name below
    vision_model, unless `optional` matches."""
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


def compare_towers(
    vision: Any, tensors: Mapping[str, Any], frames: np.ndarray
) -> tuple[dict[str, float], str]:
    """Largest differences after each layer of every tower, and what stood on the other side.

    Args:
      vision: our module with its parameters.
      tensors: published, by name.
      frames: uint8[1, F, S, S, 3].
    """
    differences = {}
    for name, attribute in _TOWERS[vision.config.kind].items():
        ours = getattr(vision, attribute) if attribute else vision
        pixels = np.asarray(normalise_pixels(ours.config, jnp.asarray(frames)))
        _, last, states = ours.run(jnp.asarray(pixels), np.ones(frames.shape[:2], bool), keep=True)
        clip = _channels_first(pixels[0])
        if ours.config.kind == "umt":
            expected = _umt(ours.config, named(tensors, _UMT), clip)
            states = [*states, ours.post_layernorm(last)]
        else:
            expected = _of_transformers(ours.config, named(tensors, _TOWER.format(name=name)), clip)
        for number, (found, wanted) in enumerate(zip(states, expected, strict=True)):
            layer = f"layer {number - 1}" if number else "embed"
            layer = "post_layernorm" if number > ours.config.depth else layer
            differences[f"vision/{name}/{layer}"] = difference(found[0], wanted)
    return differences, _other_side(vision.config)


def _other_side(config: TowerConfig) -> str:
    if config.kind == "umt":
        return "UMT, written with PyTorch's functions (transformers has no such class)"
    if config.kind in _SIGLIP:
        return f"{_SIGLIP[config.kind]}VisionModel of transformers"
    more = "; its attention over time is written with PyTorch's functions" if config.frames else ""
    return f"CLIPVisionModel of transformers{more}"


def _channels_first(pixels: np.ndarray) -> Any:
    """float32[F, S, S, 3] -> PyTorch's float32[F, 3, S, S]."""
    import torch

    return torch.from_numpy(np.moveaxis(pixels, -1, -3).copy())


def _of_transformers(config: TowerConfig, tensors: Mapping[str, Any], clip: Any) -> list[Any]:
    """Hidden states [F, T, D] before the first layer and after each."""
    import torch
    import transformers

    kind = _SIGLIP.get(config.kind, "CLIP")
    make, describe = (getattr(transformers, f"{kind}Vision{part}") for part in ("Model", "Config"))
    options = {
        "image_size": config.image_size, "patch_size": config.patch_size,
        "hidden_size": config.width, "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads, "intermediate_size": config.mlp_width,
        "hidden_act": config.activation, "layer_norm_eps": config.epsilon,
    }  # fmt: skip
    more = {}
    if kind != "CLIP":
        options["vision_use_head"] = False
    if kind == "Siglip2":  # it takes patches, of any grid
        del options["image_size"]
        options["num_patches"] = config.grid**2
        clip, more = _patches(clip, config)
    theirs = filled(make(describe(**options)), tensors, r".*position_ids|head\..*")
    with torch.no_grad():
        if not config.frames:
            return list(theirs(clip, output_hidden_states=True, **more).hidden_states)
        states = [theirs.pre_layrnorm(theirs.embeddings(clip))]
        for number, layer in enumerate(theirs.encoder.layers):
            key = f"encoder.layers.{number}."
            part = {k.removeprefix(key): v for k, v in tensors.items() if k.startswith(key)}
            out = layer(_over_time(config, part, states[-1]), None)
            states.append(out[0] if isinstance(out, tuple) else out)
        return states


def _patches(clip: Any, config: TowerConfig) -> tuple[Any, dict[str, Any]]:
    """float32[F, 3, S, S] -> float32[F, grid * grid, 3 p p], channels last in a patch, and which
    are there and how they lie."""
    import torch

    frames, side, p = len(clip), config.grid, config.patch_size
    whole = clip[..., : side * p, : side * p].reshape(frames, 3, side, p, side, p)
    patches = whole.permute(0, 2, 4, 3, 5, 1).reshape(frames, side * side, 3 * p * p)
    shapes = torch.tensor([[side, side]] * frames)
    return patches, {
        "pixel_attention_mask": torch.ones(frames, side * side), "spatial_shapes": shapes,
    }  # fmt: skip


def _over_time(config: TowerConfig, part: Mapping[str, Any], x: Any) -> Any:
    """LanguageBind's first half of a layer: x float32[F, T, D] plus attention over F at each token.

    Args:
      part: tensors of the layer by their names in it.
    """
    from torch.nn import functional as F

    x = x + part["temporal_embedding"][0, : len(x), None]
    norm = (part[f"temporal_layer_norm1.{name}"] for name in ("weight", "bias"))
    rows = F.layer_norm(x, x.shape[-1:], *norm, config.epsilon).transpose(0, 1)  # [T, F, D]
    q, k, v = (
        F.linear(rows, part[f"temporal_attn.{name}_proj.weight"],
                 part[f"temporal_attn.{name}_proj.bias"])
        for name in ("q", "k", "v")
    )  # fmt: skip
    out = F.linear(
        _attend(q, k, v, config.heads), part["temporal_attn.out_proj.weight"],
        part["temporal_attn.out_proj.bias"],
    )  # fmt: skip
    return x + out.transpose(0, 1)


def _attend(q: Any, k: Any, v: Any, heads: int) -> Any:
    """float32[B, T, D], three times -> float32[B, T, D]."""
    from torch.nn import functional as F

    B, T, D = q.shape
    q, k, v = (x.reshape(B, -1, heads, D // heads).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)


def _umt(config: TowerConfig, tensors: Mapping[str, Any], clip: Any) -> list[Any]:
    """Hidden states float[F * p, D] before the first layer, after each, after the last norm; in the
    dtype of clip and tensors."""
    import torch
    from torch.nn import functional as F

    tower = "vision_encoder.encoder."

    def linear(name: str, x: Any) -> Any:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name: str, x: Any, epsilon: float) -> Any:
        return F.layer_norm(x, x.shape[-1:], *(tensors[f"{name}.{n}"] for n in ("weight", "bias")),
                            epsilon)  # fmt: skip

    patch, side = tensors[f"{tower}patch_embed.proj.weight"], config.patch_size
    x = F.conv2d(clip, patch.reshape(-1, 3, side, side), tensors[f"{tower}patch_embed.proj.bias"],
                 stride=side)  # fmt: skip
    x = x.flatten(2).transpose(1, 2) + _umt_positions(config, len(clip)).to(clip.dtype)
    x, states = x.reshape(1, -1, config.width), []
    for number in range(config.depth):
        states.append(x[0])
        block = f"{tower}blocks.{number}"
        biases = [tensors[f"{block}.attn.{name}_bias"] for name in ("q", "v")]
        bias = torch.cat([biases[0], torch.zeros_like(biases[0]), biases[1]])
        qkv = F.linear(norm(f"{block}.norm1", x, config.epsilon),
                       tensors[f"{block}.attn.qkv.weight"], bias)  # fmt: skip
        x = x + linear(f"{block}.attn.proj", _attend(*qkv.chunk(3, dim=-1), config.heads))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, config.epsilon)))
        x = x + linear(f"{block}.mlp.fc2", hidden)
    return [*states, x[0], norm("vision_layernorm", x, 1e-12)[0]]


def _umt_positions(config: TowerConfig, frames: int) -> Any:
    """float32[frames, p, D]: sines and cosines over (frame, row, column) as the tower was trained,
    linear in time between the centres of the trained frames."""
    import torch

    trained, places, width = (1 if frames == 1 else config.frames), config.grid**2, config.width
    table = torch.arange(trained * places, dtype=torch.float64)[:, None] / torch.pow(
        10000.0, 2 * (torch.arange(width) // 2) / width
    )
    table[:, 0::2], table[:, 1::2] = table[:, 0::2].sin(), table[:, 1::2].cos()
    table = table.float().reshape(1, trained, places * width).transpose(1, 2)
    table = torch.nn.functional.interpolate(table, frames, mode="linear", align_corners=False)
    return table[0].T.reshape(frames, places, width)


def compare_qformer(
    connector: Any, tensors: Mapping[str, Any], width: int, rng: np.random.Generator
) -> tuple[dict[str, float], str]:
    """The Q-Former on random tokens of a clip, and the matrix behind it.

    Args:
      connector: our module with its parameters.
      width: of the tower.
    """
    import torch

    config: QFormerConfig = connector.config
    tokens = rng.normal(size=(1, 24, width)).astype(np.float32)
    states = connector.states(jnp.asarray(tokens), jnp.ones(tokens.shape[:2], bool))
    expected = _bert(config, tensors, torch.from_numpy(tokens))
    up = named(tensors, r"project_up\.(weight|bias)")
    found, wanted = connector.project_up(states[-1]), torch.nn.functional.linear(
        expected[-1], up["weight"], up["bias"]
    )  # fmt: skip
    names = ["embed", *(f"layer {i}" for i in range(config.depth))]
    differences = {
        f"connector/{name}": difference(ours[0], theirs)
        for name, ours, theirs in zip(names, states, expected, strict=True)
    }
    differences["connector/project_up"] = difference(found[0], wanted)
    return differences, "Blip2QFormerModel of transformers, on random tokens, and project_up"


def _bert(config: QFormerConfig, tensors: Mapping[str, Any], tokens: Any) -> list[Any]:
    """States float32[Q, D] of the queries after the first norm and after each layer."""
    import torch
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    theirs = Blip2QFormerModel(Blip2QFormerConfig(
        hidden_size=config.width, num_hidden_layers=config.depth, hidden_act="gelu",
        num_attention_heads=config.heads, intermediate_size=config.mlp_width,
        encoder_hidden_size=tokens.shape[-1], cross_attention_frequency=2, layer_norm_eps=1e-12,
        use_qformer_text_input=False, attn_implementation="eager",
    ))  # fmt: skip
    renamed = {
        re.sub(r"\.(cross)?attention\.self\.", r".\1attention.attention.", key).replace(
            "embeddings.LayerNorm", "layernorm"): tensor
        for key, tensor in named(tensors, _QFORMER).items()
    }  # fmt: skip
    theirs, states = filled(theirs, renamed, ""), []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    for module in (theirs.layernorm, *theirs.encoder.layer):
        module.register_forward_hook(keep)
    queries = [named(tensors, f"({name})") for name in ("query_tokens", "extra_query_tokens")]
    queries = torch.cat([tensor for found in queries for tensor in found.values()], dim=1)
    with torch.no_grad():
        theirs(query_embeds=queries, encoder_hidden_states=tokens)
    return [state[0] for state in states]


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference of two [...] of one shape, in float64."""
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs.detach().numpy())))
