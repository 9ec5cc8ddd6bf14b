"""What Serve is told to try, in which order."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.sampling.params import SamplingParams
from server.cluster.affinity import Affinity
from server.cluster.asked import Asked

pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
pytestmark = pytest.mark.slow


def test_the_best_replica_is_asked_twice_and_whichever_accepts_has_the_load() -> None:
    from server.cluster.router import PrefixRouter

    router = PrefixRouter.__new__(PrefixRouter)
    affinity = router._affinity = Affinity()
    names = ["a", "b", "c"]
    affinity.keep_only(names)
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]
    blocks = (b"12345678",)
    attempt = affinity.begin()
    asked = Asked(np.zeros(32, np.int32), SamplingParams(), "", (), blocks, attempt=attempt)
    request: Any = SimpleNamespace(args=[asked], routing_context=SimpleNamespace(should_backoff=False))

    ranks = asyncio.run(router.choose_replicas(replicas, request))
    assert [[each.replica_id.unique_id for each in rank] for rank in ranks] == [["a"], ["a"], ["b"], ["c"]]
    router.on_request_routed(request, replicas[1].replica_id, None)
    assert affinity.order((), names) == ["a", "c", "b"]
    affinity.end(attempt)
    assert affinity.order((), names)[0] == "a"
