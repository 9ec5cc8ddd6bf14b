"""Drafters that lose more than they bring rest, and are measured again now and then."""

from __future__ import annotations

from engine.drafts.rests import ENOUGH, FIRST_REST, LAST_REST, LOAN, MOST_CREDIT, Rest

STEPS = 32


def test_nobody_rests_for_what_the_first_drafts_took() -> None:
    rest = Rest()
    assert all(rest.look(STEPS, drafts, lambda: False) for drafts in range(ENOUGH))
    assert not rest.look(STEPS, ENOUGH, lambda: False)


def test_a_rest_ends_with_new_measurements_and_the_next_one_is_longer() -> None:
    rest, drafts, rests = Rest(), ENOUGH, []
    for _ in range(8):
        assert not rest.look(STEPS, drafts, lambda: False)
        looks = 1
        while not rest.look(STEPS, drafts, lambda: False):
            looks += 1
        rests.append(looks * STEPS)
        assert rest.look(STEPS, drafts + ENOUGH - 1, lambda: False)
        drafts += ENOUGH
    assert rests[:3] == [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST]
    assert rests[-1] == LAST_REST


def test_who_pays_does_not_rest() -> None:
    rest = Rest()
    assert all(rest.look(STEPS, drafts, lambda: True) for drafts in range(100))


def test_who_has_lost_its_loan_rests_and_what_was_gained_may_be_lost_again() -> None:
    rest = Rest()
    rest.gained(-LOAN + 0.5)
    assert rest.look(STEPS, ENOUGH, lambda: True)
    rest.gained(100.0)
    rest.gained(-MOST_CREDIT + 0.5)
    assert rest.look(STEPS, ENOUGH, lambda: True)
    rest.gained(-1.0)
    assert rest.is_due
    assert not rest.look(STEPS, ENOUGH, lambda: True)
    assert not rest.is_due
    assert not rest.look(FIRST_REST - STEPS, ENOUGH, lambda: True)
    assert rest.look(STEPS, ENOUGH, lambda: True)


def test_a_rest_because_many_answers_ran_makes_the_next_one_no_longer() -> None:
    rest, rests = Rest(), []
    for _ in range(3):
        assert not rest.look(STEPS, ENOUGH + rest.after, lambda: False, is_crowded=True)
        rests.append(rest.left)
        assert rest.look(rest.left, rest.after, lambda: True)
    assert rests == [FIRST_REST] * 3
