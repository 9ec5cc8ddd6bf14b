"""Better scales than "the smallest that clips nothing" for the four-bit formats.

Covering the largest value of a block spends levels on one outlier and makes all others coarser. The
search tries smaller scales, block by block, then refits the best one to its codes by least squares,
and keeps whatever lowers the weighted square error

    sum over the block of importance[column] * (value - decoded)^2

so that no block ever gets worse than without it. `importance` says how much an error in a column
costs: the mean square of the activations that it multiplies, where those are known.
"""

from __future__ import annotations

import torch

from quant.errors import FormatError
from quant.formats.four_bit import FourBit
from quant.packed import PackedTensor

REFITS = 2
# Values searched at a time: intermediate results of 512 KiB stay in the cache.
CHUNK_VALUES = 1 << 17


def encode_searched(
    format_: FourBit, values: torch.Tensor, importance: torch.Tensor | None = None
) -> PackedTensor:
    """`format_.encode` with searched scales.

    values `[rows, cols]` float; importance `[cols]`, finite and not negative, None for equal weights.
    Raises FormatError as `Format.encode` does, and for an importance that does not fit.
    """
    weights = _weights(format_, values, importance)
    step = max(1, CHUNK_VALUES // values.shape[1]) if values.ndim == 2 and values.shape[1] else 1
    parts = []
    for start in range(0, max(1, values.shape[0]), step):
        chunk = values[start : start + step]
        parts.append(format_.encode(chunk, search_scales(format_, format_.blocks(chunk), weights)))
    codes = torch.cat([part.codes for part in parts])
    scales = torch.cat([part.scales for part in parts if part.scales is not None])
    return PackedTensor(format_, (values.shape[0], values.shape[1]), codes, scales)


def search_scales(format_: FourBit, blocks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Stored scales for blocks `[rows, cols/block, block]` float32; weights broadcast to them."""
    covering = format_.covering_scales(blocks)
    best, least = covering, _error(format_, blocks, covering, weights)
    for factor in format_.search_factors:
        trial = format_.rescaled(covering, factor)
        best, least = _better(format_, (best, least), (trial, _error(format_, blocks, trial, weights)))
    for _ in range(REFITS):
        levels = format_.nearby_levels(format_.remove_scales(blocks, best))
        trial = format_.fitted(blocks, levels, weights)
        best, least = _better(format_, (best, least), (trial, _error(format_, blocks, trial, weights)))
    return best


Candidate = tuple[torch.Tensor, torch.Tensor]  # stored scales, error of each block `[rows, cols/block]`


def _better(format_: FourBit, best: Candidate, trial: Candidate) -> Candidate:
    """Block by block, whichever has the lower error."""
    is_better = trial[1] < best[1]
    per_scale = is_better.view(*is_better.shape, *(1 for _ in format_.scale_fields))
    return torch.where(per_scale, trial[0], best[0]), torch.where(is_better, trial[1], best[1])


def _error(
    format_: FourBit, blocks: torch.Tensor, stored: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted square error of each block, `[rows, cols/block]`."""
    levels = format_.nearby_levels(format_.remove_scales(blocks, stored))
    return format_.apply_scales(levels, stored).sub_(blocks).square_().mul_(weights).sum(-1)


def _weights(format_: FourBit, values: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """`importance` as float32 `[cols/block, block]`, or a single 1."""
    if importance is None:
        return torch.ones(1, 1)
    if importance.shape != values.shape[1:]:
        raise FormatError(
            f"importance has shape {list(importance.shape)}, expected one per column {list(values.shape[1:])}"
        )
    weights = importance.float()
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise FormatError("importance must be finite and not negative")
    # A block that never sees an activation still gets the best plain fit.
    blocks = weights.reshape(-1, format_.tile_cols)
    return torch.where(blocks.amax(-1, keepdim=True) == 0, 1.0, blocks)
