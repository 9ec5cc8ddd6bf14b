"""How long a step takes, by how many tokens it computes: what a draft costs."""

from __future__ import annotations

from collections.abc import Callable

# Of a step whose time is not known yet: what each further token adds, as a share of a step of one.
FIRST_GUESS, LEAST_GUESS = 0.3, 0.1
# Weight of the newest step in the level of all times, which grows with contexts.
OF_LEVEL = 0.05
# A step is no news beyond these factors of what was expected: something else kept the machine busy.
LEAST, MOST = 0.5, 2.0
# Steps by which a mean is settled; it then forgets as many.
SETTLED = 8
# So many first steps of a server read and allocate what later ones find: the fastest of them counts.
COLD = 4
# What is expected of steps of so many tokens, by what others take, counts as much as so many measurements.
PRIOR_STEPS = 2.0


class StepTimes:
    """Running means of the times of steps without prompts.

    measured  how many steps
    guess  what a step of so many tokens probably takes, in relation to one of one token: how the excess over
           one grows with tokens; how much it is in all, is measured
    """

    def __init__(self, most: int, guess: Callable[[int], float] | None = None) -> None:
        guessed = guess or _first_guess
        self._guess = [max(guessed(n), 1 + LEAST_GUESS * (n - 1)) for n in range(most + 1)]
        self._level: float | None = None  # seconds of a step of one token
        self._excess, self._excess_count = 1.0, 1  # in relation to the guess
        self._means = [0.0] * (most + 1)  # in relation to the level
        self._counts = [0] * (most + 1)
        self.measured = 0
        self._table: list[float] | None = None

    @property
    def is_known(self) -> bool:
        """Whether any step was measured."""
        return self._level is not None

    @property
    def knows_excess(self) -> bool:
        """Whether a step of several tokens was measured."""
        return any(self._counts[2:])

    def is_settled(self, tokens: int) -> bool:
        """Whether steps of so many tokens were measured often enough."""
        return tokens < len(self._counts) and self._counts[tokens] == SETTLED

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if tokens >= len(self._counts):
            return
        if self._level is None:
            self._level = seconds / self._guess[tokens]
            self._table = None
        expected = self.seconds(tokens)
        ratio = min(max(seconds / expected, LEAST), MOST)
        count = self._counts[tokens] = min(self._counts[tokens] + 1, SETTLED)
        is_first = not any(self._counts[:tokens])
        if is_first and count <= COLD and ratio < 1:
            ratio, self._level = seconds / expected, self._level * seconds / expected
        elif is_first or count == SETTLED:
            self._level *= 1 + max(OF_LEVEL, 1 / (1 + count) if is_first else 0.0) * (ratio - 1)
        relative = ratio * expected / self._level
        self._means[tokens] += (relative - self._means[tokens]) / count
        if tokens > 1:
            self._excess_count = min(self._excess_count + 1, 2 * SETTLED)
            excess = (relative - 1) / (self._guess[tokens] - 1)
            self._excess += (max(excess, 0.0) - self._excess) / self._excess_count
        self.measured += 1
        self._table = None

    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens takes; at most what the longest takes that is measured."""
        table = self._table or self.table()
        return table[tokens] if tokens < len(table) else table[-1]

    def table(self) -> list[float]:
        """The same by tokens, from none on."""
        if self._table is None:
            assert self._level is not None
            level, excess, known = self._level, self._excess, (self._counts, self._means, self._guess)
            self._table = [
                level * (count * mean + PRIOR_STEPS * (1 + excess * (guess - 1))) / (count + PRIOR_STEPS)
                for count, mean, guess in zip(*known, strict=True)
            ]
        return self._table


def _first_guess(tokens: int) -> float:
    return 1 + FIRST_GUESS * (tokens - 1)
