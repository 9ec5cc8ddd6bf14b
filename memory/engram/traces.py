"""Traces of Engram lookups: the rows of every table that a text needed, token by token.

File: `engram_rows` `[tokens, tables, columns]` int32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memory.user_files import whole_file
from quant.errors import CheckpointError

FILE_NAME = "engram.safetensors"


def load_rows(file: Path) -> torch.Tensor:
    """Rows `[tokens, tables, columns]` int64. Raises CheckpointError for a file that is no such trace."""
    try:
        rows = load_file(file)["engram_rows"]
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{file}: not an Engram row trace ({error})") from None
    if rows.dim() != 3 or rows.dtype != torch.int32 or not rows.numel() or int(rows.min()) < 0:
        raise CheckpointError(f"{file}: engram_rows must be [tokens, tables, columns] of row numbers")
    return rows.to(torch.int64)


def save_rows(rows: torch.Tensor, file: Path) -> None:
    """Write rows `[tokens, tables, columns]` atomically."""
    with whole_file(file) as temporary:
        save_file({"engram_rows": rows.to(torch.int32).contiguous()}, temporary)
