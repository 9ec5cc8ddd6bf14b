"""How a tensor of a cache lies in memory, so that its bytes can be written and read as they lie.

A slot's rows are a few long runs of memory with something else between them: keys of one head, entries of one
layer. A file has the runs one after the other, so that reading it puts whole runs where they belong. Nothing
here knows what the bytes mean: any element format that a cache has is written and read alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import torch


def as_it_lies(view: torch.Tensor) -> torch.Tensor:
    """The view with its dimensions in the order in which they lie in memory, outermost first."""
    return view.permute(_order(view))


def copied(view: torch.Tensor) -> torch.Tensor:
    """A copy in host memory, `as_it_lies`, in one piece."""
    lying = as_it_lies(view)
    return torch.empty(lying.shape, dtype=lying.dtype).copy_(lying)


def layout_of(view: torch.Tensor, rows: int | None = None) -> list[Any]:
    """What must be the same for a file to fit: dtype and shape `as_it_lies`, perhaps with so many `rows` in
    the view's first dimension."""
    order = _order(view)
    shape = [rows if axis == 0 and rows is not None else view.shape[axis] for axis in order]
    return [str(view.dtype), shape]


@dataclass(frozen=True)
class Target:
    """Memory that a tensor's bytes in a file are read into.

    memory      bytes of the host's memory
    runs        where in it each run of the file goes
    file_bytes  of a run in the file
    run_bytes   of these, how many are wanted: the rest is of later tokens
    """

    memory: memoryview
    runs: tuple[int, ...]
    file_bytes: int
    run_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return len(self.runs) * self.file_bytes

    def parts(self, start: int, stop: int, unwanted: memoryview) -> list[memoryview]:
        """Where bytes `start` to `stop` of the tensor go; what nobody wants goes into `unwanted`, which has
        room for it. Nowhere if that is all of it."""
        found: list[memoryview] = []
        is_wanted = False
        while start < stop:
            run, first = divmod(start, self.file_bytes)
            last = min(self.file_bytes, first + stop - start)
            wanted = min(last, self.run_bytes) - first
            if wanted > 0:
                at = self.runs[run] + first
                found.append(self.memory[at : at + wanted])
                is_wanted = True
            rest = last - first - max(0, wanted)
            if rest:
                found.append(unwanted[:rest])
                unwanted = unwanted[rest:]
            start += last - first
        return found if is_wanted else []


def target_in(view: torch.Tensor, rows: int, wanted: int) -> tuple[Target, torch.Tensor | None]:
    """Where a file's `rows` rows go, of which the first `wanted` are those of `view`'s first dimension.

    Straight into the view's own memory where that is the host's and rows lie in runs there; else into a
    tensor that is returned, too, to be copied to `as_it_lies(view[:wanted])`.
    """
    lying = as_it_lies(view[:wanted])
    axis = _order(view).index(0)
    beside = None
    if lying.device.type != "cpu" or not lying[(0,) * axis].is_contiguous():
        lying = beside = torch.empty(lying.shape, dtype=lying.dtype)
    size = lying.element_size()
    row_bytes = prod(lying.shape[axis + 1 :]) * size
    starts = (
        range(0, n * step, step) for n, step in zip(lying.shape[:axis], lying.stride()[:axis], strict=True)
    )
    runs = tuple(int((lying.storage_offset() + sum(at)) * size) for at in product(*starts))
    memory = _bytes_of(torch.empty(0, dtype=torch.uint8).set_(lying.untyped_storage()))
    return Target(memory, runs, rows * row_bytes, wanted * row_bytes), beside


def whole_target(tensor: torch.Tensor) -> Target:
    """All of a tensor in one piece of the host's memory."""
    memory = _bytes_of(tensor.view(-1).view(torch.uint8))
    return Target(memory, (0,), memory.nbytes, memory.nbytes)


def _order(view: torch.Tensor) -> list[int]:
    """Dimensions by their strides, the largest first; those of equal strides as they are."""
    strides = view.stride()
    return sorted(range(view.dim()), key=lambda axis: -strides[axis])


def _bytes_of(values: torch.Tensor) -> memoryview:
    shared: Any = values.numpy()
    return memoryview(shared)
