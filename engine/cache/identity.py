"""What a saved state depends on besides its text: the weights, and the arithmetic that used them."""

from __future__ import annotations

import hashlib
import json

from engine.distribution import DISTRIBUTION, version_of
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.budget import MemoryBudget
from quant.kernels.choice import choose
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.interface import Products


def identity_of(checkpoint: Checkpoint, budget: MemoryBudget, prompt_products: Products = "exact") -> str:
    """A digest of a model's files (headers, sizes and times, not all of their contents), of the back end, of
    prompts' products, the GPUs that compute and the KV format. A copy of the files counts as another model:
    rather compute than misread."""
    entries = [
        (entry.name, entry.dtype, entry.shape, entry.offset, entry.nbytes)
        for entry in checkpoint.entries.values()
    ]
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    stats = [(file.name, (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    host = choose()
    arithmetic = (host.level, host.activations) if isinstance(host, NativeKernels) else (host.name,)
    gpus = [(gpu.name, gpu.budget_bytes) for gpu in budget.gpus if not gpu.is_virtual]
    config = json.dumps(checkpoint.config, sort_keys=True, default=str)
    computed = arithmetic, prompt_products, gpus, budget.kv_format
    parts = version_of(DISTRIBUTION), config, sorted(entries), stats, computed
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
