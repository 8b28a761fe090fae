"""The towers again in float64 NumPy, one step at a time, written from the papers and layouts."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import erf

from tpo_jax.models.layers import Rngs


def params_of(module):
    """Nested dict of float64 arrays."""
    state = nnx.to_pure_dict(nnx.state(module))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), state)


def random_module(make, seed=0):
    """The module that make(rngs=...) builds, every parameter random and nothing compiled: biases
    of a fresh module are zeros and norms ones."""
    structure, state = nnx.split(nnx.eval_shape(lambda: make(rngs=Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        name = [key.key for key in path if hasattr(key, "key")][-1]
        if name == "kernel":
            fan_in = leaf.shape[-2] if leaf.ndim < 4 else np.prod(leaf.shape[1:])
            return jnp.asarray(noise * fan_in**-0.5)
        return jnp.asarray(0.2 * noise + (name == "scale"))

    return nnx.merge(structure, jax.tree_util.tree_map_with_path(draw, state))


def run(module, *inputs):
    """module(*inputs) as one compiled program."""
    structure, state = nnx.split(module)

    def call(state, *inputs):
        return nnx.merge(structure, state)(*inputs)

    return jax.jit(call)(state, *inputs)


def layer(params, index):
    return jax.tree.map(lambda x: x[index], params)


def linear(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def norm(p, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * p["scale"] + p["bias"]


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def attend(q, k, v, heads):
    """[T, D], [S, D], [S, D] -> [T, D]."""
    out = np.empty((len(q), v.shape[1]))
    width = q.shape[1] // heads
    for n in range(heads):
        part = slice(n * width, (n + 1) * width)
        logits = q[:, part] @ k[:, part].T / np.sqrt(width)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[:, part] = weights / weights.sum(-1, keepdims=True) @ v[:, part]
    return out


def self_attention(p, x, heads, seen=None):
    """[T, D] -> [T, D]; `seen` lists the keys."""
    keys = x if seen is None else x[seen]
    mixed = attend(
        linear(p["q_proj"], x), linear(p["k_proj"], keys), linear(p["v_proj"], keys), heads
    )
    return linear(p["o_proj"], mixed)


def conv_patches(kernel, bias, frame):
    """kernel [D, 3, p, p], frame [H, W, 3] -> [h, w, D]."""
    p = kernel.shape[-1]
    h, w = frame.shape[0] // p, frame.shape[1] // p
    out = np.empty((h, w, len(kernel)))
    for i in range(h):
        for j in range(w):
            patch = frame[i * p : (i + 1) * p, j * p : (j + 1) * p]
            out[i, j] = np.einsum("dcyx,yxc->d", kernel, patch) + bias
    return out


def languagebind(params, config, clip, valid):
    """float[F, 1 + h * w, D] of one clip [F, H, W, 3], normalised, at the layer that is read.

    Args:
      params: of the image tower or, with layers over time, the video tower.
      valid: [F]; absent frames are no keys over time.
    """
    seen, x, heads, epsilon = np.flatnonzero(valid), [], config.heads, config.epsilon
    for frame in clip:
        patches = conv_patches(params["patch_embedding"]["kernel"], 0.0, frame)
        patches = patches.reshape(-1, config.width)
        x.append(np.concatenate([params["class_embedding"][None], patches]))
    x = norm(params["pre_layernorm"], np.stack(x) + params["position_embedding"], epsilon)
    for index in range(config.depth + 1 + config.layer):
        p = layer(params["layers"], index)
        if "temporal_attn" in p:
            x = x + p["temporal_embedding"][0][: len(x), None]
            normal = norm(p["temporal_layer_norm1"], x, epsilon)
            for place in range(x.shape[1]):
                x[:, place] += self_attention(p["temporal_attn"], normal[:, place], heads, seen)
            p = p["spatial"]
        for frame in range(len(x)):
            normal = norm(p["layer_norm1"], x[frame], epsilon)
            x[frame] += self_attention(p["self_attn"], normal, heads)
            normal = norm(p["layer_norm2"], x[frame], epsilon)
            hidden = quick_gelu(linear(p["mlp"]["fc1"], normal))
            x[frame] += linear(p["mlp"]["fc2"], hidden)
    return x


def umt_positions(frames, trained, patches, width):
    """[frames, patches, width] by the definition: the sin-cos table of the trained number of
    frames, linear between their centres; a single frame has a table of its own."""
    trained = 1 if frames == 1 else trained
    table = np.empty((trained, patches, width))
    for f in range(trained):
        for place in range(patches):
            for j in range(width):
                angle = (f * patches + place) / 10000 ** (2 * (j // 2) / width)
                table[f, place, j] = np.cos(angle) if j % 2 else np.sin(angle)
    out = np.empty((frames, patches, width))
    for f in range(frames):
        at = min(max((f + 0.5) * trained / frames - 0.5, 0.0), trained - 1)
        low = min(int(at), trained - 1)
        high = min(low + 1, trained - 1)
        out[f] = table[low] * (1 - (at - low)) + table[high] * (at - low)
    return out


def umt(params, config, clip, valid):
    """float[F * h * w, D] of one clip [F, H, W, 3], normalised; the first `valid` frames are
    there."""
    frames, heads = len(clip), config.heads
    patch = params["patch_embedding"]
    x = np.stack([conv_patches(patch["kernel"], patch["bias"], f) for f in clip])
    x = x.reshape(frames, -1, config.width)
    patches = x.shape[1]
    x = x + umt_positions(frames, config.frames, patches, config.width)
    x, seen = x.reshape(-1, config.width), slice(0, valid * patches)
    for index in range(config.depth):
        p = layer(params["layers"], index)
        normal = norm(p["norm1"], x, config.epsilon)
        q, k, v = np.split(normal @ p["attn"]["qkv"]["kernel"], 3, axis=-1)
        q, v = q + p["attn"]["q_bias"], v + p["attn"]["v_bias"]
        x = x + linear(p["attn"]["proj"], attend(q, k[seen], v[seen], heads))
        hidden = gelu(linear(p["mlp"]["fc1"], norm(p["norm2"], x, config.epsilon)))
        x = x + linear(p["mlp"]["fc2"], hidden)
    return norm(params["post_layernorm"], x, 1e-12)
