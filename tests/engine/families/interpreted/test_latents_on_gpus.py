"""Recorded steps of families with latent attention, on GPUs in name only, in Triton's interpreter: the golden
logits, and those of operations in torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, started by test_recorded_on_gpus.py", allow_module_level=True)

from tests import pretend_gpus as pretend
from tests.engine.families.interpreted.test_decoders_on_gpus import Twice, decoder_of, load

PLENTY = 256 << 20  # of a GPU


@pytest.fixture
def gpus() -> Iterator[tuple[torch.device, torch.device]]:
    with pretend.pretend_gpus() as both:
        yield both


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k2", "deepseek_v2", "deepseek_v32", "glm_moe_dsa"])
def test_replayed_steps_give_the_golden_logits(
    gpus: tuple[torch.device, torch.device], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = load(name, gpus[:1], PLENTY, monkeypatch)
    both = Twice(model, name)
    assert {stay.recorder.device for stay in decoder_of(both.replayed).step.stays} == set(gpus[:1])
    both.step({0: 40})
    both.step({2: 7})
    both.step({1: 1, 2: 1, 0: 1})  # a number of rows that there are no launches for
    both.step({0: 1})
    model.close()
