"""API keys, from settings and from a TOML file that is reloaded when it changes.

ada = "sk-one"

[bob]
key = "sk-two"
requests_per_minute = 60
tokens_per_minute = 100000
concurrent_requests = 4
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError

from quant.errors import ConfigError
from server.http.rate_limits import Account, Clock, Limits
from server.metrics import Metrics

log = logging.getLogger("loci")

MAX_FILE_BYTES = 1 << 20
CHECK_EVERY_S = 1.0
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Entry(Limits):
    """One key from the file, with its limits."""

    key: SecretStr = Field(min_length=1)

    @property
    def limits(self) -> Limits:
        """The limits alone."""
        return Limits(**self.model_dump(exclude={"key"}))


class KeyRing:
    """Maps keys to accounts. Not thread-safe: it belongs to the event loop.

    Keys of `given` are named key-1, key-2 ... and have no limits. Raises ConfigError if the file is invalid
    at startup; if it becomes invalid later, this is logged and the previous keys stay valid.
    """

    def __init__(
        self,
        given: Iterable[str],
        file: Path | None,
        metrics: Metrics,
        clock: Clock = time.monotonic,
    ) -> None:
        self._file = file
        self._metrics = metrics
        self._clock = clock
        self._fixed = {f"key-{i}": Entry(key=SecretStr(key)) for i, key in enumerate(given, 1)}
        self._accounts: dict[str, Account] = {}
        self._digests: dict[str, bytes] = {}
        self._version = _version(file)
        self._checked = clock()
        self._use(self._fixed | self._read())

    def account(self, key: str) -> Account | None:
        """The account of `key`, if there is one."""
        self._reload_if_changed()
        digest = _digest(key)
        # Every key is compared, so that the time taken reveals nothing about the match.
        matches = [name for name, known in self._digests.items() if hmac.compare_digest(known, digest)]
        return self._accounts[matches[0]] if matches else None

    def _reload_if_changed(self) -> None:
        now = self._clock()
        if self._file is None or now - self._checked < CHECK_EVERY_S:
            return
        self._checked = now
        version = _version(self._file)
        if version == self._version:
            return
        self._version = version
        try:
            self._use(self._fixed | self._read())
        except ConfigError as error:
            log.error("%s; the previous keys stay valid", error)
        else:
            log.info("%s was reloaded: %d keys", self._file, len(self._digests))

    def _read(self) -> dict[str, Entry]:
        if self._file is None:
            return {}
        entries = read_key_file(self._file)
        taken = entries.keys() & self._fixed.keys()
        if taken:
            raise ConfigError(f"{self._file}: the name {min(taken)} is already used by a key in the settings")
        return entries

    def _use(self, entries: Mapping[str, Entry]) -> None:
        # A key's usage survives changes of the file that do not affect it.
        accounts = {}
        for name, entry in entries.items():
            account = self._accounts.get(name) or Account(name, entry.limits, self._metrics, self._clock)
            if account.limits != entry.limits:
                account.change(entry.limits)
            account.salt = _salt(entry.key.get_secret_value()) if len(entries) > 1 else ""
            accounts[name] = account
        self._accounts = accounts
        self._digests = {name: _digest(entry.key.get_secret_value()) for name, entry in entries.items()}


def read_key_file(path: Path) -> dict[str, Entry]:
    """The keys in `path` by name. Warns if other users can read the file.

    Raises ConfigError that names the error and never shows a key.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(MAX_FILE_BYTES + 1)
        content = tomllib.loads(text.decode())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; --api-key-file takes a TOML file") from None
    except ValueError:  # its text could include part of a key
        raise ConfigError(f'{path}: not valid TOML; a key is a line like name = "key"') from None
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes, too large for a key file")
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        log.warning("%s can be read by other users; run chmod 600 %s", path, path)
    entries = {name: _entry(path, name, value) for name, value in content.items()}
    if not entries:
        raise ConfigError(f'{path}: contains no keys; a key is a line like name = "key"')
    secrets = [entry.key.get_secret_value() for entry in entries.values()]
    twice = next((name for name, key in zip(entries, secrets, strict=True) if secrets.count(key) > 1), None)
    if twice is not None:
        raise ConfigError(f"{path}: the key of {twice} is listed twice")
    return entries


def _entry(path: Path, name: str, value: Any) -> Entry:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{path}: {name!r} is not a valid key name; use up to 64 letters, digits and . _ -")
    try:
        return Entry.model_validate({"key": value} if isinstance(value, str) else value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join([name, *map(str, first["loc"])])
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None


def _version(file: Path | None) -> tuple[int, ...] | None:
    """A version that changes with the file; None while there is no file."""
    try:
        found = file.stat() if file is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _salt(key: str) -> str:
    """Of the key itself, since names of keys in the settings only count them."""
    encoded = key.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(encoded, digest_size=16, person=b"cached prompts").hexdigest()
