"""Building blocks that every tower shares: matmul, linear, norms, dropout, stacks of layers.

Axis letters, used in every shape of this package:

    B batch rows      F frames            h, w  patch grid      p  tokens of one frame
    P prefix tokens   K branches of a row R  branch tokens      T  query tokens   S  key tokens
    A answer tokens   S  slots of a row   W  windows            V  vocabulary
    D model width     N  query heads      G  key/value heads    H  head width     L  layers

Parameters are float32 (or what the checkpoint holds) and are cast to the dtype of the activation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from tpo_jax.parallel.rules import constrain_rows

Block = TypeVar("Block", bound=nnx.Module)
Carry = TypeVar("Carry")


class Rngs:
    """Independent keys for parameters, in the order in which they are drawn.

    It has the one method of nnx.Rngs that modules use here. The counter is a plain integer: that of
    nnx.Rngs is a Variable, and updating it inside a trace takes time in proportion to the trace.
    """

    def __init__(self, key: jax.Array | int):
        self._key = jax.random.key(key) if isinstance(key, int) else key
        self._drawn = 0

    def params(self) -> jax.Array:
        """A new key, key[]."""
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """float[..., I] @ float[I, O] -> float[..., O].

    Only the gradient is special: XLA:CPU is up to 2.5x slower at contracting two axes than one, so
    the weight gradient is taken over flattened rows there. Elsewhere rows stay as they are, because
    flattening would merge two sharded axes (batch and context) into one.
    """
    return x @ kernel


def _matmul_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(
    residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals

    def flattened(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return x.reshape(-1, x.shape[-1]).T @ gradient.reshape(-1, gradient.shape[-1])

    def unflattened(x: jax.Array, gradient: jax.Array) -> jax.Array:
        rows = tuple(range(x.ndim - 1))
        return jax.lax.dot_general(x, gradient, ((rows, rows), ((), ())))

    kernel_gradient = jax.lax.platform_dependent(x, gradient, cpu=flattened, default=unflattened)
    return gradient @ kernel.T, kernel_gradient.astype(kernel.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias), kernel [in, out]; drawn from N(0, scale^2 / in).

    `lora_a` [in, rank] and `lora_b` [rank, out] exist only after `lora.attach`; then
    y += lora_scale * (x @ lora_a) @ lora_b, which reads x with dropout where it gets keys.
    """

    def __init__(
        self, features_in: int, features_out: int, *, rngs: Rngs, bias: bool = True,
        scale: float = 1.0,
    ):
        deviation = scale * features_in**-0.5
        draw = jax.random.normal(rngs.params(), (features_in, features_out), jnp.float32)
        self.kernel = nnx.Param(deviation * draw)
        self.bias = nnx.Param(jnp.zeros(features_out, jnp.float32)) if bias else None
        self.lora_a = None
        self.lora_b = None
        self.lora_scale = 0.0
        self.lora_dropout = 0.0

    @property
    def merged_kernel(self) -> jax.Array:
        """float[in, out] with the adapter in it."""
        if self.lora_a is None:
            return self.kernel[...]
        return self.kernel[...] + self.lora_scale * (self.lora_a[...] @ self.lora_b[...])

    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """float[*rows, ..., in] -> float[*rows, ..., out]; keys [*rows] for dropout, or None."""
        y = matmul(x, self.kernel[...].astype(x.dtype))
        if self.lora_a is not None:
            kept = dropout(x, keys, self.lora_dropout)
            low = matmul(kept, self.lora_a[...].astype(x.dtype))
            y = y + self.lora_scale * matmul(low, self.lora_b[...].astype(x.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        # Kernels are split over `fsdp` as rows are. Left to itself the compiler may keep the kernel
        # where it lies and gather the rows of all devices instead.
        return constrain_rows(y) if y.ndim > 2 else y


# For elementwise functions and norms: in a loop over layers the backward pass keeps their arguments
# alone and computes what lies between again. Storing all of it was nearly half of a step's memory.
# Where layers are unrolled, the compiler may share the two computations.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)

gelu = recomputed(functools.partial(jax.nn.gelu, approximate=True))
exact_gelu = recomputed(functools.partial(jax.nn.gelu, approximate=False))


@recomputed
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """float[..., D], float32[D], float32[D] -> float[..., D] of the dtype of x; float32 inside."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(variance + epsilon)
    return (normal * scale + bias).astype(x.dtype)


@recomputed
def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """float[..., D], float32[D] -> float[..., D] of the dtype of x; the mean square in float32."""
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    normal = (x32 * jax.lax.rsqrt(mean_square + epsilon)).astype(x.dtype)
    return normal * scale.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, computed in float32."""

    def __init__(self, features: int, *, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., features] -> float[..., features], of the same dtype."""
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation as in Llama: float32 inside, scaled in the input dtype."""

    def __init__(self, features: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., features] -> float[..., features], of the same dtype."""
        return rms_norm(x, self.scale[...], self.epsilon)


class Mlp(nnx.Module):
    """Linear, GELU (tanh form) or `activation`, Linear."""

    def __init__(
        self, features: int, hidden: int, features_out: int, *, rngs: Rngs, scale: float = 1.0,
        activation: Callable[[jax.Array], jax.Array] = gelu,
    ):
        self.fc1 = Linear(features, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, features_out, rngs=rngs, scale=scale)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., features] -> float[..., features_out]."""
        return self.fc2(self.activation(self.fc1(x)))


def dropout(x: jax.Array, keys: jax.Array | None, rate: float) -> jax.Array:
    """Inverted dropout with one key per leading index.

    Args:
      x: float[*rows, ...].
      keys: key array [*rows], or None for no dropout. What a row loses depends on its own key and
        its own shape only, never on its place in the batch.
      rate: share of entries that are set to zero, in [0, 1).
    """
    if keys is None or rate == 0.0:
        return x
    rest = x.shape[keys.ndim:]
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, rest))(keys.reshape(-1))
    return jnp.where(keep.reshape(x.shape), x / (1.0 - rate), jnp.zeros_like(x))


