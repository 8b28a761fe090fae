"""What reaches the adapter through a frozen SAM 2: each mask term alone, without prompt and box."""

import dataclasses

import jax
import numpy as np
import pytest
from fake_batches import micro
from flax import nnx

from tpo_jax.models.heads import HeadInputs, sam2
from tpo_jax.models.layers import Rngs
from tpo_jax.models.sam2_config import SIZES
from tpo_jax.parallel.paths import flatten

CONFIG = dataclasses.replace(micro(), heads=("sam2",), sam2=SIZES["micro"])
F, SIDE = 2, 32
TERMS = tuple(sam2.published_weights())
MASK_TERMS = tuple(term for term in TERMS if term not in sam2.PROMPT_TERMS)


def _inputs():
    """One object in two frames, a square that moves."""
    rng = np.random.default_rng(0)
    m = CONFIG.mask_size
    masks = np.zeros((1, 1, F, m, m), np.uint8)
    for frame in range(F):
        masks[..., frame, m // 4 : m // 2, m // 4 + frame : 3 * m // 4 + frame] = 1
    targets = {"masks": masks, "labelled": np.ones((1, 1, F), bool)}
    states = rng.normal(size=(1, 1, CONFIG.language.width)).astype(np.float32)
    frames = rng.uniform(-1, 1, (1, F, SIDE, SIDE, 3)).astype(np.float32)
    return HeadInputs(states, None, frames, np.ones((1, F), bool), None, targets=targets)


@pytest.fixture(scope="module")
def gradients():
    """{term: gradients of the trained leaves and of the slot state}, by one program."""
    inputs = _inputs()

    def head():
        return sam2.Sam2Head(CONFIG, rngs=Rngs(0))

    structure = nnx.graphdef(nnx.eval_shape(head))
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(head())))()
    network = params.pop("network")

    def total(trained, states, weights):
        leaves = trained | {"network": network}
        model = nnx.merge(structure, nnx.State(jax.tree.map(nnx.Param, leaves)))
        found = model(dataclasses.replace(inputs, slot_states=states))
        terms = sam2.loss(found, inputs.targets, np.ones((1, 1), bool))
        return sum(weights[name] * term.mean() for name, term in terms.items())

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    alone = {term: {name: float(name == term) for name in TERMS} for term in TERMS}
    return {term: gradient(params, inputs.slot_states, w) for term, w in alone.items()}


@pytest.mark.parametrize("term", MASK_TERMS)
def test_a_mask_term_alone_reaches_the_adapter_and_the_slot_state(term, gradients):
    trained, states = gradients[term]
    leaves = flatten(trained["adapter"])
    assert leaves and np.all(np.isfinite(states)) and np.abs(states).max() > 1e-7
    for path, leaf in leaves.items():
        assert np.all(np.isfinite(leaf)) and np.abs(leaf).max() > 1e-7, path
    # The box is read out of the state beside the network.
    assert not any(np.any(leaf) for leaf in flatten(trained["box_readout"]).values())


def test_the_prompt_term_trains_the_adapter_and_the_box_term_its_readout(gradients):
    reached = {
        term: {name for name, leaf in flatten(gradients[term][0]).items() if np.any(leaf)}
        for term in sam2.PROMPT_TERMS
    }
    names = {term: {path.split("/")[0] for path in paths} for term, paths in reached.items()}
    assert names == {"sam2/prompt": {"adapter"}, "sam2/box": {"box_readout"}}
