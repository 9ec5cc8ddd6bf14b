"""Reads a model's config: typed lookups that note every problem, so that one error names all of them.

A key that nobody asked for may change what the model computes. It is refused, unless it is known to change
nothing, or is switched off (null, false, zero, empty).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quant.errors import ConfigError

LARGEST = sys.float_info.max
SHOWN = 60  # characters of an unexpected value

# Keys of config.json that change nothing of what is computed from tokens to logits: training, bookkeeping,
# how other software loads the model.
HARMLESS = frozenset(
    (
        "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures",
        "attention_dropout", "attn_pdrop", "auto_map", "aux_loss_alpha", "chunk_size_feed_forward",
        "do_sample", "dtype", "embd_pdrop", "ep_size", "hidden_dropout", "hidden_dropout_prob", "id2label",
        "initializer_range", "label2id", "max_length", "max_new_tokens", "min_length", "model_type",
        "name_or_path", "num_return_sequences", "output_router_logits", "pad_token_id", "pretraining_tp",
        "quantization_config", "repetition_penalty", "resid_pdrop", "return_dict", "router_aux_loss_coef",
        "router_jitter_noise", "sep_token_id", "seq_aux", "temperature", "tokenizer_class", "top_k", "top_p",
        "torch_dtype", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed",
        "unsloth_version", "use_cache",
    )
)  # fmt: skip

# What is computed unless one of these is false: here false changes what is computed.
ON = frozenset(("is_causal", "causal", "attention.causal", "use_rope"))


class Keys:
    """Lookups in a config, or in an object within it; problems are collected until `check`.

    prefix: the path of `config` within the whole config, for messages. Where a key is missing or wrong, a
    lookup notes that and returns 1, so that reading can go on.
    """

    def __init__(self, path: Path, family: str, config: Mapping[str, Any], prefix: str = "") -> None:
        self.path = path
        self.family = family
        self.config = config
        self.prefix = prefix
        self.problems: list[str] = []
        self._asked: set[str] = set()

    def inner(self, key: str, config: Mapping[str, Any]) -> Keys:
        """Lookups in an object under `key`; what they find wrong is noted here."""
        inner = Keys(self.path, self.family, config, f"{self.prefix}{key}.")
        inner.problems = self.problems
        self._asked.add(key)
        return inner

    def raw(self, key: str) -> Any:
        """The value as it is; None where there is none."""
        self._asked.add(key)
        return self.config.get(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self.raw(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
            self.refuse(key, value, "expected a positive number")
            return 1.0
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.number(key, default)
        if not value.is_integer():
            self.refuse(key, value, "expected an integer")
            return 1
        return int(value)

    def count_or_none(self, key: str) -> int | None:
        """A positive integer; None where the key is missing, null or 0."""
        return self.count(key) if self.raw(key) else None

    def flag(self, key: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.raw(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(key, value, "expected true or false")
        return value is True

    def token_ids(self, *keys: str) -> tuple[int, ...]:
        """The ids under `keys`, in order, each once; a key may hold one id, a list, or be absent."""
        found: list[int] = []
        for key in keys:
            value = self.raw(key)
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
                self.refuse(key, value, "expected a token id")
                continue
            found += ids
        return tuple(dict.fromkeys(found))

    def only(self, key: str, *accepted: Any) -> None:
        """Refuse a value other than these; the first is named."""
        value = self.raw(key)
        if not any(value is item or (value == item and type(value) is not bool) for item in accepted):
            self.refuse_choice(key, value, accepted[:1])

    def refuse(self, key: str, value: object, why: str) -> None:
        """Note that the value of `key` is wrong."""
        self._note(key, value, f", {why}")

    def refuse_choice(self, key: str, value: object, accepted: Iterable[object]) -> None:
        """Note that the family does not compute this value of `key`."""
        only = " or ".join(map(repr, accepted))
        self._note(key, value, f"; the {self.family} family supports only {only}")

    def _note(self, key: str, value: object, why: str) -> None:
        shown = repr(value)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        self.problems.append(f"{self.prefix}{key} is {shown}{why}")

    def check_unknown(self, harmless: Iterable[str] = ()) -> None:
        """Note every key that nobody asked for and that is neither harmless nor switched off."""
        for key in sorted(self.config.keys() - self._asked - set(harmless)):
            value = self.config[key]
            if value is not True and value is not None if key in ON else value:
                self._note(key, self.config[key], f"; the {self.family} family does not support it")

    def check(self) -> None:
        """Raise one ConfigError with everything that was noted."""
        if self.problems:
            raise ConfigError(f"{self.path}: {'; '.join(dict.fromkeys(self.problems))}")
