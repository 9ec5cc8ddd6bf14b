"""What a model may use of this machine: bytes of DRAM, and GPUs with their budgets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from memory.hardware.detect import available_memory_bytes
from memory.hardware.profiles import (
    DeviceSpec,
    GpuSpec,
    HardwareProfile,
    parse_bytes,
    parse_devices,
    virtual_gpu,
)
from memory.hardware.this_machine import (
    ASSUMED_GPU_FLOPS,
    ASSUMED_LINK_BYTES_PER_S,
    ASSUMED_VRAM_BYTES_PER_S,
    this_machine,
)
from memory.pages.spaces import page_bytes_of
from memory.planner.placement import Workload
from memory.planner.shape import ModelShape
from memory.tiers import Tier
from quant.errors import BudgetError, ConfigError
from quant.formats.kv_names import KvFormat

logger = logging.getLogger("loci.memory")

# Share of the memory that is free at start that weights may take; the rest is for caches and work space.
WEIGHTS_SHARE = 0.75
# Share of a GPU's memory that can be asked for; the rest is the driver's and the kernels'.
GPU_SHARE = 0.93
ENOUGH_BYTES = 1 << 60


@dataclass(frozen=True)
class MemoryBudget:
    """Budgets that loading must keep.

    dram_bytes  for all weights in host memory
    gpus        with what may be allocated on each, for weights and KV
    workload    for which GPUs must have KV and work space
    machine     that all this is a part of; None for this one
    cpu_bytes_per_s  at which the CPU gets through experts, where that was measured
    kv_format   of caches
    cpu_flops   that it reaches on many tokens, where that is known
    """

    dram_bytes: int
    gpus: tuple[Tier, ...] = ()
    workload: Workload = field(default_factory=lambda: Workload(context=8192))

    cpu_bytes_per_s: float | None = None
    kv_format: KvFormat = "float32"
    cpu_flops: float | None = None
    machine: HardwareProfile | None = None

    @property
    def limited_workload(self) -> Workload:
        """The workload, with DRAM for weights as far as this budget goes."""
        return replace(self.workload, weights_bytes=self.dram_bytes)

    def machine_for(self, shape: ModelShape) -> HardwareProfile:
        """The machine to place a model on: with these GPUs, and the checkpoint on its disk already.

        Where nothing was said of the machine, DRAM has room for all that is not weights.
        """
        machine = self.machine or replace(this_machine(), dram_bytes=ENOUGH_BYTES)
        return replace(
            machine,
            gpus=tuple(_spec(gpu, machine) for gpu in self.gpus),
            disk_bytes=machine.disk_bytes + shape.disk_bytes,
        )

    @classmethod
    def of_this_machine(
        cls,
        dram: str | None = None,
        devices: str | Sequence[DeviceSpec] | None = None,
        workload: Workload | None = None,
        kv_format: KvFormat = "float32",
    ) -> MemoryBudget:
        """Budgets as a person writes them: `dram` like `16GiB`, `devices` like `virtual:24GiB@12.5GB/s`,
        or certain ones.

        Without `dram` it is a share of the memory that is free now, less what virtual GPUs take of
        it. Raises ConfigError for text that is not understood, BudgetError where there is not as much.
        """
        specs = parse_devices(devices) if isinstance(devices, str) and devices else tuple(devices or ())
        machine = this_machine() if specs else None
        gpus = tuple(_tier(f"vram:{number}", device, machine) for number, device in enumerate(specs))
        if sum(not gpu.is_virtual for gpu in gpus) > 1:
            logger.warning("using two real GPUs together is untested; `pytest tests/gpu` checks yours")
        on_gpus = sum(gpu.budget_bytes for gpu in gpus if gpu.is_virtual)
        free = available_memory_bytes()
        dram_bytes = int(free * WEIGHTS_SHARE) - on_gpus if dram is None else parse_bytes(dram)
        asked = max(dram_bytes, 0) + on_gpus
        if dram_bytes <= 0 or asked > free:
            raise BudgetError(
                f"the budgets for DRAM and virtual GPUs add up to {asked / 1e9:.1f} GB, but only "
                f"{free / 1e9:.1f} GB of memory is free; lower them"
            )
        budget = cls(dram_bytes, gpus, kv_format=kv_format)
        if machine is not None:
            budget = replace(
                budget, cpu_bytes_per_s=machine.expert_bytes_per_s, cpu_flops=machine.cpu_matmul_flops
            )
        return replace(budget, workload=workload) if workload else budget


def unused_gpus_notice(devices: str | None) -> str | None:
    """The notice for a user who requested no devices on a machine with GPUs; None if all is well."""
    if devices is not None or not torch.cuda.is_available():
        return None
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return gpus_advice([(gpu.name, gpu.total_memory) for gpu in gpus])


def gpus_advice(gpus: Sequence[tuple[str, int]]) -> str:
    """How to use GPUs of these names and bytes of memory."""
    names = ", ".join(name for name, _ in gpus)
    devices = ",".join(f"cuda:{max(1, int(GPU_SHARE * nbytes / 2**30))}GiB" for _, nbytes in gpus)
    which, them = ("a GPU", "it") if len(gpus) == 1 else (f"{len(gpus)} GPUs", "them")
    return (
        f"this machine has {which} ({names}), but Loci does not use {them}: to use {them}, pass --devices "
        f"{devices} or set LOCI_DEVICES={devices}"
    )


def _tier(name: str, device: DeviceSpec, machine: HardwareProfile | None) -> Tier:
    if device.kind == "virtual":
        return Tier(name, device.budget_bytes, torch.device("cpu"), device.link_bytes_per_s)
    if not torch.cuda.is_available():
        raise ConfigError(f"devices: there is no CUDA GPU {device.index}: {_why_no_cuda()}")
    if device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"devices: there is no CUDA GPU {device.index}; this machine has {torch.cuda.device_count()}"
        )
    free = torch.cuda.mem_get_info(device.index)[0]
    if device.budget_bytes > free:
        raise BudgetError(
            f"devices: GPU {device.index} has {free / 1e9:.1f} GB free, but {device.budget_bytes / 1e9:.1f} "
            "GB was requested"
        )
    assert machine is not None
    link = machine.gpus[device.index].link_together_bytes_per_s
    return Tier(name, device.budget_bytes, torch.device("cuda", device.index), link)


def _spec(tier: Tier, machine: HardwareProfile) -> GpuSpec:
    """A GPU of a budget as the planner sees it: the machine's, as large as its budget."""
    link = tier.link_bytes_per_s
    if tier.is_virtual:
        return virtual_gpu(machine, tier.budget_bytes, link)
    number = tier.device.index or 0
    real = [gpu for gpu in machine.gpus if gpu.kind == "cuda"]
    if number < len(real):
        return replace(
            real[number],
            memory_bytes=tier.budget_bytes,
            link_together_bytes_per_s=link or real[number].link_together_bytes_per_s,
            page_bytes=page_bytes_of(tier.device),
        )
    link = link or ASSUMED_LINK_BYTES_PER_S
    return GpuSpec(
        tier.name,
        "cuda",
        tier.budget_bytes,
        ASSUMED_VRAM_BYTES_PER_S,
        ASSUMED_GPU_FLOPS,
        link,
        link,
        page_bytes_of(tier.device),
    )


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "the installed PyTorch is built for the CPU; install one for CUDA"
    return "no driver or GPU responds (check with `nvidia-smi`)"
