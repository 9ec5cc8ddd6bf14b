"""Files that Loci writes for its user: where its cache is, and how a file is written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quant.errors import ConfigError


def user_cache() -> Path:
    """The user's cache for Loci: `$XDG_CACHE_HOME/loci`, or `~/.cache/loci`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loci"


def check_writable(target: Path) -> None:
    """Raise ConfigError where no file can be written as `target`: said before long work, not after it."""
    if target.is_dir():
        raise ConfigError(f"{target}: a directory; name a file to write")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent}: no such directory to write to; name another file")
    try:
        with tempfile.TemporaryFile(
            dir=target.parent
        ):  # rights and read-only file systems: only trying tells
            pass
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); name another file") from None


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary name beside `target` to write to; it becomes `target` unless the writing fails."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
