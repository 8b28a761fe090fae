"""The chat endpoint against a server on this machine; time is a number that the client moves."""

import base64
import email.utils
import io
import json

import numpy as np
import pytest
from chat_server import reply, serving
from micro_model import MemoryDataset
from PIL import Image

from tpo_jax.generation.pipeline import endpoint as endpoints
from tpo_jax.generation.pipeline.endpoint import (
    Budget,
    BudgetSpent,
    Clock,
    Endpoint,
    EndpointError,
    EndpointSettings,
    RequestRefused,
)
from tpo_jax.generation.pipeline.plugins import EndpointSpeaker, Request
from tpo_jax.training.preemption import Preempted

KEY = "sk-very-secret"


class FakeClock(Clock):
    """Waiting moves it; `waits` are the seconds that were waited."""

    def __init__(self):
        super().__init__()
        self.time, self.waits = 1000.0, []

    def now(self):
        return self.time

    date = now

    def sleep(self, seconds):
        self.waits.append(seconds)
        self.time += seconds


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with serving() as server:
        yield server


@pytest.fixture
def clock():
    return FakeClock()


def client(server, clock, budget=None, **options):
    options = {"key_variable": "TEST_KEY", "tries": 4} | options
    settings = EndpointSettings(server.url, "some-model", **options)
    return Endpoint(settings, budget or Budget(), clock, jitter=lambda: 1.0)


def ask(client, text="What?", pictures=(), max_tokens=20):
    return client.ask(text, pictures, max_tokens, seed=3)


def test_a_request_holds_the_pictures_as_data_urls_and_the_key_in_its_header(server, clock):
    server.script = [(200, {}, reply(" A dog. "))]
    picture = np.full((24, 32, 3), (200, 30, 30), np.uint8)
    said = ask(client(server, clock, temperature=0.5, body={"top_p": 0.9, "seed": None}),
               pictures=[picture])
    assert (said.text, said.finished) == ("A dog.", True)
    assert said.usage == {"prompt_tokens": 10, "completion_tokens": 5}
    (path, headers, body), = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    image, text = body.pop("messages")[0]["content"]
    assert text == {"type": "text", "text": "What?"}
    assert body == {"model": "some-model", "max_tokens": 20, "temperature": 0.5, "top_p": 0.9}
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_allclose(decoded, picture, atol=8)
    assert not clock.waits


@pytest.mark.parametrize("bad", [
    (500, {}, "oops"), (503, {}, ""), (429, {}, "slow down"), (200, {}, "<html>"),
    (520, {}, "proxy"), (524, {}, "proxy"), (599, {}, ""),
    (200, {}, '{"choices": []}'), (200, {}, "[1]"), (200, {}, '{"choices": [{"message": {}}]}'),
    (None, {}, ""),
])
def test_what_may_pass_is_tried_again_with_doubled_waits(server, clock, bad):
    server.script = [bad, bad]
    assert ask(client(server, clock)).text == "fine"
    assert len(server.requests) == 3 and clock.waits == [1.0, 2.0]


def test_tries_end_with_an_error_that_names_address_reply_and_fix(server, clock):
    server.script = [(500, {}, f"bad day for {KEY}")] * 4
    with pytest.raises(EndpointError) as error:
        ask(client(server, clock))
    text = str(error.value)
    assert f"{server.url}/chat/completions: status 500 (bad day for [key])" in text
    assert "after 4 tries" in text and "--tries" in text and clock.waits == [1.0, 2.0, 4.0]


def test_retry_after_is_waited_for_as_seconds_or_date(server, clock):
    date = email.utils.formatdate(clock.time + 30 + 7, usegmt=True)
    server.script = [(429, {"Retry-After": "30"}, ""), (429, {"Retry-After": date}, ""),
                     (503, {"Retry-After": "soon"}, "")]
    assert ask(client(server, clock)).text == "fine"
    assert clock.waits == [30.0, 7.0, 4.0]


def test_a_wait_that_is_too_long_is_left_to_the_user(server, clock):
    server.script = [(429, {"Retry-After": "86400"}, "")]
    with pytest.raises(EndpointError, match="429 asks to wait 86400 s"):
        ask(client(server, clock))


