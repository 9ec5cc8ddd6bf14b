"""States of prompts and answers on disk: found again after a restart, or when memory had no room for them.

A state is a file (state_files.py) in a folder for its model, formats and cache layout: another model's states
are never looked at. Rows of a text that an earlier file has already are not written again, so a conversation
grows by a file a turn. Files are written behind, by a thread, and the least recently used go first. An index
of digests says where a prompt goes on from: of texts' ends, and of every `BLOCK` tokens of what files hold
rows of. Who may find a state is part of the digest (`salt`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from engine.cache.state_files import (
    ENDING,
    FORMAT,
    Ids,
    State,
    StateFileError,
    StateHeader,
    read_header,
    read_state,
    write_state,
)
from engine.families.base import KvCache
from memory.user_files import user_cache
from quant.errors import ConfigError

log = logging.getLogger("loci.prefixes")

MODEL = "model"  # a file with the model's name, in its folder
BLOCK = 64  # tokens between places where a file may go on from the rows of another
LEFT_ON_DISK = 1 << 30  # bytes that others keep, whatever the budget


def states_folder() -> Path:
    """Where states are unless told otherwise."""
    return user_cache() / "states"


@dataclass(eq=False)
class _Record:
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
    parent: _Record | None
    children: set[_Record] = field(default_factory=set)
    is_written: bool = True

    def chain(self) -> list[_Record]:
        """The files with all rows up to the state's end, from the first on."""
        found: list[_Record] = [self]
        while found[-1].parent is not None:
            found.append(found[-1].parent)
        return found[::-1]


@dataclass(frozen=True)
class StoredStats:
    """A snapshot for metrics; all but nbytes and budget_bytes only grow."""

    hits: int
    cached_tokens: int
    written: int
    evictions: int
    refused: int
    nbytes: int
    budget_bytes: int


@dataclass(frozen=True)
class StatesOnDisk:
    """Where states are, and whose.

    budget_bytes  of all states in the folder, other models' too
    identity      of the model's weights and what computes with them: states of others are not found
    model         its name, for people
    """

    folder: Path
    budget_bytes: int
    identity: str
    model: str


