"""When steps are left without drafts, so that it stays known how long they take."""

from __future__ import annotations

from collections import defaultdict

# Steps without drafts are measured again after so many with drafts, at first, and at last; so many at a time,
# since the first one behind drafts finds caches full of other weights.
FIRST_CHECK, LAST_CHECK, CHECKED = 8, 128, 4


class Checks:
    """Of steps of an engine, by the tokens that they have without drafts."""

    def __init__(self) -> None:
        self._since: dict[int, int] = defaultdict(int)  # steps with drafts
        self._intervals: dict[int, int] = defaultdict(lambda: FIRST_CHECK)
        self._left = 0  # steps of the check under way
        self._is_on = False  # the step under way is one of these, and not measured yet

    def is_due(self, tokens: int) -> bool:
        """Whether the next step is to have none."""
        if not self._left:
            if self._since[tokens] < self._intervals[tokens]:
                return False
            self._intervals[tokens] = min(2 * self._intervals[tokens], LAST_CHECK)
            self._left = CHECKED
        self._left -= 1
        self._is_on = True
        return True

    def is_fresh(self, tokens: int) -> bool:
        """Whether the last step was one without, and this one need not be measured."""
        return not self._is_on and not self._since[tokens]

    def stepped(self, tokens: int, *, had_drafts: bool) -> None:
        """A step had some, or none."""
        self._is_on = False
        self._since[tokens] = self._since[tokens] + 1 if had_drafts else 0
