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
