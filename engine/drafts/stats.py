"""What drafts have done so far, in numbers that only grow."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.drafts.base import MOST_ROWS


@dataclass
class DrafterStats:
    """Tokens of one drafter: drafted and computed, and accepted of these; `steps` had any of them.

    lengths  how often so many tokens were accepted, from none on
    """

    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * MOST_ROWS)

    def add(self, drafted: int, accepted: int) -> None:
        """A draft, of which so many tokens were accepted."""
        self.drafted += drafted
        self.accepted += accepted
        self.steps += 1
        self.lengths[accepted] += 1


@dataclass
class DraftStats:
    """What drafts have done so far.

    drafting_s   spent on drafts themselves
    gained_s, lost_s  of steps with drafts, against steps without for as many tokens: those that gained, and
                 those that lost
    """

    by_drafter: dict[str, DrafterStats] = field(default_factory=dict)
    drafting_s: float = 0.0
    gained_s: float = 0.0
    lost_s: float = 0.0
