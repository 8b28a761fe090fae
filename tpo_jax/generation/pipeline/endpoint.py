"""An OpenAI-compatible chat endpoint: one question with pictures in, one reply out.

    POST {url}/chat/completions   {"model", "messages", "max_tokens", "temperature", "seed"}

Tries again where that can help, keeps to a rate and stops before a budget is exceeded. The key is
read from an environment variable, sent in the header alone and cut out of every message.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import email.utils
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tpo_jax.data import tables
from tpo_jax.errors import UserError

AGAIN = {408, 409, 425, 429, *range(500, 1000)} - {501}  # statuses to try again; 501 is for good
REFUSED = (400, 413, 422)  # statuses that may be about this one request
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; doubled with every try
LONGEST_ASKED = 900.0  # seconds of Retry-After that are waited for
SLICE = 0.5  # seconds between two looks for a signal while waiting
_LIMITS = ("max_tokens", "max_completion_tokens")  # of a choice, in the body of a request
_USAGE = ("prompt_tokens", "completion_tokens")  # of a reply
_LOCAL = ("localhost", "127.0.0.1", "::1")


class EndpointError(UserError, RuntimeError):
    """The endpoint cannot be used, or not now; the message names address, status and fix."""


class RequestRefused(RuntimeError):
    """The endpoint does not answer this one request, whatever is tried.

    usage: of malformed replies that it got before, or None.
    """

    def __init__(self, problem: str, usage: dict[str, int] | None = None):
        super().__init__(problem)
        self.usage = usage


class BudgetSpent(RuntimeError):
    """The next request might exceed the budget; what is answered is kept."""


class _Malformed(Exception):
    """A reply that is no completion; usage is what it tells to have used, or None."""

    def __init__(self, why: object, usage: dict[str, int] | None = None):
        super().__init__(why)
        self.usage = usage


class Stopped(Exception):
    """Raised in place of waiting, once a clock was told to stop."""


class Clock:
    """Time as the client sees it. `poll` is called while waiting; what it raises ends the wait."""

    def __init__(self, poll: Callable[[], None] = lambda: None):
        self._poll, self._stopped = poll, threading.Event()

    def stop(self) -> None:
        """From now on `poll` raises Stopped, in any thread."""
        self._stopped.set()

    def poll(self) -> None:
        if self._stopped.is_set():
            raise Stopped
        self._poll()

    def now(self) -> float:
        """Seconds that only grow."""
        return time.monotonic()

    def date(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        end = self.now() + seconds
        while (left := end - self.now()) > 0:
            self.poll()
            time.sleep(min(left, SLICE))


@dataclasses.dataclass(frozen=True)
class EndpointSettings:
    """Where requests go and how.

    Attributes:
      url: up to and without /chat/completions.
      model: name that the endpoint knows.
      key_variable: environment variable with the key; "" for an endpoint that needs none.
      temperature: of its replies, where `body` has none.
      body: entries of every request's body over the standard ones; None removes one.
      requests_per_minute: at most; 0 is any number.
      tries: of one request.
      timeout: seconds that one try may take.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    requests_per_minute: float = 0.0
    tries: int = 6
    timeout: float = 120.0

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"--endpoint={_without_login(self.url)}: expected http(s)://HOST/... "
                            "up to and without /chat/completions, such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise UserError(f"--endpoint={_without_login(self.url)}: holds a login or a query; "
                            "give the key in an environment variable (--key_variable)")
        if not self.model:
            raise UserError("--endpoint_model: missing; give the name of a model that "
                            f"{self.url} serves")
        if self.key_variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise UserError("--key_variable: expected the NAME of an environment variable, such "
                            "as OPENAI_API_KEY, not a key; what was given is not shown")
        for name, good, expected in (
            ("tries", self.tries >= 1, "at least 1"),
            ("timeout", self.timeout > 0, "more than 0 seconds"),
            ("requests_per_minute", self.requests_per_minute >= 0, "0 (any number) or more"),
        ):
            if not good:
                raise UserError(f"--{name}={getattr(self, name)}: expected {expected}")

    def key(self) -> str:
        """The key, or "" where none is needed."""
        if not self.key_variable:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise EndpointError(
                f"{self.key_variable}: this environment variable is not set; put the key of "
                f"{self.url} there, or pass --key_variable= for an endpoint that needs none")
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme == "http" and parts.hostname not in _LOCAL:
            raise EndpointError(
                f"--endpoint={self.url}: the key in {self.key_variable} would be sent unencrypted; "
                "use https, or pass --key_variable= for an endpoint that needs none")
        return key


