"""Runs a model folder here and its export in PyTorch on the same inputs, part by part."""

import importlib.util
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from tpo_jax.data.text import TextCodec
from tpo_jax.interop.check_language import compare_language
from tpo_jax.interop.export import RUNTIME_HEADS
from tpo_jax.interop.folder import load_config, load_model
from tpo_jax.models.config import ModelConfig
from tpo_jax.models.heads import HEADS
from tpo_jax.models.video_language import FunctionalModel

QUESTION = "what happens here?"
SECONDS_APART = 0.7
BOX = (0.2, 0.3, 0.6, 0.7)  # that the user draws for a head that tracks, on the last frame


def compare(model: epath.PathLike, exported: epath.PathLike, seed: int = 0) -> dict[str, float]:
    """Largest absolute difference of each part, in the order in which they are computed.

    Both sides get one random clip and, for every head of the model, a question whose answer is
    the head's routing and slot token.
    """
    config, params, codec = load_model(model)
    size = config.vision.image_size
    shape = (1, min(4, config.vision.max_frames), size, size, 3)
    frames = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    given = _features(config, shape[1], seed)
    times = SECONDS_APART * np.arange(shape[1], dtype=np.float32)[None]
    functional_model = FunctionalModel(config)
    runtime = _runtime(exported)
    other = runtime.VideoLanguageModel.from_folder(exported)
    visual, features = other.encode(frames, times)
    layers = compare_language(model, epath.Path(exported) / "language_model")
    differences = {}
    for name in _run(config) or ("",):
        answer = HEADS[name].marker if name else "nothing"
        ours = _forward(functional_model, params, codec, frames, times, answer, name, given)
        differences["vision/patches"] = _difference(ours["patches"], features["patches"])
        differences["connector/visual"] = _difference(ours["visual"], visual)
        differences |= layers
        head = HEADS[name] if name else None
        written = f"{head.routing_token}{head.slot_token}" if head else answer
        theirs = other.hidden(QUESTION, written, visual)
        differences[f"language/{name or 'hidden'}"] = _difference(ours["hidden"], theirs)
        logits = other.language.lm_head(theirs)
        differences[f"logits/{name or 'hidden'}"] = _difference(ours["logits"], logits)
        if head:
            more = {"box": BOX, "box_frame": shape[1] - 1} if head.task == "mask" else {}
            if head.reads_clip_features and "clip_features" in given:
                more["clip_features"] = runtime.torch.from_numpy(given["clip_features"])
            if head.reads_prompt:
                more["prompt"] = theirs[:, codec.after_visual : -2]
            if head.reads_text_features and "prompt" in given:
                more["prompt"] = runtime.torch.from_numpy(given["prompt"])
            if name in ("region", "mask"):
                after = other.prompt_ids(QUESTION, written)[1]
                more["embeds"] = other.embed(after[codec.after_visual : -2])
            states = getattr(other, name)(theirs[:, -1:], features, **more)
            differences |= _head_differences(name, ours["head"], states)
    return differences


def not_run(model: epath.PathLike) -> list[str]:
    """Heads of a model that the PyTorch file does not run, so that `compare` leaves them out."""
    heads = load_config(model).heads
    return [name for name in heads if name not in RUNTIME_HEADS]


def _run(config: ModelConfig) -> list[str]:
    return [name for name in config.heads if name in RUNTIME_HEADS]


def _features(config: ModelConfig, frames: int, seed: int) -> dict[str, np.ndarray]:
    """Random "clip_features" float32[1, F, D] and text features "prompt" float32[1, T, D], for a
    model whose head reads them."""
    rng, shapes = np.random.default_rng(seed), {}
    if config.clip_features is not None:
        shapes["clip_features"] = (1, frames, config.clip_features.width)
    if config.text_features is not None:
        shapes["prompt"] = (1, config.text_features.tokens, config.text_features.width)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _runtime(exported: epath.PathLike) -> Any:
    """The exported folder's own tpo_torch.py as a module, which reads its layers beside it."""
    folder = pathlib.Path(exported).absolute()
    spec = importlib.util.spec_from_file_location("tpo_torch", folder / "tpo_torch.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    sys.modules.pop("tpo_torch_layers", None)  # may be another export's
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("tpo_torch_layers", None)
    return module


def _forward(
    functional_model: FunctionalModel,
    params: Any,
    codec: TextCodec,
    frames: np.ndarray,
    times: np.ndarray,
    answer: str,
    head: str,
    given: dict[str, np.ndarray],
) -> dict[str, Any]:
    """patches, visual, hidden float32[1, n, D] and logits of the text after the video (without the
    end token), and the head's predictions at the last token."""
    offset = codec.template.visual_offset
    branch = codec.build_branch(QUESTION, answer).ids[:-1]

    @jax.jit
    def run(params: Any, frames: jax.Array, times: jax.Array) -> dict[str, Any]:
        module = functional_model.bind(params)
        valid = jnp.ones(frames.shape[:2], bool)
        encoded = module.encode(frames, valid, times)
        span = encoded.visual.shape[1]
        prefix = jnp.asarray(codec.build_prefix(span))[None]
        P, total = prefix.shape[1], prefix.shape[1] + len(branch)
        positions, ones = jnp.arange(total)[None], jnp.ones((1, total), jnp.int32)
        before, cache = module.language.prefill(
            module.embed_prefix(prefix, encoded.visual), positions[:, :P], ones[:, :P]
        )
        after, _ = module.language.extend(
            module.embed_branches(jnp.asarray(branch)[None, None], {}),
            positions[:, None, P:], ones[:, None, P:], cache, ones[:, :P],
        )  # fmt: skip
        # The text after the video starts inside of the prefix.
        hidden = jnp.concatenate([before[:, offset + span :], after[:, 0]], axis=1)
        out = {"patches": encoded.features.patches, "visual": encoded.visual, "hidden": hidden,
               "logits": hidden @ module.language.table.T}  # fmt: skip
        if head:
            more = {"boxes": jnp.array([[BOX]]), "box_valid": jnp.ones((1, 1), bool),
                    "box_frame": jnp.full((1, 1), frames.shape[1] - 1)}  # fmt: skip
            if HEADS[head].reads_clip_features:
                more["clip_features"] = given.get("clip_features")
            if HEADS[head].reads_prompt:
                # The question, between what closes the video and the routing token.
                prompt = hidden[:, None, codec.after_visual : -2]
                more |= {"prompt": prompt, "prompt_valid": jnp.ones(prompt.shape[:3], bool)}
                asked = jnp.asarray(branch)[None, None, :-2]
                more["prompt_embeds"] = module.embed_branches(asked, {})
            if HEADS[head].reads_text_features and "prompt" in given:
                states = given["prompt"][:, None]
                more |= {"prompt": states, "prompt_valid": np.ones(states.shape[:3], bool),
                         "prompt_embeds": None}  # fmt: skip
            states = hidden[:, -1:]
            out["head"] = module.run_head(head, states, encoded.features, frames, valid, **more)
        return out

    return run(params, frames, times)


def _head_differences(name: str, ours: Any, theirs: Any) -> dict[str, float]:
    if not isinstance(theirs, dict):
        return {f"heads/{name}/boxes": _difference(ours["boxes"], theirs)}
    return {f"heads/{name}/{key}": _difference(ours[key], theirs[key]) for key in theirs}


def _difference(ours: jax.Array, theirs: Any) -> float:
    theirs = theirs.detach().numpy()
    if ours.shape != theirs.shape:
        raise ValueError(f"shapes differ: {ours.shape} here, {theirs.shape} in PyTorch")
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))
