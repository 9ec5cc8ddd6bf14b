"""Rounding to the stored formats: for training (straight through) and for export (codes and scales).

One rounding serves both, so the model that was trained is the model that is stored: `round_*`
returns exactly the numbers that decoding `encode_*`'s bytes gives.

Scales are powers of two (ue8m0). The smallest one that clips nothing is chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.formats.mxfp4 import E2M1

TILE = 32
E4M3_LARGEST = 448.0
E2M1_LARGEST = 6.0
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127


def _exponents(largest: Tensor, limit: float) -> Tensor:
    """The smallest e with largest / 2^e <= limit, as int32."""
    mantissa, exponent = torch.frexp(
        largest / limit
    )  # largest / limit = mantissa * 2^exponent, 0.5 <= mantissa < 1
    return (exponent - (mantissa == 0.5).int()).clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT)


def _tiles(w: Tensor) -> Tensor:
    """`[..., rows, cols]` as `[..., rows/32, 32, cols/32, 32]`."""
    rows, cols = w.shape[-2:]
    return w.view(*w.shape[:-2], rows // TILE, TILE, cols // TILE, TILE)


def _dense_exponents(w: Tensor) -> Tensor:
    return _exponents(_tiles(w).abs().amax((-3, -1)), E4M3_LARGEST)  # [..., rows/32, cols/32]


def _row_exponents(w: Tensor, limit: float) -> Tensor:
    blocks = w.view(*w.shape[:-1], -1, TILE)
    return _exponents(blocks.abs().amax(-1), limit)  # [..., cols/32]


def _power(exponents: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def _to_e2m1(scaled: Tensor) -> Tensor:
    """The nearest e2m1 value of each value in [-6, 6]; ties go to the even code."""
    magnitude = scaled.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (scaled / step).round_().mul_(step)


def _e2m1_codes(scaled: Tensor) -> Tensor:
    """The code of that value, uint8."""
    rounded = _to_e2m1(scaled)
    return (torch.bucketize(rounded.abs(), E2M1[:8]) + 8 * (rounded < 0)).to(torch.uint8)


def round_fp8_tiles(w: Tensor) -> Tensor:
    """`w` `[..., rows, cols]` as FP8 with a scale per 32x32 tile holds it."""
    scale = _power(_dense_exponents(w))[..., :, None, :, None]
    return ((_tiles(w) / scale).to(torch.float8_e4m3fn).float() * scale).view_as(w)


def round_fp8_rows(w: Tensor) -> Tensor:
    """`w` `[..., cols]` as FP8 with a scale per 32 columns of a row holds it."""
    blocks = w.view(*w.shape[:-1], -1, TILE)
    scale = _power(_row_exponents(w, E4M3_LARGEST)).unsqueeze(-1)
    return ((blocks / scale).to(torch.float8_e4m3fn).float() * scale).view_as(w)


def round_fp4(w: Tensor) -> Tensor:
    """`w` `[..., cols]` as MXFP4 (a scale per 32 columns of a row) holds it."""
    blocks = w.view(*w.shape[:-1], -1, TILE)
    scale = _power(_row_exponents(w, E2M1_LARGEST)).unsqueeze(-1)
    return (_to_e2m1(blocks / scale) * scale).view_as(w)


def round_bf16(w: Tensor) -> Tensor:
    """`w` as bfloat16 holds it."""
    return w.to(torch.bfloat16).float()


ROUNDERS = {"fp8": round_fp8_tiles, "fp8_row": round_fp8_rows, "fp4": round_fp4, "bf16": round_bf16}


def straight_through(w: Tensor, stored_as: str) -> Tensor:
    """The rounded `w`, whose gradient is that of `w` itself."""
    if stored_as == "fp32":
        return w
    return w + (ROUNDERS[stored_as](w.detach()) - w.detach())


def _biased(exponents: Tensor) -> Tensor:
    return (exponents + 127).to(torch.uint8)


def encode_fp8_tiles(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[rows, cols]` and ue8m0 scales `[rows/32, cols/32]`, both uint8."""
    exponents = _dense_exponents(w)
    scaled = _tiles(w) / _power(exponents)[:, None, :, None]
    return scaled.to(torch.float8_e4m3fn).view_as(w).view(torch.uint8), _biased(exponents)


def encode_fp8_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[rows, cols]` and ue8m0 scales `[rows, cols/32]`, both uint8."""
    exponents = _row_exponents(w, E4M3_LARGEST)
    scaled = w.view(w.shape[0], -1, TILE) / _power(exponents).unsqueeze(-1)
    return scaled.to(torch.float8_e4m3fn).view_as(w).view(torch.uint8), _biased(exponents)


def encode_fp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[rows, cols/2]` (even column in the low nibble) and ue8m0 scales `[rows, cols/32]`."""
    exponents = _row_exponents(w, E2M1_LARGEST)
    codes = _e2m1_codes(w.view(w.shape[0], -1, TILE) / _power(exponents).unsqueeze(-1)).view_as(w)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), _biased(exponents)
