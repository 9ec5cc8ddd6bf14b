"""DSpark draft stages of V4 and V4.1: what a config and a checkpoint say of them.

Stages are layers named `mtp.S`, which draft several tokens at once from what the model captures of its last
layers (docs/drafts.md). They are optional: a checkpoint without them is whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from memory.checkpoint.checkpoint import Checkpoint

STAGE = re.compile(r"mtp\.(\d+)\.(.*)")


@dataclass(frozen=True)
class DSparkShape:
    """Fields are the keys of config.json that begin with `dspark_`, without that.

    experts, top_k  of a stage (dspark_n_routed_experts, dspark_num_experts_per_tok); None: as the model's
    """

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int
    experts: int | None = None
    top_k: int | None = None

    @classmethod
    def of(cls, keys: Mapping[str, Any], layers: int, vocab_size: int) -> DSparkShape | None:
        """What the keys say; None where they say nothing, or what cannot be: a model runs without drafts."""
        block, noise, rank = (
            keys.get(f"dspark_{name}") for name in ("block_size", "noise_token_id", "markov_rank")
        )
        targets, experts = keys.get("dspark_target_layer_ids"), keys.get("dspark_n_routed_experts")
        top_k = keys.get("dspark_num_experts_per_tok", keys.get("dspark_n_activated_experts"))
        if not (_is_count(block, 1, MOST_DRAFTED) and _is_count(noise, 0, vocab_size - 1)):
            return None
        if not isinstance(targets, list) or not targets or not _is_count(rank, 1):
            return None
        if not all(_is_count(n, 0, layers - 1) for n in targets) or sorted(set(targets)) != targets:
            return None
        if not all(value is None or _is_count(value, 1) for value in (experts, top_k)):
            return None
        return cls(block, noise, tuple(targets), rank, experts, top_k)


MOST_DRAFTED = 16  # rows of a recorded step


def _is_count(value: object, least: int, most: int = 1 << 31) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def stage_count(checkpoint: Checkpoint) -> int:
    """How many stages a checkpoint has tensors of."""
    numbers = {int(found[1]) for name in checkpoint.entries if (found := STAGE.fullmatch(name))}
    return max(numbers, default=-1) + 1


def stages_of(checkpoint: Checkpoint) -> Checkpoint:
    """The stages as a model of their own: `mtp.S.NAME` is `layers.S.NAME`, nothing else is there."""
    entries = {}
    for name, entry in checkpoint.entries.items():
        if found := STAGE.fullmatch(name):
            renamed = f"layers.{found[1]}.{found[2]}"
            entries[renamed] = replace(entry, name=renamed)
    return Checkpoint(checkpoint.path, checkpoint.model_type, checkpoint.config, entries, [])
