import os
import signal
import types

import jax
import pytest

from tpo_jax.data.buckets import Bucket, BucketSchedule
from tpo_jax.parallel.mesh import make_mesh
from tpo_jax.training.preemption import EXIT_STATUS, Preempted, Preemption
from tpo_jax.training.references import verify_references


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


def test_a_signal_is_heard_although_a_service_took_it_over():
    """As jax.distributed.initialize() does, also where there is one process."""
    with Preemption() as preemption:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        preemption.joined()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            preemption.check()


def test_references_are_not_looked_at_after_a_signal():
    config = types.SimpleNamespace(dtype="float32")
    program = types.SimpleNamespace(
        model=types.SimpleNamespace(config=config), mesh=make_mesh({}, jax.devices()[:1])
    )
    sizes = {"batch_size": 1, "frames": 1, "branches": 2, "branch_tokens": 8, "answers": 4}
    bucket = Bucket("pairs", "video", **sizes)
    pipeline = types.SimpleNamespace(schedule=BucketSchedule([bucket]))  # that has no batches
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            verify_references(
                program, pipeline, None, seed=0, files=[], say=print, preemption=preemption
            )


def test_exit_status_is_the_one_launchers_restart_on():
    assert EXIT_STATUS == os.EX_TEMPFAIL == 75
