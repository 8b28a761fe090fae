"""Composed families in PyTorch, in float32 or bfloat16: towers, Q-Former and language models of
`transformers`, between them PyTorch's functions on the published tensors by name.

`transformers` has neither LanguageBind's attention over time nor UMT: those are the functions that
`convert check` runs beside real weights, written from the published names as well.
"""

import dataclasses
import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

from tpo_jax.interop import check_towers


@dataclasses.dataclass
class Composed:
    """The other side of a composed family.

    Attributes:
      see: visual tokens [V, D] of pixels [F, S, S, 3], normalised, in the dtype of the model. One
        frame is an image; with the second argument, (height, width), F are the tiles of an image of
        that size, the whole image first.
      language: of `transformers`.
    """

    see: Callable[..., Any]
    language: Any

    def embeds(self, ids, visual):
        """[T, D] of ids int64[T], in which -1 stands for each of the tokens [V, D]."""
        import torch

        embeds = self.language.get_input_embeddings()(torch.from_numpy(np.maximum(ids, 0)))
        places = torch.from_numpy(ids < 0)
        assert places.sum() == len(visual)
        return embeds.masked_scatter(places[:, None], visual.to(embeds.dtype))


def compose(name, data, tensors, dtype):
    """Of a key of VISUAL, its config.json, its published tensors, and "float32" or "bfloat16"."""
    import torch

    dtype = getattr(torch, dtype)
    language = language_of(name, data, tensors).to(dtype)
    tensors = {key: torch.as_tensor(value).to(dtype) for key, value in tensors.items()}

    def see(pixels, size=None):
        with torch.no_grad():
            return VISUAL[name](data, tensors, pixels.to(dtype), size)

    return Composed(see, language)


def compose_siglip2_qwen3(path, dtype):
    """Of what `convert export --like` writes of a joined model."""
    import torch
    from transformers import AutoModelForCausalLM, Siglip2VisionModel

    dtype = getattr(torch, dtype)
    tower = Siglip2VisionModel.from_pretrained(path / "vision", dtype=dtype).eval()
    tensors = safetensors.numpy.load_file(path / "connector.safetensors")
    layers = [
        [torch.from_numpy(tensors[f"connector/linear_{i}/{name}"].T.copy()).to(dtype)
         for name in ("kernel", "bias")]
        for i in (1, 2)
    ]  # fmt: skip

    def see(pixels, size=None):
        frames, side = len(pixels), pixels.shape[1] // 8
        patches = pixels.to(dtype).reshape(frames, side, 8, side, 8, 3).transpose(2, 3)
        with torch.no_grad():
            states = tower(
                patches.reshape(frames, side * side, -1),
                pixel_attention_mask=torch.ones(frames, side * side),
                spatial_shapes=torch.tensor([[side, side]] * frames), output_hidden_states=True,
            ).hidden_states[-2]  # fmt: skip
            x = mlp(layers, states)
            return pooled(x).flatten(0, 2) if frames > 1 else x[0]  # an image is not pooled

    inner = path / "language_model"
    return Composed(see, AutoModelForCausalLM.from_pretrained(inner, dtype=dtype).eval())


def fill(module, tensors, pattern):
    """The module with the tensors whose name matches, by the group of the pattern; every parameter
    has to be there."""
    import torch

    matches = ((re.fullmatch(pattern, key), value) for key, value in tensors.items())
    module.load_state_dict({m[1]: torch.as_tensor(v) for m, v in matches if m})
    return module.eval()


TOWER = r"model\.vision_tower\.vision_tower\.vision_model\.(.*)"


def tower_of(kind, data, tensors, pattern=TOWER):
    """A tower of `transformers`, float32."""
    import transformers

    config = getattr(transformers, f"{kind}VisionConfig")(**data["vision_config"])
    return fill(getattr(transformers, f"{kind}VisionModel")(config), tensors, pattern)


def channels_first(pixels):
    return pixels.movedim(-1, 1).contiguous()


def mlp(layers, x):
    """[..., D_vision] -> [..., D], of two (weight, bias)."""
    from torch.nn import functional as F

    return F.linear(F.gelu(F.linear(x, *layers[0])), *layers[1])


def projected(tensors, x):
    """What the connector of the LLaVA layouts makes of [..., D_vision]."""
    name = "model.mm_projector"
    return mlp([(tensors[f"{name}.{n}.weight"], tensors[f"{name}.{n}.bias"]) for n in (0, 2)], x)


def pooled(x):
    """[F, h * h, D] -> [F, h // 2, h // 2, D], means of 2 x 2."""
    from torch.nn import functional as F

    side = int(x.shape[1] ** 0.5)
    return F.avg_pool2d(channels_first(x.unflatten(1, (side, side))), 2).movedim(1, -1)


