"""Files that Loci writes for its user: where its cache is, and how a file is written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from quant.errors import ConfigError


def user_cache() -> Path:
    """The user's cache for Loci: `$XDG_CACHE_HOME/loci`, or `~/.cache/loci`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loci"


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary name beside `target` to write to; it becomes `target` unless the writing fails.

    Raises ConfigError for a directory or a device, which are not replaced, and OSError where writing fails.
    """
    if target.exists() and not target.is_file():
        raise ConfigError(f"{target}: is not a file that can be replaced; name another")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    except SafetensorError as error:  # its library's word for an OSError
        raise OSError(errno.EIO, f"cannot be written ({error})", str(target)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
