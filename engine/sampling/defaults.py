"""A model's default sampling parameters and end-of-answer tokens, from its `generation_config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.errors import ConfigError

FILE_NAME = "generation_config.json"
MAX_BYTES = 1 << 20
FIELDS: dict[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
}


def sampling_defaults(checkpoint: Path) -> Mapping[str, Any]:
    """Sampling parameters by name; empty if the checkpoint has no such file.

    `do_sample: false` means greedy. Raises ConfigError for a file that is damaged.
    """
    file = checkpoint / FILE_NAME
    config = _read(file)
    defaults: dict[str, Any] = {}
    for name, kind in FIELDS.items():
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{file}: {name} is {value!r}, expected a number")
        defaults[name] = kind(value)
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def end_token_ids(checkpoint: Path, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer according to this file, besides those in the model's config.

    Raises ConfigError for a file that is damaged, or an id that is none of the vocabulary's.
    """
    file = checkpoint / FILE_NAME
    value = _read(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
        raise ConfigError(
            f"{file}: eos_token_id is {value!r}, expected token ids from 0 to {vocab_size - 1}; fix it"
        )
    return tuple(dict.fromkeys(ids))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_BYTES} bytes, too large for a generation config")
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error}); fix or remove it") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: expected a JSON object")
    return config
