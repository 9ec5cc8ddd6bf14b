"""Routing traces: written whole, read with care, and what they say of hot experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memory.experts.replay import compare_policies
from memory.experts.traces import FILE_NAME, RoutingTrace, trace_of_checkpoint
from quant.errors import CheckpointError


@pytest.fixture
def trace() -> RoutingTrace:
    """Two layers of eight experts; expert 5 of the first layer is used by every token."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(400)]).view(200, 2, 2)
    ids[:, 0, 0] = 5
    ids[:, 0, 1] = ids[:, 0, 1] % 5
    return RoutingTrace(ids)


def test_a_trace_is_read_as_it_was_written(trace: RoutingTrace, tmp_path: Path) -> None:
    trace.save(tmp_path / "t")
    assert torch.equal(RoutingTrace.load(tmp_path / "t").router_ids, trace.router_ids)
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


def test_shares_are_of_all_uses_of_a_layer(trace: RoutingTrace) -> None:
    shares = trace.shares(8)
    assert torch.allclose(shares.sum(1), torch.ones(2, dtype=torch.float64))
    assert shares[0, 5] == 0.5
    assert shares[0, 6] == 0


def test_a_model_without_a_trace_has_no_hot_experts(tmp_path: Path) -> None:
    assert trace_of_checkpoint(tmp_path, 2, 8) is None


def test_a_trace_of_another_model_is_refused(trace: RoutingTrace, tmp_path: Path) -> None:
    trace.save(tmp_path / FILE_NAME)
    with pytest.raises(
        CheckpointError, match="covers 2 layers, but the model has 3; delete it and record a new one"
    ):
        trace_of_checkpoint(tmp_path, 3, 8)
    with pytest.raises(CheckpointError, match="refers to expert 7, but there are only 7"):
        trace_of_checkpoint(tmp_path, 2, 7)


@pytest.mark.parametrize(
    "tensors",
    [
        {"other": torch.zeros(3)},
        {"router_ids": torch.zeros(3, 2, 2)},
        {"router_ids": -torch.ones(1, 1, 1).short()},
    ],
)
def test_a_file_that_is_no_trace_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "t")
    with pytest.raises(CheckpointError, match="t: "):
        RoutingTrace.load(tmp_path / "t")


def test_policies_are_compared_with_the_best_possible(trace: RoutingTrace) -> None:
    scores = compare_policies(trace, 8, (0.25, 1.0))
    assert {s.policy for s in scores} == {"lru", "lfu", "predictive"}
    for score in scores:
        assert 0 < score.hit_rate <= score.belady_rate <= 1
    assert all(score.of_belady == 1 for score in scores if score.slots_share == 1.0)
