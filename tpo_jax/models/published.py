"""Published families as presets: full size, and a tiny model of the same parts.

Sizes and modes are those of the checkpoints named in docs/families.md. A run that starts from
imported weights needs no preset: its folder says all this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from tpo_jax.models.config import HeadConfig, LanguageConfig, LoraConfig, ModelConfig
from tpo_jax.models.connectors.config import MlpConnectorConfig, QFormerConfig
from tpo_jax.models.heads import tokens_of
from tpo_jax.models.towers.config import TowerConfig

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

SIGLIP_SO400M = TowerConfig(
    kind="siglip", image_size=384, patch_size=14, width=1152, depth=26, heads=16, mlp_width=4304,
    activation="gelu_pytorch_tanh", epsilon=1e-6, layer=-1, max_frames=512,
)  # fmt: skip
# For any aspect ratio (siglip2-so400m-patch16-naflex), here 16 x 16 patches of a square frame; what
# enters the last layer is read, as in the LLaVA families.
SIGLIP2_SO400M = TowerConfig(
    kind="siglip2", image_size=256, patch_size=16, width=1152, depth=27, heads=16, mlp_width=4304,
    activation="gelu_pytorch_tanh", epsilon=1e-6, layer=-2, max_frames=512,
)  # fmt: skip
CLIP_L_336 = TowerConfig(
    kind="clip", image_size=336, patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096,
    activation="quick_gelu", epsilon=1e-5, layer=-2, max_frames=512, mean=OPENAI_MEAN,
    std=OPENAI_STD, resize="crop",
)  # fmt: skip
LANGUAGEBIND = dataclasses.replace(
    CLIP_L_336, kind="languagebind", image_size=224, activation="gelu", frames=8, max_frames=8
)
UMT_L = TowerConfig(
    kind="umt", image_size=224, patch_size=16, width=1024, depth=23, heads=16, mlp_width=4096,
    activation="gelu", epsilon=1e-6, layer=-1, max_frames=16, frames=4, mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)  # fmt: skip

QWEN2_7B = LanguageConfig(
    vocab_size=152064, width=3584, depth=28, heads=28, kv_heads=4, head_dim=128, mlp_width=18944,
    rope_theta=1e6, qkv_bias=True,
)  # fmt: skip
QWEN2_HALF_B = LanguageConfig(
    vocab_size=151936, width=896, depth=24, heads=14, kv_heads=2, head_dim=64, mlp_width=4864,
    rope_theta=1e6, qkv_bias=True, tied_head=True,
)  # fmt: skip
QWEN3_8B = LanguageConfig(
    vocab_size=151936, width=4096, depth=36, heads=32, kv_heads=8, head_dim=128, mlp_width=12288,
    rope_theta=1e6, qk_norm=True,
)  # fmt: skip
VICUNA_7B = LanguageConfig(
    vocab_size=32128, width=4096, depth=32, heads=32, kv_heads=32, head_dim=128, mlp_width=11008,
    norm_epsilon=1e-5,
)  # fmt: skip
MISTRAL_7B = LanguageConfig(
    vocab_size=32128, width=4096, depth=32, heads=32, kv_heads=8, head_dim=128, mlp_width=14336,
    norm_epsilon=1e-5, rope_theta=1e6,
)  # fmt: skip


def grids(side: int, most: int) -> tuple[tuple[int, int], ...]:
    """Resolutions of images in tiles of `side` pixels, from 1 x 1 to most x most of them."""
    return tuple(
        (side * rows, side * columns)
        for rows in range(1, most + 1)
        for columns in range(1, most + 1)
    )


ONEVISION_CONNECTOR = MlpConnectorConfig(
    pool="bilinear", newline="one_token", image="newline", resolutions=grids(384, 6), max_tiles=9
)
# Of no checkpoint: a model of SigLIP 2 and Qwen3 begins with a new connector.
SIGLIP2_CONNECTOR = MlpConnectorConfig(pool="average", newline="no_token", image="plain")
# Rank, targets and dropout of the published checkpoint.
VIDEOCHAT_LORA = LoraConfig(
    r"language/.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|lm_head)/kernel",
    rank=16, alpha=32.0, dropout=0.1,
)  # fmt: skip

# {"FAMILY_SIZE": vision, connector, language and what else differs}.
_FULL: dict[str, tuple[Any, Any, LanguageConfig, dict[str, Any]]] = {
    "llava_onevision_7b": (SIGLIP_SO400M, ONEVISION_CONNECTOR, QWEN2_7B, {}),
    "llava_onevision_0.5b": (SIGLIP_SO400M, ONEVISION_CONNECTOR, QWEN2_HALF_B, {}),
    "siglip2_qwen3_8b": (SIGLIP2_SO400M, SIGLIP2_CONNECTOR, QWEN3_8B, {}),
    "llava_video_7b": (
        SIGLIP_SO400M, dataclasses.replace(ONEVISION_CONNECTOR, newline="grid"), QWEN2_7B, {},
    ),
    "longva_7b": (
        CLIP_L_336,
        MlpConnectorConfig(
            pool="average", newline="no_token", image="pool", resolutions=grids(336, 7)
        ),
        dataclasses.replace(QWEN2_7B, rope_theta=1e9),
        {},
    ),
    "video_llava_7b": (
        LANGUAGEBIND,
        MlpConnectorConfig(pool="none", newline="no_token", image="plain", class_token=True),
        VICUNA_7B,
        {},
    ),
    "videochat2_7b": (
        UMT_L,
        QFormerConfig(
            queries=32, extra_queries=64, width=768, depth=12, heads=12, mlp_width=3072
        ),
        MISTRAL_7B,
        {"lora": VIDEOCHAT_LORA},
    ),
}  # fmt: skip


def full(
    name: str, heads: tuple[str, ...] = (), tokens: Mapping[str, int] | None = None
) -> ModelConfig:
    """The published sizes, in bfloat16."""
    vision, connector, language, more = _FULL[name]
    vision = _whole_frames(vision, heads)
    stride = {384: 8, 336: 7, 256: 8, 224: 8}[vision.image_size]
    return ModelConfig(
        vision=vision, connector=connector, language=language,
        head=HeadConfig(width=256, heads=8, layers=2, mask_stride=stride), heads=tuple(heads),
        tokens=_tokens(heads, tokens, language.num_tokens), dtype="bfloat16", **more,
    )  # fmt: skip


def tiny(
    name: str, heads: tuple[str, ...] = (), tokens: Mapping[str, int] | None = None
) -> ModelConfig:
    """The same parts at the size of the `micro` preset; trains on a CPU."""
    vision, connector, language, more = _FULL[name]
    vision = _whole_frames(vision, heads)
    frames, side = {"languagebind": 4, "umt": 4}.get(vision.kind, 0), vision.image_size
    vision = dataclasses.replace(
        vision, image_size=32, patch_size=8, width=32, heads=2, depth=2, mlp_width=64,
        max_frames=frames or 8, frames=frames,
    )  # fmt: skip
    if isinstance(connector, QFormerConfig):
        connector = QFormerConfig(
            queries=4, extra_queries=4, width=32, depth=2, heads=2, mlp_width=64
        )
    else:
        connector = dataclasses.replace(
            connector,
            resolutions=tuple(
                (32 * (h // side), 32 * (w // side)) for h, w in connector.resolutions
            ),
        )
    language = dataclasses.replace(
        language, vocab_size=1024, num_tokens=1024, width=32, depth=2, heads=4,
        kv_heads=4 if language.kv_heads == language.heads else 2, head_dim=8, mlp_width=64,
    )  # fmt: skip
    return ModelConfig(
        vision=vision, connector=connector, language=language,
        head=HeadConfig(width=32, heads=2, layers=1, mask_stride=2), heads=tuple(heads),
        tokens=_tokens(heads, tokens, 1000), **more,
    )  # fmt: skip


def _whole_frames(vision: TowerConfig, heads: tuple[str, ...]) -> TowerConfig:
    """Heads answer about whole frames, so with heads a tower that crops them stretches them."""
    return dataclasses.replace(vision, resize="stretch") if heads else vision


def _tokens(heads: tuple[str, ...], tokens: Mapping[str, int] | None, last: int) -> dict[str, int]:
    """Ids of the task tokens: the last ones of the vocabulary, where nobody gives others."""
    if tokens is not None:
        return dict(tokens)
    names = tokens_of(heads)
    return {token: last - len(names) + i for i, token in enumerate(names)}


def presets() -> dict[str, Callable[..., ModelConfig]]:
    """{"llava_onevision_7b": ..., "llava_onevision_tiny": ..., ...}; a family's tiny model is that
    of its first size."""

    def make(build: Callable[..., ModelConfig], name: str) -> Callable[..., ModelConfig]:
        return lambda heads=(), tokens=None: build(name, heads, tokens)

    found: dict[str, Callable[..., ModelConfig]] = {}
    for name in _FULL:
        found[name] = make(full, name)
        found.setdefault(f"{name.rpartition('_')[0]}_tiny", make(tiny, name))
    return found
