"""What steps without drafts take stays known: some are left without, and all of these are measured."""

from __future__ import annotations

from engine.drafts.checks import CHECKED, FIRST_CHECK, Checks


def test_every_step_of_a_check_is_measured() -> None:
    checks = Checks()
    for _ in range(FIRST_CHECK):
        assert not checks.is_due(1)
        checks.stepped(1, had_drafts=True)
    for _ in range(CHECKED):
        assert checks.is_due(1)
        assert not checks.is_fresh(1)
        checks.stepped(1, had_drafts=False)
    assert not checks.is_due(1)
    assert checks.is_fresh(1)
