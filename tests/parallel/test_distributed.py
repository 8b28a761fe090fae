import jax
import pytest

from tpo_jax.parallel.distributed import initialize_distributed


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
