"""Loads the weights of a PyTorch module into one of ours, through the mapping rows."""

import jax
import numpy as np
from flax import nnx

from tpo_jax.interop.mapping import import_leaves
from tpo_jax.parallel.paths import unflatten


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


def with_weights(module, rows, tensors, ignored=()):
    """Our nnx module with the tensors of theirs; every leaf and tensor is used."""
    leaves = import_leaves(rows, tensors, ignored)
    structure, state = nnx.split(module)
    wanted = {
        "/".join(str(k.key) for k in path if hasattr(k, "key")): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
    }
    assert {path: leaf.shape for path, leaf in leaves.items()} == wanted
    params = jax.tree.map(nnx.Param, unflatten({k: np.asarray(v) for k, v in leaves.items()}))
    return nnx.merge(structure, nnx.State(params))


def difference(ours, theirs):
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))
