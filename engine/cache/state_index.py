"""Where saved states are found: by digests of the texts that they belong to.

A text's state is in a file; the rows that the cache appended for its beginning may be in files of shorter
texts. So there is a digest for each place that a prompt may go on from (texts' ends, and the few tokens
before them that a state can be taken back by), and one for every `BLOCK` tokens of what files hold rows of.
Who may find a state is part of the digests, as a salt.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from engine.cache.state_files import Ids, StateHeader
from memory.planner.published import KV_MARGIN

BLOCK = 64  # tokens between places where a file may go on from the rows of another


def text_hash(salt: str) -> hashlib.blake2b:
    """Of a client's salt, and no text yet."""
    return hashlib.blake2b(salt.encode(), digest_size=16)


def then(before: hashlib.blake2b, ids: Ids) -> hashlib.blake2b:
    """That of a longer text."""
    longer = before.copy()
    longer.update(ids.tobytes())
    return longer


@dataclass(eq=False)
class Record:
    """A file that is there, or is about to be.

    blocks  digests of the beginnings, a block longer each, whose last rows are here
    ends    digests of the texts whose state it gives, and their lengths: its end, and those just before it
    parent  has the rows before `start`; children go on from rows here
    """

    path: Path
    start: int
    stop: int
    shortest: int
    has_logits: bool
    nbytes: int
    used: float
    blocks: list[bytes]
    ends: dict[bytes, int]
    parent: Record | None
    children: set[Record] = field(default_factory=set)
    is_written: bool = True

    def chain(self) -> list[Record]:
        """The files with all rows up to the state's end, from the first on."""
        found: list[Record] = [self]
        while found[-1].parent is not None:
            found.append(found[-1].parent)
        return found[::-1]


@dataclass(frozen=True)
class Found:
    """A state, and how many tokens of a prompt it gives."""

    record: Record
    length: int


class StateIndex:
    """The states of a folder.

    records  by their files
    """

    def __init__(self) -> None:
        self.records: dict[Path, Record] = {}
        self._ends: dict[bytes, Record] = {}
        self._lengths: Counter[int] = Counter()  # of the texts in `_ends`
        self._blocks: dict[bytes, Record] = {}

    def best(self, ids: Ids, salt: str) -> Found | None:
        """The state with the longest beginning of a prompt: of all but the last token, unless it has the
        logits behind that."""
        hashes = [text_hash(salt)]  # of the beginnings whose rows are in files, block by block
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            hashes.append(then(hashes[-1], ids[start : start + BLOCK]))
            if hashes[-1].digest() not in self._blocks:
                break
        most = min(len(ids), len(hashes) * BLOCK)
        for length in range(most, 0, -1):
            if length not in self._lengths:
                continue
            blocks = min(length // BLOCK, len(hashes) - 1)
            record = self._ends.get(then(hashes[blocks], ids[blocks * BLOCK : length]).digest())
            if record is None or not record.is_written:
                continue
            if length < len(ids) or (record.has_logits and length == record.stop):
                return Found(record, length)
        return None

    def likeliest(self, beginning: Ids, salt: str) -> Record | None:
        """Of the states whose rows begin as a text does, the one that was used last."""
        _, record, _ = self.known_rows(beginning, salt)
        while record is not None and (longer := [child for child in record.children if child.is_written]):
            record = max(longer, key=lambda child: child.used)
        return record

    def known_rows(self, ids: Ids, salt: str) -> tuple[int, Record | None, list[bytes]]:
        """Up to where files have a text's rows, the last of them, and digests of the blocks after that."""
        start, parent = 0, None
        digests: list[bytes] = []
        at = text_hash(salt)
        for first in range(0, len(ids) - BLOCK + 1, BLOCK):
            at = then(at, ids[first : first + BLOCK])
            found = self._blocks.get(at.digest())
            if found is not None and not digests:
                start, parent = first + BLOCK, found
            else:
                digests.append(at.digest())
        return start, parent, digests

    def add(
        self,
        path: Path,
        header: StateHeader,
        nbytes: int,
        parent: Record | None,
        blocks: list[bytes],
        *,
        is_written: bool,
    ) -> Record:
        """Index a state: its blocks, its end, and the places before that it can be taken back to. To places
        long before its own rows, the state whose rows they are can be taken back as well."""
        stop = len(header.tokens)
        first = max(header.shortest, header.start - KV_MARGIN, 1)
        at = then(text_hash(header.salt), header.tokens[:first])
        ends = {at.digest(): first}
        for length in range(first + 1, stop + 1):
            at = then(at, header.tokens[length - 1 : length])
            ends[at.digest()] = length
        record = Record(
            path, header.start, stop, header.shortest, header.has_logits, nbytes, time.time(), blocks, ends,
            parent, is_written=is_written,
        )  # fmt: skip
        for digest in blocks:
            self._blocks.setdefault(digest, record)
        for digest, length in ends.items():
            if digest not in self._ends or length == stop:
                self._lengths[length] += digest not in self._ends
                self._ends[digest] = record
        if parent is not None:
            parent.children.add(record)
        self.records[path] = record
        return record

    def remove(self, record: Record) -> list[Record]:
        """Forget a state, and those that go on from its rows: all of them. Nothing where it was
        forgotten before."""
        if self.records.get(record.path) is not record:
            return []
        gone = [record]
        for child in list(record.children):
            gone += self.remove(child)
        del self.records[record.path]
        for digest in record.blocks:
            if self._blocks.get(digest) is record:
                del self._blocks[digest]
        for digest, length in record.ends.items():
            if self._ends.get(digest) is record:
                del self._ends[digest]
                self._lengths[length] -= 1
                if not self._lengths[length]:
                    del self._lengths[length]
        if record.parent is not None:
            record.parent.children.discard(record)
        return gone
