"""A whole multimodal model here and in `transformers` on one clip in a short prompt.

What joins the parts is in it: pooling, newlines, the order of visual tokens, their place in the
prompt. `transformers` loads the published folder by itself.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from tpo_jax.interop.check_language import layer_outputs, states_of
from tpo_jax.interop.check_towers import difference
from tpo_jax.interop.families.base import FamilyError
from tpo_jax.models.towers.registry import normalise_pixels

# Families that have one class in `transformers`.
WHOLE = ("llava_onevision", "video_llava")
BEFORE, AFTER = 5, 8  # words before and after the clip


def compare_whole(
    module: Any, published: epath.PathLike, frames: np.ndarray, rng: np.random.Generator
) -> tuple[dict[str, float], str]:
    """Largest differences after each layer of the language model, and what stood on the other side.

    Args:
      module: our model with its parameters.
      published: local folder.
      frames: uint8[1, F, S, S, 3].
    """
    import torch

    theirs = _load(published)
    visual = module.encode(
        jnp.asarray(frames), jnp.ones(frames.shape[:2], bool), jnp.zeros(frames.shape[:2])
    ).visual
    count, marker = visual.shape[1], theirs.config.video_token_id
    markers = [marker, theirs.config.image_token_id]
    words = np.setdiff1d(np.arange(module.config.language.num_tokens), markers)
    tokens = rng.choice(words, (1, BEFORE + count + AFTER))
    tokens[:, BEFORE : BEFORE + count] = marker
    # Not `module.embed_tokens`, which has places for heads: they are not in their class.
    embeds = module.language.embed_tokens(jnp.asarray(tokens))
    embeds = embeds.at[:, BEFORE : BEFORE + count].set(visual)
    positions = np.arange(tokens.shape[1])[None]
    states, _, logits = states_of(module.language, embeds, positions, np.ones_like(tokens))

    pixels = np.asarray(normalise_pixels(module.config.vision, jnp.asarray(frames)))
    inputs = {
        "input_ids": torch.from_numpy(tokens),
        "attention_mask": torch.ones(tokens.shape, dtype=torch.long),
        "pixel_values_videos": torch.from_numpy(np.moveaxis(pixels, -1, -3).copy()),
    }
    expected, out = layer_outputs(
        theirs.model.language_model.layers, lambda: theirs(**inputs, output_hidden_states=True)
    )
    differences = {"whole/embed": difference(embeds, out.hidden_states[0])}
    for number, (found, wanted) in enumerate(zip(states, expected, strict=True)):
        differences[f"whole/layer {number}"] = difference(found, wanted)
    differences["whole/logits"] = difference(logits, out.logits[..., : logits.shape[-1]])
    clip = f"a clip of {frames.shape[1]} frames between words"
    return differences, f"{type(theirs).__name__} of transformers, on {clip}"


def _load(published: epath.PathLike) -> Any:
    """The model of `transformers` that a folder holds, in float32."""
    import torch
    from transformers import AutoModelForImageTextToText

    model, found = AutoModelForImageTextToText.from_pretrained(
        published, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    lacking = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]]))
    if lacking:
        raise FamilyError(
            f"{published}: {type(model).__name__} of transformers finds {len(lacking)} of its "
            f"tensors missing or of another shape, such as {lacking[0]}; correct config.json, or "
            "copy the folder again"
        )
    return model.eval()
