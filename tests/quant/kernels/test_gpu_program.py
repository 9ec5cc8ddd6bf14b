"""How programs for GPUs are started and captured, with what CUDA would do stubbed: no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from quant.kernels.cuda.launch import Launcher
from quant.kernels.cuda.mailbox import Word
from quant.kernels.cuda.program import Segment

SECOND = torch.device("cuda", 1)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that are current, the innermost last."""
    devices: list[torch.device] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        devices.append(which)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def word() -> Word:
    return Word(torch.zeros(1, dtype=torch.int32), 0, is_wait=False)


def test_words_of_launches_without_a_graph_are_set_on_their_own_device(
    entered: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.device] = []
    monkeypatch.setattr(Word, "on_stream", lambda word, device: seen.extend(entered))
    segment = Segment(Launcher(), SECOND)
    segment.steps = [word()]
    segment.run()
    assert seen == [SECOND]
