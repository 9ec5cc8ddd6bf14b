"""Where data and checkpoints of the demonstration model lie: outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent


def demo_directory() -> Path:
    """`$XDG_CACHE_HOME/loci/demo`, or `~/.cache/loci/demo`."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "loci" / "demo"
