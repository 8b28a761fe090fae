"""What a family of published checkpoints is, and the translations that several share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tpo_jax.data.text import ChatTemplate
from tpo_jax.errors import UserError
from tpo_jax.interop import huggingface
from tpo_jax.interop.mapping import Row, llama_rows
from tpo_jax.models.config import HeadConfig, LanguageConfig, ModelConfig
from tpo_jax.models.connectors.config import MlpConnectorConfig, QFormerConfig
from tpo_jax.models.published import OPENAI_MEAN, OPENAI_STD
from tpo_jax.models.towers.config import TowerConfig

# Most frames of a clip where a tower sets no bound; how many are shown is `Sampling.frames`.
MOST_FRAMES = 512
# Filters of Pillow, as `resample` of a preprocessor numbers them.
BILINEAR, BICUBIC = 2, 3
# How images and videos become pixels, by the place that says it (`source.read_pixels`), such as
# {"preprocessor_config.json": {"resample": 3}}.
Pixels = Mapping[str, Mapping[str, Any]]
# {vision_config.model_type: (kind, what a vision_config leaves out)}, by the configuration classes
# of `transformers` (models/*/configuration_*.py): it saves what differs from these.
_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
          "intermediate_size": 3072}  # fmt: skip
_SIGLIP = _SIZES | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TOWERS = {
    "siglip_vision_model": ("siglip", _SIGLIP | {"image_size": 224}),
    "siglip2_vision_model": ("siglip2", _SIGLIP | {"num_patches": 256}),
    "clip_vision_model": ("clip", _SIZES | {
        "patch_size": 32, "image_size": 224, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    }),
}  # fmt: skip


class FamilyError(UserError):
    """A checkpoint that cannot be imported as it is; the message names the option and the fix."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How frames of a video are chosen: a function of data.preprocess, and how many."""

    method: str
    frames: int
    time_instruction: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One layout on disk.

    Attributes:
      matches: whether a config.json is of this family.
      model_config: ModelConfig of (config.json, what says how images and videos become pixels).
      rows: mapping rows of a ModelConfig, given the tensor names of the source.
      template: texts around video, question and answer.
      conversation: what `conv_template` of config.json has to say for `template`, unless a chat
        template is given; None: the family has one.
      reads_template: whether a folder's chat template takes its place, where it has one.
      needs_template: whether a folder without one is refused.
      sampling: of config.json.
      with_heads: ModelConfig with the heads that a checkpoint has, of (ModelConfig, its tensor
        names, names of heads or None for all that read nothing else, config.json); None: no
        checkpoint of the family has heads.
      head_options: entries of config.json that `with_heads` reads.
      carried: regular expressions of tensors that this program has no use for. They are kept
        beside the model and go back out as they came.
      unapplied: entries of config.json, as text, that say how the checkpoint is trained on and that
        this program does not have.
      layouts: where the names of the tensors were read.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    model_config: Callable[[Mapping[str, Any], Pixels], ModelConfig]
    rows: Callable[[ModelConfig, Collection[str]], list[Row]]
    template: ChatTemplate
    sampling: Callable[[Mapping[str, Any]], Sampling]
    conversation: str | None = None
    reads_template: bool = False
    needs_template: bool = False
    with_heads: Callable[..., ModelConfig] | None = None
    head_options: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    unapplied: Callable[[Mapping[str, Any]], list[str]] = lambda config: []
    layouts: str = ""


# "qwen_1_5" of LLaVA-NeXT's and LongVA's conversation.py.
CHATML = ChatTemplate(
    before_video="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    after_video="\n",
    before_image="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
    after_image="\n",
    user="",
    assistant="<|im_end|>\n<|im_start|>assistant\n",
    end="<|im_end|>",
    pad="<|endoftext|>",
)


def said(config: Mapping[str, Any], key: str, choices: Collection[Any] | None = None) -> Any:
    """The value of an option that must not be guessed.

    Raises:
      FamilyError: config.json does not say, or says what this program does not have.
    """
    known = f", one of {sorted(map(str, choices))}" if choices else ""
    if config.get(key) is None:
        raise FamilyError(
            f"config.json does not say {key}, and a guess would change what the model sees; add "
            f"it to config.json or import with --set {key}=VALUE{known} (train: "
            "config.init_options)"
        )
    if choices and config[key] not in choices:
        raise FamilyError(f"config.json: {key}={config[key]!r}: this program has{known[1:]}")
    return config[key]


def frames_upbound(config: Mapping[str, Any]) -> int:
    """Most frames that a model is to see, by that entry of config.json."""
    frames = said(config, "frames_upbound")
    if not isinstance(frames, int) or not 1 <= frames <= MOST_FRAMES:
        raise FamilyError(
            f"config.json: frames_upbound={frames!r}: batches here have a fixed number of frames; "
            "import with --set frames_upbound=N (train: config.init_options), the most that the "
            f"model is to see, up to {MOST_FRAMES}"
        )
    return frames


def only(config: Mapping[str, Any], key: str, value: Any) -> None:
    """Refuses any value but one; a config that does not say has it."""
    if config.get(key, value) != value:
        raise FamilyError(f"config.json: {key}={config[key]!r}: this program has only {value!r}")


