"""ue8m0 scales: one unsigned byte `c` is the power of two 2^(c-127); 255 is NaN and refused."""

from __future__ import annotations

import torch

from quant.errors import FormatError


def decode_ue8m0(codes: torch.Tensor) -> torch.Tensor:
    """2^(c-127) as float32, of `codes`' shape.

    `codes` is uint8. Code 0 is the subnormal 2^-127, which float32 still holds exactly.
    """
    bits = codes.to(torch.int32)
    normal = (bits << 23).view(torch.float32)
    return torch.where(bits == 0, torch.full_like(normal, 2.0**-127), normal)


def refuse_nan(codes: torch.Tensor, what: str) -> None:
    """Raise FormatError where a scale code is 255 (NaN); `what` names the tensor."""
    if bool((codes == 255).any()):
        raise FormatError(f"{what}: a ue8m0 scale is NaN (code 255); the file is damaged, download it again")
