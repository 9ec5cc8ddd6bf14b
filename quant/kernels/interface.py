"""The operations a model needs on packed weights, behind one small interface.

A back end is one module with a class that implements `Kernels`; `quant/kernels/choice.py` picks one at start.
The `reference` back end is plain torch; all others are tested against it.
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
        """One readable line: what computes, on what, and why it is not the fastest back end, if so."""
        ...

    def on(self, device: torch.device) -> Kernels:
        """The back end for weights on `device`: its `prepare` moves weights there."""
        ...

    def prepare(self, weight: Weight) -> Weight:
        """A dense weight in this back end's layout, made once at load; may copy it into memory."""
        ...

    def slot_layout(self, hidden: int, width: int, format_: Format) -> SlotLayout:
        """This back end's slot layout for an expert of these dimensions and file format."""
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
        """Decoded rows of a packed table: rows `[n]` int64 -> `[n, cols]` float32."""
        ...


class Experts(Protocol):
    """A layer's routed experts in memory, as an expert store passes them to `Kernels.moe`."""

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
        """Addresses of the codes and scales of w1, w3 and w2."""
        return tuple(
            0 if part is None else part.data_ptr()
            for weight in self.matrices
            for part in (weight.codes, weight.scales)
        )


@dataclass(frozen=True)
class MoeCall:
    """The input of routed experts: some tokens, the experts chosen for each, and their weights.

    x               `[tokens, hidden]`
    expert_ids      `[tokens, top_k]` int64, in host memory or on the device of x
    expert_weights  `[tokens, top_k]` float32
    experts         the chosen experts
    swiglu_limit    expert(x) = w2( silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit) )
    """

    x: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor
    experts: Experts
    swiglu_limit: float


class SlotLayout(Protocol):
    """The layout of an expert's bytes in a slot of fixed size."""

    @property
    def nbytes(self) -> int:
        """Bytes of a slot."""
        ...

    def pack_into(
        self, slot: torch.Tensor, w1: PackedTensor, w3: PackedTensor, w2: PackedTensor, threads: int = 1
    ) -> ExpertWeights:
        """Repack an expert's weights from file layout into `slot` (uint8 `[nbytes]`)."""
        ...

    def pack_matrix(self, slot: torch.Tensor, number: int, weight: PackedTensor, threads: int = 1) -> None:
        """Repack one of them: number 0 is w1, 1 is w3, 2 is w2."""
        ...

    def views(self, slot: torch.Tensor) -> ExpertWeights:
        """The weights of the expert in `slot`."""
        ...


def swiglu(
    kernels: Kernels, x: torch.Tensor, w1: Weight, w3: Weight, w2: Weight, limit: float
) -> torch.Tensor:
    """One gated feed-forward of x `[tokens, hidden]`: w2( silu(min(w1 x, limit)) * clamp(w3 x, +-limit) )."""
    return kernels.linear(kernels.gated(kernels.linear(x, w1), kernels.linear(x, w3), limit), w2)
