"""How many bytes rows take in whole pages: what plans count, and what sequences take."""

from __future__ import annotations


def run_bytes(tokens: int, ratio: int, row_bytes: int, page_bytes: int) -> int:
    """Bytes of the pages of a run of rows, one for each `ratio` of so many tokens. A sequence has the first
    row's from the beginning: what is chosen among no rows yet is looked up there."""
    rows = max(tokens // ratio, min(tokens, 1))
    return -(-rows * row_bytes // page_bytes) * page_bytes
