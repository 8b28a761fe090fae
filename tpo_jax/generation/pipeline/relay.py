"""Replies of an endpoint for several processes, of which the first one asks.

Their records have to be equal, because what our own model does follows from them and runs on all
devices at once. So the first process asks and tells the others what it got.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from tpo_jax.errors import UserError
from tpo_jax.generation.pipeline.endpoint import BudgetSpent, Clock, EndpointError
from tpo_jax.generation.pipeline.plugins import Done, EndpointSpeaker, Reply, Request
from tpo_jax.parallel.distributed import of_process_0

# Seconds after which the first process says that there is no reply yet: collectives give up on a
# process that does not come (gloo after half a minute), and signals have to be looked for.
BEAT = 5.0
_ERRORS = {kind.__name__: kind for kind in (BudgetSpent, EndpointError, UserError, RuntimeError)}
_ENDED = "ended"


class RelayedSpeaker:
    """Yields on every process the replies that the speaker of the first one gets.

    Args:
      speaker: is asked in a thread. It polls `clock`: of the signal that processes have in common
        all have to ask equally often, which threads cannot.
      clock: of its endpoint.
      poll: called on every process after each reply, and in each BEAT without one. What it raises
        is raised on all of them when replies that were under way are yielded.
    """

    def __init__(self, speaker: EndpointSpeaker, clock: Clock, poll: Callable[[], None]):
        self._speaker, self._clock, self._poll = speaker, clock, poll
        self.temperature = speaker.temperature

    def say(self, requests: Sequence[Request], done: Done) -> Iterator[tuple[str, Reply]]:
        heard: queue.Queue[dict[str, Any]] = queue.Queue()
        if jax.process_index() == 0:
            threading.Thread(target=self._ask, args=(requests, done, heard), daemon=True).start()
        problem: Exception | None = None
        told: dict[str, Any] = {}
        try:
            while _ENDED not in told:
                told = json.loads(of_process_0(_next(heard)))
                if "id" in told:
                    yield told.pop("id"), Reply(**told)
                if problem is None:
                    try:
                        self._poll()
                    except Exception as error:
                        problem = error
                        self._clock.stop()
        finally:
            if _ENDED not in told:
                self._clock.stop()
        if problem:
            raise problem
        if told[_ENDED]:
            raise _ERRORS[told[_ENDED]](told["why"])

    def _ask(self, requests: Sequence[Request], done: Done,
             heard: queue.Queue[dict[str, Any]]) -> None:
        """Puts every reply, then how it ended."""
        try:
            for name, reply in self._speaker.say(requests, done):
                heard.put({"id": name, "text": reply.text, "failed": reply.failed,
                           "usage": reply.usage})
        except Exception as error:
            kind = next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), None)
            why = str(error) if kind else f"{type(error).__name__}: {error}"
            heard.put({_ENDED: kind or "RuntimeError", "why": why})
        else:
            heard.put({_ENDED: ""})


def _next(heard: queue.Queue[dict[str, Any]]) -> bytes:
    """What the first process tells, {} where it has heard nothing new; b"" of the others."""
    if jax.process_index() != 0:
        return b""
    try:
        return json.dumps(heard.get(timeout=BEAT)).encode()
    except queue.Empty:
        return b"{}"
