"""Addresses on a GPU, with memory mapped behind them page by page (CUDA's virtual memory management).

Not run on a card yet: `pages_work` tries all of it once, and whoever finds that it fails allocates at once.
"""

from __future__ import annotations

import logging
import weakref
from functools import cache
from typing import Any

import torch

from quant.errors import BudgetError

logger = logging.getLogger("loci.memory")


class CudaSpace:
    """See `Space`. The first page is always there: torch asks the driver whose memory the address is."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        """Raises BudgetError where the driver grants no such range, ImportError without its bindings."""
        self._driver = _driver()
        self._device = torch.device("cuda", device.index or 0)
        self._property = self._properties()
        self.page_bytes = page_bytes(self._device)
        self._nbytes = -(-nbytes // self.page_bytes) * self.page_bytes
        self._pages: dict[int, Any] = {}  # by offset
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().synchronize()  # the context exists
            self._begin = int(self._call("cuMemAddressReserve", self._nbytes, 0, 0, 0))
            self.take(0, self.page_bytes)
            memory = _Bytes(self._begin, nbytes)  # torch keeps it as long as there is any view
            owned = (self._driver, self._device, self._begin, self._nbytes, self.page_bytes, self._pages)
            weakref.finalize(memory, _free, *owned).atexit = False
            self.whole = torch.as_tensor(memory, device=self._device)

    def take(self, start: int, length: int) -> None:
        """Map memory behind a part. Raises BudgetError where the GPU has no more."""
        missing = [at for at in range(start, start + length, self.page_bytes) if at not in self._pages]
        if missing:
            with torch.cuda.device(self._device):
                torch.cuda.current_stream().synchronize()  # this thread has the device's context
                for at in missing:
                    self._take_page(at)

    def give_back(self, start: int, length: int) -> None:
        """Unmap a part, after what has been launched so far."""
        torch.cuda.current_stream(self._device).synchronize()
        for at in range(max(start, self.page_bytes), start + length, self.page_bytes):
            handle = self._pages.pop(at, None)
            if handle is not None:
                self._call("cuMemUnmap", self._begin + at, self.page_bytes)
                self._call("cuMemRelease", handle)

    def _take_page(self, at: int) -> None:
        driver, address = self._driver, self._begin + at
        try:
            handle = self._call("cuMemCreate", self.page_bytes, self._property, 0)
        except RuntimeError as error:
            raise BudgetError(f"{self._device}: no more memory for the KV cache ({error})") from None
        self._call("cuMemMap", address, self.page_bytes, 0, handle, 0)
        self._pages[at] = handle
        access = driver.CUmemAccessDesc()
        access.location = self._property.location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._call("cuMemSetAccess", address, self.page_bytes, [access], 1)
        self._call("cuMemsetD8", address, 0, self.page_bytes)

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


def _free(
    driver: Any, device: torch.device, begin: int, nbytes: int, page: int, pages: dict[int, Any]
) -> None:
    """Return all memory of a space and its addresses, after what has been launched."""
    torch.cuda.synchronize(device)
    for at, handle in pages.items():
        driver.cuMemUnmap(begin + at, page)
        driver.cuMemRelease(handle)
    pages.clear()
    driver.cuMemAddressFree(begin, nbytes)


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
