"""The configuration of a model: frozen dataclasses that check themselves.

A wrong value raises ValueError naming the field, the value and the fix. `ModelConfig.to_dict` is
what config.json of a model folder holds; an unknown or missing key there is an error by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from tpo_jax.models.checks import name_remat
from tpo_jax.models.checks import require as _require
from tpo_jax.models.checks import require_positive as _require_positive
from tpo_jax.models.connectors.config import MlpConnectorConfig, QFormerConfig
from tpo_jax.models.rope import RopeScaling
from tpo_jax.models.sam2_config import Sam2Config
from tpo_jax.models.towers.config import KINDS as TOWER_KINDS
from tpo_jax.models.towers.config import TowerConfig

FORMAT_VERSION = 1
VOCABULARY_MULTIPLE = 128
DTYPES = ("float32", "bfloat16")
# "auto": that of the devices, see attention.best_backend.
ATTENTION_BACKENDS = ("auto", "xla", "dense", "cudnn", "splash", "splash_interpret")
BOX_ENCODERS = ("own", "tpo")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Video encoder: a hierarchical stem of non-overlapping patches, then transformer blocks.

    A plain ViT is one stem level, e.g. `stem_strides=(14,)`, with `temporal="none"`.
    """

    image_size: int
    stem_strides: tuple[int, ...]
    stem_widths: tuple[int, ...]
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    max_frames: int
    # Whether the stem sees, beside each frame, its change since the frame before.
    motion: bool = False
    # "divided": each block first attends over time at each patch. "none": frames are independent.
    temporal: str = "divided"
    # What each layer computes again in the backward pass (checks.REMAT) / one program per layer
    # instead of a loop.
    remat: str = ""
    unroll: bool = False

    def __post_init__(self):
        _require_positive(
            self, "vision", "image_size", "width", "depth", "heads", "mlp_ratio", "max_frames"
        )
        name_remat(self, "vision.remat")
        _require(
            len(self.stem_strides) == len(self.stem_widths) > 0, "vision.stem_widths",
            self.stem_widths, f"needs one width for each stride of {self.stem_strides}",
        )
        stride = math.prod(self.stem_strides)
        _require(
            self.image_size % stride == 0, "vision.image_size", self.image_size,
            f"must be a multiple of the total stem stride {stride}",
        )
        _require(
            self.stem_widths[-1] == self.width, "vision.stem_widths", self.stem_widths,
            f"must end in vision.width={self.width}",
        )
        _require(
            self.width % self.heads == 0, "vision.heads", self.heads,
            f"must divide vision.width={self.width}",
        )
        _require(
            self.temporal in ("divided", "none"), "vision.temporal", self.temporal,
            'use "divided" or "none"',
        )

    # How pixels come in; published towers choose it (towers.config.TowerConfig).
    resize: ClassVar[str] = "area"
    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)

    @property
    def per_frame(self) -> bool:
        """Whether frames do not see each other."""
        return self.temporal == "none" and not self.motion

    @property
    def channels(self) -> int:
        """Channels that the stem sees."""
        return 6 if self.motion else 3

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // math.prod(self.stem_strides)

    @property
    def stem_grid(self) -> int:
        """Patches along one side of a frame at the first stem level."""
        return self.image_size // self.stem_strides[0]

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Average pooling of a frame's patches to grid x grid tokens, then a two-layer MLP."""

    grid: int
    hidden: int
    # Shortest and longest period, seconds, of the waves that tell a token its frame's time. Without
    # them, time is only the order of the tokens, which a model reads but can hardly report.
    time_periods: tuple[float, float] | None = None

    def __post_init__(self):
        _require_positive(self, "connector", "grid", "hidden")
        _require(
            self.time_periods is None or 0 < self.time_periods[0] < self.time_periods[1],
            "connector.time_periods", self.time_periods, "use (shortest, longest) seconds, or None",
        )

    @property
    def tokens_per_frame(self) -> int:
        return self.grid**2

    def visual_frames(self, frames: int, grid: int) -> np.ndarray:
        """int32[V]: the frame that must be there for each visual token to be there."""
        del grid
        return np.repeat(np.arange(frames, dtype=np.int32), self.tokens_per_frame)


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """Decoder of the Llama / Mistral / Qwen2 / Qwen3 family.

    `vocab_size` counts table rows (a multiple of 128); `num_tokens` counts ids in use: logits of
    the rows from there on are padding and have to be masked by whoever normalises over them.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    num_tokens: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's last matrix
    qk_norm: bool = False  # queries and keys are normalised per head before they are turned
    # A token sees itself and the sliding_window - 1 tokens before it; the first full_layers layers
    # see everything.
    sliding_window: int | None = None
    full_layers: int = 0
    tied_head: bool = False
    dropout: float = 0.0
    # What each layer computes again in the backward pass (checks.REMAT) / one program per layer
    # instead of a loop.
    remat: str = ""
    unroll: bool = False
    attention: str = "auto"

    def __post_init__(self):
        _require_positive(
            self, "language", "vocab_size", "width", "depth", "heads", "kv_heads", "head_dim",
            "mlp_width", "rope_theta", "norm_epsilon",
        )
        _require(
            self.vocab_size % VOCABULARY_MULTIPLE == 0, "language.vocab_size", self.vocab_size,
            f"round up to a multiple of {VOCABULARY_MULTIPLE}: "
            f"{-(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE}",
        )
        if self.num_tokens is None:
            object.__setattr__(self, "num_tokens", self.vocab_size)
        _require(
            0 < self.num_tokens <= self.vocab_size, "language.num_tokens", self.num_tokens,
            f"must be in 1..vocab_size={self.vocab_size}; raise vocab_size",
        )
        _require(
            self.heads % self.kv_heads == 0, "language.kv_heads", self.kv_heads,
            f"must divide language.heads={self.heads}",
        )
        _require(
            self.head_dim % 2 == 0, "language.head_dim", self.head_dim,
            "must be even (rotary positions turn pairs)",
        )
        if isinstance(self.rope_scaling, Mapping):  # as read from a file
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(self.rope_scaling))
        _require(
            self.sliding_window is None or self.sliding_window > 0, "language.sliding_window",
            self.sliding_window, "must be above 0, or None",
        )
        _require(
            0 <= self.full_layers <= self.depth, "language.full_layers", self.full_layers,
            f"must be in 0..depth={self.depth}",
        )
        _require(
            0.0 <= self.dropout < 1.0, "language.dropout", self.dropout, "must be in [0, 1)"
        )
        _require(
            self.attention in ATTENTION_BACKENDS, "language.attention", self.attention,
            f"use one of {ATTENTION_BACKENDS}",
        )
        name_remat(self, "language.remat")

    @property
    def windows(self) -> tuple[tuple[int, int, int | None], ...]:
        """Runs of layers of one kind: (first, behind the last, window or None)."""
        if self.sliding_window is None:
            return ((0, self.depth, None),)
        cut = self.full_layers
        runs = ((0, cut, None), (cut, self.depth, self.sliding_window))
        return tuple(run for run in runs if run[0] < run[1])


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Size of the task heads; they share it so that a head is one name in `ModelConfig.heads`."""

    width: int
    heads: int
    layers: int
    # The mask head answers at image_size / mask_stride.
    mask_stride: int

    def __post_init__(self):
        _require_positive(self, "head", "width", "heads", "layers", "mask_stride")
        _require(
            self.width % self.heads == 0, "head.heads", self.heads,
            f"must divide head.width={self.width}",
        )


