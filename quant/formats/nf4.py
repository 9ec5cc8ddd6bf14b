"""NF4: two NormalFloat codes in a byte, one float32 scale per 64 values, as bitsandbytes stores them.

byte  [row, c]   HIGH nibble: column 2c, low nibble: column 2c+1 (the other way round than MXFP4)
code  0..15      the levels below, ascending: quantiles of a normal distribution, scaled to [-1, 1]
scale [row, b]   float32, largest magnitude of columns 64b .. 64b+63 ("absmax")

codes  uint8 [rows, cols/2]     scales float32 [rows, cols/64]

bitsandbytes cuts the flattened tensor into blocks of 64; these are blocks of rows as long as a row
is a whole number of blocks, and other matrices are refused.

Double quantisation (read only): the absmax values, less their mean `offset`, are themselves stored
as one byte per value: absmax = map[byte] * nested_absmax[i / 256] + offset, where map has 256 levels.

Source: Dettmers et al., QLoRA (2023), appendix E for the levels; bitsandbytes for the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from quant.errors import FormatError
from quant.formats.four_bit import TINY, FourBit, largest_magnitude
from quant.packed import PackedTensor

BLOCK = 64
NF4_LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=torch.float32,
)  # fmt: skip
FINE_BINS = 4096
BINS = 256  # narrower than any two borders or levels lie apart
MAX_STATE_BYTES = 1 << 16


class Nf4(FourBit):
    """NormalFloat weights of bitsandbytes (`quant_type: nf4`, block size 64)."""

    def __init__(self) -> None:
        super().__init__("nf4", BLOCK, NF4_LEVELS, torch.float32, even_is_low=False)
        borders = (NF4_LEVELS[:-1] + NF4_LEVELS[1:]) / 2  # [15]
        # [-1, 1] is cut into bins that hold one border at most. What lies in a bin is below or above
        # that border, so one lookup and one comparison find the nearest of 16 levels.
        bins = torch.arange(BINS, dtype=torch.int32)
        bin_of_border = _bin(borders)
        below = torch.searchsorted(bin_of_border, bins)  # borders in earlier bins
        has_border = torch.isin(bins, bin_of_border)
        self._border = torch.where(has_border, borders[below.clamp(max=14)], 2.0)
        self._low, self._high = NF4_LEVELS[below], NF4_LEVELS[(below + 1).clamp(max=15)]
        centres = (torch.arange(FINE_BINS + 1) + 0.5) * (2 / FINE_BINS) - 1
        self._nearby = NF4_LEVELS[torch.bucketize(centres, borders)]
        self._code = torch.zeros(BINS, dtype=torch.uint8)
        self._code[_bin(NF4_LEVELS).long()] = torch.arange(16, dtype=torch.uint8)

    def covering_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        return self.store(largest_magnitude(blocks))

    def store(self, scales: torch.Tensor) -> torch.Tensor:
        # A subnormal scale has no float32 reciprocal; blocks of zeros keep 0, as in bitsandbytes.
        return torch.where(scales == 0, 0, scales.clamp(min=TINY))

    def scale_values(self, stored: torch.Tensor) -> torch.Tensor:
        return stored

    def nearest_levels(self, scaled: torch.Tensor) -> torch.Tensor:
        flat = scaled.flatten()
        bins = _bin(flat.clamp(-1, 1))
        border, low, high = (
            table.to(flat.device).index_select(0, bins) for table in (self._border, self._low, self._high)
        )
        return torch.where(flat > border, high, low).view(scaled.shape)

    def nearby_levels(self, scaled: torch.Tensor) -> torch.Tensor:
        bins = (scaled.flatten().clamp(-1, 1) + 1).mul_(FINE_BINS / 2).to(torch.int32)
        return self._nearby.to(scaled.device).index_select(0, bins).view(scaled.shape)

    def codes_of(self, levels: torch.Tensor) -> torch.Tensor:
        bins = _bin(levels.flatten())
        return self._code.to(levels.device).index_select(0, bins).view(levels.shape)

    def validate(self, packed: PackedTensor) -> None:
        assert packed.scales is not None
        if not bool(packed.scales.isfinite().all()):
            raise FormatError("nf4: a scale is NaN or infinite; the file is damaged, download it again")


def _bin(values: torch.Tensor) -> torch.Tensor:
    """The bin of each value in [-1, 1], int32; never falls as values rise."""
    return ((values + 1) * (BINS / 2)).to(torch.int32).clamp_(max=BINS - 1)


NF4 = Nf4()


def read_bitsandbytes(tensors: Mapping[str, torch.Tensor], name: str) -> PackedTensor:
    """The NF4 matrix `name` among tensors named as bitsandbytes writes them.

    `tensors` holds `name` (uint8 `[n/2, 1]`), `name.absmax`, `name.quant_state.bitsandbytes__nf4` and
    so on, with or without double quantisation. Raises FormatError where one is missing, or holds
    what Loci does not read.
    """

    def part(suffix: str) -> torch.Tensor:
        if f"{name}{suffix}" not in tensors:
            raise FormatError(f"nf4: {name}{suffix} is missing; the checkpoint is incomplete")
        return tensors[f"{name}{suffix}"]

    state = _read_state(part(".quant_state.bitsandbytes__nf4"), name)
    shape, block = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, int) for n in shape):
        raise FormatError(f"nf4: {name} has shape {shape}, expected [rows, cols]")
    if block != BLOCK or shape[1] % BLOCK:
        raise FormatError(
            f"nf4: {name} is {shape} in blocks of {block}; only rows of whole blocks of {BLOCK} are supported"
        )
    if not torch.allclose(part(".quant_map").float(), NF4_LEVELS, atol=1e-6):
        raise FormatError(f"nf4: {name}.quant_map does not contain the NF4 levels")
    absmax = part(".absmax")
    if f"{name}.nested_absmax" in tensors:
        nested = (part(".nested_absmax"), part(".nested_quant_map"))
        absmax = _undo_double_quantisation(absmax, *nested, state, name)
    rows, cols = shape
    codes = part("").contiguous().view(torch.uint8)
    for what, found, expected in (
        ("bytes of codes", codes.numel(), rows * cols // 2),
        ("scales", absmax.numel(), rows * cols // BLOCK),
    ):
        if found != expected:
            raise FormatError(f"nf4: {name} has {found} {what}, expected {expected} for {shape}")
    scales = absmax.float().reshape(rows, cols // BLOCK)
    return PackedTensor(NF4, (rows, cols), codes.reshape(rows, cols // 2), scales)


def _read_state(raw: torch.Tensor, name: str) -> dict[str, object]:
    """The small JSON object that bitsandbytes stores as a tensor of its characters."""
    if raw.numel() > MAX_STATE_BYTES:
        raise FormatError(f"nf4: quant_state of {name} has {raw.numel()} bytes; the checkpoint is damaged")
    try:
        state = json.loads(bytes(raw.to(torch.uint8).tolist()))
    except (ValueError, RecursionError):
        raise FormatError(f"nf4: quant_state of {name} is not JSON; the checkpoint is damaged") from None
    if not isinstance(state, dict):
        raise FormatError(f"nf4: quant_state of {name} is not a JSON object; the checkpoint is damaged")
    return state


def _undo_double_quantisation(
    absmax_codes: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_map: torch.Tensor,
    state: Mapping[str, object],
    name: str,
) -> torch.Tensor:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not isinstance(block, int) or block < 1 or not isinstance(offset, int | float):
        raise FormatError(f"nf4: quant_state of {name} lacks nested_blocksize or nested_offset")
    count = absmax_codes.numel()
    found = (absmax_codes.dtype, nested_map.numel(), nested_absmax.numel())
    expected = (torch.uint8, 256, -(-count // block))
    if found != expected:
        raise FormatError(
            f"nf4: double quantisation of {name} has dtype, levels and blocks {found}, expected {expected}"
        )
    scales = nested_absmax.float().repeat_interleave(block)[:count]
    return nested_map.float()[absmax_codes.flatten().int()] * scales + offset
