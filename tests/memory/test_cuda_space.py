"""When memory of a GPU that was taken in pages is freed, with a driver that only notes what it is asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from memory.pages import cuda_space
from memory.pages.cuda_space import CudaSpace

GPU = torch.device("cuda", 0)
PAGE = 1 << 21


class Driver:
    """Grants everything; `asked` are the names of what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.CUmemAccess_flags = self.CUmemAllocationType = self.CUmemLocationType = self
        self.CU_MEM_ACCESS_FLAGS_PROT_READWRITE = self.CU_MEM_ALLOCATION_TYPE_PINNED = 0
        self.CU_MEM_LOCATION_TYPE_DEVICE = 0
        self.CUmemAccessDesc = SimpleNamespace
        self.CUmemAllocationProp = lambda: SimpleNamespace(location=SimpleNamespace())

    def __getattr__(self, name: str) -> Callable[..., tuple[int, int]]:
        def answer(*arguments: object) -> tuple[int, int]:
            self.asked.append(name)
            return 0, 1 << 40

        return answer


class View:
    """Of the memory, as torch's tensors are."""

    def __init__(self, memory: object, device: torch.device) -> None:
        self._memory = memory


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(cuda_space, "_driver", lambda: made)
    monkeypatch.setattr(cuda_space, "page_bytes", lambda device: PAGE)
    monkeypatch.setattr(torch, "as_tensor", View)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.asked.append("synchronize"))
    return made


@pytest.mark.parametrize("how", ["a new space", "take", "give back"])
def test_the_thread_that_lets_go_of_a_space_does_not_wait_for_its_gpu(driver: Driver, how: str) -> None:
    """It may be the one that the GPU waits for. Who takes or gives back pages next frees it."""
    other, space = CudaSpace(PAGE, GPU), [CudaSpace(4 * PAGE, GPU)]
    space[0].take(PAGE, PAGE)
    driver.asked.clear()
    thread = threading.Thread(target=space.clear)
    thread.start()
    thread.join()
    assert driver.asked == []
    if how == "a new space":
        CudaSpace(PAGE, GPU)
    elif how == "take":
        other.take(0, PAGE)
    else:
        other.give_back(0, PAGE)
    freed = ["synchronize", *["cuMemUnmap"] * 4, *["cuMemRelease"] * 2, "cuMemAddressFree"]
    assert driver.asked[: len(freed)] == freed
