"""Parameters come to the rows of a device; the rows of all devices do not come to a parameter."""

import re

import jax
import jax.numpy as jnp
import pytest
from fake_batches import pair_bucket, train_config

from experiments.plans import Cell, cell_config
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.parallel.mesh import batch_sharding, make_mesh, on_mesh
from tpo_jax.training.program import make_program
from tpo_jax.training.start import make_model_config

ROWS = 8


@pytest.fixture(scope="module")
def program():
    """Of a LongVA whose parameters are split over eight devices.

    Its connector is larger than what a device has of activations, so that the compiler, left to
    itself, would send activations.
    """
    config = cell_config(Cell("longva_tpo", "", "v5e:1x1"), tiny=True)
    model_config, _ = make_model_config(config)
    mesh = make_mesh({"fsdp": ROWS}, jax.devices())
    return make_program(train_config(objective="preference"), model_config, mesh)


@pytest.fixture(scope="module")
def compiled(program):
    """The gradient on pairs."""
    bucket, model_config = pair_bucket(ROWS), program.model.config
    text = program.lower_gradient(batch_spec(bucket, model_config)).compile().as_text()
    return text, model_config, bucket


def shapes(text: str) -> set[tuple[int, ...]]:
    return {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}


def test_hidden_units_are_those_of_a_device(compiled):
    text, config, bucket = compiled
    side = config.vision.grid
    width, hidden = config.language.width, config.language.mlp_width
    assert (ROWS, bucket.frames, side, side, width) not in shapes(text)
    assert (ROWS, 2, bucket.branch_tokens, hidden) not in shapes(text)


def test_looked_up_vectors_come_whole_to_their_rows(program):
    """Else the compiler may let the layers keep columns apart, and exchange them in each."""
    rows = batch_sharding(program.mesh)
    look_up = jax.jit(
        on_mesh(lambda params, tokens: program.model.bind(params).embed_tokens(tokens),
                program.mesh),
        in_shardings=(program.param_shardings, rows),
    )  # fmt: skip
    tokens = jax.ShapeDtypeStruct((ROWS, 3, 5), jnp.int32)
    compiled = look_up.lower(program.abstract_state.params, tokens).compile()
    assert compiled.output_shardings.is_equivalent_to(rows, 4)
