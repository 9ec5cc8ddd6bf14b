"""The plan that a server is started by: this machine as it is, what the operator has set, and the model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from engine.drafts.beside import SmallModelFiles, open_beside
from engine.drafts.choice import DraftChoice, weights_wanted
from engine.drafts.own import own_draft_bytes, own_key_bytes, room_for_drafts
from engine.embedded import model_path
from engine.families.loader import OpenedModel
from memory.hardware.detect import Machine, detect, resident_bytes
from memory.hardware.profiles import DeviceSpec, HardwareProfile, parse_bytes
from memory.hardware.quick import known_rates
from memory.hardware.this_machine import disk_of, this_machine
from memory.pages.spaces import is_paged
from memory.planner.budget import GPU_SHARE, MemoryBudget
from memory.planner.forecast import remedy
from memory.planner.placement import NOWHERE, Workload
from memory.planner.serving import (
    Asked,
    Choice,
    ServingPlan,
    bytes_of_one,
    chosen_gpus,
    serving_plan,
    too_long,
)
from memory.planner.shape import ModelShape
from quant.errors import BudgetError, ConfigError
from quant.formats.kv_names import KvFormat
from server.settings import Settings

log = logging.getLogger("loci")

NO_DEVICES = "none"
# Of free memory that a plan may use: allocators and libraries take more than is asked of them.
USABLE_SHARE = 0.95


@dataclass(frozen=True)
class Planned:
    """How a model is to be served; `budget` is for loading, which makes the same placement of it.

    own_drafts  bytes for the model's own weights that guess ahead; 0 where they are not read
    draft_keys  bytes for keys that these keep
    disk        the one that the model is on
    small_model that guesses ahead too
    """

    machine: Machine
    shape: ModelShape
    budget: MemoryBudget
    plan: ServingPlan
    own_drafts: int = 0
    draft_keys: int = 0
    small_model: SmallModelFiles | None = None
    disk: int | None = None

    @property
    def workload(self) -> Workload:
        """Of the plan."""
        return self.plan.workload


def planned(settings: Settings, opened: OpenedModel) -> Planned:
    """The plan for this machine. Raises ConfigError or BudgetError in one line: what of the settings cannot
    be, or the smallest change that would make the model fit."""
    kv_format = opened.kv_format(settings.kv_format)
    shape = opened.family.loaded_shape(opened.checkpoint, kv_format)
    path = opened.checkpoint.path
    found = detect(path if path.is_dir() else path.parent)
    largest = _largest_file(path)
    machine = this_machine(found, known_rates(found, largest))
    machine = replace(machine, dram_bytes=int(USABLE_SHARE * (machine.dram_bytes + resident_bytes())))
    asked = _asked(settings)
    devices, gpus = _devices(settings.devices, shape, machine, asked)
    budget = MemoryBudget.of_this_machine(settings.dram_budget, devices)
    on_host = sum(gpu.budget_bytes for gpu in budget.gpus if gpu.is_virtual)
    dram_bytes = max(0, machine.dram_bytes - on_host)
    if asked.weights_bytes is None:
        budget = replace(budget, dram_bytes=dram_bytes)
    elif machine.dram_bytes < asked.weights_bytes + on_host:
        dram_bytes = asked.weights_bytes  # what was asked for is tried: it may be there
    budget = replace(budget, kv_format=kv_format, machine=replace(machine, dram_bytes=dram_bytes))
    drafts = own_drafts_room(settings.drafts, opened, budget)
    small = _small_model(settings, opened)
    asked = replace(asked, draft_bytes=drafts + (0 if small is None else small.nbytes))
    pools = all(is_paged(gpu.device) for gpu in budget.gpus)
    plan = serving_plan(shape, budget.machine_for(shape), asked, pools=pools)
    keys = own_key_bytes(opened.family, opened.checkpoint, plan.workload) if drafts else 0
    if keys:  # of as many tokens as the pool holds without them, which is not less than with them
        asked = replace(asked, draft_bytes=asked.draft_bytes + keys)
        plan = serving_plan(shape, budget.machine_for(shape), asked, pools=pools)
    _check_context(settings, shape, plan, pools=pools)
    others = [*_of_tiers(settings, plan), *_of_formats(settings, kv_format)]
    if settings.drafts == "auto":
        needed = own_draft_bytes(opened.family, opened.checkpoint)
        others.append(_of_drafts(drafts, needed, has_gpus=not all(gpu.is_virtual for gpu in budget.gpus)))
    plan = replace(plan, choices=(gpus, *plan.choices, *others))
    _check_fit(shape, plan, settings)
    budget, disk = replace(budget, workload=plan.workload), None if largest is None else disk_of(largest)
    return Planned(found, shape, budget, plan, drafts, keys, small, disk)


def own_drafts_room(choice: DraftChoice, opened: OpenedModel, budget: MemoryBudget) -> int:
    """Bytes of DRAM to keep for a model's own weights for drafts. Raises ConfigError where they are asked for
    and there are none, or layers lie on GPUs."""
    wanted = weights_wanted(choice)
    if wanted != "off" and not all(gpu.is_virtual for gpu in budget.gpus):
        has_weights = own_draft_bytes(opened.family, opened.checkpoint) > 0
        if has_weights and wanted == "mtp":
            raise ConfigError(
                f"--drafts mtp: nothing is captured of {opened.info.name}'s layers on GPUs that its draft "
                "layers could read: use --devices none, or --drafts lookup"
            )
        if has_weights:
            log.info(
                "the model's own weights for drafts are not read, and no memory is planned for them: "
                "nothing is captured of layers on GPUs that they could draft from"
            )
        if wanted == "auto":
            return 0
    room = room_for_drafts(wanted, opened.family, opened.checkpoint, budget.dram_bytes)
    if wanted == "mtp" and not room:
        raise ConfigError(
            f"--drafts mtp: {opened.info.name} has no draft layers that Loci can use; leave it out, or use "
            "--drafts lookup"
        )
    return room


def _small_model(settings: Settings, opened: OpenedModel) -> SmallModelFiles | None:
    """The model that guesses ahead for `opened`, where one was named. Raises ConfigError."""
    if settings.draft_model is None:
        return None
    if settings.drafts == "off":
        raise ConfigError("--draft-model says who drafts, but --drafts off says that nobody does")
    return open_beside(model_path(settings.draft_model), opened, settings.max_model_len)


def _asked(settings: Settings) -> Asked:
    """What of the settings the plan has to keep to. Raises ConfigError."""
    prefix = settings.prefix_cache
    return Asked(
        context=settings.max_model_len,
        sequences=settings.max_num_seqs,
        chunk=settings.prefill_chunk,
        kv_bytes=None if settings.kv_budget is None else parse_bytes(settings.kv_budget),
        prefix_bytes=None if prefix is None else 0 if prefix.strip() == "0" else parse_bytes(prefix),
        weights_bytes=None if settings.dram_budget is None else parse_bytes(settings.dram_budget),
    )


def _devices(
    asked_for: str | None, shape: ModelShape, machine: HardwareProfile, asked: Asked
) -> tuple[str | tuple[DeviceSpec, ...] | None, Choice]:
    """The GPUs to use, as `--devices` names them or by number, and why these."""
    if asked_for is not None:
        devices = None if asked_for.strip() == NO_DEVICES else asked_for
        return devices, Choice("devices", asked_for, "as asked for")
    gpus = tuple(replace(gpu, memory_bytes=int(GPU_SHARE * gpu.memory_bytes)) for gpu in machine.gpus)
    whole = replace(machine, gpus=gpus, disk_bytes=machine.disk_bytes + shape.disk_bytes)
    numbers, why = chosen_gpus(shape, whole, asked)
    if not numbers:
        if gpus:
            log.warning("no GPU of this machine is used: %s; --devices says otherwise", why)
        return None, Choice("devices", NO_DEVICES, why)
    if numbers != tuple(range(len(numbers))):  # a flag would name the first ones
        why += f"; to ask for the same, set CUDA_VISIBLE_DEVICES={','.join(map(str, numbers))} too"
    shown = ",".join(f"cuda:{gpus[n].memory_bytes / 2**30:.2f}GiB" for n in numbers)
    return tuple(DeviceSpec("cuda", n, gpus[n].memory_bytes, None) for n in numbers), Choice(
        "devices", shown, why
    )


def _of_tiers(settings: Settings, plan: ServingPlan) -> tuple[Choice, ...]:
    """What of DRAM weights take, and why."""
    if settings.dram_budget is not None:
        return ()
    parts = plan.placement.allocated()["dram"]
    nbytes = sum(parts.get(part, 0) for part in ("dense", "drafts", "experts", "engram"))
    on_disk = sum(p.count for p in plan.placement.places if p.kind == "routed_experts" and p.tier == "nvme")
    why = f"{on_disk:,} experts stay on disk" if on_disk else "all weights that are not on GPUs"
    return (Choice("dram_budget", f"{nbytes / 2**30:.2f}GiB", why),)


def _of_formats(settings: Settings, kv_format: KvFormat) -> tuple[Choice, ...]:
    """What keys and values are kept in, and why."""
    if settings.kv_format != "auto":
        return ()
    why = "exact" if kv_format == "float32" else "as the model was trained; float32 is exact"
    return (Choice("kv_format", kv_format, why),)


def _of_drafts(kept: int, needed: int, *, has_gpus: bool) -> Choice:
    """Who guesses tokens ahead, and why: bytes that are kept for the model's own weights for it, and that
    they need."""
    size = f"{needed / 2**20:,.0f} MiB of weights of its own for it"
    if kept:
        who = f"the model has {size}, and there is room; texts are looked up too"
    elif needed:
        left_out = "layers are on GPUs" if has_gpus else "they are more than a tenth of the memory"
        who = f"the model's {size} are left out, as {left_out}; texts are looked up"
    else:
        who = "the model has no weights for it; texts are looked up"
    return Choice("drafts", "auto", f"{who}, where that makes answers faster")


def _check_context(settings: Settings, shape: ModelShape, plan: ServingPlan, *, pools: bool) -> None:
    """Raises BudgetError where the KV pool holds no sequence as long as asked for; without `pools`, all."""
    wanted, longest = settings.max_model_len, plan.workload.context
    if wanted is None or longest >= wanted:
        return
    count = 1 if pools else plan.workload.sequences
    needed = count * bytes_of_one(shape, plan.hardware, wanted)
    raise too_long(sum(plan.placement.pool_bytes().values()), wanted, longest, needed, count)


def _check_fit(shape: ModelShape, plan: ServingPlan, settings: Settings) -> None:
    """Raises BudgetError that says the smallest change which would make the model fit."""
    placement = plan.placement
    if placement.fits or settings.dram_budget is not None:  # loading says how much too small that is
        return
    workload = replace(placement.workload, kv_tokens=None, prefix_bytes=0)
    found = remedy(shape, plan.hardware, workload)
    short = placement.used(NOWHERE)
    changes = [*found.required, *(found.options[:1] if found.options else ())]
    raise BudgetError(
        f"{shape.name} does not fit on this machine, by {short / 1e9:.1f} GB; the smallest change: "
        f"{' and '.join(changes) or 'a smaller model'}"
    )


def _largest_file(path: Path) -> Path | None:
    """The largest file of a checkpoint, to see how fast its disk is."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    try:
        return max(files, key=lambda file: file.stat().st_size, default=None)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
