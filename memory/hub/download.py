"""Downloading a model into the Hub's cache: a few files at a time, each whole or not at all."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from huggingface_hub import constants, hf_hub_download
from tqdm.auto import tqdm

from memory.hub.cache import cache_folder, note_commit, repo_folder, snapshot_folder
from memory.hub.remote import Listing, hub_errors, hub_host
from quant.errors import BudgetError, LociError

OnProgress = Callable[[int, int], None]  # bytes done, of how many
CONNECTIONS = 8
# What a worker that was told to stop gets to remove what it has not finished.
STOPPING_S = 3.0
# Left for everything else on that disk.
KEPT_FREE_BYTES = 1_000_000_000


def missing_bytes(listing: Listing, files: Mapping[str, int]) -> int:
    """Bytes of those `files` (name -> bytes) that the cache does not have yet."""
    return sum(nbytes for name, nbytes in files.items() if not _is_here(listing, name))


def existing_cache_folder() -> Path:
    """The cache's directory, or that one above it which exists and lies on the same disk."""
    folder = cache_folder().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def free_bytes() -> int:
    """Bytes free on the disk of the cache."""
    return shutil.disk_usage(existing_cache_folder()).free


def check_room(listing: Listing, nbytes: int) -> None:
    """Raise BudgetError where `nbytes` more do not fit onto the cache's disk."""
    free = free_bytes()
    if nbytes + KEPT_FREE_BYTES > free:
        raise BudgetError(
            f"{listing.model} needs {nbytes / 1e9:.3g} GB more in {cache_folder()}, where {free / 1e9:.3g} "
            "GB are free, and 1 GB should stay free; make room (`loci list`, `loci rm`) or set HF_HOME to a "
            "directory on a larger disk"
        )


def download(listing: Listing, files: Mapping[str, int], on_progress: OnProgress) -> Path:
    """The snapshot directory with `files` (name -> bytes); those that are there already are not fetched.

    A broken connection is taken up where it broke; if the process ends, finished files stay. The revision
    counts as downloaded once all of it is there, so that an older one stays in use until then. Raises
    LociError where a file cannot be fetched, or is not what was listed.
    """
    wanted = [name for name in files if not _is_here(listing, name)]
    check_room(listing, sum(files[name] for name in wanted))
    # hf_hub_download links a file that another revision has already, so all names pass through it.
    names: SimpleQueue[str] = SimpleQueue()
    for name in files:
        names.put(name)
    count = _Count(sum(files[name] for name in wanted), on_progress)
    failures: list[BaseException] = []

    def work() -> None:
        while not (count.is_stopped or failures):
            try:
                name = names.get_nowait()
            except Empty:
                return
            try:
                _fetch(listing, name, count)
            except BaseException as error:
                failures.append(error)

    # Not a pool: that would wait for its threads, and so for gigabytes, before the process may end.
    workers = [threading.Thread(target=work, name=f"loci-hub-{n}", daemon=True) for n in range(CONNECTIONS)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)
                if failures:
                    break
    except BaseException:
        _stop(listing, count, workers)
        raise
    if failures:
        _stop(listing, count, workers)
        with hub_errors(listing.model):
            raise failures[0]
    note_commit(listing.model, listing.commit)
    return snapshot_folder(listing.model, listing.commit)


def _is_here(listing: Listing, name: str) -> bool:
    """Whether the cache has the file already, as this commit's or as another's."""
    listed = listing.files[name]
    snapshot = snapshot_folder(listing.model, listing.commit)
    places = (snapshot / name, repo_folder(listing.model) / "blobs" / listed.etag)
    return any(place.is_file() and place.stat().st_size == listed.nbytes for place in places)


def _fetch(listing: Listing, name: str, count: _Count) -> None:
    listed, model = listing.files[name], listing.model
    expected = snapshot_folder(model, listing.commit) / name
    is_damaged = expected.is_file() and expected.stat().st_size != listed.nbytes
    found = Path(
        hf_hub_download(
            model.repo,
            name,
            revision=listing.commit,
            cache_dir=cache_folder(),
            endpoint=constants.ENDPOINT,
            force_download=is_damaged,
            tqdm_class=count.bar(),
        )
    )
    if found.resolve() != expected.resolve() or expected.stat().st_size != listed.nbytes:
        got = found.stat().st_size
        found.unlink()
        raise LociError(
            f"{model}: {name} is not what {hub_host()} listed ({got} bytes instead of {listed.nbytes}); it "
            "changed meanwhile, try again"
        )


class _StoppedError(Exception):
    """The download was interrupted."""


class _Count:
    """Bytes that have come, of all files together; workers learn here that they should stop."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self.is_stopped = False
        self._done = 0
        self._total = total
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        if self.is_stopped:
            raise _StoppedError
        with self._lock:
            self._done += nbytes
            self._on_progress(min(self._done, self._total), self._total)

    def bar(self) -> type[Any]:
        """The kind of progress bar that huggingface_hub makes for each file; draws nothing itself."""
        count = self

        class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **(options | {"disable": True}))

            def update(self, n: float | None = 1) -> None:
                count.add(int(n or 0))

            def update_transfer(self, n: float | None = 1) -> None:
                """What came over the network, where that is not what is written."""

            def set_transfer_postfix_str(self, s: str = "", refresh: bool = True) -> None:
                """Nothing is drawn."""

        return Bar


def _stop(listing: Listing, count: _Count, workers: list[threading.Thread]) -> None:
    """Stop the workers, and remove what those that do not listen have half written: nothing resumes it."""
    count.is_stopped = True
    for worker in workers:
        if worker.ident is not None:
            worker.join(STOPPING_S / len(workers))
    blobs = os.path.realpath(repo_folder(listing.model) / "blobs")
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            open_file = os.readlink(descriptor)
            if open_file.startswith(f"{blobs}{os.sep}") and open_file.endswith(".incomplete"):
                os.unlink(open_file)