class StoredStates:
    """Saves states of a cache's slots in `folder`, and restores them. Used by one thread, which `expect` need
    not be.

    pending_bytes  of host memory, for states that are not written yet; what does not fit is not saved

    Raises ConfigError where the folder cannot be used.
    """

    def __init__(self, cache: KvCache, of: StatesOnDisk, pending_bytes: int) -> None:
        self._cache = cache
        folder = of.folder
        self._root, self._folder = folder, folder / _fingerprint(cache, of.identity)
        self._budget_bytes, self._pending_room = of.budget_bytes, pending_bytes
        self._lock = threading.Lock()
        self._ends: dict[bytes, _Record] = {}
        self._lengths: Counter[int] = Counter()  # of the texts in `_ends`
        self._blocks: dict[bytes, _Record] = {}
        self._records: dict[Path, _Record] = {}
        self._hits = self._cached_tokens = self._written = self._evictions = self._refused = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self._folder / MODEL).write_text(of.model)
        except OSError as error:
            raise ConfigError(f"{folder}: no states can be kept there ({error.strerror})") from None
        self._find()
        self._nbytes = sum(nbytes for _, _, nbytes in _files(self._root))
        self._queue: SimpleQueue[tuple[_Record, State] | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="loci-states", daemon=True)
        self._writer.start()

    @property
    def stats(self) -> StoredStats:
        """Current counters and gauges."""
        return StoredStats(
            self._hits, self._cached_tokens, self._written, self._evictions, self._refused, self._nbytes,
            self._budget_bytes,
        )  # fmt: skip

    def close(self) -> None:
        """Return once everything is written."""
        self._queue.put(None)
        self._writer.join()

    # ---------------------------------------------------------------------------------------- reading

    def longest(self, prompt: Ids, salt: str) -> int:
        """How many tokens of the prompt the best state has; 0 where there is none."""
        with self._lock:
            return self._best(prompt, salt)[1]

    def expect(self, prompt: Sequence[int], salt: str) -> None:
        """Let the system read ahead what `restore` will ask for."""
        with self._lock:
            record, _ = self._best(np.asarray(prompt, dtype=np.int32), salt)
        for each in [] if record is None else record.chain():
            with suppress(OSError), each.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def restore(self, slot: int, prompt: Ids, salt: str) -> tuple[int, torch.Tensor | None]:
        """Restore the longest state that is a beginning of the prompt into the empty slot.

        Returns its length, and the logits behind it if that is the whole prompt; 0 where there is none, or
        where a file turned out to be damaged.
        """
        with self._lock:
            record, length = self._best(prompt, salt)
        if record is None:
            return 0, None
        logits: torch.Tensor | None = None
        for each in record.chain():
            try:
                state = read_state(each.path)
                self._check(state, each)
            except (StateFileError, OSError) as error:
                log.warning("a saved state is ignored: %s", error)
                with self._lock:
                    self._forget(each)
                return 0, None
            self._fill(slot, state, length)
            if each is record:
                for view, saved in zip(self._cache.recent(slot, record.stop), state.recent, strict=True):
                    view.copy_(saved)
                logits = state.logits if length == len(prompt) else None
            each.used = time.time()
            with suppress(OSError):
                os.utime(each.path)  # for the next server
        self._cache.resume(slot, length, record.shortest)
        self._hits += 1
        self._cached_tokens += length
        return length, logits

    def _best(self, ids: Ids, salt: str) -> tuple[_Record | None, int]:
        """The state with the longest beginning of a prompt, and how much of it: all but the last token,
        unless it has the logits behind that."""
        hashes = [Hashes(_salt_digest(salt))]  # of the beginnings whose rows are in files, block by block
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            hashes.append(hashes[-1].then(ids[start : start + BLOCK]))
            if hashes[-1].digest not in self._blocks:
                break
        most = min(len(ids), len(hashes) * BLOCK)
        for length in sorted((length for length in self._lengths if length <= most), reverse=True):
            blocks = min(length // BLOCK, len(hashes) - 1)
            digest = hashes[blocks].then(ids[blocks * BLOCK : length]).digest
            record = self._ends.get(digest)
            if record is None or not record.is_written:
                continue
            if length < len(ids) or (record.has_logits and length == record.stop):
                return record, length
        return None, 0

    def _check(self, state: State, record: _Record) -> None:
        """Raise StateFileError where a file has another layout than the cache."""
        wanted = [
            (record.stop // ratio - record.start // ratio, *view.shape[1:], view.dtype)
            for ratio, view in self._cache.appended(0)
        ]
        if [(*rows.shape, rows.dtype) for rows in state.rows] != wanted:
            raise StateFileError(f"{record.path}: rows of other shapes than the cache has")
        recent = [(view.shape, view.dtype) for view in self._cache.recent(0, record.stop)]
        if [(part.shape, part.dtype) for part in state.recent] != recent:
            raise StateFileError(f"{record.path}: a state of other shapes than the cache has")

    def _fill(self, slot: int, state: State, length: int) -> None:
        start, stop = state.header.start, min(len(state.header.tokens), length)
        for (ratio, view), saved in zip(self._cache.appended(slot), state.rows, strict=True):
            first, last = start // ratio, stop // ratio
            view[first:last] = saved[: last - first]

    # ---------------------------------------------------------------------------------------- writing

    def save(self, slot: int, tokens: Sequence[int] | Ids, salt: str, logits: torch.Tensor | None) -> None:
        """Write the state of `slot`, which holds exactly `tokens`, soon; `logits` are those after them.

        Does nothing where it is there, or where the memory for what is not written yet is full.
        """
        ids = np.asarray(tokens, dtype=np.int32)
        key = _salt_digest(salt)
        end = Hashes(key).then(ids).digest
        path = self._folder / f"{end.hex()}{ENDING}"
        with self._lock:
            if path in self._records:
                return
            start, parent, blocks = self._known_rows(ids, key)
            shortest = self._cache.shortest(slot)
            nbytes = self._state_bytes(slot, start, len(ids), logits)
            if nbytes > self._pending_room:
                self._refused += 1
                if self._refused == 1:
                    log.warning(
                        "a state of %.0f MB was not saved to disk: the memory for those that are not written "
                        "yet is full; raise --prefix-cache", nbytes / 1e6,
                    )  # fmt: skip
                return
            self._pending_room -= nbytes
        header = StateHeader(ids, start, shortest, key, logits is not None)
        rows = tuple(
            view[start // ratio : len(ids) // ratio].to("cpu", copy=True)
            for ratio, view in self._cache.appended(slot)
        )
        recent = tuple(part.to("cpu", copy=True) for part in self._cache.recent(slot, len(ids)))
        state = State(header, rows, recent, None if logits is None else logits.clone())
        with self._lock:
            record = self._add(path, header, nbytes, parent, blocks, is_written=False)
        self._queue.put((record, state))

    def _state_bytes(self, slot: int, start: int, stop: int, logits: torch.Tensor | None) -> int:
        rows = sum(
            (stop // ratio - start // ratio) * view[:1].nbytes for ratio, view in self._cache.appended(slot)
        )
        recent = sum(part.nbytes for part in self._cache.recent(slot, stop))
        return rows + recent + 4 * stop + (0 if logits is None else logits.nbytes)

    def _known_rows(self, ids: Ids, salt: str) -> tuple[int, _Record | None, list[bytes]]:
        """Up to where files have a text's rows, the last of them, and digests of the blocks after that."""
        start, parent = 0, None
        digests: list[bytes] = []
        at = Hashes(salt)
        for first in range(0, len(ids) - BLOCK + 1, BLOCK):
            at = at.then(ids[first : first + BLOCK])
            found = self._blocks.get(at.digest)
            if found is not None and not digests:
                start, parent = first + BLOCK, found
            else:
                digests.append(at.digest)
        return start, parent, digests

    def _add(
        self,
        path: Path,
        header: StateHeader,
        nbytes: int,
        parent: _Record | None,
        blocks: list[bytes],
        *,
        is_written: bool,
    ) -> _Record:
        """Index a state: its blocks, its end, and the places before that it can be taken back to."""
        stop = len(header.tokens)
        first = max(header.shortest, 1)
        at = Hashes(header.salt).then(header.tokens[:first])
        ends = {at.digest: first}
        for length in range(first + 1, stop + 1):
            at = at.then(header.tokens[length - 1 : length])
            ends[at.digest] = length
        record = _Record(
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
        self._records[path] = record
        return record

    def _write(self) -> None:
        while (job := self._queue.get()) is not None:
            record, state = job
            try:
                self._make_room(record.nbytes)
                write_state(record.path, state)
            except OSError as error:
                log.warning("a state was not saved to disk: %s", error.strerror or error)
                with self._lock:
                    self._forget(record)
            else:
                with self._lock:
                    size = record.path.stat().st_size
                    self._nbytes += size
                    record.nbytes, record.is_written = size, True
                    self._written += 1
            with self._lock:
                self._pending_room += state.nbytes

    def _make_room(self, needed: int) -> None:
        """Remove states until `needed` bytes more are within the budget, and on the disk. Raises OSError."""
        while True:
            free = shutil.disk_usage(self._folder).free - LEFT_ON_DISK
            if self._nbytes + needed <= self._budget_bytes and needed <= free:
                return
            with self._lock:
                own = [r for r in self._records.values() if r.is_written and not r.children]
                foreign = [f for f in _files(self._root) if f[0].parent != self._folder]
                oldest = min(own, key=lambda r: r.used, default=None)
                other = min(foreign, key=lambda f: f[1], default=None)
                if other is not None and (oldest is None or other[1] < oldest.used):
                    other[0].unlink(missing_ok=True)
                    self._nbytes -= other[2]
                elif oldest is not None:
                    self._forget(oldest)
                else:
                    raise OSError(f"{needed / 1e6:.0f} MB do not fit on the disk, or in --prefix-disk")
                self._evictions += 1

    def _forget(self, record: _Record) -> None:
        """Remove a state, and those that go on from its rows."""
        for child in list(record.children):
            self._forget(child)
        self._records.pop(record.path, None)
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
        if record.is_written:
            self._nbytes -= record.nbytes
            record.path.unlink(missing_ok=True)

    def _find(self) -> None:
        """Index the folder's files, shorter texts first; those that cannot be used are removed."""
        headers: list[tuple[Path, StateHeader]] = []
        for path in self._folder.glob(f"*{ENDING}"):
            try:
                headers.append((path, read_header(path)))
            except StateFileError as error:
                log.warning("a saved state is ignored and removed: %s", error)
                path.unlink(missing_ok=True)
        for path, header in sorted(headers, key=lambda found: len(found[1].tokens)):
            start, parent, blocks = self._known_rows(header.tokens, header.salt)
            if start < header.start:
                path.unlink(missing_ok=True)  # the rows before are gone
                continue
            record = self._add(path, header, path.stat().st_size, parent, blocks, is_written=True)
            record.used = path.stat().st_mtime


class Hashes:
    """A digest of a client's salt and a text so far."""

    def __init__(self, salt: str, of: hashlib.blake2b | None = None) -> None:
        self._salt = salt
        self._of = of or hashlib.blake2b(salt.encode(), digest_size=16)

    def then(self, ids: Ids) -> Hashes:
        """That of a longer text."""
        longer = self._of.copy()
        longer.update(ids.tobytes())
        return Hashes(self._salt, longer)

    @property
    def digest(self) -> bytes:
        """16 bytes."""
        return self._of.digest()


def _fingerprint(cache: KvCache, identity: str) -> str:
    """Of a model and how its cache is laid out."""
    appended = [(ratio, *view.shape[1:], str(view.dtype)) for ratio, view in cache.appended(0)]
    recent = [(*part.shape, str(part.dtype)) for part in cache.recent(0, cache.capacity)]
    parts = identity, FORMAT, type(cache).__name__, cache.margin, appended, recent
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _salt_digest(salt: str) -> str:
    return hashlib.blake2b(salt.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class ModelStates:
    """What a folder holds of a model.

    model      its name; folders of other files or back ends than today's may have the same
    used       when the last of them was, in seconds
    """

    folder: Path
    model: str
    states: int
    nbytes: int
    used: float


def states_in(root: Path) -> list[ModelStates]:
    """The models that have states in a folder, the last used first."""
    found: dict[Path, list[tuple[float, int]]] = {}
    for path, used, nbytes in _files(root):
        found.setdefault(path.parent, []).append((used, nbytes))
    models = []
    for folder, states in found.items():
        name = folder / MODEL
        models.append(
            ModelStates(
                folder,
                name.read_text() if name.exists() else folder.name,
                len(states),
                sum(nbytes for _, nbytes in states),
                max(used for used, _ in states),
            )
        )
    return sorted(models, key=lambda of: -of.used)


def remove_states(of: ModelStates) -> None:
    """Remove all states of a model. Raises OSError."""
    for path in of.folder.glob(f"*{ENDING}"):
        path.unlink(missing_ok=True)
    (of.folder / MODEL).unlink(missing_ok=True)
    with suppress(OSError):  # somebody else's files
        of.folder.rmdir()


def _files(root: Path) -> Iterator[tuple[Path, float, int]]:
    """All states in a folder, of any model: when they were used last, and their bytes."""
    for path in root.glob(f"*/*{ENDING}"):
        with suppress(OSError):
            found = path.stat()
            yield path, found.st_mtime, found.st_size