def fold_rows(keys: jax.Array | None, data: jax.Array | int) -> jax.Array | None:
    """fold_in of a number (or an int array [*rows]) for keys [*rows]; None stays None."""
    if keys is None:
        return None
    numbers = jnp.broadcast_to(jnp.asarray(data, jnp.uint32), keys.shape).reshape(-1)
    return jax.vmap(jax.random.fold_in)(keys.reshape(-1), numbers).reshape(keys.shape)


def stack(make: Callable[[Rngs], Block], depth: int, rngs: Rngs) -> Block:
    """`depth` independently drawn copies of one block as ONE block with parameters [L, ...]."""
    keys = jax.random.split(rngs.params(), depth)
    structure = nnx.graphdef(nnx.eval_shape(lambda: make(Rngs(0))))
    parameters = jax.vmap(lambda key: nnx.state(make(Rngs(key))))(keys)
    return nnx.merge(structure, parameters)


_POLICIES = {
    "full": None,  # nothing but the arguments
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def checkpointed(function: Callable, remat: str) -> Callable:
    """`function`, whose backward pass computes again what `remat` (of checks.REMAT) says."""
    return jax.checkpoint(function, policy=_POLICIES[remat]) if remat else function


def run_layers(
    layers: Block, apply: Callable[[Block, Carry, Any], tuple[Carry, Any]], carry: Carry,
    inputs: Any = None, *, remat: str = "", unroll: bool = False,
) -> tuple[Carry, Any]:  # fmt: skip
    """Runs a stack made by `stack`: carry, output_l = apply(layer_l, carry, inputs_l).

    Args:
      layers: block with parameters [L, ...].
      apply: function of (block, carry, inputs of one layer) -> (carry, outputs of one layer).
      carry: float[B, ...] or several, activations; on a mesh their rows stay split between layers.
      inputs: pytree with leading axis L, or None.
      remat: name of checks.REMAT; "full" stores only the carry of each layer.
      unroll: a copy of the program for each layer instead of one loop. Compiles depth times as
        much, but does not stack what the backward pass needs, which is most of a small model's
        time on a CPU.

    Returns: (carry, outputs stacked to [L, ...]).
    """
    structure, parameters = nnx.split(layers)

    def body(carry: Carry, layer: tuple[nnx.State, Any]) -> tuple[Carry, Any]:
        parameters, inputs = layer
        return apply(nnx.merge(structure, parameters), jax.tree.map(constrain_rows, carry), inputs)

    body = checkpointed(body, remat)
    if not unroll:
        return jax.lax.scan(body, carry, (parameters, inputs))
    outputs = []
    for index in range(jax.tree.leaves(parameters)[0].shape[0]):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], (parameters, inputs))
        carry, output = body(carry, layer)
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
