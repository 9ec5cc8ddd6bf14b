"""The demonstration model's scripts are no package: tests find them by path."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "deploy" / "demo"))  # last: their short names must not hide others
