import os
import signal

import pytest

from tpo_jax.training.preemption import EXIT_STATUS, Preemption


def test_sigterm_is_heard_at_the_next_poll_and_stays():
    with Preemption() as preemption:
        assert not preemption.reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.reached() and preemption.reached()


def test_the_previous_handler_comes_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("outer"))
    try:
        with pytest.raises(RuntimeError), Preemption():
            raise RuntimeError
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["outer"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_exit_status_is_the_one_launchers_restart_on():
    assert EXIT_STATUS == os.EX_TEMPFAIL == 75
