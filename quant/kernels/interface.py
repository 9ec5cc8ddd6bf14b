"""The operations a model needs on packed weights, behind one small interface.

A back end is one module with a class that implements `Kernels`; `quant/kernels/choice.py` picks one at start.
The `reference` back end is plain torch; all others are tested against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch

from quant.kernels.layers import LayerOperations
from quant.packed import Format, PackedTensor

Weight = torch.Tensor | PackedTensor
Products = Literal["exact", "bf16"]
ExpertFormats = tuple[Format, Format, Format]  # of w1, w3 and w2


class Kernels(LayerOperations, Protocol):
    """What a back end offers. Activations and results are float32 (or bfloat16 on CUDA)."""

    name: str

    def describe(self) -> str:
        """One readable line: what computes, on what, and why it is not the fastest back end, if so."""
        ...

    def on(self, device: torch.device) -> Kernels:
        """The back end for weights on `device`: its `prepare` moves weights there."""
        ...

    def multiplying(self, products: Products) -> AbstractContextManager[None]:
        """While it lasts, products with weights are `exact` (to float32), or `bf16`: activations are rounded
        to bfloat16, and weights too, but for float32 and float16. Either way, on processors, a token's result
        depends on itself alone. Raises ConfigError where there are no such kernels."""
        ...

    def prepare(self, weight: Weight) -> Weight:
        """A dense weight in this back end's layout, made once at load; may copy it into memory."""
        ...

    def slot_layout(self, hidden: int, width: int, formats: Format | ExpertFormats) -> SlotLayout:
        """This back end's slot layout for an expert of these dimensions, with w1, w3 and w2 in these formats
        in files, or all in one."""
        ...

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """`x @ weight^T`: `[..., cols]` -> `[..., rows]`."""
        ...

    def linear_blocks(self, x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
        """n weights of one shape, each times its own columns of x, side by side: `[tokens, n * cols]` ->
        `[tokens, n * rows]`."""
        ...

    def moe(self, call: MoeCall) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs for each token, `[tokens, hidden]`."""
        ...

    def moe_apart(self, call: MoeCall) -> torch.Tensor:
        """The chosen experts' outputs for each token, not weighted: `[tokens, top_k, hidden]`."""
        ...

    def moe_some(self, call: MoeCall, some: torch.Tensor, out: torch.Tensor) -> None:
        """`moe_apart` of some choices alone: those of numbers `some` `[n]` int64 (token * top_k + place), in
        host memory, whose outputs become these rows of out `[tokens * top_k, hidden]`, on any device."""
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
class ExpertBiases:
    """Biases of a layer's experts, float32: gate and up `[experts, width]`, down `[experts, hidden]`."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def addresses(self, expert: int) -> tuple[int, int, int]:
        """Where those of one expert lie."""
        gate, up, down = (bias[expert].data_ptr() for bias in (self.gate, self.up, self.down))
        return gate, up, down


@dataclass(frozen=True)
class ExpertExtras:
    """Another activation than silu (`LayerOperations.gated`), and biases."""

    alpha: float = 1.0
    shift: float = 0.0
    biases: ExpertBiases | None = None


NO_EXTRAS = ExpertExtras()


@dataclass(frozen=True)
class MoeCall:
    """The input of routed experts: some tokens, the experts chosen for each, and their weights.

    x               `[tokens, hidden]`
    expert_ids      `[tokens, top_k]` int64, in host memory or on the device of x
    expert_weights  `[tokens, top_k]` float32
    experts         the chosen experts
    swiglu_limit    expert(x) = w2( silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit) )
    extras          what these experts have beyond that
    """

    x: torch.Tensor
    expert_ids: torch.Tensor
    expert_weights: torch.Tensor
    experts: Experts
    swiglu_limit: float
    extras: ExpertExtras = NO_EXTRAS


def three_formats(formats: Format | ExpertFormats) -> ExpertFormats:
    """The formats of w1, w3 and w2, which may be one."""
    return (formats, formats, formats) if isinstance(formats, Format) else formats


def matrix_shapes(hidden: int, width: int) -> tuple[tuple[int, int], ...]:
    """The shapes of w1, w3 and w2."""
    return (width, hidden), (width, hidden), (hidden, width)


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


def moe_by_products(kernels: Kernels, call: MoeCall) -> torch.Tensor:
    """`Kernels.moe`, expert by expert, by products with their matrices."""
    x, out = call.x, torch.zeros_like(call.x)
    for expert_id in sorted(set(call.expert_ids.flatten().tolist())):
        places = (call.expert_ids == expert_id).nonzero(as_tuple=True)
        tokens, choice = (place.to(x.device) for place in places)
        y = _expert_output(kernels, x[tokens], expert_id, call)
        out.index_add_(0, tokens, y * call.expert_weights[tokens, choice].unsqueeze(-1))
    return out


def apart_by_moe(kernels: Kernels, call: MoeCall) -> torch.Tensor:
    """`Kernels.moe_apart` by `moe`: each choice as a token of its own."""
    (tokens, top_k), ids = call.expert_ids.shape, call.expert_ids.reshape(-1, 1)
    x = call.x.repeat_interleave(top_k, dim=0)
    ones = torch.ones(ids.shape, device=x.device)
    return kernels.moe(replace(call, x=x, expert_ids=ids, expert_weights=ones)).view(tokens, top_k, -1)


def blocks_by_products(kernels: Kernels, x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
    """`Kernels.linear_blocks`, weight by weight."""
    columns = x.view(len(x), len(weights), -1)
    return torch.cat([kernels.linear(columns[:, n], weight) for n, weight in enumerate(weights)], dim=-1)


def some_apart(kernels: Kernels, call: MoeCall, some: torch.Tensor, out: torch.Tensor) -> None:
    """`Kernels.moe_some` by `moe_apart`: inputs are gathered, outputs put in their places."""
    ids = call.expert_ids.flatten()[some.to(call.expert_ids.device)].unsqueeze(1)
    x = call.x[(some // call.expert_ids.shape[1]).to(call.x.device)]
    ones = torch.ones(ids.shape, device=x.device)
    y = kernels.moe_apart(replace(call, x=x, expert_ids=ids, expert_weights=ones)).flatten(0, 1)
    out[some.to(out.device)] = y.to(out.device)


def _expert_output(kernels: Kernels, x: torch.Tensor, expert_id: int, call: MoeCall) -> torch.Tensor:
    """What one expert of a call makes of some tokens: x `[n, hidden]` to the same."""
    expert, extras = call.experts[expert_id], call.extras
    gate, up = kernels.linear(x, expert.w1), kernels.linear(x, expert.w3)
    if extras.biases is None:
        return kernels.linear(
            kernels.gated(gate, up, call.swiglu_limit, extras.alpha, extras.shift), expert.w2
        )
    gate = gate + extras.biases.gate[expert_id].to(x.device)
    up = up + extras.biases.up[expert_id].to(x.device)
    inner = kernels.gated(gate, up, call.swiglu_limit, extras.alpha, extras.shift)
    return kernels.linear(inner, expert.w2) + extras.biases.down[expert_id].to(x.device)