@pytest.mark.parametrize("status, fix", [
    (400, "Check --endpoint_model"), (401, "environment variable"), (403, "--endpoint_model"),
    (404, "Check --endpoint"), (307, "--endpoint"), (501, "Check --endpoint")])
def test_what_will_not_pass_is_not_tried_again(server, clock, status, fix):
    server.script = [(status, {"Location": f"{server.url}/elsewhere"}, f"no: {KEY}")]
    with pytest.raises(EndpointError, match=rf"status {status} \(no: \[key\]\).*{fix}") as error:
        ask(client(server, clock))
    assert len(server.requests) == 1 and not clock.waits and KEY not in repr(error.value)


def test_one_refused_request_does_not_end_the_work_once_others_were_answered(server, clock):
    both = client(server, clock)
    ask(both)
    server.script = [(400, {}, "content policy")]
    with pytest.raises(RequestRefused, match="content policy"):
        ask(both)


def test_the_key_comes_from_the_environment_alone(server, clock, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(EndpointError, match="^TEST_KEY: .*not set.*--key_variable="):
        client(server, clock)
    ask(client(server, clock, key_variable=""))
    assert "Authorization" not in server.requests[0][1]
    with pytest.raises(ValueError, match="--key_variable") as error:
        client(server, clock, key_variable=KEY)
    assert KEY not in str(error.value)
    monkeypatch.setenv("TEST_KEY", KEY)
    with pytest.raises(EndpointError, match="unencrypted; use https") as error:
        Endpoint(EndpointSettings("http://example.com/v1", "m", "TEST_KEY"), Budget(), clock)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("url, message", [
    ("api.example.com/v1", r"expected http\(s\)"), ("https://me:sk-1@example.com/v1", "login"),
    ("https://example.com/v1?key=sk-1", "query")])
def test_addresses_that_cannot_serve_are_refused_without_their_login(url, message):
    with pytest.raises(ValueError, match=f"--endpoint=.*{message}") as error:
        EndpointSettings(url, "m")
    assert "sk-1" not in str(error.value)


def test_the_rate_is_kept(server, clock):
    slow = client(server, clock, requests_per_minute=30)
    for _ in range(3):
        ask(slow)
    assert clock.waits == [2.0, 2.0]


def test_the_budget_of_tokens_ends_before_it_is_exceeded(server, clock):
    budget = Budget(max_tokens=70)
    asked = client(server, clock, budget)
    for _ in range(3):  # 15 spent each; the next may need 10 + 20
        ask(asked)
    with pytest.raises(BudgetSpent, match="--max_tokens=70: 45 are spent and the next request may "
                       "need 30. Raise it"):
        ask(asked)
    assert len(server.requests) == 3 and (budget.prompt, budget.completion) == (30, 15)


def test_the_budget_of_money_and_what_malformed_replies_cost(server, clock):
    budget = Budget(max_cost=0.0001, prompt_price=1.0, completion_price=2.0)
    asked = client(server, clock, budget)
    usage = '{"usage": {"prompt_tokens": 10, "completion_tokens": 5}}'
    server.script = [(200, {}, usage)]
    ask(asked)  # two replies, 20 millionths each; the next may cost 50
    assert budget.cost == pytest.approx(40e-6)
    ask(asked)
    with pytest.raises(BudgetSpent, match="--max_cost=0.0001"):
        ask(asked)
    assert len(server.requests) == 3


MALFORMED = '{"usage": {"prompt_tokens": 10, "completion_tokens": 5}}'


def test_tries_after_malformed_replies_keep_the_budget_of_tokens(server, clock):
    """15 each; every try may need 10 + 20 more, so that the fourth is not sent."""
    server.script = [(200, {}, MALFORMED)] * 9
    budget = Budget(max_tokens=70)
    asked = client(server, clock, budget, tries=9)
    expected = "--max_tokens=70: 45 are spent.*need 30.*The last try: malformed reply"
    with pytest.raises(BudgetSpent, match=expected):
        ask(asked)
    assert len(server.requests) == 3 and (budget.prompt, budget.completion) == (30, 15)


def test_malformed_replies_of_several_workers_keep_the_budget_of_money(server, clock):
    """20 millionths a reply; with two others under way, and so far as it is known."""
    server.script = [(200, {}, reply()), *[(200, {}, MALFORMED)] * 90]
    budget = Budget(max_cost=300e-6, prompt_price=1.0, completion_price=2.0)
    asked = EndpointSpeaker(client(server, clock, budget, tries=40), MemoryDataset(1), 7, 20, 3)
    said = []
    with pytest.raises(BudgetSpent, match="--max_cost=0.0003"):
        said.extend(asked.say(requests(9), ()))
    assert [name for name, _ in said] == ["r0"]
    assert 250e-6 < budget.cost <= 300e-6 and len(server.requests) == round(budget.cost / 20e-6)


def test_replies_that_tell_nothing_count_as_they_were_reserved(server, clock):
    """The first request tells a prompt of 10; then each try is taken for 10 + 20."""
    server.script = [(200, {}, reply()), *[(200, {}, "<html>")] * 9]
    budget = Budget(max_tokens=80)
    asked = client(server, clock, budget, tries=9)
    ask(asked)
    with pytest.raises(BudgetSpent, match="--max_tokens=80: 75 are spent.*The last try: malformed"):
        ask(asked)
    assert len(server.requests) == 3
    without = Budget()
    server.script = [(200, {}, "<html>")]
    ask(client(server, clock, without))
    assert (without.prompt, without.completion) == (10, 5)  # nobody told, nobody asked


def test_a_record_has_the_usage_of_all_tries_of_its_request(server, clock):
    """So that the next start, which reads it, counts it; without taking prompts for longer."""
    server.script = [(200, {}, MALFORMED), (503, {}, ""), (200, {}, MALFORMED)]
    one = EndpointSpeaker(client(server, clock), MemoryDataset(1), 7, 20, 1)
    (_, said), = one.say(requests(1), ())
    assert said.fields()["usage"] == {
        "prompt_tokens": 30, "completion_tokens": 15, "replies": 3}  # fmt: skip
    server.script = [(200, {}, MALFORMED), (422, {}, "no pictures of this")]
    (_, refused), = one.say(requests(1), ())
    assert refused.failed and refused.fields()["usage"]["completion_tokens"] == 5
    later = Budget(max_tokens=45 + 10 + 20)
    later.spend(said.usage)
    assert ask(client(server, clock, later)).text == "fine"


@pytest.mark.parametrize(
    ("body", "most"),
    [
        ({}, 20),
        ({"max_tokens": 300}, 300),
        ({"max_tokens": None, "max_completion_tokens": 400}, 400),
        ({"max_completion_tokens": 7}, 20),  # beside max_tokens, which may be the one that holds
        ({"n": 3}, 60),
        ({"max_tokens": None, "max_completion_tokens": 400, "n": 2}, 800),
    ],
)
def test_a_budget_reserves_the_reply_that_the_body_allows(server, clock, body, most):
    """15 are spent by the first request; the next may need 10 and the longest reply."""
    enough = client(server, clock, Budget(max_tokens=15 + 10 + most), body=body)
    ask(enough)
    ask(enough)
    short = client(server, clock, Budget(max_tokens=15 + 10 + most - 1), body=body)
    ask(short)
    with pytest.raises(BudgetSpent, match=f"15 are spent .* may need {10 + most}. Raise"):
        ask(short)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": None}, "max_tokens: null and no max_completion_tokens.*any length"),
        ({"n": 0}, "--endpoint_body: n: 0, expected a whole number"),
        ({"max_tokens": "400"}, "--endpoint_body: max_tokens: '400', expected a whole number"),
    ],
)
def test_a_body_without_a_limit_is_refused_with_a_budget_alone(server, clock, body, message):
    with pytest.raises(ValueError, match=message):
        client(server, clock, Budget(max_tokens=100), body=body)
    assert ask(client(server, clock, body=body)).text == "fine" and len(server.requests) == 1


