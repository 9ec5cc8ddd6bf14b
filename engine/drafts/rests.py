"""Which drafters rest: those that could not pay even if all their drafts were right, as steps are timed now.

They are asked for nothing and told nothing meanwhile. Times change, and the first ones say little, so that a
rest ends, and its drafter is measured anew; if that changes nothing, the next rest is longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# A drafter rests only after so many drafts: the first ones take longer.
SURE = 2
# Steps of the first rest, and of the longest: each is twice as long as the one before.
FIRST_REST, LAST_REST = 4096, 65536


@dataclass
class Rest:
    """Of one drafter.

    left   steps for which it still rests
    after  drafts that had been made when it woke last
    """

    left: int = 0
    after: int = 0
    _next: int = FIRST_REST

    def look(self, steps: int, drafts: int, can_pay: Callable[[], bool]) -> bool:
        """Whether it is awake. So many steps have passed since the last look; `drafts` were measured in
        all."""
        if self.left > 0:
            self.left -= steps
            self.after = drafts
        elif drafts >= self.after + SURE and not can_pay():
            self.left, self._next = self._next, min(2 * self._next, LAST_REST)
        return self.left <= 0
