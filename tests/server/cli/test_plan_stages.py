"""`loci plan` with several machines: layers by memory, and what the network does."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from memory.checkpoint.part import Span
from memory.hardware.profiles import load_profile
from memory.planner.shape import KvShape, LayerShape, ModelShape, Weights
from memory.planner.stages import part_of, spread
from quant.errors import ConfigError
from server.cli.plan_stages import bits_per_s, show_stages

LAYER = LayerShape(dense=Weights(10**9, 10**9), kv=KvShape())
ENDS = Weights(10**8, 10**8)
SHAPE = ModelShape("model", 1000, 4096, 8192, 0, ENDS, ENDS, (LAYER,) * 12, 4 * 4096)
EVERYWHERE = tuple(range(1, 12))


def test_layers_go_where_there_is_room() -> None:
    assert spread(SHAPE, EVERYWHERE, (1.0, 1.0)) == [Span(0, 6, 12), Span(6, 12, 12)]
    assert spread(SHAPE, EVERYWHERE, (3.0, 1.0)) == [Span(0, 9, 12), Span(9, 12, 12)]
    assert spread(SHAPE, (2, 11), (1.0, 1.0)) == [Span(0, 2, 12), Span(2, 12, 12)]
    assert [str(span) for span in spread(SHAPE, (4, 8), (1.0, 1.0, 1.0))][1] == "layers 4 to 7"


def test_a_model_is_not_cut_into_more_parts_than_it_can_be() -> None:
    with pytest.raises(ConfigError, match="can be cut into 2; lower --stages"):
        spread(SHAPE, (4,), (1.0, 1.0, 1.0))


def test_parts_are_the_whole() -> None:
    spans = spread(SHAPE, EVERYWHERE, (5.0, 2.0, 1.0))
    assert [a.stop for a, _ in pairwise(spans)] == [b.first for _, b in pairwise(spans)]
    assert sum(part_of(SHAPE, span).nbytes for span in spans) == SHAPE.nbytes
    tied = replace(SHAPE, embedding=Weights(), tied=SHAPE.embedding)
    parts = [part_of(tied, span) for span in spans]
    assert [part.embedding for part in parts] == [SHAPE.embedding, *[Weights()] * (len(spans) - 1)]
    assert all(part.tied == Weights() for part in parts)


def _planned(network: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    machines = [load_profile("2x4090-256g")] * 2
    assert show_stages(SHAPE, EVERYWHERE, machines, (4096, 8, None), bits_per_s(network), as_json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_slower_network_makes_answers_slower(capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = _planned("10Gbps", capsys), _planned("10 Mbps", capsys)
    assert [stage["layers"] for stage in fast["stages"]] == ["layers 0 to 5", "layers 6 to 11"]
    assert slow["way_ms"] - fast["way_ms"] == pytest.approx(8e3 * 4 * (4096 + 1000) * (1e-7 - 1e-10))
    assert slow["tokens_per_s"] < fast["tokens_per_s"]
    # One answer passes both machines, so two of them are no faster than one.
    assert fast["tokens_per_s"] < 1 / fast["each_alone"][0]["alone_s"] * 1.01


@pytest.mark.parametrize("wrong", ["10", "fast", "0Gbps", "-1Gbps"])
def test_a_network_is_a_rate(wrong: str) -> None:
    with pytest.raises(ConfigError, match="a rate like 10Gbps"):
        bits_per_s(wrong)


def test_models_with_several_streams_send_each_and_their_mix() -> None:
    assert SHAPE.state_bytes == 4 * 4096
    assert replace(SHAPE, streams=4).state_bytes == 4 * 4 * (4096 + 1)
