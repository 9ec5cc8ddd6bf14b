"""DSpark drafters against a float64 reference that is written from the specification."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.drafts.base import NOTHING, DraftRequest, Rows
from engine.drafts.dspark import DSpark
from engine.families.base import Batch, Trace
from engine.families.deepseek_v41.draft_stages import read_stages
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.registry import family_of
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.errors import CheckpointError
from quant.kernels.choice import choose
from quant.kernels.interface import Kernels
from quant.kernels.reference import ReferenceKernels
from tests.conftest import golden_path
from tests.engine.drafts.random_stages import StageKeys, v41_stages, with_stages
from tests.engine.drafts.reference_stages import Block, v41_block

TOLERANCE = 1e-4
KEYS = StageKeys()
NEWEST = 11


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    golden = golden_path("v41-a")
    config = json.loads((golden / "config.json").read_text())["text_config"]
    to = tmp_path_factory.mktemp("stages") / "v41"
    return with_stages(golden, to, v41_stages(config, KEYS), KEYS.keys())


def loaded(path: Path, kernels: Kernels) -> tuple[DeepseekV41, DSpark]:
    checkpoint = open_safetensors(path)
    model = family_of(checkpoint).load(checkpoint, kernels, MemoryBudget(1 << 30))
    assert isinstance(model, DeepseekV41)
    return model, DSpark(read_stages(model, checkpoint, kernels), slots=4)


@pytest.fixture(scope="module", params=["torch", "native"])
def drafting(files: Path, request: pytest.FixtureRequest) -> tuple[DeepseekV41, DSpark]:
    return loaded(files, ReferenceKernels() if request.param == "torch" else choose())


def expected(files: Path, captures: torch.Tensor, start: int, newest: int) -> Block:
    c = json.loads((files / "config.json").read_text())["text_config"]
    tensors = {k: v for f in sorted(files.glob("*.safetensors")) for k, v in load_file(f).items()}
    stages = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    return v41_block(stages, c, tensors["embed.weight"], tensors["head.weight"], captures, start, newest)


def observe(
    drafter: DSpark, sequence: int, start: int, captures: torch.Tensor, cut: int | None = None
) -> None:
    """Tell a drafter of committed tokens, `cut` of them at a time."""
    for first in range(0, len(captures), cut or len(captures)):
        part = captures[first : first + (cut or len(captures))]
        drafter.observe([Rows(sequence, start + first, [0] * len(part), part)])


def random_captures(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, 3 * 128, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [1, 5, 16, 43])
def test_a_blocks_logits_and_confidence_are_the_references(
    files: Path, drafting: tuple[DeepseekV41, DSpark], tokens: int
) -> None:
    """Within, at and past the window of 16."""
    drafter, captures = drafting[1], random_captures(tokens)
    drafter.open(1, [])
    try:
        observe(drafter, 1, 0, captures, cut=7)
        found = drafter.blocks([drafter._known[1]], [NEWEST])
    finally:
        drafter.close(1)

    wanted = expected(files, captures, 0, NEWEST)
    assert (torch.from_numpy(found.logits[0]) - wanted.logits).abs().max() < TOLERANCE
    assert (torch.from_numpy(found.confidence[0]) - wanted.confidence).abs().max() < TOLERANCE
    assert found.token_ids[0].tolist() == wanted.token_ids


def test_sequences_are_drafted_for_together_as_alone(
    files: Path, drafting: tuple[DeepseekV41, DSpark]
) -> None:
    """Four at once, which are more than one program takes, one of them after a gap."""
    drafter, lengths = drafting[1], (3, 9, 20, 33)
    for sequence, length in enumerate(lengths):
        drafter.open(sequence, [])
        observe(drafter, sequence, 100 * (sequence == 2), random_captures(length, sequence))
    ends = [100 * (n == 2) + length for n, length in enumerate(lengths)]
    requests = [DraftRequest(n, [0] * end + [NEWEST + n], 5) for n, end in enumerate(ends)]

    drafts = drafter.draft(requests)

    for sequence, length in enumerate(lengths):
        start = 100 * (sequence == 2)
        wanted = expected(files, random_captures(length, sequence), start, NEWEST + sequence)
        assert list(drafts[sequence].token_ids) == wanted.token_ids
        chances = drafts[sequence].chances
        assert chances is not None
        assert torch.tensor(chances).sub(wanted.confidence).abs().max() < TOLERANCE
        drafter.close(sequence)


def test_nothing_is_drafted_where_the_tokens_before_are_unknown(
    drafting: tuple[DeepseekV41, DSpark],
) -> None:
    drafter = drafting[1]
    drafter.open(1, [])
    try:
        assert drafter.draft([DraftRequest(1, [1, 2, 3], 5)]) == [NOTHING]
        observe(drafter, 1, 0, random_captures(2))
        assert drafter.draft([DraftRequest(1, [1, 2, 3, 4], 5)]) == [NOTHING]
        (draft,) = drafter.draft([DraftRequest(1, [1, 2, 3], 2)])
        assert len(draft.token_ids) == 2
    finally:
        drafter.close(1)


def test_the_mean_of_the_streams_that_target_layers_read_is_captured(files: Path) -> None:
    """From prompts in chunks and from recorded steps alike; layer 5 reads Engram first."""
    model, _ = loaded(files, choose())
    ids = load_file(files / "expected.safetensors")["input_ids"].tolist()[:40]
    trace = Trace()
    plain = model.forward(Batch.of([(0, 0, ids)], all_logits=True), model.new_cache(1, 64), trace)
    assert model.capture()
    cache, found = model.new_cache(1, 64), []
    for start, stop in ((0, 13), (13, 30), *((at, at + 1) for at in range(30, 40))):
        logits = model.forward(Batch.of([(0, start, ids[start:stop])], all_logits=True), cache)
        assert torch.equal(logits, plain[start:stop])
        found += [part.clone() for part in model.captured()]
    captured = torch.cat(found).view(40, 3, 128)

    for at, layer in ((1, 6), (2, 7)):
        (streams,) = trace.values[f"streams.{layer - 1}"]
        assert (captured[:, at] - streams.mean(1)).abs().max() < 1e-5
    (streams,), (kv,), (gates,) = (
        trace.values[name] for name in ("streams.4", "engram_kv.5", "engram_gate.5")
    )
    value = kv[:, -128:]
    with_engram = streams + gates.unsqueeze(2) * value.unsqueeze(1)
    assert (captured[:, 0] - with_engram.mean(1)).abs().max() < 1e-5


def test_amid_a_long_prompt_nothing_is_captured_that_was_not_computed(files: Path) -> None:
    model, _ = loaded(files, choose())
    assert model.capture()
    cache = model.new_cache(1, 400)
    ids = [i % 500 for i in range(300)]
    for start, to_come in ((0, 200), (100, 100), (200, 0)):
        batch = Batch.of([(0, start, ids[start : start + 100])])
        model.forward(Batch(batch.ids, batch.segments, batch.wanted, (to_come,)), cache)
        (last,) = model.captured()
        needed = model.config.tail_of(7) + cache.margin
        assert len(last) == (0 if to_come else needed)


def test_stages_that_lack_a_tensor_are_named(files: Path, tmp_path: Path) -> None:
    config = json.loads((files / "config.json").read_text())["text_config"]
    stages = v41_stages(config, KEYS)
    del stages["mtp.1.attn.attn_sink"]
    path = with_stages(golden_path("v41-a"), tmp_path / "v41", stages, KEYS.keys())
    with pytest.raises(CheckpointError, match=r"missing tensor layers\.1\.attn\.attn_sink"):
        loaded(path, choose())
