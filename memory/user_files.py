"""Files that Loci writes for its user: the cache directory, and atomic writes."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from quant.errors import ConfigError


def user_cache() -> Path:
    """The user's cache for Loci: `$XDG_CACHE_HOME/loci`, or `~/.cache/loci`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loci"


def check_writable(target: Path) -> None:
    """Raise ConfigError if `target` cannot be written: checked before long work, not after it."""
    if target.is_dir():
        raise ConfigError(f"{target}: is a directory; name a file to write")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent}: no such directory to write to; name another file")
    try:
        with tempfile.TemporaryFile(
            dir=target.parent
        ):  # permissions and read-only file systems: only trying tells
            pass
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); name another file") from None


def make_folder(folder: Path, refusal: str) -> None:
    """Make a folder that only its user can read, unless it is there. Raises ConfigError, with the refusal,
    where it cannot be made or nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{folder}: {refusal} ({error.strerror})") from None


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary file next to `target` to write to, renamed to `target` unless writing fails.

    Raises ConfigError for a directory or a device, which are not replaced, and OSError where writing fails.
    """
    if target.exists() and not target.is_file():
        raise ConfigError(f"{target}: not a regular file; name another file")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    except SafetensorError as error:  # safetensors' form of an OSError
        raise OSError(errno.EIO, f"cannot be written ({error})", str(target)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
