"""Engram tables in training: counted once, read in such a way that no text reads what it wrote.

Rows trained by gradients learn by heart. A row seen in one text knows what followed there, the model
learns to trust it, and is wrong on new text: held-out small talk stood still at 3.72 nats from 11 to
12 million tokens. Counting has a cure that gradients lack. There are five sets of tables: four that
each leave a quarter of the texts out, from which that quarter reads, and one counted in all texts,
which is exported. So a row is as right or wrong in training as it will be later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from counting import code_size, count, next_token_codes
from engine.families.deepseek_v41.config import V41Config
from quantise import round_fp8_rows
from rows import RowFinder

FOLDS = 4
COMPLETE = FOLDS  # the set that was counted in all texts


class Tables:
    """The rows of every Engram layer, in FOLDS + 1 sets: `[sets, rows, dim]` per layer."""

    def __init__(self, layers: list[Tensor]) -> None:
        self.layers = layers

    @property
    def complete(self) -> list[Tensor]:
        """What is exported, per layer `[rows, dim]`."""
        return [layer[COMPLETE] for layer in self.layers]

    def values(self, rows: list[Tensor], sets: Tensor, rounding: bool) -> list[Tensor]:
        """Per layer `[N, columns * dim]`: rows `[N, columns]` read from each token's set `[N]`."""
        found = []
        for layer, places in zip(self.layers, rows, strict=True):
            values = layer.flatten(0, 1)[places + sets.unsqueeze(1) * layer.shape[1]]
            found.append((round_fp8_rows(values) if rounding else values).flatten(1))
        return found


def load_or_count(file: Path, documents: Sequence[np.ndarray], config: V41Config, find: RowFinder) -> Tables:
    """The tables of these texts, from `file` where it holds them, else counted and written there."""
    digest = fingerprint(documents)
    if file.exists():
        with safe_open(file, framework="pt") as stored:
            if stored.metadata()["documents"] == digest:
                return Tables([stored.get_tensor(f"table.{i}") for i in range(find.tables)])
    print("counting Engram rows, which takes some minutes", flush=True)
    codes = next_token_codes(documents, config.vocab_size, code_size(config))
    sets = []
    for left_out in range(FOLDS + 1):
        kept = [document for i, document in enumerate(documents) if i % FOLDS != left_out]
        sets.append(count(kept, codes, config, find))
    layers = [torch.stack(layer) for layer in zip(*sets, strict=True)]
    for layer in layers:
        layer /= layer[COMPLETE].square().mean().sqrt()
    temporary = file.with_suffix(".tmp")
    save_file({f"table.{i}": t for i, t in enumerate(layers)}, temporary, metadata={"documents": digest})
    temporary.replace(file)
    return Tables(layers)


def fingerprint(documents: Sequence[np.ndarray]) -> str:
    """What tells one collection of texts from another."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(document.tobytes())
    return digest.hexdigest()[:16]
