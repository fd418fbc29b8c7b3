"""An OpenAI-compatible endpoint: one call at a time, patiently; what cannot be mended by waiting is said at once."""

import asyncio
import json
import os
import random
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from rlhf_lab.judges.pacing import Pace
from rlhf_lab.judges.reply_ledger import Reply
from rlhf_lab.records import Message
from rlhf_lab.types import Count, Fraction, NonNegative, NonNegativeCount, Positive

if TYPE_CHECKING:
    from openai import AsyncOpenAI

NO_FUNDS = {"insufficient_quota", "quota_exceeded", "credit_balance_exhausted", "billing_hard_limit_reached"}
# what an endpoint will not answer for what it reads, while others are answered
UNANSWERABLE = {
    "content_filter",
    "content_policy_violation",
    "context_length_exceeded",
    "exceed_context_size_error",  # llama.cpp
    "invalid_prompt",
    "string_above_max_length",
}
# vLLM and others say so in words alone, with the status for a code
TOO_LONG = re.compile(r"(maximum|exceeds?).{0,40}context (length|size|window)", re.IGNORECASE)
GATEWAYS = {502, 504}  # behind them the reply may have been made
PATIENT = {408, 409, 425, 429}  # and whatever is 500 or more: waiting may help


class EndpointError(ValueError):
    """The endpoint cannot be asked as things stand; the message says what to change."""