@dataclasses.dataclass(frozen=True)
class ClipFeaturesConfig:
    """Pre-extracted features of the pieces of a video, which a head reads instead of its frames.

    Features of another encoder, or of pieces of another length, are other features: they have to
    agree in all three.
    """

    # Numbers a piece.
    width: int
    # Length of a piece in seconds; the first begins with the video.
    clip_seconds: float
    # What computed them: a name, and whatever tells its versions apart.
    encoder: str

    def __post_init__(self):
        _require_positive(self, "clip_features", "width", "clip_seconds")
        _require(bool(self.encoder), "clip_features.encoder", self.encoder, "name the encoder")


@dataclasses.dataclass(frozen=True)
class TextFeaturesConfig:
    """Pre-extracted states of the tokens of a question, which a head reads instead of the language
    model's own; they have to agree in all three, too."""

    # Numbers a token: those of the language model, for the state at the slot joins the tokens.
    width: int
    # Most tokens of a question.
    tokens: int
    # What computed them: a name, and whatever tells its versions and prompts apart.
    encoder: str

    def __post_init__(self):
        _require_positive(self, "text_features", "width", "tokens")
        _require(bool(self.encoder), "text_features.encoder", self.encoder, "name the encoder")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on every kernel whose "/"-joined path matches `pattern` (re.search).

    dropout: share of what an adapter reads that is set to zero in training. Only adapters in the
      layers of the language model have it.
    """

    pattern: str
    rank: int
    alpha: float
    dropout: float = 0.0

    def __post_init__(self):
        _require_positive(self, "lora", "rank", "alpha")
        _require(0.0 <= self.dropout < 1.0, "lora.dropout", self.dropout, "must be in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes and the meaning of the parameters.

    vision and connector are this project's own, or published ones, which have a `kind`.
    """

    vision: VisionConfig | TowerConfig
    connector: ConnectorConfig | MlpConnectorConfig | QFormerConfig
    language: LanguageConfig
    head: HeadConfig
    # Names of registered task heads (models/heads), in any order.
    heads: tuple[str, ...] = ()
    # Ids of the routing and slot tokens of those heads, e.g. {"<box_begin>": 1000, ...}.
    tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # Where the visual tokens start in the prefix.
    visual_offset: int = 2
    dtype: str = "float32"
    lora: LoraConfig | None = None
    # Of the head "sam2"; a model without it may have none.
    sam2: Sam2Config | None = None
    # What turns a box that the user draws into a token. "own": GELU, as wide as the language model.
    # "tpo": that of Task Preference Optimization, ReLU, half as wide.
    box_encoder: str = "own"
    # What heads with `reads_clip_features` read; None: the model's own video encoder.
    clip_features: ClipFeaturesConfig | None = None
    # What heads with `reads_text_features` read; None: the states of the language model.
    text_features: TextFeaturesConfig | None = None

    def __post_init__(self):
        _require(
            self.text_features is None or self.text_features.width == self.language.width,
            "text_features.width", self.text_features and self.text_features.width,
            f"must be language.width={self.language.width}: the state at the slot joins the tokens",
        )
        _require("sam2" not in self.heads or self.sam2 is not None, "sam2", self.sam2,
                 "the head sam2 needs its sizes, see models/sam2_config.py")  # fmt: skip
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"use one of {DTYPES}")
        _require(self.box_encoder in BOX_ENCODERS, "box_encoder", self.box_encoder,
                 f"use one of {BOX_ENCODERS}")  # fmt: skip
        _require(self.visual_offset >= 0, "visual_offset", self.visual_offset, "must be 0 or more")
        if isinstance(self.connector, ConnectorConfig):
            _require(
                self.vision.grid % self.connector.grid == 0, "connector.grid",
                self.connector.grid,
                f"must divide the patch grid {self.vision.grid} (image_size / stem strides)",
            )
        elif getattr(self.connector, "class_token", False):
            _require(
                getattr(self.vision, "kind", "") in ("clip", "languagebind"),
                "connector.class_token", True, "the vision tower has no class token",
            )
        _require(
            not self.heads or self.vision.resize not in ("crop", "pad"), "heads", self.heads,
            f"boxes and masks are of whole frames, which vision.resize={self.vision.resize!r} does "
            'not show; use "stretch": `convert import --set resize=stretch` for a published '
            "checkpoint, a preset with heads has it",
        )
        _require(
            self.vision.image_size % self.head.mask_stride == 0, "head.mask_stride",
            self.head.mask_stride, f"must divide vision.image_size={self.vision.image_size}",
        )
        _require(
            len(set(self.heads)) == len(self.heads), "heads", self.heads, "names a head twice"
        )
        for token, index in self.tokens.items():
            _require(
                0 <= index < self.language.num_tokens, f"tokens[{token!r}]", index,
                f"must be below language.num_tokens={self.language.num_tokens}",
            )

    @property
    def mask_size(self) -> int:
        """Side of the mask head's logits and targets, in cells."""
        return self.vision.image_size // self.head.mask_stride

    def visual_frames(self, frames: int) -> np.ndarray:
        """int32[V]: for each visual token of a clip of `frames` frames, the frame that must be
        there for the token to be there (0: always)."""
        return self.connector.visual_frames(frames, self.vision.grid)

    def num_visual_tokens(self, frames: int) -> int:
        """Tokens that a clip of `frames` frames puts into the prefix."""
        return len(self.visual_frames(frames))

    def running(self, *, attention: str, remat: str, dtype: str = "") -> ModelConfig:
        """The same model, run otherwise.

        Args:
          attention: of ATTENTION_BACKENDS.
          remat: of checks.REMAT, for the vision encoder and the language model.
          dtype: of DTYPES, that it computes in; "": as it is.
        """
        language = dataclasses.replace(self.language, attention=attention, remat=remat)
        vision = dataclasses.replace(self.vision, remat=remat)
        return dataclasses.replace(
            self, vision=vision, language=language, dtype=dtype or self.dtype
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` is its inverse, but for `attention` and `remat`: a run chooses
        them, so that a model that was trained on one kind of device is used on any."""
        out = dataclasses.asdict(self)
        for part, name in _CHOSEN_BY_RUNS:
            del out[part][name]
        if self.box_encoder == "own":  # older folders have no such key; their fingerprints stay
            del out["box_encoder"]
        for name in ("clip_features", "text_features"):  # likewise
            if out[name] is None:
                del out[name]
        out["tokens"] = dict(self.tokens)
        return {"format_version": FORMAT_VERSION} | _lists(out)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Raises ValueError for an unknown, missing or wrong key, by name. What older files say
        of `attention` and `remat` is checked and left."""
        data = dict(data)
        version = data.pop("format_version", None)
        _require(
            version == FORMAT_VERSION, "format_version", version,
            f"this program reads version {FORMAT_VERSION}; convert the model with the program "
            "that wrote it",
        )
        return _from_dict(cls, data, "").running(attention="auto", remat="")


_CHOSEN_BY_RUNS = (("language", "attention"), ("language", "remat"), ("vision", "remat"))

_NESTED = {
    "vision": VisionConfig, "connector": ConnectorConfig, "language": LanguageConfig,
    "head": HeadConfig, "lora": LoraConfig, "sam2": Sam2Config,
    "clip_features": ClipFeaturesConfig, "text_features": TextFeaturesConfig,
}  # fmt: skip


_KINDS = {
    "vision": dict.fromkeys(TOWER_KINDS, TowerConfig),
    "connector": {"mlp": MlpConnectorConfig, "qformer": QFormerConfig},
}


def _nested_class(name: str, value: Any) -> type:
    """The class of a part; a published tower or connector says its kind."""
    kinds = _KINDS.get(name, {})
    if not kinds or not isinstance(value, Mapping) or "kind" not in value:
        return _NESTED[name]
    kind = value["kind"]
    _require(kind in kinds, f"{name}.kind", kind, f"use one of {sorted(kinds)}")
    return kinds[kind]


def _from_dict(cls: type, data: Any, prefix: str) -> Any:
    _require(isinstance(data, Mapping), prefix or "config", data, "must be an object")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        _require(key in fields, f"{prefix}{key}", data[key], f"unknown key; known: {list(fields)}")
    values = {}
    for name, field in fields.items():
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        _require(name in data or optional, f"{prefix}{name}", None, "is missing")
        if name not in data:
            continue
        value = data[name]
        if cls is ModelConfig and name in _NESTED and value is not None:
            value = _from_dict(_nested_class(name, value), value, f"{name}.")
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple) else value
