import functools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.towers import oracle
from tpo_jax.models.connectors.config import QFormerConfig
from tpo_jax.models.connectors.registry import make_connector
from tpo_jax.models.vision import VisionFeatures

CONFIG = QFormerConfig(queries=2, extra_queries=3, width=8, depth=4, heads=2, mlp_width=10)


@pytest.fixture(scope="module")
def qformer():
    return oracle.random_module(functools.partial(make_connector, CONFIG, 6, 12))


def _attend(p, x, tokens):
    q, k, v = (oracle.linear(p[name], y) for name, y in
               (("query", x), ("key", tokens), ("value", tokens)))  # fmt: skip
    return oracle.norm(p["norm"], x + oracle.linear(p["dense"], oracle.attend(q, k, v, 2)), 1e-12)


def _layer(p, x, tokens):
    x = _attend(p["attention"], x, x)
    if "crossattention" in p:
        x = _attend(p["crossattention"], x, tokens)
    hidden = oracle.gelu(oracle.linear(p["mlp"]["fc1"], x))
    return oracle.norm(p["mlp"]["norm"], x + oracle.linear(p["mlp"]["fc2"], hidden), 1e-12)


def test_queries_read_the_frames_that_are_there(qformer):
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(2, 3, 2, 2, 6)).astype(np.float32)
    valid = np.array([[True] * 3, [True, True, False]])
    features = VisionFeatures(jnp.asarray(patches), jnp.asarray(patches))
    found = oracle.run(qformer, features, jnp.asarray(valid))
    params = oracle.params_of(qformer)
    for row in range(2):
        tokens = patches[row][valid[row]].reshape(-1, 6).astype(np.float64)
        x = np.concatenate([params["query_tokens"][0], params["extra_query_tokens"][0]])
        x = oracle.norm(params["embeddings_norm"], x, 1e-12)
        for pair in range(2):
            for name in ("even", "odd"):
                x = _layer(oracle.layer(params["layers"], pair)[name], x, tokens)
        np.testing.assert_allclose(found[row], oracle.linear(params["project_up"], x), atol=2e-5)


def test_the_number_of_tokens_does_not_depend_on_the_clip():
    assert CONFIG.visual_frames(1, 14).tolist() == CONFIG.visual_frames(16, 14).tolist() == [0] * 5


def test_an_odd_depth_is_refused():
    with pytest.raises(ValueError, match="connector.depth=3: must be even"):
        QFormerConfig(queries=2, extra_queries=0, width=8, depth=3, heads=2, mlp_width=10)
