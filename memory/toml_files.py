"""TOML files that people write: read with their keys checked, and refused in one line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from quant.errors import ConfigError

MAX_BYTES = 1 << 20  # nobody writes more by hand


class Section(BaseModel):
    """A table of a TOML file: unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Whole = TypeVar("Whole", bound=Section)


def read_toml(kind: type[Whole], path: Path, shows: str) -> Whole:
    """A file of this kind. Raises ConfigError; `shows` is the page that shows one."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes; {shows} shows such a file")
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {shows} shows such a file") from None
    return parse_toml(kind, text, str(path), shows)


def parse_toml(kind: type[Whole], text: str, source: str, shows: str) -> Whole:
    """The same from text. Raises ConfigError naming every key that is unknown, missing or wrong."""
    try:
        return kind.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: not TOML ({error}); {shows} shows such a file") from None
    except ValidationError as error:
        raise ConfigError(f"{source}: {_describe(error)}") from None


def _describe(error: ValidationError) -> str:
    problems = []
    for item in error.errors(include_url=False, include_context=False):
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            problems.append(f"{key}: no such key")
        elif item["type"] == "missing":
            problems.append(f"{key}: missing")
        elif item["type"] == "model_type":
            problems.append(f"{key}: must be a section of its own, [{key}]")
        elif item["type"] == "value_error":
            problems.append(f"{key}: {item['msg'].removeprefix('Value error, ')}".removeprefix(": "))
        else:
            problems.append(f"{key}: {item['msg']}, got {item['input']!r}")
    return "; ".join(problems)
