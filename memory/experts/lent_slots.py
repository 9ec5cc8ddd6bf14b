"""Expert slots that a prompt borrows while it passes through, and how their experts come back.

A streamed pass (streamed.py) takes slots as rings; a long chunk computes in the memory of GPUs' slots. Used
by one thread, the engine's.
"""

from __future__ import annotations

from collections.abc import Iterable

from memory.experts.slot_table import Key, SlotTable
from memory.experts.slots import ExpertSlots
from memory.transfer import Priority

REFILLS = 4  # transfers at once


class LentSlots:
    """What of `slots` a prompt has at the moment, and which experts gave way to it."""

    def __init__(self, slots: ExpertSlots) -> None:
        self._slots = slots
        self._lent: list[tuple[SlotTable, Key]] = []  # the least valuable of each time first

    def borrow(self, table: SlotTable, count: int) -> list[int]:
        """Up to so many slots of a table, for a prompt to pass through: free ones, then those of the experts
        of least value, which come back by `refill` after `give_back`."""
        slots = self._slots
        slots.settle()
        found: list[int] = []
        has_waited = False
        while len(found) < count:
            slot = table.arena.take()
            if slot is None:
                fullest = max(range(len(table.by_layer)), key=table.count)
                leaving = slots.victim(table, fullest, slots.claims)
                if leaving is None and has_waited:
                    break
                if leaving is None:
                    slots.wait_for_transfers()
                    has_waited = True
                    continue
                slot = slots.evict(table, leaving)
                self._lent.append((table, leaving))
            found.append(slot)
        return found

    def lend(self) -> None:
        """Give GPUs' lendable slots to whoever computes a long chunk, until `take_back`; their experts come
        back by `refill`."""
        slots = self._slots
        for table in slots.gpus:
            if not table.arena.can_lend:
                continue
            slots.wait_for_transfers()
            lent = [
                (layer, expert)
                for layer, entries in enumerate(table.by_layer)
                for expert, entry in entries.items()
                if entry.slot >= table.arena.kept
            ]
            for key in sorted(lent, key=slots.score):
                table.arena.give_back(slots.evict(table, key))
                self._lent.append((table, key))
            table.forget_lent()
            table.arena.lend()

    def take_back(self) -> bool:
        """Slots that were lent are for experts again; False while something else has their memory."""
        are_back = [table.arena.take_back() for table in self._slots.gpus]
        return all(are_back)

    def give_back(self, table: SlotTable, numbers: Iterable[int]) -> None:
        """What was borrowed is free again."""
        for number in numbers:
            table.arena.give_back(number)

    def refill(self) -> None:
        """Bring back experts that gave way to a prompt, the most valuable first and a few at a time; called
        between a step's own transfers, until all are back."""
        if not self.take_back():
            return
        slots = self._slots
        at = len(self._lent) - 1  # the least valuable ones left first
        under_way = 0
        while at >= 0 and under_way < REFILLS:
            table, key = self._lent[at]
            found = slots.find(key)
            may_move = table is not slots.dram and table.arena.free and not slots.gpus_rest
            if found is not None and found[1].is_moving:
                under_way += 1
            elif found is not None and found[0] is slots.dram and may_move:
                slots.move_to_gpu(key, Priority.PREFETCH)
                under_way += 1
            elif found is not None or (table is not slots.dram and not table.arena.free):
                del self._lent[at]
            elif slots.dram.arena.free > slots.reserved:
                slots.read(key, Priority.PREFETCH)
                # not a guess: no better one cancels it
                slots.dram.by_layer[key[0]][key[1]].is_unused_prefetch = False
                under_way += 1
            else:
                break
            at -= 1
