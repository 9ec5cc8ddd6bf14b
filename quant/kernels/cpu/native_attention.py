"""Attention in C++, and what chooses for it: a token's result depends on its own row alone."""

from __future__ import annotations

import ctypes

import torch
from torch.nn import functional as F

from quant.formats.rows import Rows, bytes_of, like
from quant.kernels.cpu.native_calls import floats
from quant.kernels.cpu.native_rows import NativeRows, format_address, in_order


class AttendCall(ctypes.Structure):
    """`Attend` of native_src/layers.hpp."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("format", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("before", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("ring", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("more", ctypes.c_void_p),
        ("more_format", ctypes.c_void_p),
        ("chosen", ctypes.c_void_p),
        ("choices", ctypes.c_int64),
        ("sink", ctypes.c_void_p),
    )


class IndexCall(ctypes.Structure):
    """`Index` of native_src/layers.hpp."""

    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("format", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("visible", ctypes.c_void_p),
        ("entries", ctypes.c_void_p),
        ("columns", ctypes.c_int64),
    )


def fetched(compressed: Rows, entries: torch.Tensor) -> tuple[Rows, torch.Tensor]:
    """The selected entries `[chosen, dim]`, copied from another device to that of `entries`, and their new
    indices.

    entries `[L, k]`, -1 for none, which they stay.
    """
    is_chosen = entries >= 0
    latents = compressed[entries[is_chosen].to(compressed.device)].to(entries.device)
    places = torch.full_like(entries, -1)
    places[is_chosen] = torch.arange(len(latents), device=entries.device)
    return latents, places


class NativeAttention(NativeRows):
    """The part of `LayerOperations` that attends to tokens and entries."""

    def index_scores(
        self,
        queries: torch.Tensor,
        weights: torch.Tensor,
        keys: Rows,
        visible: torch.Tensor,
        entries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        queries, weights, held, visible = (
            floats(queries),
            floats(weights),
            in_order(keys),
            visible.contiguous(),
        )
        if entries is not None:
            entries = entries.contiguous()
        columns = keys.shape[0] if entries is None else entries.shape[1]
        scores = queries.new_empty(queries.shape[0], columns)
        call = IndexCall(
            queries.data_ptr(),
            weights.data_ptr(),
            held.data_ptr(),
            format_address(keys),
            *queries.shape,
            visible.data_ptr(),
            0 if entries is None else entries.data_ptr(),
            columns,
        )
        self._library.loci_index_scores(self._level, self._threads(), ctypes.byref(call), scores.data_ptr())
        return scores

    def best_columns(self, scores: torch.Tensor, top_k: int) -> torch.Tensor:
        scores = floats(scores)
        rows, columns = scores.shape
        best = torch.empty((rows, min(top_k, columns)), dtype=torch.int64)
        self._library.loci_best_columns(
            self._threads(), scores.data_ptr(), rows, columns, best.shape[1], best.data_ptr()
        )
        return best

    def attend(
        self,
        q: torch.Tensor,
        keys: Rows,
        values: Rows,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        sinks = None if sinks is None else floats(sinks)
        return self._attend(q, keys, values, window or keys.shape[1], sinks, None, None)

    def attend_chosen(
        self, q: torch.Tensor, rows: Rows, chosen: torch.Tensor, value_dim: int
    ) -> torch.Tensor:
        q, held, chosen = floats(q), in_order(rows), chosen.contiguous()
        tokens, heads, dim = q.shape
        out = q.new_empty(tokens, heads, value_dim)
        call = AttendCall(
            q=q.data_ptr(),
            tokens=tokens,
            heads=heads,
            kv_heads=1,
            dim=dim,
            value_dim=value_dim,
            more=held.data_ptr(),
            more_format=format_address(rows),
            chosen=chosen.data_ptr(),
            choices=chosen.shape[1],
        )
        self._library.loci_attend(self._level, self._threads(), ctypes.byref(call), out.data_ptr())
        return out

    def attend_sparse(
        self,
        q: torch.Tensor,
        window_kv: Rows,
        sink: torch.Tensor,
        window: int,
        compressed: Rows | None = None,
        entries: torch.Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        if compressed is not None and entries is not None and compressed.device != q.device:
            compressed, entries = fetched(compressed, entries)
        kv = like(window_kv, in_order(window_kv).unsqueeze(0))
        return self._attend(q, kv, kv, window, floats(sink), compressed, entries, in_place=in_place)

    def _attend(
        self,
        q: torch.Tensor,
        keys: Rows,
        values: Rows,
        window: int,
        sink: torch.Tensor | None,
        compressed: Rows | None,
        entries: torch.Tensor | None,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Of the last tokens, q `[tokens, heads, dim]`; keys `[kv_heads, before + tokens, dim]`, values
        `[kv_heads, before + tokens, value_dim]`."""
        q = floats(q)
        tokens, heads, dim = q.shape
        kv_heads, end, value_dim = values.shape
        of_keys, of_values = bytes_of(keys), bytes_of(values)
        width = of_keys.shape[-1]
        if of_keys.stride()[1:] != (width, 1) or of_values.stride() != of_keys.stride():
            of_keys, of_values = of_keys.contiguous(), of_values.contiguous()
            of_values = F.pad(of_values, (0, width - of_values.shape[-1]))
        if of_keys.dtype != torch.uint8:
            of_keys, of_values = of_keys.float(), of_values.float()
        # what rows of queries make is written when nothing asks for them any more
        out = q if in_place and value_dim == dim else q.new_empty(tokens, heads, value_dim)
        call = AttendCall(
            q=q.data_ptr(),
            keys=of_keys.data_ptr(),
            values=of_values.data_ptr(),
            format=format_address(keys),
            tokens=tokens,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            value_dim=value_dim,
            head_stride=of_keys.stride(0) * of_keys.itemsize,
            before=end - tokens,
            window=window,
            sink=0 if sink is None else sink.data_ptr(),
        )
        if compressed is not None and entries is not None:
            held, entries = in_order(compressed), entries.contiguous()
            call.more, call.more_format = held.data_ptr(), format_address(compressed)
            call.chosen, call.choices = entries.data_ptr(), entries.shape[1]
        self._library.loci_attend(self._level, self._threads(), ctypes.byref(call), out.data_ptr())
        return out
