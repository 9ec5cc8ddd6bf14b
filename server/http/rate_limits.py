"""Limits of an API key per minute and on concurrency, and what is left of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydantic import BaseModel, ConfigDict, Field

from server.http.errors import ApiError
from server.metrics import Metrics

Clock = Callable[[], float]

RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{figure}-{kind}"
    for kind in ("requests", "tokens")
    for figure in ("limit", "remaining", "reset")
)


class Limits(BaseModel):
    """Limits of one key; None is no limit."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    concurrent_requests: int | None = Field(default=None, ge=1)


class Bucket:
    """A token bucket: an allowance per minute that refills steadily, up to one minute's worth.

    It may be overdrawn, because what a request takes is known only afterwards; then nothing is left
    until the debt is paid.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._seen = clock()

    @property
    def left(self) -> int:
        """Whole units left; negative if overdrawn."""
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._seen) * self.per_minute / 60)
        self._seen = now
        return math.floor(self._level)

    def take(self, units: int) -> None:
        """Take `units`, overdrawing if necessary."""
        self._level -= units

    def seconds_until(self, units: int) -> float:
        """Time until that many units are available, if none are taken."""
        return max(0.0, units - self._level) * 60 / self.per_minute if self.left < units else 0.0


class Account:
    """One key's usage of the server.

    salt  keeps its cached prompts apart from those of other keys; empty where there are none
    """

    salt = ""

    def __init__(self, name: str, limits: Limits, metrics: Metrics, clock: Clock = time.monotonic) -> None:
        self.name = name
        self._metrics = metrics
        self._clock = clock
        self._running = 0
        metrics.expect_key(name, Limits.model_fields)
        self.change(limits)

    def change(self, limits: Limits) -> None:
        """Apply `limits` from now on; usage in the last minute is reset."""
        self.limits = limits
        self._requests = self._bucket(limits.requests_per_minute)
        self._tokens = self._bucket(limits.tokens_per_minute)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it runs. Raises ApiError 429 if a limit is reached."""
        self._check()
        if self._requests is not None:
            self._requests.take(1)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def spend(self, prompt: int, generated: int) -> None:
        """Count tokens."""
        if self._tokens is not None:
            self._tokens.take(prompt + generated)
        self._metrics.key_tokens.labels(self.name, "prompt").inc(prompt)
        self._metrics.key_tokens.labels(self.name, "generated").inc(generated)

    def headers(self) -> Iterator[tuple[str, str]]:
        """The remaining limits as OpenAI's headers."""
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                yield f"x-ratelimit-limit-{kind}", str(bucket.per_minute)
                yield f"x-ratelimit-remaining-{kind}", str(max(0, bucket.left))
                yield f"x-ratelimit-reset-{kind}", f"{bucket.seconds_until(bucket.per_minute):.3g}s"

    def _check(self) -> None:
        most = self.limits.concurrent_requests
        if most is not None and self._running >= most:
            raise self._refusal("concurrent_requests", f"{most} concurrent requests", 1.0)
        for name, bucket, unit in (
            ("requests_per_minute", self._requests, "requests"),
            ("tokens_per_minute", self._tokens, "tokens"),
        ):
            if bucket is not None and bucket.left < 1:
                wait_s = bucket.seconds_until(1)
                raise self._refusal(name, f"{bucket.per_minute} {unit} per minute", wait_s)

    def _refusal(self, limit: str, allowed: str, wait_s: float) -> ApiError:
        self._metrics.key_refusals.labels(self.name, limit).inc()
        after = max(1, math.ceil(wait_s))
        return ApiError(
            429,
            f"the key {self.name!r} is limited to {allowed}; try again in {after} s",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(after), **dict(self.headers())},
        )

    def _bucket(self, per_minute: int | None) -> Bucket | None:
        return None if per_minute is None else Bucket(per_minute, self._clock)
