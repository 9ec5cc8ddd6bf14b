"""What a recorder for a GPU notes: operations, and which of them passes what to which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quant.errors import FormatError
from quant.kernels.cpu.program import Buffer, HandOver
from quant.kernels.cuda.mailbox import Word
from quant.kernels.cuda.row_tasks import IN_RING


@dataclass(eq=False)
class Fixed(Buffer):
    """A buffer that is never written: the same values in every step."""

    held: torch.Tensor | None = None


@dataclass(eq=False)
class Noted:
    """An operation.

    ins, outs  by their names in lowering.py: buffers, weights, tensors, numbers; None where there is none
    sees       state of sequences that it reads
    changes    and writes
    work       what the caller does at a hand-over, unless the number at `skip` is not 0
    """

    kind: str
    ins: dict[str, Any]
    outs: dict[str, Buffer]
    sees: tuple[torch.Tensor, ...] = ()
    changes: tuple[torch.Tensor, ...] = ()
    layer: int | None = None
    work: HandOver | None = None
    skip: torch.Tensor | None = None

    @property
    def reads(self) -> list[Buffer]:
        """The buffers among what goes in."""
        return [value for value in self.ins.values() if isinstance(value, Buffer)]

    @property
    def words(self) -> tuple[Word, ...]:
        """What it sets or waits for, once it is done."""
        found: tuple[Word, ...] = self.ins.get("words", ())
        return found

    @property
    def is_mailed(self) -> bool:
        """Whether it leaves something in a mailbox."""
        return self.kind in ("route", "weigh") and self.ins.get("box") is not None

    def is_plain(self, *without: str) -> bool:
        """Whether it has none of these."""
        return all(self.ins.get(name) is None for name in without)


class Chains:
    """The operations so far, with who wrote each buffer and how often it is read."""

    def __init__(self, noted: Sequence[Noted], kept: Sequence[Buffer]) -> None:
        self.ops: list[Noted | None] = []
        self._at: dict[int, int] = {}  # by the id of a buffer that one operation wrote
        self._reads = Counter(id(buffer) for op in noted for buffer in op.reads)
        self._reads.update(id(buffer) for buffer in kept)

    def add(self, op: Noted) -> None:
        self._at.update({id(buffer): len(self.ops) for buffer in op.outs.values()})
        self.ops.append(op)

    def before(self, value: object, kind: str) -> Noted | None:
        """The operation of that kind whose only result, read once, is `value`."""
        if not isinstance(value, Buffer) or self._reads[id(value)] != 1:
            return None
        at = self._at.get(id(value))
        op = None if at is None else self.ops[at]
        return op if op is not None and op.kind == kind and list(op.outs.values()) == [value] else None

    def written_by(self, value: object, kind: str) -> Noted | None:
        """The operation of that kind that writes `value`, whoever reads it."""
        at = self._at.get(id(value))
        op = None if at is None else self.ops[at]
        return op if op is not None and op.kind == kind else None

    def written(self, value: object, kind: str) -> Noted | None:
        """The operation of that kind that writes `value`, if no operation behind it needs it yet."""
        at = self._at.get(id(value))
        op = None if at is None else self.ops[at]
        if at is None or op is None or op.kind != kind:
            return None
        later = [other for other in self.ops[at + 1 :] if other is not None]
        return None if any(value is read for other in later for read in other.reads) else op

    def writer(self, buffer: Buffer) -> Noted:
        """The operation that writes a buffer."""
        op = self.ops[self._at[id(buffer)]]
        assert op is not None
        return op

    def drop(self, *ops: Noted) -> None:
        """Take away what has become part of another."""
        gone = {id(op) for op in ops}
        self.ops = [None if op is not None and id(op) in gone else op for op in self.ops]

    def last_ring_write(self, state: torch.Tensor) -> Noted:
        """The operation that stored a row in this ring. Raises FormatError."""
        for op in reversed(self.ops):
            is_write = op is not None and op.kind == "latent" and op.ins.get("state") is state
            if op is not None and is_write and op.ins["stored"] == IN_RING and op.is_plain("weight", "turns"):
                return op
        raise FormatError("groups are pooled of rows that were stored in the same step")