def _without_login(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", url).partition("?")[0]


class Budget:
    """What may be spent on requests, over all starts of a command. Safe to share by threads.

    Every try of a request is let through if it fits with all that are under way, each taken for as
    long as its reply may be (`most_tokens`) and as the longest prompt so far, which is 0 before the
    first one.

    Args:
      max_tokens: of prompts and replies together; 0 is no limit.
      max_cost: in the currency of the prices; 0 is no limit.
      prompt_price, completion_price: of a million tokens.
    """

    def __init__(self, max_tokens: int = 0, max_cost: float = 0.0, prompt_price: float = 0.0,
                 completion_price: float = 0.0):
        if max_tokens < 0 or max_cost < 0 or prompt_price < 0 or completion_price < 0:
            raise UserError("--max_tokens, --max_cost, --prompt_price and --completion_price: "
                            f"{max_tokens}, {max_cost}, {prompt_price}, {completion_price}: "
                            "expected 0 or more")
        if max_cost and not prompt_price and not completion_price:
            raise UserError(f"--max_cost={max_cost}: needs --prompt_price and --completion_price, "
                            "the price of a million tokens")
        self.max_tokens, self.max_cost = max_tokens, max_cost
        self._prices = prompt_price / 1e6, completion_price / 1e6
        self.prompt, self.completion = 0, 0  # tokens spent
        self._longest, self._open, self._open_completion = 0, 0, 0
        self._lock = threading.Lock()

    @property
    def limits(self) -> bool:
        return bool(self.max_tokens or self.max_cost)

    @property
    def cost(self) -> float:
        return self._cost(self.prompt, self.completion)

    def _cost(self, prompt: int, completion: int) -> float:
        return prompt * self._prices[0] + completion * self._prices[1]

    def spend(self, usage: Mapping[str, int]) -> None:
        """Counts the usage of a reply, also one of an earlier start, or of a `total_usage`."""
        with self._lock:
            self.prompt += usage["prompt_tokens"]
            self.completion += usage["completion_tokens"]
            prompt = usage["prompt_tokens"] // usage.get("replies", 1)
            self._longest = max(self._longest, prompt)

    def spend_most(self, completion: int) -> None:
        """Counts a reply without usage for as long as it may be, where there is a limit."""
        if self.limits:
            self.spend({"prompt_tokens": self._longest, "completion_tokens": completion})

    @contextlib.contextmanager
    def reserved(self, completion: int) -> Iterator[None]:
        """A try whose reply has at most `completion` tokens is under way in the block; what it took
        is to be spent there.

        Raises:
          BudgetSpent: it might exceed the budget.
        """
        self._open_one(completion)
        try:
            yield
        finally:
            with self._lock:
                self._open, self._open_completion = (
                    self._open - 1, self._open_completion - completion)

    def _open_one(self, completion: int) -> None:
        with self._lock:
            prompt = self.prompt + (self._open + 1) * self._longest
            reply = self.completion + self._open_completion + completion
            for option, limit, value, spent in (
                ("max_tokens", self.max_tokens, prompt + reply, self.prompt + self.completion),
                ("max_cost", self.max_cost, self._cost(prompt, reply), self.cost),
            ):
                if limit and value > limit:
                    raise BudgetSpent(
                        f"--{option}={limit}: {round(spent, 6)} are spent and the next request may "
                        f"need {round(value - spent, 6)}. Raise it and start the same command "
                        "again to go on.")
            self._open, self._open_completion = self._open + 1, self._open_completion + completion


def most_tokens(body: Mapping[str, Any]) -> int:
    """The longest reply that the body of a request allows, in tokens over all its `n` choices.

    Of two limits the larger counts: which of them holds is up to the server.

    Raises:
      ValueError: there is none, or an entry is no number.
    """
    given = {name: body[name] for name in (*_LIMITS, "n") if body.get(name) is not None}
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise UserError(f"--endpoint_body: {name}: {value!r}, expected a whole number from 1 "
                            "on: --max_tokens and --max_cost count with it")
    if not any(name in given for name in _LIMITS):
        raise UserError("--endpoint_body: max_tokens: null and no max_completion_tokens, so that a "
                        "reply may have any length and --max_tokens and --max_cost cannot be kept; "
                        "give one of both a number, or leave out the limits")
    return max(given[name] for name in _LIMITS if name in given) * given.get("n", 1)


@dataclasses.dataclass(frozen=True)
class Completion:
    """A reply. `usage` is {"prompt_tokens", "completion_tokens"}, None if it was not told; that of
    the malformed ones before it is in it (`total_usage`)."""

    text: str
    finished: bool
    usage: dict[str, int] | None


def total_usage(replies: Sequence[dict[str, int]]) -> dict[str, int] | None:
    """What all replies to one prompt used, with their number as "replies" where it is not one."""
    if len(replies) < 2:
        return replies[0] if replies else None
    total = {name: sum(usage[name] for usage in replies) for name in _USAGE}
    return total | {"replies": len(replies)}


class Endpoint:
    """A client that threads may share.

    Args:
      settings: where requests go.
      budget: of all requests.
      clock: for waits.
      jitter: random number in [0, 1) that spreads waits.

    Raises:
      ValueError: the budget has limits, which the settings' body makes impossible to keep.
    """

    def __init__(self, settings: EndpointSettings, budget: Budget, clock: Clock | None = None,
                 jitter: Callable[[], float] = random.random):
        self.settings, self.budget = settings, budget
        if budget.limits:
            most_tokens({"max_tokens": 1} | settings.body)  # refused before anything is done
        self._key = settings.key()
        self.clock, self._jitter = clock or Clock(), jitter
        self._lock = threading.Lock()
        self._next = 0.0  # when the rate allows another request
        self._answered = False
        # A redirect would carry the key to another address.
        is_local = urllib.parse.urlsplit(settings.url).hostname in _LOCAL
        proxies = urllib.request.ProxyHandler({} if is_local else None)
        self._opener = urllib.request.build_opener(_NoRedirect, proxies)

    def ask(self, text: str, pictures: Sequence[np.ndarray], max_tokens: int,
            seed: int) -> Completion:
        """One request, tried until it is answered.

        Args:
          text: of the user.
          pictures: uint8[h, w, 3] each, sent as JPEG before the text.
          max_tokens: of the reply, where the settings' body says nothing else.
          seed: of the reply, uint31, for endpoints that read it.

        Raises:
          RequestRefused: of this request, while others were answered.
          BudgetSpent: before a try that might exceed the budget is sent.
          EndpointError: of the endpoint.
        """
        body = {"model": self.settings.model, "max_tokens": max_tokens, "seed": seed,
                "temperature": self.settings.temperature,
                "messages": [{"role": "user", "content": content(text, pictures)}]}
        body |= self.settings.body
        data = json.dumps({k: v for k, v in body.items() if v is not None}).encode()
        completion = self._try(data, most_tokens(body) if self.budget.limits else 0)
        self._answered = True
        return completion

    def _try(self, data: bytes, most: int) -> Completion:
        """Sends a body until it is answered; most: tokens of the reply, 0 without a budget."""
        problem, wait = "", 0.0
        used: list[dict[str, int]] = []  # by malformed replies
        for number in range(self.settings.tries):
            if number:
                backoff = min(FIRST_WAIT * 2 ** (number - 1), LONGEST_WAIT)
                self.clock.sleep(max(wait, backoff * (0.5 + 0.5 * self._jitter())))
            self._keep_rate()
            wait = 0.0
            try:
                with self.budget.reserved(most):
                    said = self._read(self._post(data), most)
            except urllib.error.HTTPError as error:
                problem = self._status_problem(error)
                if error.code not in AGAIN:
                    if error.code in REFUSED and self._answered:
                        raise RequestRefused(problem, total_usage(used)) from None
                    raise EndpointError(f"{self._where}: {problem}. {_FIXES.get(error.code, '')}"
                                        ) from None
                wait = self._asked_wait(error.headers.get("Retry-After"), problem)
            except (OSError, urllib.error.URLError) as error:  # refused, cut, timed out, no name
                problem = self._clean(f"no reply ({error})")
            except BudgetSpent as error:
                raise BudgetSpent(f"{error} The last try: {problem}." if problem else str(error)
                                  ) from None
            except _Malformed as error:
                problem = str(error)
                used += [error.usage] if error.usage else []
            else:
                return dataclasses.replace(
                    said, usage=total_usage([*used, *([said.usage] if said.usage else [])]))
        raise EndpointError(
            f"{self._where}: {problem}, after {self.settings.tries} tries. Start the same command "
            "again later, lower --requests_per_minute or --workers, or raise --tries.")

    @property
    def _where(self) -> str:
        return f"{self.settings.url}/chat/completions"

    def _post(self, data: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, data, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as reply:
                return reply.read()
        except urllib.error.HTTPError:
            raise
        except Exception as error:
            # http.client's own errors (a reply that is cut) are no OSError.
            raise OSError(f"{type(error).__name__}: {error}") from None

    def _keep_rate(self) -> None:
        if not self.settings.requests_per_minute:
            return
        with self._lock:
            now = self.clock.now()
            turn = max(now, self._next)
            self._next = turn + 60 / self.settings.requests_per_minute
        if turn > now:
            self.clock.sleep(turn - now)

    def _read(self, reply: bytes, most: int) -> Completion:
        """_Malformed where the reply is not a completion; it is spent all the same."""
        text = self._clean(reply.decode("utf-8", "replace"))[:200]
        try:
            value = json.loads(reply)
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            self.budget.spend_most(most)
            raise _Malformed(f"malformed reply ({error}): {text!r}") from None
        usage = value.get("usage")
        if isinstance(usage, dict) and all(isinstance(usage.get(name), int) for name in _USAGE):
            usage = {name: usage[name] for name in _USAGE}
            self.budget.spend(usage)
        elif self.budget.limits:
            raise EndpointError(f"{self._where}: the reply tells no usage.prompt_tokens and "
                                "usage.completion_tokens, so that --max_tokens and --max_cost "
                                "cannot be kept; leave them out for this endpoint")
        else:
            usage = None
        where = "choices[0].message.content"
        try:
            choice = value["choices"][0]
            said = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise _Malformed(f"malformed reply (no {where}): {text!r}", usage) from None
        if said is None:  # such as a refusal, or all tokens spent on thinking
            said = ""
        if not isinstance(said, str):
            raise _Malformed(f"malformed reply ({where} is no text): {text!r}", usage)
        return Completion(self._clean(said.strip()), choice.get("finish_reason") != "length", usage)

    def _status_problem(self, error: urllib.error.HTTPError) -> str:
        try:
            body = error.read(2**16).decode("utf-8", "replace").strip()
        except OSError:
            body = ""
        body = self._clean(body)[:300]  # in this order: half a key is no longer found
        return f"status {error.code}" + (f" ({body})" if body else "")

    def _asked_wait(self, value: str | None, problem: str) -> float:
        """Seconds of a Retry-After header: a number or a date."""
        if not value:
            return 0.0
        try:
            seconds = float(value)
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(value)
            except ValueError:
                return 0.0
            if date.tzinfo is None:
                date = date.replace(tzinfo=datetime.UTC)
            seconds = date.timestamp() - self.clock.date()
        if not seconds <= LONGEST_ASKED:
            raise EndpointError(f"{self._where}: {problem} asks to wait {seconds:.0f} s. Start the "
                                "same command again then.")
        return max(seconds, 0.0)

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


_FIXES = {
    301: "Give the address that it moved to as --endpoint.",
    302: "Give the address that it moved to as --endpoint.",
    307: "Give the address that it moved to as --endpoint.",
    308: "Give the address that it moved to as --endpoint.",
    400: "Check --endpoint_model; --endpoint_body changes entries of the request.",
    401: "Check the key in the environment variable that --key_variable names.",
    403: "Check that the key may use --endpoint_model.",
    404: "Check --endpoint (without /chat/completions) and --endpoint_model.",
    413: "Lower --caption_frames.",
    422: "Check --endpoint_model; --endpoint_body changes entries of the request.",
    501: "Check --endpoint: this server has no chat completions there.",
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None  # the status becomes an HTTPError


def content(text: str, pictures: Iterable[np.ndarray]) -> list[dict[str, Any]]:
    """The parts of a user message: pictures as data URLs, then the text."""
    parts = []
    for picture in pictures:
        data = base64.b64encode(tables.encode_jpeg(picture)).decode()
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    return [*parts, {"type": "text", "text": text}]
