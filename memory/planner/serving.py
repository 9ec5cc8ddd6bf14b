"""What a server takes of a machine where nobody said it: GPUs, sequences, context, KV pool, chunks, caches.

Each choice carries its reason. `serving_plan` makes them all, from a model's shape and the machine alone;
what an operator has set is taken as it is.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace

from memory.hardware.profiles import HardwareProfile, written
from memory.planner.cost_model import MAX_RECORDED_ROWS
from memory.planner.forecast import Forecast, forecast
from memory.planner.placement import Placement, Workload
from memory.planner.placing import PROCESS_BYTES, plan
from memory.planner.prefill import planned_chunk
from memory.planner.routing import SKEWED, UNIFORM, Routing
from memory.planner.search import largest
from memory.planner.shape import ModelShape
from quant.errors import BudgetError

# Tokens of a sequence that is neither short nor long; of a prompt that chunks are chosen for.
USUAL_CONTEXT = 8192
TYPICAL_PROMPT = 32_768
MIN_CONTEXT = 512  # a pool of no given size holds this much at least
# The KV pool's share of the memory that weights leave free, and of all where they leave little.
KV_SHARE = 0.25
KV_SHARE_OF_ALL = 0.1
# The prefix cache's share of what is left then, and of all where nothing is.
PREFIX_SHARE = 0.1
PREFIX_SHARE_OF_ALL = 0.02
# GPUs are taken where they make steps faster by so much at least: less is within the model's own error.
WORTH_A_GPU = 1.05
SEQUENCES = (MAX_RECORDED_ROWS, 8, 4, 2, 1)


@dataclass(frozen=True)
class Asked:
    """What an operator has set; None where the plan decides. Bytes are of DRAM, but KV's in all."""

    context: int | None = None
    sequences: int | None = None
    chunk: int | None = None
    kv_bytes: int | None = None
    prefix_bytes: int | None = None
    weights_bytes: int | None = None
    draft_bytes: int = 0  # of weights that guess tokens ahead, and their keys


@dataclass(frozen=True)
class Choice:
    """A setting's value, and why."""

    setting: str
    value: str
    why: str


@dataclass(frozen=True)
class ServingPlan:
    """A placement of a model for serving, what is expected of it, and the reasons.

    hardware  the machine with the GPUs that are used
    """

    placement: Placement
    hardware: HardwareProfile
    expected: Forecast
    choices: tuple[Choice, ...]

    @property
    def workload(self) -> Workload:
        """What it was made for."""
        return self.placement.workload


def serving_plan(
    shape: ModelShape, hardware: HardwareProfile, asked: Asked, *, pools: bool = True
) -> ServingPlan:
    """The plan for a machine with the GPUs that are to be used.

    pools  whether sequences share pages wherever their KV lies; else each has room for the longest

    Raises BudgetError where the KV pool that was asked for holds no sequence.
    """
    choices: list[Choice] = []
    workload = _workload(shape, hardware, asked, choices, pools=pools)
    tried = workload if asked.chunk is None else replace(workload, prefill_chunk=asked.chunk)
    if not plan(shape, hardware, tried).fits:
        lean = replace(
            asked,
            sequences=asked.sequences or 1,
            chunk=asked.chunk or min(MIN_CONTEXT, workload.context),
            kv_bytes=asked.kv_bytes
            or bytes_of_one(shape, hardware, asked.context or min(MIN_CONTEXT, shape.max_context)),
            prefix_bytes=asked.prefix_bytes or 0,
        )
        workload = _workload(shape, hardware, lean, [], pools=pools)
        choices = _lean_choices(shape, hardware, asked, replace(workload, prefill_chunk=lean.chunk or 1))
        asked = lean
    chunk = asked.chunk
    if chunk is None:
        short = replace(workload, context=min(workload.context, TYPICAL_PROMPT))
        chunk = planned_chunk(shape, hardware, short)
        choices.append(
            Choice("prefill_chunk", f"{chunk}", "the smallest with 98 % of prompts' best rate, by plan")
        )
    workload = replace(workload, prefill_chunk=chunk)
    placement = plan(shape, hardware, workload)
    expected = forecast(shape, hardware, workload, routing_of(shape))
    return ServingPlan(placement, hardware, expected, tuple(choices))


def routing_of(shape: ModelShape) -> Routing:
    """The routing that is taken for granted where none was learned."""
    return SKEWED if shape.expert_nbytes else UNIFORM


