"""A small model that drafts for a large one: it is believed as far as the large one says the same."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from engine.drafts.base import NOTHING, DraftRequest, Rows
from engine.drafts.beside import SLOTS, open_beside
from engine.drafts.small_model import CATCH_UP, LONGEST, SmallModel
from engine.families.base import Batch
from engine.families.loader import Loaded, open_model
from quant.errors import ConfigError
from tests.conftest import golden_path
from tests.engine.drafts.conversations import check

CAPACITY = 700


def beside(small: Loaded, large: Loaded, slots: int = 3) -> SmallModel:
    return SmallModel(small.model, slots, CAPACITY, large.model.info.vocab_size)


def greedy(loaded: Loaded, ids: list[int], count: int) -> list[int]:
    cache, found = loaded.model.new_cache(1, CAPACITY), list(ids)
    logits = loaded.model.forward(Batch.of([(0, 0, found)]), cache)
    for _ in range(count):
        found.append(int(logits[-1].argmax()))
        logits = loaded.model.forward(Batch.of([(0, len(found) - 1, found[-1:])]), cache)
    return found[len(ids) :]


def test_a_model_drafts_its_own_greedy_answer_whatever_was_accepted(
    model_of: Callable[[str], Loaded],
) -> None:
    small = model_of("v41-c")
    drafter, rng = beside(small, small), random.Random(1)
    ids = [rng.randrange(5, 1000) for _ in range(40)]
    drafter.open(1, ids)
    drafter.observe([Rows(1, 0, ids[:30])])
    for accepted in (0, 3, LONGEST, 1, 5, LONGEST):
        (draft,) = drafter.draft([DraftRequest(1, ids, LONGEST)])
        assert list(draft.token_ids) == greedy(small, ids, LONGEST)[: len(draft.token_ids)]
        assert draft.chances is not None
        assert all(0 < chance <= 1 for chance in draft.chances)
        ids = [*ids, *draft.token_ids[:accepted], rng.randrange(5, 1000)]
    drafter.close(1)


def test_what_it_was_not_told_of_is_read_piece_by_piece(model_of: Callable[[str], Loaded]) -> None:
    small = model_of("v41-c")
    drafter, rng = beside(small, small), random.Random(2)
    ids = [rng.randrange(5, 1000) for _ in range(2 * CATCH_UP + 7)]
    drafter.open(1, ids)
    found = [drafter.draft([DraftRequest(1, ids, 2)])[0] for _ in range(3)]
    assert found[:2] == [NOTHING, NOTHING]
    assert list(found[2].token_ids) == greedy(small, ids, 2)[: len(found[2].token_ids)]
    drafter.close(1)


def test_who_finds_no_slot_or_is_too_long_gets_nothing(model_of: Callable[[str], Loaded]) -> None:
    small = model_of("v41-c")
    drafter = beside(small, small, slots=1)
    drafter.open(1, [7, 8])
    drafter.open(2, [7, 8])
    first, second = drafter.draft([DraftRequest(1, [7, 8], 2), DraftRequest(2, [7, 8], 2)])
    assert first != NOTHING == second
    drafter.close(1)
    drafter.close(2)
    drafter.open(3, [7] * CAPACITY)
    assert drafter.draft([DraftRequest(3, [7] * CAPACITY, 2)]) == [NOTHING]
    drafter.close(3)


@pytest.mark.parametrize(
    ("large", "small"),
    [
        ("v41-a", "v41-c"),
        pytest.param("v41-c", "v41-c", marks=pytest.mark.slow),
        pytest.param("families/deepseek_v3", "families/gpt_oss", marks=pytest.mark.slow),
    ],
)
def test_answers_are_the_same_with_a_small_model(
    model_of: Callable[[str], Loaded], large: str, small: str
) -> None:
    """Random conversations, aborts and restored prefixes among them."""
    drafted = accepted = 0
    for seed in range(3):
        drafter = beside(model_of(small), model_of(large))
        of_this = check(model_of(large), seed, 10, greedy=large == small, small=drafter)
        drafted, accepted = drafted + of_this[0], accepted + of_this[1]
    assert drafted > 0
    assert accepted > (0.9 * drafted if large == small else -1)


def test_a_small_model_is_counted_and_loaded_within_what_was_counted() -> None:
    path = golden_path("v41-c")
    files = open_beside(path, open_model(golden_path("v41-a")), 300)
    assert files.capacity == 300
    found = files.load(1024)
    try:
        drafter = found.drafter()
        weights = sum(found.model.tier_bytes.values())
        full = drafter._cache.pages.nbytes(300) * SLOTS
        assert weights + full + drafter.nbytes <= found.room == files.nbytes
    finally:
        found.model.close()


def test_other_tokens_and_states_that_cannot_go_back_are_refused() -> None:
    large = open_model(golden_path("v41-a"))
    with pytest.raises(ConfigError, match=r"has other tokens than .*; use a small model of the same"):
        open_beside(golden_path("families/qwen3_moe"), large, None)
    net = open_model(golden_path("families/qwen3_next"))
    with pytest.raises(ConfigError, match="cannot be taken back"):
        open_beside(net.checkpoint.path, net, None).load(384)
