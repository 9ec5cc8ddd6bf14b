"""V4's DSpark stages against a float64 reference that is written from the specification."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.drafts.base import DraftRequest, Rows
from engine.drafts.dspark import DSpark
from engine.drafts.own import own_draft_bytes
from engine.families.base import Batch, Trace
from engine.families.deepseek_v4.draft_stages import read_stages
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.loader import open_checkpoint, open_model
from engine.families.registry import family_of
from quant.errors import CheckpointError
from quant.kernels.choice import choose
from quant.kernels.reference import ReferenceKernels
from tests.engine.drafts.random_stages import v4_with_stages
from tests.engine.drafts.reference_stages import Block, v4_block
from tests.engine.families.golden_families import PLENTY

TOLERANCE = 1e-4
NEWEST = 11


@dataclass
class Case:
    path: Path
    model: DeepseekV4
    drafter: DSpark
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def expected(self, captures: torch.Tensor, start: int, newest: int) -> Block:
        stages = {name: tensor for name, tensor in self.tensors.items() if name.startswith("mtp.")}
        outside = self.tensors["embed.weight"], self.tensors["head.weight"]
        return v4_block(stages, self.config, *outside, captures, start, newest)

    def captures(self, tokens: int, seed: int = 0) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(tokens, 3 * self.config["hidden_size"], generator=draw)


def loaded(path: Path, kernels: str) -> tuple[DeepseekV4, DSpark]:
    checkpoint = open_checkpoint(path)
    of = choose() if kernels == "native" else ReferenceKernels()
    model = family_of(checkpoint).load(checkpoint, of, PLENTY)
    assert isinstance(model, DeepseekV4)
    return model, DSpark(read_stages(model, checkpoint, of), slots=4)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return v4_with_stages(tmp_path_factory.mktemp("stages") / "v4")


@pytest.fixture(scope="module", params=["native", "torch"])
def case(files: Path, request: pytest.FixtureRequest) -> Iterator[Case]:
    model, drafter = loaded(files, request.param)
    tensors = {k: v for file in sorted(files.glob("*.safetensors")) for k, v in load_file(file).items()}
    yield Case(files, model, drafter, json.loads((files / "config.json").read_text()), tensors)
    model.close()


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 5, 16, 43])
def test_a_blocks_logits_and_confidence_are_the_references(case: Case, tokens: int) -> None:
    """Within, at and past the window of 16."""
    drafter, captures = case.drafter, case.captures(tokens)
    drafter.open(1, [])
    try:
        for first in range(0, tokens, 7):
            part = captures[first : first + 7]
            drafter.observe([Rows(1, first, [0] * len(part), part)])
        found = drafter.blocks([drafter._known[1]], [NEWEST])
    finally:
        drafter.close(1)

    wanted = case.expected(captures, 0, NEWEST)
    assert (torch.from_numpy(found.logits[0]) - wanted.logits).abs().max() < TOLERANCE
    assert (torch.from_numpy(found.confidence[0]) - wanted.confidence).abs().max() < TOLERANCE
    assert found.token_ids[0].tolist() == wanted.token_ids


@pytest.mark.slow
def test_sequences_are_drafted_for_together_as_alone(case: Case) -> None:
    """Four at once, which are more than one program takes, one of them after a gap."""
    drafter, lengths = case.drafter, (3, 9, 20, 33)
    starts = [100 * (n == 2) for n in range(4)]
    for n, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        drafter.open(n, [])
        drafter.observe([Rows(n, start, [0] * length, case.captures(length, n))])
    requests = [DraftRequest(n, [0] * (starts[n] + lengths[n]) + [NEWEST + n], 5) for n in range(4)]

    drafts = drafter.draft(requests)

    for n, draft in enumerate(drafts):
        wanted = case.expected(case.captures(lengths[n], n), starts[n], NEWEST + n)
        assert list(draft.token_ids) == wanted.token_ids
        assert torch.tensor(draft.chances).sub(wanted.confidence).abs().max() < TOLERANCE
        drafter.close(n)


@pytest.mark.slow
def test_the_mean_of_the_streams_that_leave_target_layers_is_captured(case: Case) -> None:
    """From prompts in chunks and from recorded steps alike; no logits change."""
    model, ids = case.model, [37 * n % 380 + 2 for n in range(40)]
    trace = Trace()
    plain = model.forward(Batch.of([(0, 0, ids)], all_logits=True), model.new_cache(1, 64), trace)
    assert model.capture()
    cache, found = model.new_cache(1, 64), []
    for start, stop in ((0, 13), (13, 30), *((at, at + 1) for at in range(30, 40))):
        logits = model.forward(Batch.of([(0, start, ids[start:stop])], all_logits=True), cache)
        assert (logits - plain[start:stop]).abs().max() < TOLERANCE
        found += [part.clone() for part in model.captured()]
    captured = torch.cat(found).view(40, 3, -1)
    assert model.config.dspark is not None
    for at, layer in enumerate(model.config.dspark.target_layer_ids):
        (streams,) = trace.values[f"streams.{layer}"]
        assert (captured[:, at] - streams.mean(1)).abs().max() < TOLERANCE


def test_stages_are_counted_for_plans(files: Path) -> None:
    opened = open_model(files)
    entries = opened.checkpoint.entries
    needed = sum(entry.nbytes for name, entry in entries.items() if name.startswith("mtp."))
    assert own_draft_bytes(opened.family, opened.checkpoint) > needed


def test_stages_that_lack_a_tensor_are_named(tmp_path: Path) -> None:
    path = v4_with_stages(tmp_path / "v4")
    stages = load_file(path / "stages.safetensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    for name in ("mtp.2.markov_head.markov_w2.weight", "mtp.1.attn.attn_sink"):
        del stages[name], index["weight_map"][name]
    save(stages, index, path)
    with pytest.raises(CheckpointError) as raised:
        loaded(path, "native")
    assert "missing tensor layers.1.attn.attn_sink" in str(raised.value)
    assert "missing tensor layers.2.markov_head.markov_w2.weight" in str(raised.value)


def save(stages: dict[str, torch.Tensor], index: dict[str, Any], path: Path) -> None:
    save_file(stages, path / "stages.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
