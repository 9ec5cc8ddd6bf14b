"""The tokenizer in a GGUF file's metadata, rebuilt for the `tokenizers` library.

`tokenizer.ggml.model` names the kind (`gpt2` is byte-level BPE), `tokenizer.ggml.pre` the pre-tokenizer. A
slightly wrong pre-tokenizer still gives plausible ids, so only those compared with llama.cpp are accepted
(tests/golden/smollm2 holds the comparison).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from quant.errors import CheckpointError, ConfigError

# values of tokenizer.ggml.token_type
CONTROL = 3
USER_DEFINED = 4

KINDS = ("gpt2",)
CUTS = ("smollm",)


def backend_from_gguf(metadata: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer for GGUF `metadata` (flat keys such as `tokenizer.ggml.tokens`).

    Raises ConfigError naming a kind or cut that is not supported, CheckpointError where lists are
    missing or disagree. `path` is for the messages.
    """
    kind = metadata.get("tokenizer.ggml.model")
    cut = metadata.get("tokenizer.ggml.pre")
    if kind not in KINDS:
        raise ConfigError(f"{path}: tokenizer.ggml.model is {kind!r}; supported: {', '.join(KINDS)}")
    if cut not in CUTS:
        raise ConfigError(f"{path}: tokenizer.ggml.pre is {cut!r}; supported: {', '.join(CUTS)}")

    tokens = _strings(metadata, "tokenizer.ggml.tokens", path)
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.token_type does not have one entry per token")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens) - len(vocab)} duplicate token(s)"
        )
    merges = []
    for merge in _strings(metadata, "tokenizer.ggml.merges", path):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    try:
        model = models.BPE(vocab=vocab, merges=merges)
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{path}: tokenizer.ggml.merges do not fit the tokens ({error})") from None

    backend = tokenizers.Tokenizer(model)
    # `smollm`: every digit alone, then GPT-2's cut into words, punctuation and white space.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    typed = list(zip(tokens, types, strict=True))
    backend.add_tokens([_added(token) for token, type_ in typed if type_ == USER_DEFINED])
    backend.add_special_tokens([_added(token) for token, type_ in typed if type_ == CONTROL])
    return backend


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _strings(metadata: Mapping[str, Any], key: str, path: Path) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{path}: {key} is missing or not a list of strings")
    return value
