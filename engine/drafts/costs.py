"""What drafters cost beside the steps with their drafts: being told of tokens, and drafts made for nothing.

What a step of answers took is charged at once. What a prompt took is paid by its answer in instalments: all
at once, drafts would seem to have lost that much before there was one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from collections.abc import Sequence as Ids

from engine.drafts.base import Drafter
from engine.sequence import Sequence

# Of the time of an answer's token: what it pays of its prompt's costs at most. The rest is forgotten with it.
INSTALMENT = 0.3


class Costs:
    """In seconds, by drafter."""

    def __init__(self) -> None:
        self._of_step: dict[str, float] = defaultdict(float)  # that is under way
        self._told: dict[Sequence, float] = {}  # of its sequences, what share of its tokens was theirs
        self._owed: dict[Sequence, dict[str, float]] = {}  # of prompts

    def spent(self, drafters: Collection[Drafter], seconds: float) -> None:
        """A step has cost so much, by these drafters alike."""
        for drafter in drafters:
            self._of_step[drafter.name] += seconds / len(drafters)

    def told(self, tokens: dict[Sequence, int]) -> None:
        """It has told so many tokens of these sequences."""
        total = max(sum(tokens.values()), 1)
        self._told = {sequence: count / total for sequence, count in tokens.items()}

    def put_off(self) -> float:
        """What no `due` has asked for was of a step with prompts; how much that is."""
        if not self._of_step:
            return 0.0
        for sequence, share in self._told.items():
            owed = self._owed.setdefault(sequence, {})
            for name, seconds in self._of_step.items():
                owed[name] = owed.get(name, 0.0) + seconds * share
        seconds = sum(self._of_step.values())
        self._of_step.clear()
        return seconds

    def due(self, sequences: Ids[Sequence], token_s: float) -> tuple[dict[str, float], float]:
        """What is charged now, by a step of answers of these sequences in which a token takes so long; and
        how much of it the step itself has cost."""
        found, of_step = dict(self._of_step), sum(self._of_step.values())
        self._of_step.clear()
        for sequence in sequences if self._owed else ():
            owed = self._owed.pop(sequence, {})
            for name, seconds in owed.items():
                paid = min(seconds, INSTALMENT * token_s)
                found[name] = found.get(name, 0.0) + paid
                owed[name] = seconds - paid
            if any(owed.values()):
                self._owed[sequence] = owed
        return found, of_step

    def close(self, sequence: Sequence) -> None:
        """It has ended; so have its debts."""
        self._owed.pop(sequence, None)
        self._told.pop(sequence, None)

    def forgive(self, drafters: Collection[Drafter]) -> None:
        """These rest: nobody owes for them any more."""
        for owed in self._owed.values():
            for drafter in drafters:
                owed.pop(drafter.name, None)
