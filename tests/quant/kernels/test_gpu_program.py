"""How programs for GPUs are started and captured, with what CUDA would do stubbed: no GPU is needed."""

from __future__ import annotations

import gc
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


def test_a_capture_is_disturbed_neither_by_other_threads_nor_by_what_python_collects(
    entered: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []

    @contextmanager
    def graph(made: object, *, stream: object, capture_error_mode: str) -> Iterator[None]:
        modes.append(capture_error_mode)
        assert entered == [SECOND]
        assert not gc.isenabled()
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(Word, "on_stream", lambda word, device: None)
    segment = Segment(Launcher(), SECOND)
    segment.steps = [word()]
    assert segment.capture() == ""
    assert segment.is_captured
    assert modes == ["thread_local"]
    assert gc.isenabled()