def chosen_gpus(shape: ModelShape, hardware: HardwareProfile, asked: Asked) -> tuple[tuple[int, ...], str]:
    """Which GPUs of a machine to use, and why: with the first so many of those that are of use, steps are
    fastest.

    Raises BudgetError where the KV pool that was asked for holds no sequence with any number of them.
    """
    everything = tuple(range(len(hardware.gpus)))
    if not everything:
        return (), "there is no GPU"
    if not shape.expert_nbytes:
        return (), "models without routed experts are computed by the processor"
    asked = replace(asked, chunk=asked.chunk or MIN_CONTEXT)
    useful = _gpus_of_use(shape, hardware, asked) if len(everything) > 1 else everything
    rates: dict[int, float] = {}
    refused: dict[int, BudgetError] = {}  # GPUs have larger pages than the host
    for some in range(len(useful) + 1):
        gpus = tuple(hardware.gpus[n] for n in useful[:some])
        try:
            found = serving_plan(shape, replace(hardware, gpus=gpus), asked)
        except BudgetError as error:
            refused[some] = error
            continue
        is_long_enough = found.workload.context >= (asked.context or 0)
        if found.placement.fits and is_long_enough and len(_used_gpus(found)) == some:
            steps = found.expected.alone.tokens_per_s * found.expected.together.tokens_per_s
            rates[some] = steps**0.5
    if not rates:
        if refused:
            raise refused[max(refused)]
        return everything, "the model needs all there is"
    best = next(some for some in rates if rates[some] * WORTH_A_GPU >= max(rates.values()))
    all_rates = ", ".join(f"{rate:.3g} tok/s with {some or 'none'}" for some, rate in rates.items())
    others = f"; with {' or '.join(map(str, refused))} the KV pool asked for holds no sequence"
    useless = ", ".join(f"GPU {n}" for n in everything if n not in useful)
    empty = f"; nothing would lie on {useless}" if useless else ""
    return useful[:best], f"by plan {all_rates}{others if refused else ''}{empty}"


def _gpus_of_use(shape: ModelShape, hardware: HardwareProfile, asked: Asked) -> tuple[int, ...]:
    """The GPUs that a plan with all of them puts anything on. One with next to no free memory, say because a
    screen or another program has it, has no room even for what computing takes."""
    try:
        used = _used_gpus(serving_plan(shape, hardware, asked))
    except BudgetError:
        return tuple(range(len(hardware.gpus)))
    return tuple(n for n in range(len(hardware.gpus)) if f"vram:{n}" in used)


def _used_gpus(found: ServingPlan) -> set[str]:
    return {place.tier for place in found.placement.places if place.tier.startswith("vram")}


def _workload(
    shape: ModelShape, hardware: HardwareProfile, asked: Asked, choices: list[Choice], *, pools: bool
) -> Workload:
    """Sequences, context, KV pool and prefix cache. Raises BudgetError for a pool without a page."""
    context = asked.context or shape.max_context
    on_gpus = sum(gpu.memory_bytes for gpu in hardware.gpus)
    dram = max(0, hardware.dram_bytes - PROCESS_BYTES)
    held = max(0, memory_bytes(shape) - on_gpus) + asked.draft_bytes
    weights = held if asked.weights_bytes is None else min(held, asked.weights_bytes)
    free = max(0, dram - weights)
    page, least = largest_page(hardware), asked.context or min(context, MIN_CONTEXT)
    if asked.kv_bytes is None:
        room, why = _kv_room(free, dram, on_gpus, bytes_of_one(shape, hardware, least), least)
    else:
        room, why = asked.kv_bytes, ""

    def pool(tokens: int, sequences: int) -> int:
        return shape.pool_bytes(tokens, sequences, context, page)

    def wanted(sequences: int) -> int:
        return max(context, min(context, USUAL_CONTEXT) * sequences)

    sequences = asked.sequences or next(
        (n for n in SEQUENCES if pool(min(context, USUAL_CONTEXT) * n, n) <= room), 1
    )
    usual = min(context, USUAL_CONTEXT)
    if asked.sequences is None:
        fits = pool(usual * sequences, sequences) <= room
        reason = f"{usual:,} tokens of each fit into the KV pool" if fits else "the KV pool is small"
        most = f"; steps of more than {MAX_RECORDED_ROWS} are not recorded"
        choices.append(
            Choice("max_num_seqs", f"{sequences}", reason + (most if sequences == SEQUENCES[0] else ""))
        )
    if asked.kv_bytes is None and on_gpus:
        needed = max(pool(wanted(sequences), sequences), bytes_of_one(shape, hardware, least))
        if needed < room:
            room, why = needed, f"the longest sequence, or {usual:,} tokens of each"
    if pools:
        tokens = largest(lambda count: pool(count, sequences) <= room, sequences * context)
        longest = min(context, tokens)
    else:
        longest = largest(lambda each: sequences * bytes_of_one(shape, hardware, each) <= room, context)
        tokens = sequences * longest
    if not longest and asked.kv_bytes is not None:
        count = 1 if pools else sequences
        raise no_room(room, count * bytes_of_one(shape, hardware, least), count)
    nbytes = shape.pool_bytes(tokens, sequences, longest, page)
    if asked.kv_bytes is None:
        why = "all that the sequences can have" if tokens == sequences * context else why
        choices.append(Choice("kv_budget", _size(nbytes), f"{tokens:,} tokens; {why}"))
    if asked.context is None:
        whole = "all that the model can" if longest == shape.max_context else "what the KV pool holds"
        choices.append(Choice("max_model_len", f"{longest}", whole))
    kv = shape.kv_bytes(0, sequences) + nbytes
    prefix = asked.prefix_bytes
    if prefix is None:
        prefix, why = _prefix_bytes(max(0, free - (0 if on_gpus else kv)), dram)
        choices.append(Choice("prefix_cache", _size(prefix), why))
    return Workload(
        longest,
        sequences,
        kv_tokens=tokens,
        weights_bytes=asked.weights_bytes,
        prefix_bytes=prefix,
        draft_bytes=asked.draft_bytes,
    )


