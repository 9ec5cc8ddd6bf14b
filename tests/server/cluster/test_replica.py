"""A replica by itself, in this process: what it makes of sequences, and how it ends with its engine."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engine.cache.digest import block_hashes
from engine.grammar.constraint import MAX_COMPILING
from engine.grammar.lark import GrammarWriter
from engine.output import FinishReason, Output
from engine.sampling.params import SamplingParams
from quant.errors import ConfigError
from server.cluster import replica as module
from server.cluster.asked import STATE, Answered, Asked
from server.cluster.replica import DIFFERS, Replica, unsent
from server.cluster.replicas import CALLS_AT_ONCE, of_replicas, settings_of_front
from server.settings import Settings
from tests.server.harness import TINY

CONTEXT = 512
LIMITS: dict[str, Any] = {"dram_budget": "150MiB", "max_model_len": CONTEXT, "max_num_seqs": 2}


class Left(BaseException):
    """Where the process would have ended."""


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(module, "listen_where_ray_does", lambda: None)
    threads = torch.get_num_threads()
    try:
        started = Replica(of_replicas(Settings(model=str(TINY), max_waiting=0, **LIMITS)))
        monkeypatch.setattr(os, "_exit", leave)
        yield started
        started._engine.stop()
    finally:
        torch.set_num_threads(threads)


def asked(count: int = 3, **more: object) -> Asked:
    prompt = np.arange(5, 5 + count, dtype=np.int32)
    params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | more)  # type: ignore[arg-type]
    return Asked(prompt, params, "", (), block_hashes(prompt, ""))


async def last(answering: AsyncIterator[Answered]) -> Output:
    """The last output of an answer."""
    found = [each[-1] async for each in answering if isinstance(each, list)]
    return found[-1]


def test_more_sequences_with_a_grammar_than_are_compiled_at_once_are_all_answered(replica: Replica) -> None:
    async def all_of_them() -> list[Output]:
        each = [
            asked(grammar=GrammarWriter({}).finished(f'"{"a" * number}"'), ignore_eos=False)
            for number in range(1, MAX_COMPILING + 4)
        ]
        return await asyncio.gather(*(last(replica.generate(one)) for one in each))

    ends = asyncio.run(all_of_them())
    assert {end.finish_reason for end in ends} <= {FinishReason.STOP, FinishReason.LENGTH}, ends


def test_a_replica_refuses_with_the_code_of_a_server_and_tells_its_context(replica: Replica) -> None:
    end = asyncio.run(last(replica.generate(asked(CONTEXT + 1))))
    assert (end.finish_reason, end.code) == (FinishReason.REFUSED, "context_length_exceeded")
    assert replica.record_routing_stats()[STATE].context == CONTEXT


def test_a_replica_whose_engine_has_died_ends_and_attracts_nothing_more(replica: Replica) -> None:
    async def stop_amid() -> None:
        async for _ in replica.generate(asked(max_tokens=400)):
            await asyncio.to_thread(replica._engine.stop)

    with pytest.raises(Left):
        asyncio.run(stop_amid())
    with pytest.raises(Left):
        asyncio.run(last(replica.generate(asked())))


def test_what_was_sent_before_is_left_out() -> None:
    again = [
        Output("a", (1,)),
        Output("b", (2,)),
        Output("c", (3,)),
        Output("", (4,), finish_reason=FinishReason.STOP),
    ]
    assert unsent(again, deque([1, 2])) == [
        Output("c", (3, 4), finish_reason=FinishReason.STOP, special_ranges=None)
    ]
    assert unsent(again[:2], deque([1, 2])) == []


@pytest.mark.parametrize("sent", [[1, 3], [1, 2, 3], [1, 2, 3, 4]], ids=["other", "shorter", "no end"])
def test_another_answer_than_was_sent_before_is_an_error(sent: list[int]) -> None:
    again = [Output("a", (1,)), Output("b", (2,), finish_reason=FinishReason.LENGTH)]
    (found,) = unsent(again, deque(sent))
    assert (found.finish_reason, found.error) == (FinishReason.ERROR, DIFFERS)


def test_what_waits_is_counted_by_the_front_alone() -> None:
    chosen_ones: list[dict[str, Any]] = [{}, {"max_waiting": 0}]
    for chosen in chosen_ones:
        passed = of_replicas(Settings(model=str(TINY), **chosen))
        assert passed["max_waiting"] == CALLS_AT_ONCE


def test_a_front_on_a_machine_without_keys_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="LOCI_API_KEY"):
        settings_of_front({"model": "demo"}, needs_key=True)
    assert not settings_of_front({"model": "demo"}, needs_key=False).needs_key
    monkeypatch.setenv("LOCI_API_KEY", "sk-1")
    assert settings_of_front({"model": "demo"}, needs_key=True).needs_key
