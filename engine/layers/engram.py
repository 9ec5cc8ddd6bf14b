"""Engram: n-gram memory read into the residual streams (spec section 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quant.kernels.interface import Kernels, Weight


@dataclass(frozen=True)
class EngramMix:
    """Weights that bring table rows into the streams.

    wkv `[hidden * (hc + 1), columns * dim]`: one key per stream, then one value for all
    qk `[hc, hidden]` float32: q_weight * k_weight, which always occur as a product
    """

    wkv: Weight
    qk: torch.Tensor
    norm_eps: float

    def keys_and_value(self, kernels: Kernels, rows: torch.Tensor) -> torch.Tensor:
        """The part of the result that does not depend on the streams, from rows `[tokens, columns * dim]`:
        `[tokens, (hc + 1) * hidden]`."""
        return kernels.linear(rows, self.wkv)

    def gates_and_value(
        self, kernels: Kernels, streams: torch.Tensor, kv: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gate per stream `[tokens, hc]` and value `[tokens, hidden]`.

        streams `[tokens, hc, hidden]`, kv of `keys_and_value`.
        """
        tokens, hc, hidden = streams.shape
        key, value = kv[:, : hc * hidden].view(tokens, hc, hidden), kv[:, hc * hidden :]
        return kernels.engram_gates(streams, self.qk, key, self.norm_eps), value
