"""The formats that a KV cache can be kept in, by name, and what each makes of the rows of each architecture.

float32  exact
bf16     every value
fp8      e4m3, a float32 scale for each 128 columns of a row; the rotary columns of latents stay bf16
int8     the same with eight-bit integers
vendor   what the model's makers keep:
         V4.1  windows e4m3 per 32; entries e2m1 per 16 with e4m3 scales; index keys e2m1 per 32
         V4    windows and entries e4m3 per 64, rotary columns bf16; index keys e2m1 per 32, turned
         V3.2 and its relatives  latents e4m3 per 128 with float32 scales, rotary columns bf16; index keys
               e4m3, turned

Sources: the engines that DeepSeek released with these models. Projections of unfinished groups, DeltaNet's
states and what is copied for n-grams stay exact in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from quant.formats.kv_names import KvFormat
from quant.formats.rows import RowFormat

WIDE_GROUP = 128  # columns that share a float32 scale


def plain_rows(form: KvFormat, dim: int, tail: int = 0) -> RowFormat | None:
    """Rows of `dim` columns in a format that is nobody's own; the last `tail` columns are rotary ones of a
    latent."""
    if form == "float32":
        return None
    if form == "bf16":
        return RowFormat(dim, "bf16")
    return RowFormat(dim, "int8" if form == "int8" else "e4m3", "float32", _group(dim - tail), tail)


def _group(columns: int) -> int:
    return min(columns, WIDE_GROUP)


@dataclass(frozen=True)
class GroupedRows:
    """How a model with windows and entries keeps these; None for float32."""

    window: RowFormat | None = None
    entries: RowFormat | None = None
    index_keys: RowFormat | None = None


EXACT = GroupedRows()


def v41_rows(form: KvFormat, head_dim: int, rope_dim: int, index_dim: int) -> GroupedRows:
    """V4.1's: the vendor's engine rounds rotary columns too."""
    if form != "vendor":
        return _grouped(form, head_dim, rope_dim, index_dim)
    return GroupedRows(
        RowFormat(head_dim, "e4m3", "ue8m0", 32),
        RowFormat(head_dim, "e2m1", "e4m3", 16),
        RowFormat(index_dim, "e2m1", "ue8m0", 32),
    )


def v4_rows(form: KvFormat, head_dim: int, rope_dim: int, index_dim: int) -> GroupedRows:
    """V4's."""
    if form != "vendor":
        return _grouped(form, head_dim, rope_dim, index_dim)
    latent = RowFormat(head_dim, "e4m3", "ue8m0", 64, rope_dim)
    return GroupedRows(latent, latent, RowFormat(index_dim, "e2m1", "ue8m0", 32, turned=_is_power(index_dim)))


def _grouped(form: KvFormat, head_dim: int, rope_dim: int, index_dim: int) -> GroupedRows:
    latent = plain_rows(form, head_dim, rope_dim)
    return GroupedRows(latent, latent, plain_rows(form, index_dim))


def latent_rows(form: KvFormat, rank: int, rope_dim: int) -> RowFormat | None:
    """Latents of multi-head latent attention with the rotary part of keys behind them."""
    return plain_rows("fp8" if form == "vendor" else form, rank + rope_dim, rope_dim)


def index_key_rows(form: KvFormat, dim: int) -> RowFormat | None:
    """Index keys beside such latents."""
    if form != "vendor":
        return plain_rows(form, dim)
    return RowFormat(dim, "e4m3", "ue8m0", _group(dim), turned=_is_power(dim))


def _is_power(n: int) -> bool:
    return n & (n - 1) == 0
