"""The operations a model needs on packed weights, behind one small interface.

A back end is one module with a class that implements `Kernels`; `quant/kernels/choice.py` picks one at start.
The `reference` back end is plain torch and the judge of every other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from quant.kernels.layers import LayerOperations
from quant.packed import Format, PackedTensor

Weight = torch.Tensor | PackedTensor


class Kernels(LayerOperations, Protocol):
    """What a back end offers. Activations and results are float32 (or bfloat16 on CUDA)."""

    name: str

    def describe(self) -> str:
        """What computes, with what, and where it is not the fastest, why: one line for people."""
        ...

    def on(self, device: torch.device) -> Kernels:
        """The back end that computes with what lies on `device`: its `prepare` brings weights there."""
        ...

    def prepare(self, weight: Weight) -> Weight:
        """A dense weight as this back end likes it, made once at load; may copy it into memory."""
        ...

    def slot_layout(self, hidden: int, width: int, format_: Format) -> SlotLayout:
        """How this back end wants an expert of these dimensions and file format to lie in a slot."""
        ...

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """`x @ weight^T`: `[..., cols]` -> `[..., rows]`."""
        ...

    def moe(self, call: MoeCall) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs for each token, `[tokens, hidden]`."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; `[..., dim]` to the same."""
        ...

    def sinkhorn(self, logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
        """Nearly doubly stochastic matrices from logits `[tokens, n, n]`, by alternate normalisation.

        Softmax over the last index, plus eps, divided by sums over the first index; then (iterations - 1)
        times divided by sums over the last and over the first index; eps is added to each sum.
        """
        ...

    def gather_rows(self, table: PackedTensor, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a packed table as numbers: rows `[n]` int64 -> `[n, cols]` float32."""
        ...


class Experts(Protocol):
    """Where a layer's routed experts can be found; what an expert store hands to `Kernels.moe`."""

    def __getitem__(self, expert_id: int) -> ExpertWeights: ...


@dataclass(frozen=True)
class ExpertWeights:
    """One expert: gate `w1` and up `w3` of `[width, hidden]`, down `w2` of `[hidden, width]`."""

    w1: PackedTensor
    w3: PackedTensor
    w2: PackedTensor

    @property
    def matrices(self) -> tuple[PackedTensor, PackedTensor, PackedTensor]:
        """w1, w3 and w2."""
        return self.w1, self.w3, self.w2

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Of codes and scales of w1, w3 and w2 in memory."""
        return tuple(
            0 if part is None else part.data_ptr()
            for weight in self.matrices
            for part in (weight.codes, weight.scales)
        )


@dataclass(frozen=True)
class MoeCall:
    """Routed experts at work on some tokens: each token's choice of experts, and with which weights.

    x               `[tokens, hidden]`
    expert_ids      `[tokens, top_k]` int64, in host memory or beside x
    expert_weights  `[tokens, top_k]` float32
    experts         where the chosen ones are
    swiglu_limit    expert(x) = w2( silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit) )
    """

    x: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor
    experts: Experts
    swiglu_limit: float


class SlotLayout(Protocol):
    """How an expert's bytes lie in a slot of fixed size."""

    @property
    def nbytes(self) -> int:
        """Bytes of a slot."""
        ...

    def pack_into(
        self, slot: torch.Tensor, w1: PackedTensor, w3: PackedTensor, w2: PackedTensor, threads: int = 1
    ) -> ExpertWeights:
        """Rearrange an expert's weights, as files have them, into `slot` (uint8 `[nbytes]`)."""
        ...

    def pack_matrix(self, slot: torch.Tensor, number: int, weight: PackedTensor, threads: int = 1) -> None:
        """Rearrange one of them: number 0 is w1, 1 is w3, 2 is w2."""
        ...

    def views(self, slot: torch.Tensor) -> ExpertWeights:
        """The weights of the expert that lies in `slot`."""
        ...


def swiglu(
    kernels: Kernels, x: torch.Tensor, w1: Weight, w3: Weight, w2: Weight, limit: float
) -> torch.Tensor:
    """One gated feed-forward of x `[tokens, hidden]`: w2( silu(min(w1 x, limit)) * clamp(w3 x, +-limit) )."""
    return kernels.linear(kernels.gated(kernels.linear(x, w1), kernels.linear(x, w3), limit), w2)
