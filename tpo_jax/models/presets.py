"""Named model configurations. Each is a function of the heads that the model shall have."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tpo_jax.errors import UserError
from tpo_jax.models import published
from tpo_jax.models.config import (
    ConnectorConfig,
    HeadConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from tpo_jax.models.heads import tokens_of


def _default_tokens(heads: tuple[str, ...], first: int) -> dict[str, int]:
    """Ids of the task tokens when they are appended to a base tokenizer of `first` tokens."""
    return {token: first + i for i, token in enumerate(tokens_of(heads))}


def tiny(heads: tuple[str, ...] = (), tokens: Mapping[str, int] | None = None) -> ModelConfig:
    """The shipped base: 64 x 64 pixels, 32 frames, about 2M parameters; trains on a CPU."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=64, stem_strides=(4, 2, 2), stem_widths=(32, 64, 128), width=128, depth=2,
            heads=4, mlp_ratio=4.0, max_frames=32, motion=True, unroll=True,
        ),
        connector=ConnectorConfig(grid=2, hidden=256, time_periods=(1.0, 256.0)),
        language=LanguageConfig(
            vocab_size=1024, width=128, depth=4, heads=4, kv_heads=2, head_dim=32, mlp_width=384,
            unroll=True,
        ),
        head=HeadConfig(width=64, heads=4, layers=2, mask_stride=2),
        heads=tuple(heads),
        tokens=_default_tokens(heads, 1000) if tokens is None else tokens,
    )  # fmt: skip


def micro(heads: tuple[str, ...] = (), tokens: Mapping[str, int] | None = None) -> ModelConfig:
    """The smallest model with every part; for tests."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=32, stem_strides=(4, 2), stem_widths=(16, 32), width=32, depth=1, heads=2,
            mlp_ratio=2.0, max_frames=8, motion=True,
        ),
        connector=ConnectorConfig(grid=1, hidden=32, time_periods=(1.0, 256.0)),
        language=LanguageConfig(
            vocab_size=1024, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_width=64,
        ),
        head=HeadConfig(width=32, heads=2, layers=1, mask_stride=2),
        heads=tuple(heads),
        tokens=_default_tokens(heads, 1000) if tokens is None else tokens,
    )  # fmt: skip


def siglip_qwen2_7b(
    heads: tuple[str, ...] = (), tokens: Mapping[str, int] | None = None
) -> ModelConfig:
    """SigLIP-so400m/14 shapes and Qwen2-7B shapes, as in LLaVA-OneVision-7B."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=378, stem_strides=(14,), stem_widths=(1152,), width=1152, depth=27,
            heads=16, mlp_ratio=4304 / 1152, max_frames=512, temporal="none",
        ),
        connector=ConnectorConfig(grid=9, hidden=3584),
        language=LanguageConfig(
            vocab_size=152064, width=3584, depth=28, heads=28, kv_heads=4, head_dim=128,
            mlp_width=18944, rope_theta=1e6, qkv_bias=True,
        ),
        head=HeadConfig(width=256, heads=8, layers=2, mask_stride=7),
        heads=tuple(heads),
        tokens=_default_tokens(heads, 151646) if tokens is None else tokens,
        dtype="bfloat16",
    )  # fmt: skip


PRESETS: dict[str, Callable[..., ModelConfig]] = {
    "tiny": tiny,
    "micro": micro,
    "7b": siglip_qwen2_7b,
    **published.presets(),
}


def preset(
    name: str, heads: tuple[str, ...] = (), tokens: Mapping[str, int] | None = None
) -> ModelConfig:
    """The named configuration; ValueError lists the names."""
    if name not in PRESETS:
        raise UserError(f"model preset {name!r} is unknown; use one of {sorted(PRESETS)}")
    return PRESETS[name](heads, tokens)
