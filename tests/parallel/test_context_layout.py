import numpy as np
import pytest

from tpo_jax.parallel.context import ContextLayout


@pytest.mark.parametrize(("tokens", "devices"), [(16, 2), (45, 4), (7, 8), (5, 1)])
def test_every_token_has_one_place_and_comes_back(tokens, devices):
    layout = ContextLayout(tokens, devices)
    x = np.arange(1, 1 + 2 * tokens).reshape(2, tokens)
    placed = np.asarray(layout.spread(x))
    expected = np.where(layout.order < tokens, x[:, np.minimum(layout.order, tokens - 1)], 0)
    np.testing.assert_array_equal(placed, expected)
    np.testing.assert_array_equal(layout.restore(placed), x)
    assert layout.length % devices == 0 and sorted(layout.order) == list(range(layout.length))


@pytest.mark.parametrize("devices", [2, 8])
def test_every_device_has_the_same_number_of_visible_pairs(devices):
    order = ContextLayout(32 * devices, devices).order.reshape(devices, -1)
    pairs = {int(np.sum(part + 1)) for part in order}  # token i sees i + 1 tokens
    assert len(pairs) == 1
