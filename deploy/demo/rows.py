"""Engram rows of packed documents: which table rows each token's n-grams use."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.families.deepseek_v41_config import V41Config
from engine.layers.engram_hash import EngramHash, table_primes


def hashes_of(config: V41Config) -> list[EngramHash]:
    """One hash per Engram layer, as the serving family makes them."""
    primes = table_primes(
        len(config.engram_layer_ids),
        config.engram_max_ngram_size - 1,
        config.engram_n_heads,
        config.engram_vocab_size,
    )
    return [
        EngramHash.for_layer(layer, sizes, config.engram_compressed_vocab_size, config.engram_max_ngram_size)
        for layer, sizes in zip(config.engram_layer_ids, primes, strict=True)
    ]


class RowFinder:
    """Rows of every token of packed rows; a document's first n-grams begin with the padding key."""

    def __init__(self, config: V41Config, token_map: np.ndarray) -> None:
        self.token_map = torch.from_numpy(token_map)
        self.pad_key = self.token_map[config.engram_pad_token_id]
        self.longest = config.engram_max_ngram_size
        self.hashes = hashes_of(config)

    def __call__(self, ids: Tensor, documents: Tensor) -> list[Tensor]:
        """ids, documents `[B, T]` -> per Engram layer `[B * T, columns]` int64."""
        keys = self.token_map[ids]
        return [self._rows(h, keys, documents) for h in self.hashes]

    def _rows(self, hashing: EngramHash, keys: Tensor, documents: Tensor) -> Tensor:
        hashed = keys * hashing.multipliers[0]
        columns = []
        for n in range(1, len(hashing.multipliers)):
            behind = torch.full_like(keys, int(self.pad_key))
            same = documents[:, n:] == documents[:, :-n]
            behind[:, n:] = torch.where(same, keys[:, :-n], behind[:, n:])
            hashed = hashed ^ (behind * hashing.multipliers[n])
            columns.append(hashed.flatten().unsqueeze(1).expand(-1, hashing.heads))
        return torch.cat(columns, dim=1) % hashing.primes + hashing.offsets