def test_a_budget_needs_prices_and_replies_that_tell_their_usage(server, clock):
    with pytest.raises(ValueError, match="--max_cost=1: needs --prompt_price"):
        Budget(max_cost=1)
    with pytest.raises(ValueError, match="expected 0 or more"):
        Budget(max_tokens=-1)
    silent = json.dumps({"choices": [{"message": {"content": "x"}}]})
    server.script = [(200, {}, silent), (200, {}, silent)]
    assert ask(client(server, clock)).usage is None
    with pytest.raises(EndpointError, match="usage.prompt_tokens"):
        ask(client(server, clock, Budget(max_tokens=1000)))


def test_a_wait_ends_when_told_to_stop():
    def stop():
        raise Preempted

    with pytest.raises(Preempted):
        Clock(stop).sleep(3600)


# --- as a speaker ---


def requests(count):
    return [Request(f"r{i}", "video0", f"text {i}", (0, 5), i % 2 == 0) for i in range(count)]


def speaker(server, clock, poll=lambda: None, **options):
    return EndpointSpeaker(client(server, clock, **options), MemoryDataset(1), 7, 20, 3, poll)


def test_replies_come_in_order_with_pictures_where_they_are_needed(server, clock):
    said = list(speaker(server, clock).say(requests(7), {"r2"}))
    assert [name for name, _ in said] == ["r0", "r1", "r3", "r4", "r5", "r6"]
    assert {r.text for _, r in said} == {"fine"} and said[0][1].usage["prompt_tokens"] == 10
    pictures = {b["messages"][0]["content"][-1]["text"]: len(b["messages"][0]["content"]) - 1
                for _, _, b in server.requests}
    assert pictures == {f"text {i}": 2 * (i % 2 == 0) for i in (0, 1, 3, 4, 5, 6)}
    seeds = {b["messages"][0]["content"][-1]["text"]: b["seed"] for _, _, b in server.requests}
    assert len(set(seeds.values())) == 6


