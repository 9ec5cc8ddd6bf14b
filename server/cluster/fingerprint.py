"""What tells that a checkpoint on another machine is the same."""

from __future__ import annotations

import hashlib
import json
import math

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from memory.checkpoint.reads import read_tensor

SAMPLES = 64  # tensors of which bytes are compared
SAMPLE_BYTES = 4096  # of each


def fingerprint(checkpoint: Checkpoint) -> str:
    """A digest of the config, of every tensor's name, type, shape and size, and of some of their bytes.

    Two copies have the same, wherever they lie. Raises CheckpointError where a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    entries = [checkpoint.entries[name] for name in sorted(checkpoint.entries)]
    for entry in entries:
        digest.update(repr((entry.name, entry.dtype, entry.shape, entry.nbytes)).encode())
    for entry in entries[:: max(1, math.ceil(len(entries) / SAMPLES))]:
        digest.update(bytes(read_tensor(_beginning(entry)).tolist()))
    return digest.hexdigest()


def _beginning(entry: TensorEntry) -> TensorEntry:
    if not entry.shape or entry.nbytes <= SAMPLE_BYTES:
        return entry
    row = max(1, entry.nbytes // entry.shape[0])
    return entry.rows(0, max(1, min(entry.shape[0], SAMPLE_BYTES // row)))
