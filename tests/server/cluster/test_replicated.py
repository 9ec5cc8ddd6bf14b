"""The engine in front of replicas, where there are none, or where it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from engine.families.loader import OpenedModel, open_model
from engine.output import FinishReason, Output
from engine.sampling.params import SamplingParams
from server.cluster.affinity import Affinity
from server.cluster.asked import ReplicaInfo
from server.cluster.replicated import NO_REPLICA, ReplicatedEngine
from server.http.errors import ApiError
from tests.server.harness import TINY


class Unavailable:
    """A handle to replicas that Serve has given up."""

    class generate:  # noqa: N801  # as handles have methods
        @staticmethod
        def remote(asked: object) -> Any:
            raise OSError("no deployment")


@pytest.fixture(scope="module")
def opened() -> OpenedModel:
    return open_model(TINY)


def engine_of(
    opened: OpenedModel, affinity: Affinity, when_stopped: Callable[[], None] = lambda: None
) -> ReplicatedEngine:
    info = ReplicaInfo(context=100, slots=2)
    tokenizer, means_loss = opened.tokenizer, lambda error: isinstance(error, OSError)
    return ReplicatedEngine(Unavailable, affinity, tokenizer, opened.info, info, 4, means_loss, when_stopped)


def test_while_there_is_no_replica_clients_are_told_to_come_again(opened: OpenedModel) -> None:
    affinity = Affinity()
    affinity.keep_only(["a"])
    engine = engine_of(opened, affinity)
    assert engine.is_ready
    affinity.lose("a")
    assert engine.is_alive
    assert not engine.is_ready
    with pytest.raises(ApiError) as raised:
        engine.submit([1, 2], SamplingParams(), lambda _: None)
    assert (raised.value.status, raised.value.headers["Retry-After"]) == (503, "1")


def test_a_sequence_that_no_replica_computes_ends_so_and_is_no_load(opened: OpenedModel) -> None:
    affinity = Affinity()
    affinity.keep_only(["a"])
    engine = engine_of(opened, affinity)
    ended: list[Output] = []

    async def ask() -> None:
        engine.submit([1, 2], SamplingParams(), ended.append)
        while not ended:
            await asyncio.sleep(0.01)

    asyncio.run(ask())
    assert (ended[0].finish_reason, ended[0].code) == (FinishReason.ERROR, NO_REPLICA)
    assert not affinity._given


def test_who_stops_it_as_well_waits_until_the_replicas_are_gone(opened: OpenedModel) -> None:
    over: list[str] = []

    def slowly() -> None:
        time.sleep(0.2)
        over.append("replicas")

    engine = engine_of(opened, Affinity(), slowly)
    first = threading.Thread(target=engine.stop)
    first.start()
    while engine.is_alive:
        time.sleep(0.001)
    engine.stop()
    assert over == ["replicas"]
    first.join()
