import jax
import pytest
from jax.experimental import multihost_utils

from tpo_jax.parallel.distributed import initialize_distributed, of_process_0


@pytest.fixture
def joined(monkeypatch):
    """What jax.distributed.initialize is called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_one_process_joins_nobody(joined, capsys):
    initialize_distributed(None, None, None)
    assert not joined and "process 0 of 1" in capsys.readouterr().err


def test_arguments_come_before_variables(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    initialize_distributed("host:2", None, 0)
    initialize_distributed(None, None, None)
    assert joined == [("host:2", 4, 0), ("other:1", 4, 3)]


@pytest.mark.parametrize("data", [b"", b"{}", b"x" * 1000])
def test_every_process_gets_the_bytes_of_the_first(monkeypatch, data):
    sent = []

    def broadcast(value):  # what process 0 sends, in its order; shapes have to agree
        if jax.process_index() == 0:
            sent.append(value)
            return value
        expected = sent.pop(0)
        assert value.shape == expected.shape and value.dtype == expected.dtype
        return expected

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    for index, mine in ((0, data), (1, b"another")):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert of_process_0(mine) == data
    assert not sent
