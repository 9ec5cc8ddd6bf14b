"""Routing traces: which experts a model's routers chose, token by token, on some text.

A trace next to a checkpoint (`routing.safetensors`) tells the expert store which experts are hot: they are
loaded first and start with a higher rank. File: `router_ids` `[tokens, layers, top_k]` int16.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memory.experts.policy import Neighbours, neighbours_of
from memory.user_files import whole_file
from quant.errors import CheckpointError, ConfigError

FILE_NAME = "routing.safetensors"


@dataclass(frozen=True)
class RoutingTrace:
    """Chosen experts, `[tokens, layers, top_k]`."""

    router_ids: torch.Tensor

    @classmethod
    def load(cls, file: Path) -> RoutingTrace:
        """Read a trace. Raises CheckpointError for any other file."""
        try:
            ids = load_file(file)["router_ids"]
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"{file}: not a routing trace ({error}); record one with `loci profile`"
            ) from None
        if (
            ids.dim() != 3
            or ids.dtype not in (torch.int16, torch.int64)
            or not ids.numel()
            or int(ids.min()) < 0
        ):
            raise CheckpointError(f"{file}: router_ids must be [tokens, layers, top_k] of expert indices")
        return cls(ids.to(torch.int64))

    def save(self, file: Path) -> None:
        """Write the trace atomically. Raises ConfigError if it cannot be written."""
        try:
            with whole_file(file) as temporary:
                save_file({"router_ids": self.router_ids.to(torch.int16).contiguous()}, temporary)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file}: cannot be written ({error}); name another with --out") from None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.router_ids.shape[0]

    @property
    def layers(self) -> int:
        """Layers with routed experts."""
        return self.router_ids.shape[1]

    def steps(self, layer: int) -> list[set[int]]:
        """The experts of each token in one layer."""
        return [set(ids) for ids in self.router_ids[:, layer].tolist()]

    def neighbours_of(self, layer: int) -> list[Neighbours]:
        """What the layer's neighbours used last at each token: the one before it, and the one after it."""
        steps = [self.steps(n) for n in range(self.layers)]
        newest: list[Collection[int]] = [()] * self.layers
        found = []
        for token in range(len(self.router_ids)):
            if layer > 0:
                newest[layer - 1] = steps[layer - 1][token]
            found.append(neighbours_of(newest, layer))
            if layer + 1 < self.layers:
                newest[layer + 1] = steps[layer + 1][token]
        return found

    def shares(self, experts: int) -> torch.Tensor:
        """Each expert's share of its layer's uses, `[layers, experts]` float64.

        Raises CheckpointError where the trace names experts that the model lacks.
        """
        if int(self.router_ids.max()) >= experts:
            raise CheckpointError(
                f"the routing trace refers to expert {int(self.router_ids.max())}, but there are only "
                f"{experts}"
            )
        counts = torch.stack(
            [torch.bincount(self.router_ids[:, n].flatten(), minlength=experts) for n in range(self.layers)]
        ).double()
        return counts / counts.sum(1, keepdim=True)


def trace_of_checkpoint(checkpoint: Path, layers: int, experts: int) -> torch.Tensor | None:
    """Shares `[layers, experts]` from the trace next to a checkpoint; None if there is none."""
    file = checkpoint / FILE_NAME
    if not file.is_file():
        return None
    trace = RoutingTrace.load(file)
    if trace.layers != layers:
        raise CheckpointError(
            f"{file}: covers {trace.layers} layers, but the model has {layers}; delete it and record a new "
            "one"
        )
    return trace.shares(experts)
