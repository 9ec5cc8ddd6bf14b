"""A byte-level BPE tokenizer of any size, made rather than trained: letters join to pairs and longer runs.

It reads any text and has the marks that DeepSeek V4.1's prompts need. Every run of letters exists with
and without a space before it, so that, as in real vocabularies, several tokens fold to one Engram key.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from string import ascii_lowercase

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.tokenizer.tokenizer import BYTE_OF_CHARACTER
from quant.errors import ConfigError

BOS, EOS, PAD = 0, 1, 2
SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜System｜>", "<｜User｜>",
    "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜", "<｜latest_reminder｜>", "<｜image｜>",
)  # fmt: skip
SPACE = "Ġ"  # how byte-level vocabularies spell a space


def synthetic_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens: special ones first, then bytes, then runs of letters.

    Raises ConfigError where there is not even room for the bytes, or more than there are runs.
    """
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *BYTE_OF_CHARACTER))}
    merges = merges_of(vocab_size)
    if len(vocab) + len(merges) != vocab_size:
        raise ConfigError(f"a vocabulary of {vocab_size} tokens: expected {len(vocab)} to 900000")
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def merges_of(vocab_size: int) -> list[tuple[str, str]]:
    """The merges of `synthetic_tokenizer(vocab_size)`, in order."""
    return list(islice(_merges(), max(0, vocab_size - len(SPECIAL_TOKENS) - len(BYTE_OF_CHARACTER))))


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs of tokens to be joined: each joins what exists, no run is made twice."""
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    for letter in ascii_lowercase:
        yield SPACE, letter
    for pair in pairs:
        yield pair[0], pair[1]
        yield SPACE + pair[0], pair[1]
    for pair, letter in product(pairs, ascii_lowercase):
        yield pair, letter
        yield SPACE + pair, letter
    for left, right in product(pairs, pairs):
        yield left, right
        yield SPACE + left, right
