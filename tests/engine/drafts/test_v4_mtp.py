"""V4's draft layer against a float64 reference that is written from the specification."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.drafts.base import DraftRequest, Rows
from engine.drafts.mtp import LONGEST, Mtp
from engine.families.base import Batch, Trace
from engine.families.deepseek_v4.draft_layer import V4DraftLayer, read_draft_layer
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from quant.kernels.choice import choose
from quant.kernels.reference import ReferenceKernels
from tests.engine.drafts.reference_stages import v4_layer
from tests.engine.families.golden_families import PLENTY, golden_family

TOLERANCE = 1e-4


@dataclass
class Case:
    model: DeepseekV4
    layer: V4DraftLayer
    ids: list[int]
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]

    def expected(self, streams: torch.Tensor, behind: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        t, c = self.tensors, self.config
        of_layer = {name: tensor for name, tensor in t.items() if name.startswith("mtp.")}
        parallel = streams.view(len(streams), c["hc_mult"], -1)
        return v4_layer(of_layer, c, t["embed.weight"], t["head.weight"], parallel, behind)


@pytest.fixture(scope="module", params=["native", "torch"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    golden = golden_family("deepseek_v4")
    checkpoint = open_checkpoint(golden.path)
    kernels = choose() if request.param == "native" else ReferenceKernels()
    model = family_of(checkpoint).load(checkpoint, kernels, PLENTY)
    assert isinstance(model, DeepseekV4)
    files = sorted(golden.path.glob("model-*.safetensors"))
    tensors = {key: value for file in files for key, value in load_file(file).items()}
    config = json.loads((golden.path / "config.json").read_text())
    layer = read_draft_layer(model, checkpoint, kernels)
    yield Case(model, layer, golden.ids()[:70], tensors, config)
    layer.close()
    model.close()


def streams_of(case: Case) -> torch.Tensor:
    """What leaves the last layer: of a prompt in chunks, then token by token."""
    assert case.model.capture()
    cache, found, ids = case.model.new_cache(1, 80), [], case.ids
    for start, stop in ((0, 30), (30, 60), *((at, at + 1) for at in range(60, len(ids)))):
        case.model.forward(Batch.of([(0, start, ids[start:stop])]), cache)
        found += [part.clone() for part in case.model.captured()]
    return torch.cat(found)


@pytest.mark.slow
def test_the_streams_that_leave_the_last_layer_are_captured(case: Case) -> None:
    trace = Trace()
    case.model.forward(Batch.of([(0, 0, case.ids)]), case.model.new_cache(1, 80), trace)
    last = len(case.model.weights.layers) - 1
    (streams,) = trace.values[f"streams.{last}"]
    assert (streams_of(case) - streams.flatten(1)).abs().max() < 1e-4
    case.model.drop_captured()
    assert not case.model.captured()


@pytest.mark.slow
def test_the_draft_layers_logits_are_the_references(case: Case) -> None:
    """Past the window of 16; whole, then token by token, for which steps are recorded."""
    streams, behind = streams_of(case)[:-1], case.ids[1:]
    wanted, _ = case.expected(streams, behind)
    cache, whole = case.layer.new_cache(1, 80), 50
    batch = Batch.of([(0, 0, behind[:whole])], all_logits=True)
    found = [case.layer.step(batch, streams[:whole], cache).logits]
    for at in range(whole, len(behind)):
        batch = Batch.of([(0, at, behind[at : at + 1])])
        found.append(case.layer.step(batch, streams[at : at + 1], cache).logits.clone())
    assert (torch.cat(found) - wanted).abs().max() < TOLERANCE


@pytest.mark.slow
def test_drafts_are_the_references(case: Case) -> None:
    streams, ids = streams_of(case), case.ids
    drafter = Mtp(case.layer, slots=2, capacity=80)
    drafter.open(1, [])
    drafter.observe([Rows(1, 0, ids[:40], streams[:40])])
    for length in (40, 41, 43):
        if length > 40:
            before = 40 if length == 41 else 41
            drafter.observe([Rows(1, before, ids[before:length], streams[before:length])])
        (draft,) = drafter.draft([DraftRequest(1, ids[: length + 1], LONGEST)])
        behind, known = ids[1 : length + 1], streams[:length]
        expected: list[int] = []
        for _ in range(LONGEST):
            logits, states = case.expected(known, behind + expected)
            expected.append(int(logits[-1].argmax()))
            known = torch.cat((known, states[-1:].flatten(1).float()))
        assert list(draft.token_ids) == expected
    drafter.close(1)
