"""Draft layers of the decoder families against a float64 reference that is written from the specification."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from engine.drafts.base import NOTHING, DraftRequest, Rows
from engine.drafts.mtp import LONGEST, Mtp
from engine.families.base import Batch
from engine.families.decoder.draft_forward import DraftLayer
from engine.families.decoder.draft_layer import draft_description
from engine.families.decoder.forward import Decoder
from engine.families.decoder.read_weights import read_draft
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from quant.kernels.choice import choose
from quant.kernels.reference import ReferenceKernels
from tests.engine.drafts.reference_mtp import Reference
from tests.engine.families.golden_families import PLENTY, Golden, golden_family

TOLERANCE = 1e-4
NAMES = ("deepseek_v3", "glm4_moe", "glm_moe_dsa", "qwen3_next", "qwen3_5_moe")


@dataclass
class Case:
    golden: Golden
    model: Decoder
    layer: DraftLayer
    reference: Reference
    embed: torch.Tensor
    head: torch.Tensor

    def expected(self, hidden: torch.Tensor, behind: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.reference.logits(self.embed, self.head, hidden, behind)


_cases: dict[tuple[str, str], Case] = {}


def load_case(name: str, kernels_name: str) -> Case:
    golden = golden_family(name)
    checkpoint = open_checkpoint(golden.path)
    kernels = ReferenceKernels() if kernels_name == "torch" else choose()
    model = family_of(checkpoint).load(checkpoint, kernels, PLENTY)
    assert isinstance(model, Decoder)
    description = draft_description(model.description, checkpoint)
    assert description is not None
    weights = read_draft(description, checkpoint, kernels, model.weights)
    layer = DraftLayer(description, model.info, kernels, weights)
    files = sorted(golden.path.glob("model-*.safetensors"))
    tensors = {key: value for file in files for key, value in load_file(file).items()}
    config = json.loads((golden.path / "config.json").read_text())
    prefix = "model.language_model." if "text_config" in config else "model."
    head, embed = tensors["lm_head.weight"], tensors[f"{prefix}embed_tokens.weight"]
    reference = Reference(tensors, config.get("text_config", config))
    return Case(golden, model, layer, reference, embed, head)


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    key = request.param, "native"
    if key not in _cases:
        _cases[key] = load_case(*key)
    return _cases[key]


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    for case in _cases.values():
        case.layer.close()
        case.model.close()
    _cases.clear()


def hidden_of(case: Case, ids: list[int]) -> torch.Tensor:
    """The model's last hidden states, from a prompt and then token by token."""
    assert case.model.capture()
    cache, found = case.model.new_cache(1, len(ids)), []
    for start, stop in ((0, len(ids) - 4), *((at, at + 1) for at in range(len(ids) - 4, len(ids)))):
        case.model.forward(Batch.of([(0, start, ids[start:stop])]), cache)
        found += [part.clone() for part in case.model.captured()]
    return torch.cat(found)


@pytest.mark.slow
def test_a_draft_layers_logits_are_the_references(case: Case) -> None:
    """Whole, and then token by token, for which steps are recorded."""
    ids = case.golden.ids()
    hidden, behind = hidden_of(case, ids)[:-1], ids[1:]
    wanted, _ = case.expected(hidden, behind)
    cache = case.layer.new_cache(1, len(ids))
    whole = len(behind) - 20
    found = [
        case.layer.step(Batch.of([(0, 0, behind[:whole])], all_logits=True), hidden[:whole], cache).logits
    ]
    for at in range(whole, len(behind)):
        batch = Batch.of([(0, at, behind[at : at + 1])])
        found.append(case.layer.step(batch, hidden[at : at + 1], cache).logits)

    assert (torch.cat(found) - wanted).abs().max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_next"])
def test_plain_torch_gives_the_references_logits_too(name: str) -> None:
    case = load_case(name, "torch")
    ids = case.golden.ids()[:40]
    hidden, behind = hidden_of(case, ids)[:-1], ids[1:]
    batch = Batch.of([(0, 0, behind)], all_logits=True)
    found = case.layer.step(batch, hidden, case.layer.new_cache(1, len(ids))).logits
    assert (found - case.expected(hidden, behind)[0]).abs().max() < TOLERANCE
    case.layer.close()
    case.model.close()


def expected_drafts(case: Case, hidden: torch.Tensor, behind: list[int]) -> list[int]:
    """What is drafted behind the last token: the layer asked for one token after the other."""
    found: list[int] = []
    for _ in range(LONGEST):
        logits, states = case.expected(hidden, behind + found)
        found.append(int(logits[-1].argmax()))
        hidden = torch.cat((hidden, states[-1:].to(hidden.dtype)))
    return found


@pytest.mark.slow
def test_drafts_are_the_references_whatever_was_observed_when(case: Case) -> None:
    """Two sequences at once; of one, all drafts but one are thrown away, and its beginning was not seen."""
    ids = case.golden.ids()[:60]
    hidden = hidden_of(case, ids)
    drafter = Mtp(case.layer, slots=2, capacity=80)
    for sequence in (1, 2):
        drafter.open(sequence, [])
    assert drafter.draft([DraftRequest(1, ids[:31], 3)]) == [NOTHING]
    drafter.observe([Rows(1, 0, ids[:30], hidden[:30]), Rows(2, 10, ids[10:40], hidden[10:40])])
    for count in (1, 2, 1):
        requests = [DraftRequest(1, ids[:31], 3), DraftRequest(2, ids[:41], 2)]
        first, second = drafter.draft(requests)
        assert list(first.token_ids) == expected_drafts(case, hidden[:30], ids[1:31])
        assert list(second.token_ids) == expected_drafts(case, hidden[10:40], ids[11:41])[:2]
        drafter.observe([
            Rows(1, 30, ids[30 : 30 + count], hidden[30 : 30 + count]),
            Rows(2, 40, ids[40:41], hidden[40:41]),
        ])  # fmt: skip
        (first,) = drafter.draft([DraftRequest(1, ids[: 31 + count], 3)])
        assert list(first.token_ids) == expected_drafts(case, hidden[: 30 + count], ids[1 : 31 + count])
        for sequence in (1, 2):
            drafter.close(sequence)
            drafter.open(sequence, [])
        drafter.observe([Rows(1, 0, ids[:30], hidden[:30]), Rows(2, 10, ids[10:40], hidden[10:40])])


@pytest.mark.slow
def test_capturing_changes_no_bit(case: Case) -> None:
    ids = case.golden.ids()[:30]
    plain = load_case(case.golden.path.name, "native")
    cache = plain.model.new_cache(1, 40)
    without = [plain.model.forward(Batch.of([(0, 0, ids)]), cache)]
    without.append(plain.model.forward(Batch.of([(0, 30, [5])]), cache))
    assert case.model.capture()
    cache = case.model.new_cache(1, 40)
    assert torch.equal(case.model.forward(Batch.of([(0, 0, ids)]), cache), without[0])
    assert torch.equal(case.model.forward(Batch.of([(0, 30, [5])]), cache), without[1])
    plain.model.close()
    plain.layer.close()
