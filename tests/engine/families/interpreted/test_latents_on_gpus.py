"""Recorded steps of families with latent attention, on GPUs in name only, in Triton's interpreter: the golden
logits, and those of operations in torch."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, started by test_recorded_on_gpus.py", allow_module_level=True)

from engine.families.decoder.shape import launches_of
from memory.planner.launches import HAND_OVERS, HELD
from quant.formats.kv_names import KvFormat
from quant.kernels.cuda.program import GpuProgram
from tests.engine.families.interpreted.decoded import SLOTS, decoder_of
from tests.engine.families.interpreted.test_decoders_on_gpus import CONTEXT, decoded, load

PLENTY = 256 << 20  # of a GPU


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "deepseek_v32", "glm_moe_dsa"])
def test_replayed_steps_give_the_golden_logits(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With experts in bfloat16 and FP8, which are left to the processor."""
    model = load(name, gpus[:1], PLENTY, monkeypatch)
    golden_text = decoded(model, name)
    assert {stay.recorder.device for stay in decoder_of(golden_text.replayed).step.stays} == set(gpus[:1])
    golden_text.step({0: 40})
    golden_text.step({2: 7})
    golden_text.step({1: 1, 2: 1, 0: 1})  # a number of rows that there are no launches for
    model.close()


def test_encoded_caches_are_written_and_read_by_replayed_steps(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As V3.2's vendor does; a value between two codes may become either one."""
    model = load("deepseek_v32", gpus[:1], PLENTY, monkeypatch, kv_format="vendor")
    golden_text = decoded(model, "deepseek_v32", is_golden=False)
    for counts in ({0: 40}, {0: 1}):
        golden_text.step(counts, tolerance=0.05)
    model.close()


@pytest.mark.parametrize("count", [1, 2])
def test_experts_of_kimi_are_computed_where_they_are(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """In INT4 on all GPUs."""
    model = load("kimi_k2", gpus[:count], PLENTY, monkeypatch)
    golden_text = decoded(model, "kimi_k2")
    tiers = {tier for layer in model.expert_tiers() for tier in layer}
    assert tiers == {f"vram:{number}" for number in range(count)}
    for counts in ({0: 40}, {0: 1, 1: 1}):
        golden_text.step(counts)
    model.close()


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k2", "deepseek_v2", "deepseek_v32", "glm_moe_dsa"])
@pytest.mark.parametrize("kv_format", ["float32", "fp8", "vendor"])
def test_a_layer_launches_what_a_plan_counts_with_and_hands_over_once(
    gpus: tuple[torch.device, torch.device],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    kv_format: KvFormat,
) -> None:
    model = load(name, gpus[:1], PLENTY, monkeypatch, kv_format=kv_format)
    (stay,) = decoder_of(model.new_cache(SLOTS, CONTEXT)).step.stays
    assert isinstance(stay.program, GpuProgram)
    for number, layer in enumerate(model.description.layers):
        is_routed = number in model.description.expert_layers
        left_out = HELD if is_routed and name != "kimi_k2" else 0  # this GPU holds none
        first = 1 if number == 0 else 0  # the norm before all layers, with the rotations
        planned = launches_of(layer, kv_format, CONTEXT)
        assert stay.program.launches(number) == planned - left_out + first <= 25, number
        assert stay.program.hand_overs(number) == (HAND_OVERS if is_routed else 0)
    model.close()
