"""One process asks an endpoint, and all processes get its replies, errors and the end together."""

import threading

import jax
import pytest

from tpo_jax.errors import UserError
from tpo_jax.generation.pipeline import relay
from tpo_jax.generation.pipeline.endpoint import BudgetSpent, Clock, EndpointError, Stopped
from tpo_jax.generation.pipeline.plugins import Reply
from tpo_jax.generation.pipeline.relay import RelayedSpeaker
from tpo_jax.training.preemption import Preempted

REPLIES = {
    "a": Reply("one", None, {"prompt_tokens": 1, "completion_tokens": 2}),
    "b": Reply("", "reply was cut off"), "c": Reply("three"), "d": Reply("four"),
}  # fmt: skip


class Speaker:
    """Replies in turn; before the reply to `late` it waits until `go` is set, and looks for the
    end of the work, after which it still yields what is under way. Ends with `error`."""

    temperature = 0.5

    def __init__(self, clock, late=None, error=None):
        self.clock, self.late, self.error = clock, late, error
        self.go, self.asked = threading.Event(), []

    def say(self, requests, done):
        for name in requests:
            self.asked.append(name)
            if name == self.late:
                assert self.go.wait(30)
                try:
                    self.clock.poll()
                except Stopped:
                    yield name, REPLIES[name]
                    raise
            yield name, REPLIES[name]
        if self.error:
            raise self.error


@pytest.fixture
def sent(monkeypatch):
    """What the first process told the others."""
    sent = []
    monkeypatch.setattr(relay, "BEAT", 0.01)
    monkeypatch.setattr(relay, "of_process_0", lambda data: sent.append(data) or data)
    return sent


def listen(speaker):
    """(replies, what is raised at the end)."""
    said = []
    try:
        for name, reply in speaker.say(list(REPLIES), ()):
            said.append((name, reply))
    except Exception as error:
        return said, error
    return said, None


def listen_elsewhere(sent, monkeypatch, poll=lambda: None):
    """The same on another process, which asks nobody."""
    told = iter(sent)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(relay, "of_process_0", lambda data: (data == b"") and next(told))
    asked = Speaker(Clock())
    found = listen(RelayedSpeaker(asked, asked.clock, poll))
    assert not asked.asked and next(told, None) is None
    return found


def test_every_process_gets_the_replies_and_looks_for_a_signal_as_often(sent, monkeypatch):
    asked, polls = Speaker(Clock(), late="c"), []

    def poll():
        polls.append(len(sent))
        if len(polls) == 5:
            asked.go.set()

    one = RelayedSpeaker(asked, asked.clock, poll)
    assert one.temperature == 0.5
    assert listen(one) == (list(REPLIES.items()), None) and asked.asked == list(REPLIES)
    assert sent.count(b"{}") >= 3  # while there was no reply
    assert polls == list(range(1, len(sent) + 1))
    there = []
    assert listen_elsewhere(sent, monkeypatch, lambda: there.append(len(there) + 1)) == (
        list(REPLIES.items()), None)  # fmt: skip
    assert there == polls
    asked.clock.poll()  # which goes on, for the next stage


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (BudgetSpent("enough"), BudgetSpent, "enough"),
        (EndpointError("no server"), EndpointError, "no server"),
        (UserError("video0: broken"), UserError, "video0: broken"),
        (KeyError("x"), RuntimeError, "KeyError: 'x'"),
    ],
)
def test_every_process_ends_with_the_error_behind_the_replies(sent, monkeypatch, error, kind, text):
    asked = Speaker(Clock(), error=error)
    for said, raised in (
        listen(RelayedSpeaker(asked, asked.clock, lambda: None)),
        listen_elsewhere(sent, monkeypatch),
    ):
        assert said == list(REPLIES.items()) and type(raised) is kind and str(raised) == text


def test_told_to_stop_every_process_keeps_what_was_under_way(sent, monkeypatch):
    asked = Speaker(Clock(), late="c")

    def poll_of(polls):
        def poll():
            polls.append(0)
            if len(polls) == 4:
                asked.go.set()
                raise Preempted

        return poll

    kept = [(name, REPLIES[name]) for name in "abc"]
    polls = []
    said, raised = listen(RelayedSpeaker(asked, asked.clock, poll_of(polls)))
    assert said == kept and isinstance(raised, Preempted) and asked.asked == ["a", "b", "c"]
    assert len(polls) == 4  # no poll behind the one that ended the work
    said, raised = listen_elsewhere(sent, monkeypatch, poll_of([]))
    assert said == kept and isinstance(raised, Preempted)


def test_replies_that_nobody_takes_end_the_asking(sent):
    asked = Speaker(Clock(), late="b")
    replies = RelayedSpeaker(asked, asked.clock, lambda: None).say(list(REPLIES), ())
    assert next(replies)[0] == "a"
    replies.close()
    with pytest.raises(Stopped):
        asked.clock.poll()
    asked.go.set()
