"""Selects the best back end that this machine can run."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

from quant.errors import ConfigError
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Kernels
from quant.kernels.recording import StepRecorder

# Forces an instruction-set level of the native back end: portable, avx2 or avx512.
LEVEL_VARIABLE = "LOCI_CPU_LEVEL"

log = logging.getLogger(__name__)


def choose(gpus: Sequence[torch.device] = ()) -> Kernels:
    """The best back end this machine can run, for host memory and `gpus`.

    Logs a warning if the host has only the reference. Raises ConfigError if GPUs need Triton and it is
    missing.
    """
    host = _host()
    if not gpus:
        return host
    from quant.kernels.devices import DeviceKernels

    try:
        from quant.kernels.cuda.kernels import TritonKernels
    except ImportError as error:
        raise ConfigError(f"GPUs need Triton ({error}); run `pip install 'triton>=3.3'`") from None
    return DeviceKernels(host, {gpu: TritonKernels(gpu) for gpu in gpus})


def recorder_of(kernels: Kernels, max_rows: int) -> Recorder | None:
    """Notes steps of up to `max_rows` rows in host memory; None where plain torch computes there."""
    from quant.kernels.cpu.native import NativeKernels

    host = kernels.on(torch.device("cpu"))
    return Recorder(host, max_rows) if isinstance(host, NativeKernels) else None


def recorder_on(device: torch.device, kernels: Kernels, max_rows: int) -> StepRecorder | None:
    """The same on any device; None where only plain torch computes."""
    if device.type == "cpu":
        return recorder_of(kernels, max_rows)
    from quant.kernels.cuda.kernels import TritonKernels
    from quant.kernels.cuda.recorder import GpuRecorder

    on_device = kernels.on(device)
    return GpuRecorder(on_device, max_rows) if isinstance(on_device, TritonKernels) else None


def _host() -> Kernels:
    from quant.kernels.cpu.library import LibraryMissingError
    from quant.kernels.cpu.native import NativeKernels
    from quant.kernels.reference import ReferenceKernels

    try:
        return NativeKernels(level=os.environ.get(LEVEL_VARIABLE))
    except LibraryMissingError as error:
        log.warning("computing with plain PyTorch, which is slow: %s", error)
        return ReferenceKernels(str(error))
