"""Addresses on a GPU, with memory mapped behind them page by page (CUDA's virtual memory management).

Behind all addresses without a page of their own is one page, the same for all, which nobody writes to: they
read as zeros, as in host memory, and are addresses that the driver knows.

Not run on a card yet: `pages_work` tries all of it once, and whoever finds that it fails allocates at once.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from quant.errors import BudgetError

logger = logging.getLogger("loci.memory")


class CudaSpace:
    """See `Space`."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises BudgetError where the driver grants no such range, ImportError without its bindings."""
        _free_unseen()
        self._driver = _driver()
        self._device = torch.device("cuda", device.index or 0)
        self._property = self._properties()
        self.page_bytes = page_bytes(self._device)
        self._nbytes = -(-nbytes // self.page_bytes) * self.page_bytes
        self._pages: dict[int, Any] = {}  # by offset
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().synchronize()  # the context exists
            self._begin = int(self._call("cuMemAddressReserve", self._nbytes, 0, 0, 0))
            self._shared = self._new_page()
            memory = _Bytes(self._begin, nbytes)  # torch keeps it as long as there is any view
            owned = self._begin, self._nbytes, self.page_bytes, self._shared, self._pages
            held = _Held(self._driver, self._device, *owned)
            weakref.finalize(memory, _unseen.append, held).atexit = False
            for at in range(0, self._nbytes, self.page_bytes):
                self._call("cuMemMap", self._begin + at, self.page_bytes, 0, self._shared, 0)
            self._allow(0, self._nbytes)
            self._call("cuMemsetD8", self._begin, 0, self.page_bytes)
            self.whole = torch.as_tensor(memory, device=self._device)

    def take(self, start: int, length: int) -> None:
        """Map memory behind a part. Raises BudgetError where the GPU has no more."""
        _free_unseen()
        missing = [at for at in range(start, start + length, self.page_bytes) if at not in self._pages]
        if missing:
            with torch.cuda.device(self._device):
                torch.cuda.current_stream().synchronize()  # this thread has the device's context
                for at in missing:
                    self._take_page(at)

    def give_back(self, start: int, length: int) -> None:
        """Unmap a part, after what has been launched so far."""
        _free_unseen()
        held = [at for at in range(start, start + length, self.page_bytes) if at in self._pages]
        if held:
            with torch.cuda.device(self._device):
                torch.cuda.current_stream().synchronize()
                for at in held:
                    self._put(at, self._shared)
                    self._call("cuMemRelease", self._pages.pop(at))

    def _take_page(self, at: int) -> None:
        self._pages[at] = handle = self._new_page()
        self._put(at, handle)
        self._call("cuMemsetD8", self._begin + at, 0, self.page_bytes)

    def _new_page(self) -> Any:
        try:
            return self._call("cuMemCreate", self.page_bytes, self._property, 0)
        except RuntimeError as error:
            raise BudgetError(f"{self._device}: no more memory for the KV cache ({error})") from None

    def _put(self, at: int, handle: Any) -> None:
        """Another page behind an address."""
        self._call("cuMemUnmap", self._begin + at, self.page_bytes)
        self._call("cuMemMap", self._begin + at, self.page_bytes, 0, handle, 0)
        self._allow(at, self.page_bytes)

    def _allow(self, at: int, nbytes: int) -> None:
        access = self._driver.CUmemAccessDesc()
        access.location = self._property.location
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call("cuMemSetAccess", self._begin + at, nbytes, [access], 1)

    def _properties(self) -> Any:
        driver = self._driver
        found = driver.CUmemAllocationProp()
        found.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        found.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        found.location.id = self._device.index
        return found

    def _call(self, name: str, *arguments: Any) -> Any:
        result, *values = getattr(self._driver, name)(*arguments)
        if int(result) != 0:
            raise RuntimeError(f"{name}: {result!r}")
        return values[0] if values else None


class _Bytes:
    """Memory at an address, for `torch.as_tensor`."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


@dataclass
class _Held:
    """What a space has of the driver."""

    driver: Any
    device: torch.device
    begin: int
    nbytes: int
    page: int
    shared: Any
    pages: dict[int, Any]

    def free(self) -> None:
        """Return all memory and the addresses, after what has been launched."""
        torch.cuda.synchronize(self.device)
        for at in range(0, self.nbytes, self.page):
            self.driver.cuMemUnmap(self.begin + at, self.page)
        for handle in (self.shared, *self.pages.values()):
            self.driver.cuMemRelease(handle)
        self.pages.clear()
        self.driver.cuMemAddressFree(self.begin, self.nbytes)


# Of spaces without a view. Any thread may let go of the last one: also one that a GPU waits for, which must
# not wait for the GPU, and in the middle of a capture, which waiting would break. So whoever takes or gives
# back memory next, which is between steps, frees them.
_unseen: deque[_Held] = deque()


def _free_unseen() -> None:
    while _unseen:
        _unseen.popleft().free()


@cache
def page_bytes(device: torch.device) -> int:
    """The smallest piece that the driver maps. Raises ImportError, RuntimeError."""
    driver = _driver()
    wanted = driver.CUmemAllocationProp()
    wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    wanted.location.id = device.index or 0
    smallest = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    result, nbytes = driver.cuMemGetAllocationGranularity(wanted, smallest)
    if int(result) != 0:
        raise RuntimeError(f"cuMemGetAllocationGranularity: {result!r}")
    return int(nbytes)


@cache
def pages_work(device: torch.device) -> bool:
    """Whether memory of this GPU can be taken in pages; logs why not."""
    try:
        space = CudaSpace(4 * page_bytes(device), device)
        end = 3 * space.page_bytes
        space.take(end, space.page_bytes)
        space.whole[end] = 7
        works = int(space.whole[end]) == 7
        space.give_back(end, space.page_bytes)
    except (ImportError, AttributeError, RuntimeError, TypeError, BudgetError) as error:
        logger.warning(
            "%s: the KV cache is allocated whole instead of growing with its sequences (%s)", device, error
        )
        return False
    return works


def _driver() -> Any:
    from cuda.bindings import driver

    return driver
