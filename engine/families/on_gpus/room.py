"""What a step on several devices is noted with, and whether its buffers have room there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from engine.families.places import HOST
from quant.errors import BudgetError
from quant.kernels.choice import recorder_on
from quant.kernels.interface import Kernels
from quant.kernels.recording import StepRecorder


def recorders_of(
    devices: Collection[torch.device], kernels: Kernels, max_rows: int
) -> Callable[[torch.device], StepRecorder] | None:
    """New recorders for each of these devices; None where plain torch computes on one of them."""
    if None in [recorder_on(device, kernels, max_rows) for device in devices]:
        return None

    def on(device: torch.device) -> StepRecorder:
        recorder = recorder_on(device, kernels, max_rows)
        assert recorder is not None
        return recorder

    return on


def check_room(
    nbytes: Mapping[torch.device, int], devices: Collection[torch.device], room: int, rows: int, capacity: int
) -> None:
    """Raises BudgetError where the buffers of a step of `rows` sequences need more than `room` bytes, which
    were kept for them on each GPU."""
    for device in sorted(set(devices) - {HOST}, key=str):
        if (missing := nbytes[device] - room) > 0:
            raise BudgetError(
                f"{device}: a recorded step of {rows} sequences of up to {capacity:,} tokens needs "
                f"{nbytes[device] / 1e6:,.1f} MB, {missing / 1e6:,.1f} MB more than was reserved for it; "
                "lower --max-model-len or leave this GPU out of --devices"
            )
