"""From one stored form of a weight to another, a block of rows at a time, with the error it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quant.formats.four_bit import FourBit
from quant.packed import Format, PackedTensor
from quant.scale_search import encode_searched


@dataclass(frozen=True)
class Error:
    """How far converted values lie from their source; errors of blocks of rows add up.

    square_error and square_value are sums over all values, largest is the largest single difference.
    """

    square_error: float = 0.0
    square_value: float = 0.0
    largest: float = 0.0

    def __add__(self, other: Error) -> Error:
        return Error(
            self.square_error + other.square_error,
            self.square_value + other.square_value,
            max(self.largest, other.largest),
        )

    @property
    def relative(self) -> float:
        """Root mean square error as a share of the root mean square value."""
        return math.sqrt(self.square_error / self.square_value) if self.square_value else 0.0


def convert_rows(
    source: PackedTensor | torch.Tensor, target: Format | torch.dtype
) -> tuple[PackedTensor | torch.Tensor, Error]:
    """`source` (packed, or plain floats `[rows, cols]`) as `target`, a format or a float dtype.

    Four-bit formats get searched scales, FP8 the smallest powers of two that clip nothing. Raises
    FormatError where the source has NaN or infinite values or a shape that the target cannot hold.
    """
    values = source.decode() if isinstance(source, PackedTensor) else source.float()
    converted: PackedTensor | torch.Tensor
    if isinstance(target, torch.dtype):
        converted = values.to(target)
        decoded = converted.float()
    else:
        converted = encode_searched(target, values) if isinstance(target, FourBit) else target.encode(values)
        decoded = converted.decode()
    difference = decoded.sub_(values)
    error = Error(
        difference.square().sum(dtype=torch.float64).item(),
        values.square().sum(dtype=torch.float64).item(),
        difference.abs().max().item(),
    )
    return converted, error