@pytest.mark.parametrize("body, sent", [
    ({}, 0.5), ({"temperature": 1.0}, 1.0), ({"temperature": None}, None)])
def test_the_temperature_of_records_is_the_one_that_is_sent(server, clock, body, sent):
    asked = speaker(server, clock, temperature=0.5, body=body)
    list(asked.say(requests(2), ()))
    assert [b.get("temperature") for _, _, b in server.requests] == [sent, sent]
    assert asked.temperature == sent


def test_refused_and_cut_replies_are_failures_of_their_request(server, clock):
    server.script = [(200, {}, reply()), (200, {}, reply("a long st", reason="length"))]
    one = EndpointSpeaker(client(server, clock), MemoryDataset(1), 7, 20, 1)
    said = list(one.say(requests(2), ()))
    assert [r.failed for _, r in said] == [None, "reply was cut off"]
    server.script = [(422, {}, "no pictures of this")]
    assert "no pictures of this" in list(one.say(requests(1), ()))[0][1].failed


def test_what_was_asked_is_yielded_before_the_work_ends(server, clock):
    polls = []

    def poll():
        polls.append(0)
        if len(polls) == 5:
            raise Preempted

    said = []
    with pytest.raises(Preempted):
        for name, _ in speaker(server, clock, poll).say(requests(9), ()):
            said.append(name)
    assert said == ["r0", "r1", "r2", "r3"] and len(server.requests) == 4


def test_nothing_is_sent_after_the_budget_is_spent(server, clock):
    budget = Budget(max_tokens=100)
    asked = EndpointSpeaker(client(server, clock, budget), MemoryDataset(1), 7, 20, 3)
    said = []
    with pytest.raises(BudgetSpent):
        for name, _ in asked.say(requests(50), ()):
            said.append(name)
    assert len(said) == len(server.requests)  # nothing that was paid for is lost
    assert budget.prompt + budget.completion == 15 * len(said) <= 100
    assert 3 <= len(said) <= 6


def test_prompts_are_not_taken_for_nothing_before_the_first_reply(server, clock):
    """65 tokens each; the next may need 60 + 20. Three workers at once would spend 195."""
    server.script = [(200, {}, reply(prompt=60)) for _ in range(9)]
    budget = Budget(max_tokens=140)
    asked = EndpointSpeaker(client(server, clock, budget), MemoryDataset(1), 7, 20, 3)
    with pytest.raises(BudgetSpent, match="--max_tokens=140: 65 are spent.*may need 80"):
        list(asked.say(requests(9), ()))
    assert len(server.requests) == 1 and (budget.prompt, budget.completion) == (60, 5)


def test_workers_are_refused_by_name(server, clock):
    with pytest.raises(ValueError, match="--workers=0"):
        EndpointSpeaker(client(server, clock), MemoryDataset(1), 7, 20, 0)


def test_seconds_between_looks_are_few():
    assert endpoints.SLICE <= 1  # a launcher's grace is some seconds
