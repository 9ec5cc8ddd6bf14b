"""Where data and checkpoints of the demonstration model lie: outside the repository."""

from __future__ import annotations

from pathlib import Path

from memory.user_files import user_cache

HERE = Path(__file__).resolve().parent


def demo_directory() -> Path:
    """`$XDG_CACHE_HOME/loci/demo`, or `~/.cache/loci/demo`."""
    return user_cache() / "demo"
