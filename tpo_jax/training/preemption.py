"""Stopping when told to: SIGTERM -> every process saves the same step and exits with status 75.

One process: a signal handler sets a flag that the loop polls. Several processes: JAX's preemption
service (started by jax.distributed.initialize) hears SIGTERM on any of them and agrees on a
poll that none has passed yet; `reached()` becomes True on all at that same poll. The service
counts polls, not training steps, so that validation and the gaps between compilations poll as well.

A signal that comes while XLA compiles is heard when that program is done.
"""

import os
import signal
import types

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75  # EX_TEMPFAIL: launchers start the same command again


class Preempted(Exception):
    """Told to stop, in a command that keeps what is finished; see `Preemption.check`."""


class Preemption:
    """Listens for SIGTERM while open (a context manager); call `joined` after the others are there.

    Every process must poll the same number of times: call `reached()` in loops whose length
    does not depend on the process.
    """

    def __init__(self) -> None:
        self._polls = 0
        self._reached = False
        self._told = False
        self._previous: signal.Handlers | None = None

    def __enter__(self) -> "Preemption":
        self._previous = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._polls:  # else the service has the signal
            signal.signal(signal.SIGTERM, self._previous)

    def _hear(self, signum: int, frame: types.FrameType | None) -> None:
        del signum, frame
        self._told = True

    def joined(self) -> None:
        """jax.distributed.initialize() has run, whose service took the signal over."""
        if jax.process_count() == 1:  # the service would keep it to itself
            signal.signal(signal.SIGTERM, self._hear)
        elif self._told:  # it came before the service listened
            os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """True from the poll on at which all processes stop; False before."""
        if not self._reached and jax.process_count() > 1:
            self._polls += 1
            self._told = multihost_utils.reached_preemption_sync_point(self._polls)
        self._reached = self._reached or self._told
        return self._reached

    def check(self) -> None:
        """Raises Preempted once `reached`."""
        if self.reached():
            raise Preempted
