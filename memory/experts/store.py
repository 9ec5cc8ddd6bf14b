"""The expert store: placement, movement and computation of routed experts.

Experts live in slots of arenas: one arena per GPU (real or virtual) and one in DRAM; the rest is on
disk. For a layer's step the store
  - computes experts that a GPU holds on that GPU, and experts that DRAM holds on the CPU, or moves some
    of these to a GPU first, so that link and CPU are busy for equally long;
  - reads missing ones from disk on reader threads, which also repack them for the kernels;
  - prefetches the predicted experts of the next layer, at lower priority than everything needed now.

Results do not depend on any of this: each chosen expert's output is computed separately, and outputs are
added in the router's order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from memory.experts.at_hand import AtHand
from memory.experts.lent_slots import LentSlots
from memory.experts.policy import Predictive, neighbours_of
from memory.experts.reader import ExpertFiles, default_readers
from memory.experts.slot_table import Key
from memory.experts.slots import ExpertSlots
from memory.experts.step import ExpertStep
from memory.experts.streamed import StreamedPass
from memory.experts.streamed_step import StreamedStep
from memory.experts.streaming import is_streamed
from memory.telemetry import Telemetry
from memory.tiers import Tier
from memory.transfer import Priority, Ticket
from quant.kernels.interface import NO_EXTRAS, ExpertExtras, Kernels

if TYPE_CHECKING:
    from memory.experts.gpu_places import GpuPlaces

# A chunk of so many tokens is computed in memory that is kept free for that.
BLOCK_TOKENS = 512
FILL_BATCH = 64  # experts in flight at once while filling

# Default rate at which the CPU computes experts in DRAM, bytes per second, if it was not measured.
ASSUMED_CPU_BYTES_PER_S = 40e9
ASSUMED_CPU_FLOPS = 500e9  # on many tokens


class ExpertStore:
    """Experts of all layers within fixed budgets. Used by one thread, the engine's.

    gpus      tiers of GPUs, none on a machine without
    dram      the tier of host memory; a BudgetError says how much it must have at least
    kernels   compute in all tiers, and define the slot layout
    readers   threads that read experts from disk and repack them; default: `default_readers`
    cpu_flops  that the CPU reaches with many tokens
    lent_bytes of each GPU's slots, what a long chunk of a prompt computes with meanwhile
    placed    of each layer, how many experts each GPU and then DRAM is to hold at first
    hotness   `[layers, experts]`, shares of uses from a routing trace: hot experts are loaded first
    """

    def __init__(
        self,
        files: ExpertFiles,
        kernels: Kernels,
        dram: Tier,
        gpus: Sequence[Tier] = (),
        *,
        telemetry: Telemetry | None = None,
        hotness: torch.Tensor | None = None,
        readers: int | None = None,
        cpu_bytes_per_s: float = ASSUMED_CPU_BYTES_PER_S,
        cpu_flops: float = ASSUMED_CPU_FLOPS,
        lent_bytes: int = 0,
        placed: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._files = files
        self._kernels = kernels
        self.telemetry = telemetry or Telemetry()
        self._policies = [
            Predictive(files.experts, prior=None if hotness is None else hotness[layer].numpy())
            for layer in range(files.layers)
        ]
        self.slots = ExpertSlots(
            files, kernels, dram, gpus, self._policies, self.telemetry,
            readers=readers or default_readers(), cpu_bytes_per_s=cpu_bytes_per_s, lent_bytes=lent_bytes,
            placed=placed,
        )  # fmt: skip
        self.lent = LentSlots(self.slots)
        self._cpu_flops = cpu_flops
        self._passing: StreamedPass | None = None  # a prompt that is being computed
        self._used: list[list[int]] = [[] for _ in range(files.layers)]  # by each layer's newest step
        self._predicted: set[Key] = set()  # guessed for a step to come
        self._guesses: list[set[int]] = [set() for _ in range(files.layers)]  # not compared yet
        self._ahead: list[Ticket | None] = [None] * len(self.slots.gpus)  # the last prefetch copy to each GPU
        self._fill()

    def close(self) -> None:
        """Stop the links and close the files."""
        self.slots.close()

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes allocated for experts in each tier."""
        return {table.tier.name: table.arena.nbytes for table in self.slots.tables}

    def residency(self) -> dict[str, int]:
        """Number of experts in each tier; the rest are on disk only."""
        layers = range(self._files.layers)
        return {table.tier.name: sum(map(table.count, layers)) for table in self.slots.tables}

    def expert_locations(self) -> list[list[str]]:
        """The tier that holds each expert, by layer and expert; `nvme` where none does."""
        tiers = [["nvme"] * self._files.experts for _ in range(self._files.layers)]
        for table in reversed(self.slots.tables):  # of two copies, the GPU's counts
            for layer, entries in enumerate(table.by_layer):
                for expert in list(entries):  # copied at once: another thread may read it
                    tiers[layer][expert] = table.tier.name
        return tiers

    def uses(self) -> list[list[float]]:
        """How often each expert was used, by layer, as far as policies were told: old uses count less."""
        return [policy.uses().tolist() for policy in self._policies]

    @property
    def is_still(self) -> bool:
        """True if all experts are in DRAM for good: nothing is ever read, moved or guessed."""
        return self.slots.keeps_copies and not self.slots.gpus

    @property
    def at_hand(self) -> AtHand | None:
        """Experts that native code may compute with without asking; None where there is none such."""
        found = self.slots.at_hand
        return None if found is None or not found.addresses.any() else found

    def count_uses(self, count: int) -> None:
        """Count uses of experts in DRAM that were computed without asking."""
        for counter in ("hits", "computed"):
            self.telemetry.add(counter, self.slots.dram.tier.name, count)

    def follow_uses(self, count: torch.Tensor) -> None:
        """The same for uses that native code counts by itself, in `count` `[1]` int64."""
        for counter in ("hits", "computed"):
            self.telemetry.follow(counter, self.slots.dram.tier.name, count)

    def used_at_hand(self, layer: int, needed: list[int], guess: Sequence[int] | None) -> None:
        """A layer's step was computed without asking, with experts that were at hand; likewise `guess`, its
        prediction, if nothing had to be read for it."""
        self.count_uses(len(needed))
        self._policies[layer].used(needed, neighbours_of(self._used, layer))
        self._used[layer] = needed
        if guess is not None:
            self._guesses[layer] = set(guess)
        self._count_guesses(layer, needed)
        for expert in needed:
            entry = self.slots.dram.find((layer, expert))
            if entry is not None and entry.is_unused_prefetch:
                entry.is_unused_prefetch = False
                self.telemetry.add("prefetches", "used")

    @cached_property
    def on_gpus(self) -> dict[torch.device, GpuPlaces]:
        """The experts of GPUs that can find them by themselves, by device; needs Triton. For recorded steps,
        which are the first to ask for them."""
        from memory.experts.gpu_places import GpuPlaces, publish

        found = {}
        for table in self.slots.gpus:
            if table.arena.slots and not table.tier.is_virtual:
                places = found[table.tier.device] = GpuPlaces(table, self._files.layers, self._files.experts)
                table.observer = places
        publish(list(found.values()))
        return found

    def begin(self, tokens: Sequence[int], top_k: int) -> None:
        """A forward begins that computes so many tokens in each layer. Where these are many, nearly all
        experts are needed: they stream past, and nothing has to be guessed. `end` ends it."""
        many = [n for n, count in enumerate(tokens) if is_streamed(count, top_k, self._files.experts)]
        if not many or not (self.slots.gpus or not self.slots.keeps_copies):
            return
        if max(tokens) > BLOCK_TOKENS:
            self.lent.lend()
        rankings = [self._policies[layer].ranking() for layer in many]
        flops = 2.0 * 3 * self._files.hidden * self._files.width
        self._passing = StreamedPass(
            self.slots, self.lent, self._kernels, many, rankings, self._files.hidden, flops, self._cpu_flops
        )

    def end(self) -> None:
        """The forward has ended; does nothing where none has begun."""
        passing, self._passing = self._passing, None
        if passing is not None:
            passing.close()
            self.lent.refill()
            self.slots.settle()
            self.slots.report_free()

    def wants_guesses(self, layer: int) -> bool:
        """True if prefetching experts of `layer` can help: from disk, or from DRAM to a GPU."""
        if self._passing is not None and layer in self._passing.layers:
            return False
        nearer = self.slots.gpus if self.slots.keeps_copies else self.slots.tables
        return bool(nearer) and sum(table.count(layer) for table in nearer) < self._files.experts

    def stream(self, layer: int, expert_ids: torch.Tensor) -> StreamedStep | None:
        """Like `acquire`, for a layer whose experts stream past; None where they do not. Of a prompt that
        uses everything, policies learn nothing."""
        if self._passing is None or layer not in self._passing.layers:
            return None
        self._give_up_guesses(layer, range(self._files.experts))
        return StreamedStep(self._passing, layer, expert_ids)

    def acquire(self, layer: int, expert_ids: torch.Tensor) -> ExpertStep:
        """Begin a layer's step: `expert_ids` `[tokens, top_k]` int64. Reads and moves start now."""
        self.end()  # the last layers may compute a few tokens alone, with experts in slots of their own
        self.lent.refill()
        needed = sorted(set(expert_ids.flatten().tolist()))
        if self.slots.gpus or not self.slots.keeps_copies:  # else nothing ever moves
            self._policies[layer].used(needed, neighbours_of(self._used, layer))
            self._used[layer] = needed
            self._give_up_guesses(layer, needed)
        return ExpertStep(self.slots, self._kernels, layer, expert_ids, needed)

    def outputs(
        self,
        layer: int,
        expert_ids: torch.Tensor,
        x: torch.Tensor,
        limit: float,
        extras: ExpertExtras = NO_EXTRAS,
    ) -> torch.Tensor:
        """Outputs of a layer's experts, `[n, hidden]`, for one expert each, ids `[n]`, and inputs `[n,
        hidden]`:
        part of a step that has found its other experts by itself, so GPUs' slots stay as they are."""
        needed = sorted(set(expert_ids.tolist()))
        self._give_up_guesses(layer, needed)
        ids = expert_ids.unsqueeze(1)
        with ExpertStep(self.slots, self._kernels, layer, ids, needed) as step:
            return step.run(x, torch.ones(ids.shape), limit, extras)

    def used_in_step(
        self, layer: int, needed: list[int], elsewhere: Sequence[int], on_gpus: Mapping[str, int]
    ) -> None:
        """A layer's step is over: GPUs have computed so many of what it needed by themselves, all but
        `elsewhere`, ascending.

        Between steps, the best of the others move to their GPUs, one at a time over each link.
        """
        self.lent.refill()
        for tier, count in on_gpus.items():
            for counter in ("hits", "computed"):
                self.telemetry.add(counter, tier, count)
        self._policies[layer].used(needed, neighbours_of(self._used, layer))
        self._used[layer] = needed
        for expert in elsewhere if self.slots.gpus else ():
            found = self.slots.find((layer, expert))
            if found is not None and found[0] is self.slots.dram and not found[1].is_moving:
                self._copy_ahead((layer, expert))

    def prefetch(self, layer: int, expert_ids: Iterable[int]) -> None:
        """Prefetch what `layer` will probably need, most likely first, as far as there is room.

        Experts on disk are read; if DRAM holds everything, one expert at a time is copied over each link.
        Nothing in use, in flight or prefetched is displaced, and demand transfers go first.
        """
        slots, guess = self.slots, list(dict.fromkeys(expert_ids))
        self._policies[layer].expected(guess)
        self._predicted = {(layer, expert) for expert in guess}
        self._guesses[layer] = set(guess)
        slots.protect(self._predicted)
        slots.cancel_reads(layer, guess)
        for expert in guess:
            found = slots.find((layer, expert))
            if found is not None:
                is_here = found[0] is slots.dram and not found[1].is_moving
                if slots.keeps_copies and slots.gpus and is_here:
                    self._copy_ahead((layer, expert))
                continue
            if not slots.make_room(layer, Priority.PREFETCH):
                break
            slots.read((layer, expert), Priority.PREFETCH)
        slots.report_free()

    def _copy_ahead(self, key: Key) -> None:
        """Copy a predicted expert to its GPU, unless another one is still in flight to it."""
        at = self.slots.home(key)
        last = self._ahead[at]
        if last is None or last.is_done:
            self._ahead[at] = self.slots.move_to_gpu(key, Priority.PREFETCH)

    def _give_up_guesses(self, layer: int, needed: Iterable[int]) -> None:
        """Compare the prediction with what is needed and cancel queued transfers that are not.

        On the disk those are wrong predictions; on links everything queued, since DRAM can compute what is
        needed.
        """
        self._predicted = {key for key in self._predicted if key[0] != layer}
        self.slots.protect(self._predicted)
        self._count_guesses(layer, needed)
        self.slots.cancel_reads(layer, needed)
        self.slots.cancel_uploads(layer)

    def _count_guesses(self, layer: int, needed: Iterable[int]) -> None:
        guess, self._guesses[layer] = self._guesses[layer], set()
        self.telemetry.add("guesses", "made", len(guess))
        self.telemetry.add("guesses", "right", len(guess.intersection(needed)))

    def _fill(self) -> None:
        """Fill GPUs and DRAM at startup as placed, the hottest first, and wait for the transfers."""
        slots = self.slots
        ranked = [policy.ranking() for policy in self._policies]
        keys = [
            (layer, expert)
            for at, rank in enumerate(zip(*ranked, strict=True))
            for layer, expert in enumerate(rank)
            if at < slots.held_first[layer]
        ]
        for_gpus = {
            (layer, expert)
            for layer, rank in enumerate(ranked)
            for expert in rank[: slots.on_gpus_first[layer]]
        }
        at = 0
        while at < len(keys):
            room = min(slots.dram.arena.free - slots.reserved, FILL_BATCH)
            if room <= 0:
                break
            batch, at = keys[at : at + room], at + room
            for ticket in [slots.read(key, Priority.DEMAND) for key in batch]:
                ticket.wait()
            if slots.gpus:
                moves = [slots.move_to_gpu(key) for key in batch if key in for_gpus]
                for move in filter(None, moves):
                    move.wait()
            slots.settle()
        slots.report_free()
