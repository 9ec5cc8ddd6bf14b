"""How a model wants to be sampled where a request does not say: `generation_config.json` beside it."""

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
    """Sampling parameters by name; empty where the checkpoint has no such file.

    `do_sample: false` means greedy. Raises ConfigError for a file that is damaged.
    """
    file = checkpoint / FILE_NAME
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_BYTES} bytes; that is no generation config")
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error}); mend or remove it") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: a JSON object was expected")
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
