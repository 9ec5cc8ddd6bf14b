"""States of prompts and answers on disk: found again after a restart, or when memory had no room for them.

A state is a file (state_files.py) in a folder for its model, formats and cache layout: another model's states
are never looked at. Rows of a text that an earlier file has already are not written again, so a conversation
grows by a file a turn. Files are written behind, by a thread, and the least recently used go first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch

from engine.cache.restoring import DamagedStateError, ReplacedStateError, StateReader
from engine.cache.state_files import (
    ENDING,
    FORMAT,
    Ids,
    State,
    StateFileError,
    StateHeader,
    read_header,
    write_state,
)
from engine.cache.state_folders import MODEL, remove_abandoned, state_files
from engine.cache.state_index import Found, Record, StateIndex, text_hash, then
from engine.cache.state_layout import copied, layout_of
from engine.families.base import KvCache
from quant.errors import ConfigError

log = logging.getLogger("loci.prefixes")

LEFT_ON_DISK = 1 << 30  # bytes that others keep, whatever the budget


@dataclass(frozen=True)
class StoredStats:
    """A snapshot for metrics; all but nbytes and budget_bytes only grow."""

    hits: int = 0
    cached_tokens: int = 0
    written: int = 0
    evictions: int = 0
    refused: int = 0
    nbytes: int = 0
    budget_bytes: int = 0


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


@dataclass(frozen=True)
class Restored:
    """What came with a state: `logits` `[vocab]` behind its last token, where they were saved."""

    logits: torch.Tensor | None


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
        self._model = of.model
        self._budget_bytes, self._pending_room = of.budget_bytes, pending_bytes
        self._lock = threading.Lock()
        self._index = StateIndex()
        self._hits = self._cached_tokens = self._written = self._evictions = self._refused = self._failed = 0
        try:
            self._make_folder()
        except OSError as error:
            raise ConfigError(f"{folder}: no states can be kept there ({error.strerror})") from None
        self._reader = StateReader(cache)
        self._find()
        self._nbytes = sum(nbytes for _, _, nbytes in state_files(self._root))
        self._queue: SimpleQueue[tuple[Record, State] | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="loci-states", daemon=True)
        self._writer.start()

    @property
    def stats(self) -> StoredStats:
        """Current counters and gauges."""
        return StoredStats(
            self._hits, self._cached_tokens, self._written, self._evictions, self._refused + self._failed,
            self._nbytes, self._budget_bytes,
        )  # fmt: skip

    def close(self) -> None:
        """Return once everything is written."""
        self._queue.put(None)
        self._writer.join()
        self._reader.close()

    # ---------------------------------------------------------------------------------------- reading

    def find(self, prompt: Sequence[int] | Ids, salt: str) -> Found | None:
        """The state with the longest beginning of a prompt."""
        with self._lock:
            return self._index.best(np.asarray(prompt, dtype=np.int32), _salt_digest(salt))

    def expect(self, prompt: Sequence[int], salt: str) -> None:
        """Let the system read ahead what `restore` will ask for."""
        found = self.find(prompt, salt)
        if found is not None:
            _read_ahead(found.record)

    def foresee(self, beginning: Sequence[int], salt: str) -> None:
        """The same for a prompt that is not known to its end: of the texts that begin so, the one that was
        used last is the likeliest to go on."""
        with self._lock:
            record = self._index.likeliest(np.asarray(beginning, dtype=np.int32), _salt_digest(salt))
        if record is not None:
            _read_ahead(record)

    def restore(self, slot: int, found: Found) -> Restored | None:
        """Restore a state that was found into the empty slot; None, and the slot stays empty, where it was
        removed meanwhile, or a file turned out to be damaged."""
        with self._lock:
            if not self._is_known(found.record):
                return None
            for record in found.record.chain():
                record.used = time.time()  # so it is not removed while it is read
        try:
            logits = self._reader.restore(slot, found)
        except DamagedStateError as error:
            log.warning("a saved state is ignored: %s", error)
            with self._lock:
                if isinstance(error, ReplacedStateError):
                    self._index.remove(error.record)
                else:
                    self._forget(error.record)
            return None
        _mark_used(found.record)
        self._hits += 1
        self._cached_tokens += found.length
        return Restored(logits)

    # ---------------------------------------------------------------------------------------- writing

    def save(self, slot: int, tokens: Sequence[int] | Ids, salt: str, logits: torch.Tensor | None) -> None:
        """Write the state of `slot`, which holds exactly `tokens`, soon; `logits` are those after them.

        Does nothing where it is there, or where the memory for what is not written yet is full.
        """
        ids = np.asarray(tokens, dtype=np.int32)
        key = _salt_digest(salt)
        end = then(text_hash(key), ids).digest()
        path = self._folder / f"{end.hex()}{ENDING}"
        with self._lock:
            start, parent, blocks = self._known_rows(ids, key, path)
            if path in self._index.records:
                return
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
            # From now on the parent has a child, so the writer does not remove it.
            record = self._index.add(path, header, nbytes, parent, blocks, is_written=False)
        try:
            rows = tuple(
                copied(view[start // ratio : len(ids) // ratio]) for ratio, view in self._cache.appended(slot)
            )
            recent = tuple(copied(part) for part in self._cache.recent(slot, len(ids)))
            state = State(header, rows, recent, None if logits is None else logits.clone())
        except BaseException:
            with self._lock:
                self._forget(record)
                self._pending_room += nbytes
            raise
        self._queue.put((record, state))

    def _known_rows(self, ids: Ids, key: str, path: Path) -> tuple[int, Record | None, list[bytes]]:
        """Those of the index, once files that somebody removed are forgotten: of these, and of the text's
        state itself. Holds the lock."""
        while True:
            start, parent, blocks = self._index.known_rows(ids, key)
            known = [] if parent is None else parent.chain()
            if path in self._index.records:
                known.append(self._index.records[path])
            lost = [record for record in known if record.is_written and not record.path.exists()]
            if not lost:
                return start, parent, blocks
            self._forget(lost[0])

    def _state_bytes(self, slot: int, start: int, stop: int, logits: torch.Tensor | None) -> int:
        rows = sum(
            (stop // ratio - start // ratio) * view[:1].nbytes for ratio, view in self._cache.appended(slot)
        )
        recent = sum(part.nbytes for part in self._cache.recent(slot, stop))
        return rows + recent + 4 * stop + (0 if logits is None else logits.nbytes)

    def _write(self) -> None:
        while (job := self._queue.get()) is not None:
            self._write_one(*job)
            del job  # a state is large, and the next may be hours away

    def _write_one(self, record: Record, state: State) -> None:
        is_written = False
        try:
            is_written = self._is_known(record) and self._wrote(record, state)
        except Exception as error:  # whatever it is: the next state may well be written
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            log.warning("a state was not saved to disk: %s", why)
            with self._lock:
                self._forget(record)
        with self._lock:
            self._written += is_written
            self._failed += not is_written
            self._pending_room += state.nbytes

    def _wrote(self, record: Record, state: State) -> bool:
        """Write a state; False where it was forgotten meanwhile, alone or with what it goes on from."""
        if not (self._folder / MODEL).exists():  # somebody cleared it
            self._make_folder()
        self._make_room(record.nbytes)
        write_state(record.path, state)
        size = record.path.stat().st_size
        with self._lock:
            if not self._is_known(record):
                record.path.unlink(missing_ok=True)
                return False
            self._nbytes += size
            record.nbytes, record.is_written = size, True
        _mark_used(record)
        return True

    def _is_known(self, record: Record) -> bool:
        """Whether a state was not forgotten."""
        return self._index.records.get(record.path) is record

    def _make_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self._folder / MODEL).write_text(self._model)

    def _make_room(self, needed: int) -> None:
        """Remove states until `needed` bytes more are within the budget, and on the disk. Raises OSError."""
        files = {path: (used, nbytes) for path, used, nbytes in state_files(self._root)}
        with self._lock:  # other servers write and remove files, too
            self._nbytes = sum(nbytes for _, nbytes in files.values())
            for record in list(self._index.records.values()):
                if record.is_written and record.path not in files:
                    self._forget(record)
            foreign = sorted(
                (used, path, nbytes)
                for path, (used, nbytes) in files.items()
                if path not in self._index.records
            )
        free = shutil.disk_usage(self._folder).free - LEFT_ON_DISK
        if needed > min(self._budget_bytes, free + self._nbytes):
            raise OSError(f"{needed / 1e6:.0f} MB do not fit on the disk, or in --prefix-disk")
        while True:
            free = shutil.disk_usage(self._folder).free - LEFT_ON_DISK
            if self._nbytes + needed <= self._budget_bytes and needed <= free:
                return
            with self._lock:
                own = [r for r in self._index.records.values() if r.is_written and not r.children]
                oldest = min(own, key=lambda r: r.used, default=None)
                if foreign and (oldest is None or foreign[0][0] < oldest.used):
                    _, path, nbytes = foreign.pop(0)
                    self._unlink(path, nbytes)
                elif oldest is not None:
                    self._forget(oldest)
                else:
                    raise OSError(f"{needed / 1e6:.0f} MB do not fit on the disk, or in --prefix-disk")
                self._evictions += 1

    def _forget(self, record: Record) -> None:
        """Remove a state, and those that go on from its rows. Holds the lock."""
        for gone in self._index.remove(record):
            if gone.is_written:
                self._unlink(gone.path, gone.nbytes)

    def _unlink(self, path: Path, nbytes: int) -> None:
        with suppress(OSError):  # another server was faster, or only others may
            path.unlink()
            self._nbytes -= nbytes

    def _find(self) -> None:
        """Index the folder's files, first those whose rows others go on from; remove what cannot be used."""
        remove_abandoned(self._folder)
        headers: list[tuple[Path, float, int, StateHeader]] = []
        for path, used, nbytes in state_files(self._root):
            if path.parent != self._folder:
                continue
            try:
                headers.append((path, used, nbytes, read_header(path)))
            except StateFileError as error:
                log.warning("a saved state is ignored and removed: %s", error)
                path.unlink(missing_ok=True)
        for path, used, nbytes, header in sorted(headers, key=lambda found: found[3].start):
            start, parent, blocks = self._index.known_rows(header.tokens, header.salt)
            if start < header.start:
                log.warning(
                    "a saved state is ignored and removed: %s: the file of its first rows is gone", path
                )
                path.unlink(missing_ok=True)
                continue
            record = self._index.add(path, header, nbytes, parent, blocks, is_written=True)
            record.used = used


def _mark_used(record: Record) -> None:
    """Note, on disk too, that a state was used, and the files with the rows before: the first rows last.

    Other models' servers remove the oldest files first, and files are of no use without the rows before.
    """
    for each in reversed(record.chain()):
        each.used = time.time()
        with suppress(OSError):
            os.utime(each.path, (each.used, each.used))


def _read_ahead(record: Record) -> None:
    for each in record.chain():
        with suppress(OSError), each.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _fingerprint(cache: KvCache, identity: str) -> str:
    """Of a model and how its cache is laid out, whatever the capacity."""
    appended = [(ratio, layout_of(view, 0)) for ratio, view in cache.appended(0)]
    recent = [layout_of(part) for part in cache.recent(0, cache.capacity)]
    parts = identity, FORMAT, type(cache).__name__, appended, recent
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _salt_digest(salt: str) -> str:
    return hashlib.blake2b(salt.encode(), digest_size=16).hexdigest()
