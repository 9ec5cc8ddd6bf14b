"""The tokenizer in a GGUF file's metadata, rebuilt for the `tokenizers` library.

`tokenizer.ggml.model` names the kind: `gpt2` is byte-level BPE with merges, whose cut into words
`tokenizer.ggml.pre` names; `llama` is SentencePiece's BPE, which has scores instead of merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from engine.tokenizer.cuts import CUTS, Cut
from quant.errors import CheckpointError, ConfigError

# values of tokenizer.ggml.token_type
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4

KINDS = ("gpt2", "llama")
SPACE = "\u2581"  # how SentencePiece spells a space


def backend_from_gguf(metadata: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer for GGUF `metadata` (flat keys such as `tokenizer.ggml.tokens`).

    Raises ConfigError naming a kind or cut that is not supported, CheckpointError where lists are
    missing or disagree. `path` is for the messages.
    """
    cut = _cut(metadata, path)
    tokens = _strings(metadata, "tokenizer.ggml.tokens", path)
    types = _one_per_token(metadata, "tokenizer.ggml.token_type", tokens, path)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens) - len(vocab)} duplicate token(s)"
        )
    typed = list(zip(tokens, types, strict=True))
    unknown = [token for token, type_ in typed if type_ == UNKNOWN]
    if cut is None:
        scores = _one_per_token(metadata, "tokenizer.ggml.scores", tokens, path)
        normal = {
            token: score for (token, type_), score in zip(typed, scores, strict=True) if type_ == NORMAL
        }
        has_prefix = metadata.get("tokenizer.ggml.add_space_prefix") is not False
        backend = _sentencepiece(vocab, merges_by_score(normal, vocab), unknown, has_prefix=has_prefix)
    else:
        backend = _byte_level(vocab, _strings(metadata, "tokenizer.ggml.merges", path), cut, path)
    backend.add_tokens([_added(token) for token, type_ in typed if type_ == USER_DEFINED])
    backend.add_special_tokens([_added(token) for token, type_ in typed if type_ in (UNKNOWN, CONTROL)])
    return backend


def adds_bos(metadata: Mapping[str, Any], path: Path) -> bool:
    """`tokenizer.ggml.add_bos_token`; where a file leaves it out, what llama.cpp takes the kind to mean.

    Raises ConfigError as `backend_from_gguf` does.
    """
    cut = _cut(metadata, path)
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    return stated if isinstance(stated, bool) else cut is None or cut.adds_bos


def merges_by_score(scores: Mapping[str, float], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Merges that join the same tokens as SentencePiece, which joins the pair whose token scores best.

    `scores` are those of ordinary tokens. The two ways to make one token (`a`, `aa` and `aa`, `a`) score the
    same; SentencePiece takes what stands first in the text, the library the longer left part.
    """
    merges = []
    for token, score in scores.items():
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in scores and right in scores:
                merges.append((-score, vocab[token], -at, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _cut(metadata: Mapping[str, Any], path: Path) -> Cut | None:
    """How a byte-level tokenizer cuts; nothing for SentencePiece, which does not."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in KINDS:
        raise ConfigError(f"{path}: tokenizer.ggml.model is {kind!r}; supported: {', '.join(KINDS)}")
    if kind == "llama":
        return None
    name = metadata.get("tokenizer.ggml.pre")
    cut = CUTS.get(name) if isinstance(name, str) else None
    if cut is None:
        raise ConfigError(f"{path}: tokenizer.ggml.pre is {name!r}; supported: {', '.join(CUTS)}")
    return cut


def _byte_level(vocab: dict[str, int], merges: list[str], cut: Cut, path: Path) -> tokenizers.Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        model = models.BPE(vocab=vocab, merges=pairs, ignore_merges=cut.ignores_merges)
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{path}: tokenizer.ggml.merges do not fit the tokens ({error})") from None
    backend = tokenizers.Tokenizer(model)
    if cut.normalizer is not None:
        backend.normalizer = cut.normalizer
    backend.pre_tokenizer = cut.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    vocab: dict[str, int], merges: list[tuple[str, str]], unknown: list[str], *, has_prefix: bool
) -> tokenizers.Tokenizer:
    """With `has_prefix`, a text begins with a space, and so does each part of it after an added token."""
    unk_token = unknown[0] if unknown else None
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if has_prefix else spaces
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if has_prefix else parts)
    return backend


def _added(token: str) -> AddedToken:
    return AddedToken(token, normalized=False)


def _strings(metadata: Mapping[str, Any], key: str, path: Path) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{path}: {key} is missing or not a list of strings")
    return value


def _one_per_token(metadata: Mapping[str, Any], key: str, tokens: list[str], path: Path) -> list[float]:
    value = metadata.get(key)
    if (
        not isinstance(value, list)
        or len(value) != len(tokens)
        or not all(isinstance(item, int | float) for item in value)
    ):
        raise CheckpointError(f"{path}: {key} does not have one number per token")
    return value