def _kv_room(free: int, dram: int, on_gpus: int, of_one: int, least: int) -> tuple[int, str]:
    """Bytes that the KV pool may take, and why; `of_one` sequence of `least` tokens at least."""
    if on_gpus:
        room, why = int(KV_SHARE_OF_ALL * on_gpus), f"at most {KV_SHARE_OF_ALL:.0%} of the GPUs' memory"
    elif KV_SHARE * free >= KV_SHARE_OF_ALL * dram:
        room, why = int(KV_SHARE * free), f"{KV_SHARE:.0%} of the memory that weights leave free"
    else:
        room, why = int(KV_SHARE_OF_ALL * dram), f"{KV_SHARE_OF_ALL:.0%} of memory: weights need the rest"
    return (room, why) if room >= of_one else (of_one, f"a sequence of {least:,} tokens has to fit")


def _prefix_bytes(left: int, dram: int) -> tuple[int, str]:
    """Bytes for states of earlier prompts, of so many that are left of DRAM, and why."""
    if PREFIX_SHARE * left >= PREFIX_SHARE_OF_ALL * dram:
        return int(PREFIX_SHARE * left), f"{PREFIX_SHARE:.0%} of what is left of memory"
    if PREFIX_SHARE_OF_ALL * dram <= left / 2:
        return int(PREFIX_SHARE_OF_ALL * dram), f"{PREFIX_SHARE_OF_ALL:.0%} of memory: weights need the rest"
    return left // 2, "half of the little that is left of memory"


def _lean_choices(shape: ModelShape, hardware: HardwareProfile, asked: Asked, work: Workload) -> list[Choice]:
    """What was chosen of a workload that is as small as makes sense, since nothing larger fits."""
    pool = shape.pool_bytes(work.kv_tokens or 0, work.sequences, work.context, largest_page(hardware))
    why = "as little as makes sense: weights need the memory"
    chosen = {
        "max_num_seqs": (asked.sequences, f"{work.sequences}", why),
        "kv_budget": (asked.kv_bytes, _size(pool), f"{work.kv_tokens:,} tokens; {why}"),
        "max_model_len": (asked.context, f"{work.context}", "what the KV pool holds"),
        "prefix_cache": (asked.prefix_bytes, _size(work.prefix_bytes), why),
        "prefill_chunk": (asked.chunk, f"{work.prefill_chunk}", why),
    }
    return [Choice(name, value, why) for name, (given, value, why) in chosen.items() if given is None]


def memory_bytes(shape: ModelShape) -> int:
    """Bytes of all weights in memory, were there room for all."""
    experts = sum(layer.experts * (shape.slot_bytes or layer.expert.nbytes) for layer in shape.layers)
    in_files = sum(layer.experts * layer.expert.nbytes for layer in shape.layers)
    return shape.nbytes - in_files + experts + sum(layer.decoded for layer in shape.layers)


def largest_page(hardware: HardwareProfile) -> int:
    """Bytes of the largest page that KV is taken in on a machine, wherever its layers will be."""
    return max((gpu.page_bytes for gpu in hardware.gpus), default=mmap.PAGESIZE)


def bytes_of_one(shape: ModelShape, hardware: HardwareProfile, tokens: int) -> int:
    """Bytes of the pages of a sequence of so many tokens, at most."""
    return shape.pool_bytes(tokens, 1, tokens, largest_page(hardware))


def no_room(pool: int, needed: int, sequences: int = 1) -> BudgetError:
    """For a KV pool of so many bytes that holds nothing; so many sequences need `needed`."""
    who = "a sequence" if sequences == 1 else f"{sequences} sequences"
    return BudgetError(
        f"the KV pool of {pool / 1e6:,.3f} MB has no room for {who}; raise --kv-budget to {written(needed)}"
    )


def too_long(pool: int, tokens: int, longest: int, needed: int, sequences: int = 1) -> BudgetError:
    """For sequences of so many tokens, of which a KV pool of so many bytes holds `longest`; so many of them
    need `needed` bytes together."""
    each, for_all = needed / sequences, f" for {sequences}" if sequences > 1 else ""
    return BudgetError(
        f"a sequence of {tokens:,} tokens needs {each / 1e6:,.1f} MB of KV cache, but the pool has "
        f"{pool / 1e6:,.1f} MB{for_all}: raise --kv-budget to {written(needed)}, or lower --max-model-len to "
        f"{longest}"
    )


def _size(nbytes: int) -> str:
    """As settings take it."""
    if nbytes < 2**20:
        return f"{nbytes}B" if nbytes else "0"
    return f"{nbytes / 2**30:.1f}GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f}MiB"