def tower_config(
    vision: Mapping[str, Any], *, layer: int, pixels: Pixels | None = None,
    kind: str | None = None, **changes: Any,
) -> TowerConfig:
    """TowerConfig of a `vision_config` in the layout of `transformers`.

    Pixel statistics are those of `pixels`, else of the tower.

    Raises:
      FamilyError: another tower, or other pixels than this program makes.
    """
    model_type = vision.get("model_type", "")
    if model_type not in _TOWERS:
        raise FamilyError(
            f"vision_config.model_type={model_type!r}: this program has {sorted(_TOWERS)}"
        )
    published, defaults = _TOWERS[model_type]
    vision, clip = defaults | dict(vision), published == "clip"
    side = vision["image_size"] if "image_size" in vision else round(
        vision["num_patches"] ** 0.5) * vision["patch_size"]  # fmt: skip
    pixels = pixels or {}
    check_pixels(pixels, side, clip)
    mean = agreed(pixels, "image_mean", OPENAI_MEAN if clip else (0.5, 0.5, 0.5))
    std = agreed(pixels, "image_std", OPENAI_STD if clip else (0.5, 0.5, 0.5))
    fields = {
        "kind": kind or published,
        "image_size": side,
        "patch_size": vision["patch_size"],
        "width": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "heads": vision["num_attention_heads"],
        "mlp_width": vision["intermediate_size"],
        "activation": vision["hidden_act"],
        "epsilon": vision["layer_norm_eps"],
        "layer": layer,
        "max_frames": MOST_FRAMES,
        "mean": tuple(mean),
        "std": tuple(std),
        "resize": "crop" if clip else "stretch",
    }
    return TowerConfig(**fields | changes)


def check_pixels(pixels: Pixels, side: int, clip: bool) -> None:
    """Refuses what `data.preprocess` does not do; what is not said, it does.

    Raises:
      FamilyError: another value of a setting, or a step (`do_...`) that this program has not.
    """
    square = {"height": side, "width": side}
    known = {
        "do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,),
        "rescale_factor": (1 / 255,), "resample": (BICUBIC,), "do_center_crop": (clip,),
        # Older files have a number: the short side of CLIP, both of SigLIP.
        "size": ({"shortest_edge": side} if clip else square, side),
        # There are three colours anyway. Processors of SigLIP pad a batch with tiles.
        "do_convert_rgb": (True, False), "do_pad": (False,) if clip else (True, False),
    }  # fmt: skip
    if clip:
        known["crop_size"] = (square, side)
    for where, settings in pixels.items():
        steps = {option: (False,) for option in settings if option.startswith("do_")}
        for option, values in (steps | known).items():
            given = settings.get(option)
            if given is not None and given not in values:
                raise FamilyError(
                    f"{where}: {option}={given!r}: this program has only {values[0]!r} for this "
                    "tower (docs/families.md), and with other pixels it is another model; correct "
                    "the file if it is wrong"
                )


def agreed(pixels: Pixels, option: str, default: Any) -> Any:
    """The value of a setting, in whichever place it is said.

    Raises:
      FamilyError: two places say it differently.
    """
    found = [(where, s[option]) for where, s in pixels.items() if s.get(option) is not None]
    for where, value in found:
        first, known = found[0]
        if value != known:
            raise FamilyError(
                f"{where}: {option}={value!r}, but {first} has {known!r}: images and videos go "
                "through the same pixels here; correct the one that is wrong"
            )
    return found[0][1] if found else default


def assemble(
    vision: TowerConfig,
    connector: MlpConnectorConfig | QFormerConfig,
    language: Mapping[str, Any],
    **changes: Any,
) -> ModelConfig:
    """ModelConfig of its parts; `language` in the layout of `transformers`."""
    return assemble_parts(vision, connector, huggingface.language_config(language), **changes)


def assemble_parts(
    vision: TowerConfig,
    connector: MlpConnectorConfig | QFormerConfig,
    language: LanguageConfig,
    **changes: Any,
) -> ModelConfig:
    stride = next(s for s in (8, 7, 6, 5, 4, 3, 2, 1) if vision.image_size % s == 0)
    return ModelConfig(
        vision=vision,
        connector=connector,
        language=language,
        head=HeadConfig(width=256, heads=8, layers=2, mask_stride=stride),
        **changes,
    )


def transformers_names(keys: Collection[str]) -> tuple[str, str, dict[str, str]]:
    """How `transformers` names the parts of a checkpoint with these tensors, 4 or 5: what comes
    before the name of a tower, what between it and its tensors, and `body` and `head` of
    `decoder_rows`."""
    # transformers 5 has no "vision_model." in the tower's names, files have.
    inner = "vision_model." if any(".vision_model." in key for key in keys) else ""
    if any(key.startswith("model.") for key in keys):
        return "model.", inner, {"body": "model.language_model.", "head": "lm_head.weight"}
    return "", inner, {"body": "language_model.model.", "head": "language_model.lm_head.weight"}


def decoder_rows(
    config: LanguageConfig, *, body: str, head: str, keys: Collection[str]
) -> list[Row]:
    """Rows of the language model below another name than its own.

    Args:
      keys: tensor names of the source.
    """
    return llama_rows(
        tied=config.tied_head, qkv_bias=config.qkv_bias, output_bias=config.output_bias,
        qk_norm=config.qk_norm, vocabulary=(config.num_tokens, config.vocab_size), body=body,
        head=head, stored=keys,
    )  # fmt: skip


def mlp_rows(config: MlpConnectorConfig, linear_1: str, linear_2: str, newline: str,
             faster: str = "") -> list[Row]:
    """Rows of the MLP connector and its learnt tokens."""
    rows = []
    for name, key in (("linear_1", linear_1), ("linear_2", linear_2)):
        rows.append(Row(f"connector/{name}/kernel", f"{key}.weight", transpose=True))
        rows.append(Row(f"connector/{name}/bias", f"{key}.bias"))
    if config.has_newline:
        rows.append(Row("connector/image_newline", newline))
    if config.slow_every:
        rows.append(Row("connector/faster_token", faster))
    return rows