class Fault(Exception):
    """One call failed in a way that may pass.

    Fields:
        was_paid: the endpoint may have answered, and counted it.
        wait: seconds that the endpoint asks for; None if it does not say.
    """

    def __init__(self, why: str, *, was_paid: bool, wait: float | None = None) -> None:
        super().__init__(why)
        self.why, self.was_paid, self.wait = why, was_paid, wait


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Who answers, and how; all of it is part of a reply's key.

    Fields:
        temperature, top_p, seed: None leaves the field out, for models that refuse it. A reply that cannot be read is
            asked for again with the next seed.
        max_tokens: of a reply.
        limit_field: how the endpoint calls that; newer models of OpenAI know the longer name only.
        structured: whether it takes a JSON schema for its answer, `response_format`.
    """

    model: str
    temperature: NonNegative | None
    top_p: Fraction | None
    seed: NonNegativeCount | None
    max_tokens: Count
    limit_field: Literal["max_tokens", "max_completion_tokens"]
    structured: bool

    def body(self, messages: Sequence[Message], schema: Mapping[str, Any] | None, attempt: int) -> dict[str, Any]:
        """What is sent."""
        seed = None if self.seed is None else self.seed + attempt
        fields = {"temperature": self.temperature, "top_p": self.top_p, "seed": seed, "response_format": schema}
        return {
            "model": self.model,
            "messages": list(messages),
            self.limit_field: self.max_tokens,
            **{name: value for name, value in fields.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Dollars per million tokens, as the person declares them."""

    prompt: NonNegative
    reply: NonNegative

    def __call__(self, prompt_tokens: float, reply_tokens: float) -> float:
        """Dollars."""
        return (self.prompt * prompt_tokens + self.reply * reply_tokens) / 1e6


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the model answers, and with how much patience it is asked.

    Fields:
        base_url: ends with /v1, as a rule.
        api_key_env: the NAME of the environment variable that holds the key; None where none is needed.
        concurrency: calls at one time.
        timeout: seconds for one call.
        tries: of one call, before the run gives up; it can be continued.
        first_wait, longest_wait: seconds; the wait doubles from the first, and half of it is drawn at random. An
            endpoint that says how long to wait is obeyed, up to the longest.
        requests_per_minute, tokens_per_minute: caps; None for none.
    """

    base_url: str
    api_key_env: str | None
    concurrency: Count
    timeout: Positive
    tries: Count
    first_wait: Positive
    longest_wait: Positive
    requests_per_minute: Positive | None
    tokens_per_minute: Positive | None

    def check(self) -> None:
        """Refuse an address that holds a secret or is none, and a key that is not there.

        Raises:
            EndpointError: saying what to do.
        """
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(
                f"judge.endpoint.base_url={self.base_url!r} is no address; expected one like https://host/v1"
            )
        if parts.username or parts.password or parts.query:
            raise EndpointError(
                f"judge.endpoint.base_url for {parts.hostname} holds a user name, a password or a query, which would "
                "be written into files; put the key into an environment variable and name that in api_key_env"
            )
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise EndpointError(
                f"the environment variable {self.api_key_env}, which judge.endpoint.api_key_env names, is not set; set "
                "it to the endpoint's key, or api_key_env=null for an endpoint without keys"
            )

    @asynccontextmanager
    async def session(self) -> AsyncIterator["Session"]:
        """Connections for as long as calls are made."""
        try:
            from openai import AsyncOpenAI
        except ImportError as error:
            raise EndpointError(
                "judge=openai needs the client of OpenAI: pip install -c constraints.txt 'rlhf_lab[judge]'"
            ) from error
        self.check()
        key = os.environ[self.api_key_env] if self.api_key_env is not None else "none"
        async with AsyncOpenAI(api_key=key, base_url=self.base_url, timeout=self.timeout, max_retries=0) as client:
            yield Session(self, client, Pace(self.requests_per_minute, self.tokens_per_minute))


@dataclass(frozen=True)
class Session:
    """An endpoint with open connections."""

    endpoint: Endpoint
    client: "AsyncOpenAI"
    pace: Pace

    async def ask(
        self,
        body: Mapping[str, Any],
        key: str,
        tokens: float,
        prices: Prices,
        at_most: float,
        begun: Callable[[], None],
        failed: Callable[[Fault], None],
    ) -> Reply:
        """One reply, after as many tries as it takes and are allowed.

        Args:
            key: the same for the same call: an endpoint that honours idempotency keys does not charge for it twice.
            tokens: of prompt and reply, estimated, for the cap on tokens a minute.
            at_most: dollars; what a reply is taken to cost whose endpoint does not count tokens.
            begun, failed: told before each try, and after each that failed.

        Raises:
            EndpointError: no try will do, or as many failed as are allowed.
        """
        why = ""
        for attempt in range(self.endpoint.tries):
            await self.pace.turn(tokens)
            begun()
            try:
                return await self._try(body, key, prices, at_most)
            except Fault as fault:
                failed(fault)
                why, rest = fault.why, fault.wait or 0.0
            if rest > self.endpoint.longest_wait:
                raise EndpointError(
                    f"{self.endpoint.base_url} asks to wait {rest:.0f} seconds, judge.endpoint.longest_wait is "
                    f"{self.endpoint.longest_wait:g}; give the same command again then, or raise that"
                )
            wait = min(self.endpoint.first_wait * 2**attempt, self.endpoint.longest_wait)
            wait = max(wait * random.uniform(0.5, 1), rest)
            self.pace.hold(rest)  # it says so to all, not to this call alone
            await asyncio.sleep(wait)
        raise EndpointError(
            f"{self.endpoint.base_url} failed {self.endpoint.tries} times in a row on one call, last: {why}; every "
            "reply so far is kept, so give the same command again when it answers"
        )

    async def _try(self, body: Mapping[str, Any], key: str, prices: Prices, at_most: float) -> Reply:
        import openai

        try:
            raw = await self.client.chat.completions.with_raw_response.create(
                **body, extra_headers={"Idempotency-Key": key}
            )
            return _reply(raw.http_response.content, prices, at_most)
        except openai.APITimeoutError as error:
            raise Fault("no reply in time", was_paid=True) from error
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APIConnectionError as error:
            cause = error.__cause__
            unsent = type(cause).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")
            raise Fault(f"{type(cause).__name__}: {cause}", was_paid=not unsent) from error

    def _refused(self, error: Any) -> Reply:
        """What a status other than 200 means: a refusal of this text alone, a fault that may pass, or an end."""
        status = int(error.status_code)
        said = error.body if isinstance(error.body, dict) else {}
        # what is no text is the status again, as vLLM and llama.cpp have it
        codes = [code for code in (said.get("code"), said.get("type")) if isinstance(code, str) and code]
        code = next((code for code in codes if code in NO_FUNDS | UNANSWERABLE), codes[0] if codes else "")
        where, message = self.endpoint.base_url, str(said.get("message") or error.message)[:300]
        if status in (400, 413, 422) and TOO_LONG.search(message):
            code = "context_length_exceeded"
        if status == 402 or code in NO_FUNDS:
            raise EndpointError(f"{where}: the account has no funds left ({message}); every reply so far is kept")
        if code in UNANSWERABLE:
            return Reply(text="", finish=code, prompt_tokens=0, reply_tokens=0, dollars=0.0, model="", was_refused=True)
        if status in PATIENT or status >= 500:
            raise Fault(
                f"HTTP {status} {code}".strip(), was_paid=status in GATEWAYS, wait=retry_after(error.response.headers)
            )
        hints = {
            400: "it may not know a field of judge.decoding; try structured=false, seed=null, another limit_field, …",
            401: f"the key in {self.endpoint.api_key_env} is not valid there",
            403: f"the key in {self.endpoint.api_key_env} may not use this model",
            404: "judge.decoding.model or judge.endpoint.base_url is wrong",
        }
        raise EndpointError(
            f"{where} refuses every call, HTTP {status} {code}: {message}; {hints.get(status, 'see there')}"
        )


def _reply(content: bytes, prices: Prices, at_most: float) -> Reply:
    """A reply, read from the body of a response.

    Raises:
        Fault: the body is cut, no JSON, or not what a chat completion looks like.
    """
    try:
        said = json.loads(content)
        choice = said["choices"][0]
        text, usage = choice["message"]["content"], said.get("usage") or {}
        text = "" if text is None and choice["message"].get("refusal") else text
        if not isinstance(text, str):
            raise TypeError(f"content is {text!r}")
        tokens = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        return Reply(
            text=text,
            finish=str(choice.get("finish_reason")),
            prompt_tokens=tokens[0],
            reply_tokens=tokens[1],
            dollars=prices(*tokens) if any(tokens) else at_most,
            model=str(said.get("model")),
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise Fault(f"a reply that cannot be read ({type(error).__name__}: {error})", was_paid=True) from error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a response asks to wait: milliseconds, seconds or a date (RFC 9110, section 10.2.3)."""
    if (milliseconds := headers.get("retry-after-ms")) is not None:
        try:
            return max(0.0, float(milliseconds) / 1000)
        except ValueError:
            return None
    said = headers.get("retry-after")
    if said is None:
        return None
    try:
        return max(0.0, float(said))
    except ValueError:
        pass
    try:
        then = parsedate_to_datetime(said)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())
