"""How programs for GPUs are started and captured, with what CUDA would do stubbed: no GPU is needed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (extra `gpu`)")

from quant.kernels.cuda import program
from quant.kernels.cuda.helper import Helper
from quant.kernels.cuda.launch import Launcher
from quant.kernels.cuda.mailbox import Word
from quant.kernels.cuda.program import GpuProgram, Segment

SECOND = torch.device("cuda", 1)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """The devices that are current, the innermost last."""
    devices: list[torch.device] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        devices.append(which)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    yield devices
    program._capture_stream.cache_clear()


class Stream:
    """As it was asked for."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.device, self.priority = device, priority


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
    streams: list[object] = []

    @contextmanager
    def graph(made: object, *, stream: object, capture_error_mode: str) -> Iterator[None]:
        modes.append(capture_error_mode)
        streams.append(stream)
        assert entered == [SECOND]
        assert not gc.isenabled()
        yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(Word, "on_stream", lambda word, device: None)
    for _ in range(2):
        segment = Segment(Launcher(), SECOND)
        segment.steps = [word()]
        assert segment.capture() == ""
        assert segment.is_captured
    assert modes == ["thread_local"] * 2
    assert streams[0] is streams[1]
    assert gc.isenabled()


def test_a_helper_shares_no_stream_with_those_who_answer_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have streams of usual priority, which torch hands out in turn."""
    made: list[Stream] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda *asked, **more: made.append(Stream(*asked, **more)))
    Helper(cast(GpuProgram, SimpleNamespace(device=SECOND, runs_alone=True)))
    assert [(stream.device, stream.priority) for stream in made] == [(SECOND, -1)]
