"""The names of the formats that a KV cache can be kept in (kv.py says what they mean); loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from quant.errors import ConfigError

KvFormat = Literal["float32", "bf16", "fp8", "int8", "vendor"]
KvChoice = Literal["auto", "float32", "bf16", "fp8", "int8", "vendor"]
PLAIN: tuple[KvFormat, ...] = ("float32", "bf16", "fp8", "int8")
# Of each kind of model, the default first.
V41_FORMATS: tuple[KvFormat, ...] = ("vendor", *PLAIN)
V4_FORMATS: tuple[KvFormat, ...] = ("vendor", *PLAIN)
TRAINED_LATENTS: tuple[KvFormat, ...] = ("vendor", *PLAIN)  # DeepSeek-V3.2
LATENT_FORMATS: tuple[KvFormat, ...] = (*PLAIN, "vendor")  # its relatives: trained in bfloat16
HEAD_FORMATS: tuple[KvFormat, ...] = PLAIN


def resolve(asked: KvChoice, known: Sequence[KvFormat], name: str) -> KvFormat:
    """The format asked for, of those that a model can have, the default first; `auto` is the default.

    Raises ConfigError for another one.
    """
    if asked == "auto":
        return known[0]
    if asked not in known:
        raise ConfigError(f"--kv-format {asked}: {name} has {', '.join(sorted(known))}; choose one of these")
    return asked
