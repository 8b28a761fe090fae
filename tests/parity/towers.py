"""Loads the weights of a PyTorch module into one of ours, through the mapping rows."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tpo_jax.interop.mapping import import_leaves
from tpo_jax.models.layers import Rngs
from tpo_jax.parallel.paths import flatten, unflatten


def randomise(module, seed=0):
    """Every parameter drawn anew: biases and norms of a fresh module are zeros and ones."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.0 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(0.3 * noise + parameter if parameter.ndim < 2 else scale * noise)
    return module.eval()


def tensors_of(module, rename=lambda key: key):
    return {rename(key): value.numpy() for key, value in module.state_dict().items()}


def with_weights(make, rows, tensors, ignored=()):
    """The nnx module that make(rngs=...) builds with the tensors of theirs; every leaf and every
    tensor is used."""
    leaves = import_leaves(rows, tensors, ignored)
    structure, state = nnx.split(nnx.eval_shape(lambda: make(rngs=Rngs(0))))
    wanted = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(state)).items()}
    assert {path: leaf.shape for path, leaf in leaves.items()} == wanted
    params = jax.tree.map(lambda x: nnx.Param(jnp.asarray(x)), unflatten(leaves))
    return nnx.merge(structure, nnx.State(params))


def run(module, *inputs, method=None, **options):
    """module.method(*inputs) as one compiled program; options are static."""
    structure, state = nnx.split(module)

    def call(state, *inputs):
        bound = nnx.merge(structure, state)
        return (getattr(bound, method) if method else bound)(*inputs, **options)

    return jax.jit(call)(state, *inputs)


def difference(ours, theirs):
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))
