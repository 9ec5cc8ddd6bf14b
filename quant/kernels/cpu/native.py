"""The CPU back end: C++ kernels that read packed weights at the speed of memory.

Weights that `prepare` has repacked into panels (quant/kernels/cpu/panels.py) are read strictly in sequence;
others are repacked on the fly, one panel at a time, which is correct but slower. The kernels have their own
threads, as many as torch is set to use. A token's result depends neither on other tokens of a call nor on
threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from quant.errors import ConfigError
from quant.formats.fp8 import FP8_ROW
from quant.kernels.cpu import library
from quant.kernels.cpu.native_layers import NativeLayers
from quant.kernels.cpu.panel_slots import ExpertSlotLayout, has_slots
from quant.kernels.cpu.panels import (
    BLOCK,
    NativeWeight,
    Tiled,
    native_weight,
    tile,
    tiled_format,
    untile,
)
from quant.kernels.cpu.program import DENSE_KINDS
from quant.kernels.file_slots import FileSlotLayout
from quant.kernels.interface import (
    ExpertFormats,
    MoeCall,
    Products,
    SlotLayout,
    Weight,
    blocks_by_products,
    matrix_shapes,
    some_apart,
    three_formats,
)
from quant.kernels.reference import ReferenceKernels
from quant.packed import Format, PackedTensor

Activations = Literal["exact", "int8", "bf16"]
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)  # in the order of native_src/api.cpp


class _Moe(ctypes.Structure):
    """`Moe` of native_src/operations.hpp."""

    _fields_ = (
        ("experts", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("used", ctypes.c_int64),
        ("choice", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("limit", ctypes.c_float),
        ("alpha", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("biases", ctypes.c_void_p),
        ("some", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    )


def as_floats(x: torch.Tensor, cols: int) -> torch.Tensor:
    """x as contiguous float32 `[tokens, cols]`: unchanged if it already is, because torch calls take time."""
    if x.dtype == torch.float32 and x.dim() == 2 and x.shape[1] == cols and x.is_contiguous():
        return x
    return x.reshape(-1, cols).to(torch.float32).contiguous()


def contiguous(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x contiguous and of that dtype: unchanged if it already is."""
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def like(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out `[tokens, rows]` float32 with the leading dimensions and the dtype of x `[..., cols]`."""
    return out.view(*x.shape[:-1], out.shape[1]).to(x.dtype)


class NativeKernels(NativeLayers):
    """`Kernels` in C++ for the best instruction set that the machine has, or the `level` named.

    activations: `exact` keeps float32 activations to 21 bits of each block of 32, `int8` to 8 bits. `bf16`
    rounds them and weights to bfloat16; products with float32, float16 and formats without panels stay exact.
    Raises library.LibraryMissingError where the compiled part is missing, ConfigError for a level that the
    machine lacks, or bfloat16 products that it lacks.
    """

    name = "native"

    def __init__(
        self,
        activations: Activations = "exact",
        level: str | None = None,
        threads: int | None = None,
    ) -> None:
        levels = library.available_levels()
        if level is not None and level not in levels:
            raise ConfigError(f"CPU level {level!r}: this machine has {', '.join(levels)}")
        self.level = level or levels[-1]
        self.threads = threads
        self._library = library.load()
        self._level = library.LEVELS.index(self.level)
        self._set(activations)
        self._fallback = _Decoded(self)

    def describe(self) -> str:
        """Level, threads and activation mode, human-readable."""
        return f"{self.level}, {self._threads()} threads, {self.activations} activations"

    @contextmanager
    def multiplying(self, products: Products) -> Iterator[None]:
        before = self.activations
        self._set(products)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, activations: Activations) -> None:
        if activations == "bf16" and not self._library.loci_has_bf16(self._level):
            raise ConfigError(
                f"bfloat16 products need a processor with AVX-512 BF16; this one computes with {self.level}: "
                "use exact products"
            )
        self.activations: Activations = activations
        self._activations = ACTIVATIONS.index(activations)

    def on(self, device: torch.device) -> NativeKernels:
        return self

    def prepare(self, weight: Weight) -> Weight:
        """The weight in this back end's layout: in panels if its format has them, copied into memory."""
        if (
            isinstance(weight, torch.Tensor)
            or isinstance(weight.format, Tiled)
            or tiled_format(weight) is None
        ):
            return weight
        return tile(weight)

    def run(self, operations: ctypes.Array[Any], first: int, step: ctypes.Structure) -> int:
        """Run a program's operations from `first` on for a step, up to a hand-over or the end."""
        return int(
            self._library.loci_run_program(
                self._level,
                self._threads(),
                self._activations,
                operations,
                first,
                len(operations),
                ctypes.byref(step),
            )
        )

    def slot_layout(self, hidden: int, width: int, formats: Format | ExpertFormats) -> SlotLayout:
        """Slots in panel layout, if all of the formats have it."""
        three = zip(three_formats(formats), matrix_shapes(hidden, width), strict=True)
        if all(has_slots(format_, cols) for format_, (_, cols) in three):
            return ExpertSlotLayout(hidden, width, formats)
        return FileSlotLayout(hidden, width, formats)

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        # the common case first: isinstance on a tensor is slow with cold caches
        if isinstance(weight, NativeWeight):
            native: NativeWeight | None = weight
        elif isinstance(weight, torch.Tensor):
            return self._dense_linear(x, weight)
        else:
            native = native_weight(weight)
        if native is None:
            return self._fallback.linear(x, weight)
        rows, cols = native.shape
        flat = as_floats(x, cols)
        tokens = flat.shape[0]
        out = flat.new_empty(tokens, rows)
        self._library.loci_linear(
            self._level,
            self._threads(),
            self._activations,
            native.address,
            flat.data_ptr(),
            tokens,
            out.data_ptr(),
        )
        return out if flat is x else like(x, out)

    def _dense_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows, cols = weight.shape
        weight = weight.contiguous()
        flat = as_floats(x, cols)
        tokens = flat.shape[0]
        out = flat.new_empty(tokens, rows)
        self._library.loci_dense_linear(
            self._level,
            self._threads(),
            self._activations,
            weight.data_ptr(),
            DENSE_KINDS[weight.dtype],
            rows,
            cols,
            flat.data_ptr(),
            tokens,
            out.data_ptr(),
        )
        return out if flat is x else like(x, out)

    def linear_blocks(self, x: torch.Tensor, weights: Sequence[Weight]) -> torch.Tensor:
        natives = [weight for weight in weights if isinstance(weight, NativeWeight)]
        kinds = {(weight.format.name, weight.shape) for weight in natives}
        rows, cols = weights[0].shape
        if len(natives) < len(weights) or len(kinds) > 1 or tiled_format(natives[0]) is None or cols % BLOCK:
            return blocks_by_products(self, x, weights)
        flat = as_floats(x, len(weights) * cols)
        out = flat.new_empty(len(flat), len(weights) * rows)
        matrices = (ctypes.c_void_p * len(natives))(*(weight.address for weight in natives))
        self._library.loci_linear_blocks(
            self._level,
            self._threads(),
            self._activations,
            ctypes.addressof(matrices),
            len(natives),
            flat.data_ptr(),
            len(flat),
            out.data_ptr(),
        )
        return out if flat is x else like(x, out)

    def batched_linear(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        x, weights = contiguous(x, torch.float32), weights.contiguous()
        count, rows, cols = weights.shape
        out = x.new_empty(len(x), count, rows)
        self._library.loci_dense_blocks(
            self._level,
            self._threads(),
            self._activations,
            weights.data_ptr(),
            DENSE_KINDS[weights.dtype],
            count,
            rows,
            cols,
            x.data_ptr(),
            len(x),
            out.data_ptr(),
        )
        return out

    def moe(self, call: MoeCall) -> torch.Tensor:
        flat = as_floats(call.x, call.x.shape[1])
        out = torch.empty_like(flat)
        if not self._moe(call, flat, contiguous(call.expert_weights, torch.float32), out):
            return self._fallback.moe(call)
        return out if flat is call.x else like(call.x, out)

    def moe_apart(self, call: MoeCall) -> torch.Tensor:
        flat = as_floats(call.x, call.x.shape[1])
        out = flat.new_empty(*call.expert_ids.shape, flat.shape[1])
        return out.to(call.x.dtype) if self._moe(call, flat, None, out) else self._fallback.moe_apart(call)

    def moe_some(self, call: MoeCall, some: torch.Tensor, out: torch.Tensor) -> None:
        some = contiguous(some, torch.int64)
        x, places = call.x, call.expert_ids.numel()
        is_plain = x.dtype == out.dtype == torch.float32 and x.is_contiguous() and out.is_contiguous()
        is_here = out.device.type == "cpu" and out.shape == (places, x.shape[1])  # it may be on a GPU
        if not is_plain or not is_here or not self._moe(call, x, None, out, some):
            some_apart(self, call, some, out)

    def _moe(
        self,
        call: MoeCall,
        x: torch.Tensor,
        factors: torch.Tensor | None,
        out: torch.Tensor,
        some: torch.Tensor | None = None,
    ) -> bool:
        """Compute a call for x `[tokens, hidden]` float32, without factors each choice apart, of these `some`
        alone; False where no kernel can."""
        chosen = call.expert_ids.flatten()
        used = sorted(set((chosen if some is None else chosen[some]).tolist()))
        if not used:
            if some is None:
                out.zero_()
            return True
        weights = [native_weight(w) for e in map(call.experts.__getitem__, used) for w in (e.w1, e.w3, e.w2)]
        addresses = [w.address for w in weights if w is not None]
        if len(addresses) < len(weights):
            return False
        matrices = (ctypes.c_void_p * len(addresses))(*addresses)
        ids = (ctypes.c_int64 * len(used))(*used)
        choice = contiguous(call.expert_ids, torch.int64)
        biases = None
        if call.extras.biases is not None:
            rows = [at for expert in used for at in call.extras.biases.addresses(expert)]
            biases = (ctypes.c_void_p * len(rows))(*rows)
        native = _Moe(
            ctypes.addressof(matrices),
            ctypes.addressof(ids),
            len(used),
            choice.data_ptr(),
            0 if factors is None else factors.data_ptr(),
            *choice.shape,
            call.swiglu_limit,
            call.extras.alpha,
            call.extras.shift,
            0 if biases is None else ctypes.addressof(biases),
            0 if some is None else some.data_ptr(),
            0 if some is None else len(some),
        )
        # not done where experts differ in their formats
        return bool(
            self._library.loci_moe(
                self._level,
                self._threads(),
                self._activations,
                ctypes.byref(native),
                x.data_ptr(),
                out.data_ptr(),
            )
        )

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        if x.dtype != torch.float32 or not (weight is None or weight.dtype == torch.float32):
            return self._fallback.rms_norm(x, weight, eps)
        x = x.contiguous()
        out, cols = torch.empty_like(x), x.shape[-1]
        at = None if weight is None else weight.data_ptr()
        rows = x.numel() // cols
        self._library.loci_rms_norm(
            self._level, self._threads(), x.data_ptr(), at, rows, cols, eps, out.data_ptr()
        )
        return out

    def sinkhorn(self, logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
        matrices = logits.to(torch.float32).clone(memory_format=torch.contiguous_format)
        count, n, _ = matrices.shape
        self._library.loci_sinkhorn(matrices.data_ptr(), count, n, iterations, eps)
        return matrices

    def gather_rows(self, table: PackedTensor, rows: torch.Tensor) -> torch.Tensor:
        if isinstance(table.format, Tiled):
            return untile(table, rows).decode()
        if table.format.name != FP8_ROW.name:
            return self._fallback.gather_rows(table, rows)
        codes, scales, rows = table.codes.contiguous(), table.scales, rows.to(torch.int64).contiguous()
        assert scales is not None
        scales = scales.contiguous()
        out = torch.empty((len(rows), table.shape[1]), dtype=torch.float32)
        self._library.loci_gather_rows(
            self._level,
            self._threads(),
            codes.data_ptr(),
            scales.data_ptr(),
            scales.dtype == torch.float32,
            table.shape[1],
            rows.data_ptr(),
            len(rows),
            out.data_ptr(),
        )
        return out

    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()


class _Decoded(ReferenceKernels):
    """For formats without panels: decoded by torch, multiplied like any plain weight."""

    def __init__(self, native: NativeKernels) -> None:
        super().__init__()
        self._native = native

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._native.linear(x, weight)

    def gated(
        self, gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float = 1.0, shift: float = 0.0
    ) -> torch.Tensor:
        return self._native.gated(gate, up, limit, alpha, shift)
