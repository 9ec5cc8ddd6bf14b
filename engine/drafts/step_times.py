"""How long a step takes, by how many tokens it computes: what a draft costs."""

from __future__ import annotations

from collections.abc import Callable

# Of a step whose time is not known yet: what each further token adds, as a share of a step of one.
FIRST_GUESS = 0.3
# Weights of the newest step: in the level of all times, which grows with contexts, and in what is measured
# for steps of as many tokens.
OF_LEVEL = 0.05
OF_SHAPE = 0.15
# A step is no news beyond these factors of what was expected: something else kept the machine busy.
LEAST, MOST = 0.5, 2.0
# Steps of as many tokens until the first measurements have little weight.
SETTLED = 6


class StepTimes:
    """Running means of the times of steps without prompts.

    guess  what a step of so many tokens probably takes, in relation to one of one token, until it is known
    """

    def __init__(self, most: int, guess: Callable[[int], float] | None = None) -> None:
        self._guess = guess or _first_guess
        self._level: float | None = None  # seconds of a step of one token
        self._shape: list[float | None] = [None] * (most + 1)
        self._counts = [0] * (most + 1)

    @property
    def is_known(self) -> bool:
        """Whether any step was measured."""
        return self._level is not None

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if tokens >= len(self._shape):
            return
        if self._level is None:
            self._level = seconds / self._guess(tokens)
            self._shape[tokens], self._counts[tokens] = self._guess(tokens), 1
            return
        shape = self._shape[tokens]
        if shape is None:
            self._shape[tokens] = seconds / self._level
            self._counts[tokens] = 1
            return
        news = min(max(seconds / (self._level * shape), LEAST), MOST) - 1
        settled = self._counts[tokens] >= SETTLED
        self._counts[tokens] += 1
        if tokens == min(n for n, known in enumerate(self._shape) if known is not None) or settled:
            self._level *= 1 + OF_LEVEL * news
        weight = OF_SHAPE if settled else 1 / (1 + self._counts[tokens])
        self._shape[tokens] = shape * (1 + weight * news)

    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens takes, measured or guessed from the next ones that were."""
        assert self._level is not None
        return self._level * self._relative(tokens)

    def _relative(self, tokens: int) -> float:
        shape = self._shape[tokens] if tokens < len(self._shape) else None
        if shape is not None:
            return shape
        known = [n for n, value in enumerate(self._shape) if value is not None]
        below = max((n for n in known if n < tokens), default=None)
        above = min((n for n in known if n > tokens), default=None)
        if below is None:
            assert above is not None
            return self._value(above) * self._guess(tokens) / self._guess(above)
        if above is None:
            return self._value(below) * self._guess(tokens) / self._guess(below)
        share = (tokens - below) / (above - below)
        return (1 - share) * self._value(below) + share * self._value(above)

    def _value(self, tokens: int) -> float:
        value = self._shape[tokens]
        assert value is not None
        return value


def _first_guess(tokens: int) -> float:
    return 1 + FIRST_GUESS * (tokens - 1)
