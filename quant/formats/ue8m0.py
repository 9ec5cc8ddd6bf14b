"""ue8m0 scales: one unsigned byte `c` is the power of two 2^(c-127); 255 is NaN and refused."""

from __future__ import annotations

import math

import torch

from quant.errors import FormatError

BIAS = 127
NAN_CODE = 255


def decode_ue8m0(codes: torch.Tensor) -> torch.Tensor:
    """2^(c-127) as float32, of `codes`' shape.

    `codes` is uint8. Code 0 is the subnormal 2^-127, which float32 still holds exactly.
    """
    bits = codes.to(torch.int32)
    normal = (bits << 23).view(torch.float32)
    return torch.where(bits == 0, torch.full_like(normal, 2.0**-BIAS), normal)


def inverse_ue8m0(codes: torch.Tensor) -> torch.Tensor:
    """2^(127-c) as float32: multiplying by it divides by the scale, exactly. Codes up to 253."""
    return decode_ue8m0(2 * BIAS - codes)


def covering_scale(largest: torch.Tensor, limit: float) -> torch.Tensor:
    """Codes of the smallest powers of two with `largest` <= limit * 2^(c-127), uint8.

    `largest` is finite, non-negative float32. Codes end where limit * 2^(c-127) would leave
    float32, so that decoding never overflows; the few values beyond are clipped to that.
    """
    limit_mantissa, limit_exponent = math.frexp(limit)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2^exponent, 0.5 <= mantissa < 1
    codes = exponent - limit_exponent + (mantissa > limit_mantissa).int() + BIAS
    # frexp(0) is (0, 0), which asks for a middling scale; a block of zeros may as well have it.
    return codes.clamp(0, largest_code(limit)).to(torch.uint8)


def largest_code(limit: float) -> int:
    """The largest code c for which limit * 2^(c-127) is a finite float32."""
    return 128 - math.frexp(limit)[1] + BIAS


def refuse_nan(codes: torch.Tensor, what: str) -> None:
    """Raise FormatError where a scale code is 255 (NaN); `what` names the tensor."""
    if bool((codes == NAN_CODE).any()):
        raise FormatError(f"{what}: a ue8m0 scale is NaN (code 255); the file is damaged, download it again")
