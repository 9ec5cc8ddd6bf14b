"""A model before it is downloaded: its small files, and weights of which only the headers were fetched.

What Loci says of a checkpoint before it loads it, it learns from config, tokenizer and headers. So a few
megabytes are enough to say of a model on the Hub whether it would run, what would lie where, and how fast.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memory.checkpoint.gguf_files import data_offset
from memory.checkpoint.safetensors_files import MAX_HEADER_BYTES
from memory.hub.cache import snapshot_folder
from memory.hub.remote import Listing, read_range
from memory.hub.selection import small_files, weights_of
from quant.errors import ConfigError

MAX_SMALL_BYTES = 256 << 20
FIRST_BYTES = 256 << 10  # holds most headers of safetensors files
FIRST_GGUF_BYTES = 4 << 20
MAX_GGUF_HEADER_BYTES = 256 << 20
CONNECTIONS = 8


@dataclass(frozen=True)
class StandIn:
    """What stands in for a model that is not here.

    path   of its directory or GGUF file, with holes where the weights will be
    files  what the model needs, name -> bytes; weights last
    """

    path: Path
    files: dict[str, int]


@contextmanager
def stand_in(listing: Listing) -> Iterator[StandIn]:
    """Stands in for the model that `listing` is of, until the block ends.

    Raises LociError where the repository has no weights that Loci reads, or where the Hub does not answer.
    """
    model, sizes = listing.model, listing.sizes
    with tempfile.TemporaryDirectory(prefix="loci-") as temporary:
        # Named as it will be in the cache, by which models get their names.
        folder = Path(temporary, *snapshot_folder(model, listing.commit).parts[-3:])
        folder.mkdir(parents=True)
        small = small_files(sizes)
        for name in small:
            if sizes[name] > MAX_SMALL_BYTES:
                raise ConfigError(f"{model}: {name} has {sizes[name]} bytes, implausibly many")
            (folder / name).write_bytes(read_range(listing, name, 0, sizes[name]))
        weights = weights_of(model, sizes, folder)
        is_gguf = weights[0].lower().endswith(".gguf")
        if not is_gguf and "config.json" not in small:
            raise ConfigError(f"{model}: the repository has no config.json; it is no model that Loci can run")

        def write(name: str) -> None:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            (_write_gguf if is_gguf else _write_safetensors)(listing, name, file)

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(write, weights))
        path = folder / weights[0] if is_gguf else folder
        yield StandIn(path, {name: sizes[name] for name in (*small, *weights)})


def _write_safetensors(listing: Listing, name: str, file: Path) -> None:
    """The header, and nothing behind it. What is wrong with it is found by whoever reads the file."""
    head = read_range(listing, name, 0, FIRST_BYTES)
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    if len(head) < 8 + length <= MAX_HEADER_BYTES:
        head += read_range(listing, name, len(head), 8 + length)
    _write_with_hole(file, head, listing.files[name].nbytes)


def _write_gguf(listing: Listing, name: str, file: Path) -> None:
    """As much of the beginning as holds all of metadata and tensor headers, whose length no field tells."""
    nbytes = listing.files[name].nbytes
    head = b""
    window = FIRST_GGUF_BYTES
    while True:
        head += read_range(listing, name, len(head), window)
        _write_with_hole(file, head, nbytes)
        offset = data_offset(file)
        if window >= min(nbytes, MAX_GGUF_HEADER_BYTES) or (offset is not None and offset <= len(head)):
            return
        window *= 4


def _write_with_hole(file: Path, head: bytes, nbytes: int) -> None:
    file.write_bytes(head)
    os.truncate(file, nbytes)
