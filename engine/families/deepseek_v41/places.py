"""Where the processor's layers lie, under the name that the forward imports."""

from __future__ import annotations

from engine.families import places

HOST = places.HOST
