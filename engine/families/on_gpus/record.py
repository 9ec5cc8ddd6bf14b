"""Records a family's decode step on GPUs, or says why it is not recorded."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import torch

from quant.errors import FormatError
from quant.kernels.choice import recorder_on
from quant.kernels.cpu.program import Buffer
from quant.kernels.interface import Kernels

if TYPE_CHECKING:
    from engine.families.on_gpus.step import OnGpus, RecorderOn

logger = logging.getLogger("loci.engine")

Ops = TypeVar("Ops", bound="OnGpus")


def record_on_gpus(
    note: Callable[[RecorderOn], tuple[Ops, Buffer]],
    devices: Iterable[torch.device],
    kernels: Kernels,
    max_rows: int,
    capacity: int,
    room: int,
    *,
    only_look: bool,
) -> tuple[Ops | None, dict[torch.device, int]]:
    """Programs for up to `max_rows` sequences, and their bytes by device; none where something has no kernel,
    or if `only_look`.

    note  the operations of a step, and its result
    room  bytes that were kept for programs on each GPU when loading

    Raises BudgetError where they need more, for sequences of up to `capacity` tokens.
    """
    nbytes: dict[torch.device, int] = defaultdict(int)
    if any(recorder_on(device, kernels, max_rows) is None for device in devices):
        return None, nbytes
    from engine.families.on_gpus.step import check_room, recorders_on  # which needs Triton

    try:
        ops, result = note(recorders_on(kernels, max_rows))
        nbytes.update(ops.nbytes(result))
    except FormatError as error:
        logger.warning("decode steps are started operation by operation on GPUs, which is slower: %s", error)
        return None, nbytes
    check_room(room, nbytes, max_rows, capacity)
    if only_look:
        return None, nbytes
    ops.finish(result)
    return ops, nbytes
