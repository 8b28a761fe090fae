"""Terms that compare rows see the whole batch, wherever its rows lie."""

import jax
import numpy as np
import pytest
from fake_batches import bucket, micro, random_batch, train_config

from tpo_jax.models.heads import HEADS
from tpo_jax.models.video_language import FunctionalModel
from tpo_jax.parallel.mesh import global_batch, make_mesh
from tpo_jax.training.program import make_program


@pytest.mark.long
def test_eight_devices_find_the_negatives_of_one():
    config = micro(("cg_detr",))
    params = jax.tree.map(np.asarray, FunctionalModel(config).init(jax.random.key(1)))
    local = random_batch(bucket(8), config)
    local["slots"]["temporal"]["valid"][:] = True
    found = []
    for devices, sizes in ((1, {}), (8, {"data": 4, "fsdp": 2})):
        mesh = make_mesh(sizes, jax.devices()[:devices])
        program = make_program(train_config(("cg_detr",)), config, mesh)
        state, batch = program.init_state(params), global_batch(local, mesh)
        step = program.eval_step.lower(state.params, batch).compile()
        terms = jax.device_get(step(state.params, batch))
        found.append({n: (float(t.total), float(t.weight)) for n, t in terms.items()})
    for name in HEADS["cg_detr"].coupled:
        assert found[0][name][1] > 0, name
    for name, term in found[0].items():
        assert found[1][name] == pytest.approx(term, rel=1e-4, abs=1e-5), name
