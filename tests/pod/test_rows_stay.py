"""Parameters come to the rows of a device; the rows of all devices do not come to a parameter."""

import re

import jax
import pytest
from fake_batches import pair_bucket, train_config

from experiments.plans import Cell, cell_config
from tpo_jax.data.batch_spec import batch_spec
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.program import make_program
from tpo_jax.training.start import make_model_config

ROWS = 8


@pytest.fixture(scope="module")
def compiled():
    """The gradient of a LongVA on pairs whose parameters are split over eight devices.

    Its connector is larger than what a device has of activations, so that the compiler, left to
    itself, would send activations.
    """
    config = cell_config(Cell("longva_tpo", "", "v5e:1x1"), tiny=True)
    model_config, _ = make_model_config(config)
    program = make_program(
        train_config(objective="preference"), model_config, make_mesh({"fsdp": 8}, jax.devices())
    )
    bucket = pair_bucket(ROWS)
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