def llava(data, tensors, pixels, size):
    """LongVA pools frames and tiles alike, and of an image in tiles leaves the whole one out.
    LLaVA-Video has a newline behind every row, and does not pool images."""
    import torch

    clip = data["vision_config"]["model_type"] == "clip_vision_model"
    kind, layer = ("CLIP", -2) if clip else ("Siglip", -1)
    tower = tower_of(kind, data, tensors).to(pixels.dtype)
    states = tower(channels_first(pixels), output_hidden_states=True).hidden_states[layer]
    x = projected(tensors, states[:, int(clip) :])
    if data["mm_patch_merge_type"] == "unires":
        return pooled(x[0 if size is None else 1 :]).flatten(0, 2)
    newline = tensors["model.image_newline"]
    if size is not None:
        return packed(data, x, newline, size)
    grid = pooled(x)
    return torch.cat([grid, newline.expand(*grid.shape[:2], 1, -1)], dim=2).flatten(0, 2)


def packed(data, x, newline, size):
    """[V, D] of the tiles [1 + n, h * h, D] of an image, as LLaVA-OneVision has it."""
    import torch
    from transformers import LlavaOnevisionModel

    assert data["image_grid_pinpoints"] == "(1x1),...,(2x3)"  # widths x heights, in LLaVA-NeXT
    side = data["vision_config"]["image_size"]
    about = types.SimpleNamespace(
        vision_config=types.SimpleNamespace(**data["vision_config"]),
        image_grid_pinpoints=[[side * rows, side * columns]
                              for columns in (1, 2) for rows in (1, 2, 3)],
    )  # fmt: skip
    (tokens,), _ = LlavaOnevisionModel.pack_image_features(
        types.SimpleNamespace(config=about), [x], torch.tensor([size]), newline,
        data["image_aspect_ratio"],
    )  # fmt: skip
    return tokens


def languagebind(data, tensors, pixels, size):
    """An image has a tower without attention over time, and no class token."""
    image = len(pixels) == 1
    name = "image_tower" if image else "video_tower"
    part = rf"model\.{name}\.{name}\."
    tower = tower_of("CLIP", data, tensors, rf"{part}((?!.*\.temporal_).*)").to(pixels.dtype)
    x = tower.pre_layrnorm(tower.embeddings(channels_first(pixels)))
    config = types.SimpleNamespace(
        heads=tower.config.num_attention_heads, epsilon=tower.config.layer_norm_eps
    )
    for number, layer in enumerate(tower.encoder.layers[:-1]):
        if not image:
            pattern = rf"{part}encoder\.layers\.{number}\.(temporal_.*)"
            found = ((re.fullmatch(pattern, key), value) for key, value in tensors.items())
            x = check_towers._over_time(config, {m[1]: v for m, v in found if m}, x)
        x = layer(x, None)
        x = x[0] if isinstance(x, tuple) else x
    return projected(tensors, x[:, int(image) :]).flatten(0, 1)


def videochat(data, tensors, pixels, size):
    from torch.nn import functional as F

    about = data["model_config"]["vision_encoder"]
    config = types.SimpleNamespace(
        patch_size=about["patch_size"], depth=about["encoder_depth"] - 1, epsilon=1e-6,
        heads=about["encoder_num_heads"], width=about["encoder_embed_dim"], frames=4,
        grid=about["img_size"] // about["patch_size"],
    )  # fmt: skip
    *_, tokens = check_towers._umt(config, tensors, channels_first(pixels))
    states = qformer(data, tensors, tokens[None])[0]
    return F.linear(states, tensors["project_up.weight"], tensors["project_up.bias"])


def qformer(data, tensors, tokens):
    """States [1, Q, D_qformer] of BLIP-2's queries, which read tokens [1, T, D_vision]."""
    import torch
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    bridge = Blip2QFormerModel(Blip2QFormerConfig(
        **data["qformer_config"], encoder_hidden_size=tokens.shape[-1],
        cross_attention_frequency=2, use_qformer_text_input=False, attn_implementation="eager",
    ))  # fmt: skip
    renamed = {
        re.sub(r"\.(cross)?attention\.self\.", r".\1attention.attention.", key).replace(
            "embeddings.LayerNorm", "layernorm"): value
        for key, value in tensors.items()
    }  # fmt: skip
    bridge = fill(bridge, renamed, r"qformer\.bert\.(.*)").to(tokens.dtype)
    names = ("query_tokens", "extra_query_tokens")
    queries = torch.cat([torch.as_tensor(tensors[name]) for name in names], dim=1)
    with torch.no_grad():
        return bridge(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state


VISUAL = {
    "llava_video": llava, "longva": llava, "video_llava_original": languagebind,
    "videochat": videochat,
}  # fmt: skip


def language_of(name, data, tensors):
    """The language model of `transformers`, its adapters merged."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {"llava_video": "qwen2", "longva": "qwen2", "video_llava_original": "llama"}
    text = data.get("llm_config") or data | {"model_type": kind[name]}
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text))
    if "llm_config" not in data:
        pattern = r"((?:lm_head|model\.(?:embed_tokens|layers|norm))\..*)"
        return fill(module, tensors, pattern)
    llm, merged = data["model_config"]["llm"], {}
    for key, value in tensors.items():
        if ".base_layer." in key:
            low, high = (tensors[key.replace("base_layer", f"lora_{x}.default")] for x in "AB")
            value = value + llm["lora_alpha"] / llm["lora_r"] * high @ low
        merged[key.replace(".base_layer", "")] = value
    return fill(module, merged, r"lm\.base_model\.model\.((?!.*lora_).*)")
