"""DeepSeek-V4.1: recognises, describes, checks and loads its checkpoints."""

from __future__ import annotations

import torch

from engine.families.base import Component, Family, ModelInfo
from engine.families.deepseek_v41.config import V41Config, parse_config
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.deepseek_v41.part import config_of, cuts
from engine.families.deepseek_v41.shape import checkpoint_shape, loaded_shape
from engine.families.deepseek_v41.tensors import IGNORED, expected_tensors
from engine.families.deepseek_v41.weights import read_weights
from engine.families.expert_store import trace_path
from engine.families.streams.stored import components
from engine.layers.engram_hash import EngramHash, load_token_map, table_primes
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.part import PartOfCheckpoint, Span
from memory.experts.traces import trace_of_checkpoint
from memory.planner.budget import MemoryBudget
from memory.planner.shape import ModelShape
from quant.errors import ConfigError, Findings
from quant.formats.kv_names import V41_FORMATS, KvFormat
from quant.kernels.interface import Kernels


def _table_primes(config: V41Config) -> list[list[int]]:
    """Sizes of the hash tables of each Engram layer."""
    orders = config.engram_max_ngram_size - 1
    return table_primes(len(config.engram_layer_ids), orders, config.engram_n_heads, config.engram_vocab_size)


def hashing_of(config: V41Config) -> EngramHash:
    """The addresses that the Engram layers of `config` use."""
    vocab, max_ngram = config.engram_compressed_vocab_size, config.engram_max_ngram_size
    return EngramHash.for_layers(config.engram_layer_ids, _table_primes(config), vocab, max_ngram)


def _config(checkpoint: Checkpoint) -> V41Config:
    """The config, or that of a part."""
    config = parse_config(checkpoint.config)
    return config_of(config, checkpoint.span) if isinstance(checkpoint, PartOfCheckpoint) else config


def _hashing(checkpoint: Checkpoint) -> EngramHash:
    """The addresses that a checkpoint's Engram layers use; they follow from those of all layers."""
    config = parse_config(checkpoint.config)
    hashing = hashing_of(config)
    if not isinstance(checkpoint, PartOfCheckpoint):
        return hashing
    layers, span = config.engram_layer_ids, checkpoint.span
    return hashing.of([table for table, n in enumerate(layers) if span.first <= n < span.stop])


class DeepseekV41Family(Family):
    """The family's entry in the registry."""

    name = "deepseek_v41"

    def describe(self, checkpoint: Checkpoint) -> tuple[ModelInfo, list[Component]]:
        config = _config(checkpoint)
        return config.info(self.name, checkpoint.name), components(checkpoint, IGNORED)

    def check(self, checkpoint: Checkpoint) -> None:
        config = _config(checkpoint)
        findings = Findings()
        with findings.checking():
            checkpoint.verify(expected_tensors(config, checkpoint), IGNORED)
        with findings.checking():
            self._token_map(config, checkpoint)
        with findings.checking():
            if (trace := trace_path(checkpoint)) is not None:
                trace_of_checkpoint(trace, config.num_hidden_layers, config.n_routed_experts)
        findings.raise_any()

    def kv_formats(self, checkpoint: Checkpoint) -> tuple[KvFormat, ...]:
        return V41_FORMATS

    def shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        return checkpoint_shape(_config(checkpoint), checkpoint, checkpoint.name, kv_format)

    def loaded_shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        return loaded_shape(_config(checkpoint), checkpoint, checkpoint.name, kv_format)

    def cuts(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        return cuts(parse_config(checkpoint.config))

    def part(self, checkpoint: Checkpoint, span: Span) -> PartOfCheckpoint:
        outside = (*(["embed"] if span.is_first else []), *(["norm", "head"] if span.is_last else []))
        return PartOfCheckpoint(checkpoint, span, outside)

    def load(self, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget) -> DeepseekV41:
        self.check(checkpoint)
        config = _config(checkpoint)
        token_map = self._token_map(config, checkpoint)
        weights = read_weights(config, checkpoint, kernels, budget)
        hashing = _hashing(checkpoint) if config.engram_layer_ids else None
        info, kv_format = config.info(self.name, checkpoint.name), budget.kv_format
        return DeepseekV41(config, info, weights, token_map, kernels, hashing, kv_format)

    def _token_map(self, config: V41Config, checkpoint: Checkpoint) -> torch.Tensor:
        """What Engram lookups fold token ids to; empty where there are none."""
        if not config.engram_layer_ids:
            return torch.zeros(0, dtype=torch.int64)
        self._check_tables(parse_config(checkpoint.config))
        file = checkpoint.path / "tokenizer.json"
        return torch.from_numpy(load_token_map(file, config.vocab_size, config.engram_compressed_vocab_size))

    def _check_tables(self, config: V41Config) -> None:
        """The config's table sizes must be the sums of the primes that the hash will use."""
        expected = tuple(sum(primes) for primes in _table_primes(config))
        if config.engram_num_embeddings != expected:
            raise ConfigError(
                f"engram_num_embeddings is {list(config.engram_num_embeddings)}, but the hash of this "
                f"config addresses {list(expected)} rows; the config and the tables do not match"
            )


FAMILY = DeepseekV41Family()
