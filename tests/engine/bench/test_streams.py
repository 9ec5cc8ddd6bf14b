"""Figures of streams that were measured."""

from __future__ import annotations

import pytest

from engine.bench.streams import Timeline, decode_rate
from quant.errors import LociError


def test_one_stream_decodes_all_but_its_first_token_between_the_first_and_the_last() -> None:
    assert decode_rate([Timeline(0.0, [1.0, 1.5, 2.0, 2.5], tokens=4)]) == pytest.approx(3 / 1.5)


def test_streams_count_while_all_of_them_generate() -> None:
    early = Timeline(0.0, [0.5, 1.0, 2.0, 3.0], tokens=4)
    late = Timeline(0.0, [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], tokens=6)

    assert decode_rate([early, late]) == pytest.approx((2 + 4) / 2.0)


def test_pieces_of_several_tokens_count_as_many() -> None:
    assert decode_rate([Timeline(0.0, [1.0, 2.0, 3.0], tokens=6)]) == pytest.approx(5 / 2.0)


def test_streams_that_never_ran_together_have_no_rate() -> None:
    with pytest.raises(LociError, match="did not run at the same time"):
        decode_rate([Timeline(0.0, [1.0, 2.0], tokens=2), Timeline(0.0, [2.0, 3.0], tokens=2)])
