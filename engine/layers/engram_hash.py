"""Engram addresses: which table rows a token's n-grams use (spec section 7).

Everything follows from token ids alone, so rows can be fetched before the forward needs them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, normalizers

from memory.user_files import user_cache, whole_file
from quant.errors import ConfigError

REPLACEMENT_CHARACTER = "\ufffd"
FEW = 2  # up to this many tokens, plain Python is faster


def build_token_map(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray:
    """The compressed id of every token id, `[vocab_size]` int64.

    Tokens whose text differs only in case, accents or surrounding space share an id; ids are
    numbered by first appearance.
    """
    fold = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        ]
    )
    ids_of_keys: dict[str, int] = {}
    token_map = np.empty(vocab_size, dtype=np.int64)
    for token_id in range(vocab_size):
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if REPLACEMENT_CHARACTER in text:
            key = tokenizer.id_to_token(token_id) or text
        else:
            folded = fold.normalize_str(text)
            key = folded if folded == " " else (folded.strip() or text)
        token_map[token_id] = ids_of_keys.setdefault(key, len(ids_of_keys))
    return token_map


def load_token_map(tokenizer_file: Path, vocab_size: int, expected_size: int) -> np.ndarray:
    """The token map of a checkpoint's tokenizer.json, from the user's cache where it was built before.

    Raises ConfigError where the number of compressed ids is not `expected_size`
    (`engram_compressed_vocab_size`): then the tokenizer does not belong to the checkpoint.
    """
    if not tokenizer_file.is_file():
        raise ConfigError(f"{tokenizer_file}: not found; Engram lookups need its vocabulary")
    content = tokenizer_file.read_bytes()
    digest = hashlib.sha256(content + vocab_size.to_bytes(8, "little")).hexdigest()[:32]
    cached = user_cache() / "token_maps" / f"{digest}.npy"
    token_map = _read_cached(cached, vocab_size)
    if token_map is None:
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"{tokenizer_file}: not a tokenizer ({error})") from None
        token_map = build_token_map(tokenizer, vocab_size)
        _write_cached(cached, token_map)
    size = int(token_map.max()) + 1
    if size != expected_size:
        raise ConfigError(
            f"{tokenizer_file}: its vocabulary folds to {size} Engram keys, but the config expects "
            f"{expected_size}; this tokenizer does not match the checkpoint"
        )
    return token_map


def _read_cached(file: Path, vocab_size: int) -> np.ndarray | None:
    try:
        token_map: np.ndarray = np.load(file, allow_pickle=False)
    except (OSError, ValueError):
        return None
    good = token_map.dtype == np.int64 and token_map.shape == (vocab_size,) and token_map.min() >= 0
    return token_map if good else None


def _write_cached(file: Path, token_map: np.ndarray) -> None:
    """Best effort: a read-only home only costs building the map again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary, temporary.open("wb") as stream:
            np.save(stream, token_map)
    except OSError:
        return


def _is_prime(n: int) -> bool:
    if n < 4:
        return n > 1
    if n % 2 == 0 or n % 3 == 0:
        return False
    return all(n % d and n % (d + 2) for d in range(5, int(n**0.5) + 1, 6))


def table_primes(layers: int, orders: int, heads: int, vocab_size: int) -> list[list[int]]:
    """Table sizes per layer, `orders * heads` each: successive primes >= vocab_size, none used twice."""
    used: set[int] = set()
    by_layer = []
    for _ in range(layers):
        primes = []
        for _ in range(orders):
            candidate = vocab_size
            for _ in range(heads):
                while candidate in used or not _is_prime(candidate):
                    candidate += 1
                used.add(candidate)
                primes.append(candidate)
        by_layer.append(primes)
    return by_layer


@dataclass(frozen=True)
class EngramHash:
    """Addresses in all tables of a model.

    multipliers `[tables, max_ngram]`, primes and offsets `[tables, columns]`, all int64; column
    `o * heads + h` is order `o + 2`, head `h`.
    """

    multipliers: np.ndarray
    primes: np.ndarray
    offsets: np.ndarray
    heads: int

    @classmethod
    def for_layers(
        cls, layer_ids: Sequence[int], primes: Sequence[Sequence[int]], compressed_vocab: int, max_ngram: int
    ) -> EngramHash:
        """Addresses in the tables of `layer_ids`; multipliers are drawn so that no product overflows."""
        bound = max(1, (2**63 - 1) // compressed_vocab // 2)
        drawn = [
            np.random.default_rng(10007 * layer_id).integers(0, bound, size=max_ngram, dtype=np.int64)
            for layer_id in layer_ids
        ]
        sizes = np.array(primes, dtype=np.int64)
        heads = sizes.shape[1] // (max_ngram - 1)
        return cls(2 * np.stack(drawn) + 1, sizes, sizes.cumsum(1) - sizes, heads)

    def of(self, tables: Sequence[int]) -> EngramHash:
        """Addresses in some of the tables, by number."""
        chosen = list(tables)
        return EngramHash(self.multipliers[chosen], self.primes[chosen], self.offsets[chosen], self.heads)

    @property
    def history(self) -> int:
        """How many earlier tokens an address depends on."""
        return int(self.multipliers.shape[1]) - 1

    @property
    def columns(self) -> int:
        """Rows per token and table."""
        return int(self.primes.shape[1])

    def rows(self, windows: np.ndarray) -> np.ndarray:
        """The rows of tokens, each behind those before it: `[N, history + 1]` to `[tables, N, columns]`."""
        tables = len(self.primes)
        if len(windows) <= FEW:
            few = np.array(self._rows_of_few(windows.tolist()), dtype=np.int64)
            return few.reshape(tables, len(windows), self.columns)
        terms = windows[:, ::-1] * self.multipliers[:, None]  # [tables, N, history + 1], the newest first
        mixed = np.bitwise_xor.accumulate(terms, axis=2)[:, :, 1:, None]  # [tables, N, orders, 1]
        by_order = (tables, 1, self.history, self.heads)
        rows: np.ndarray = mixed % self.primes.reshape(by_order) + self.offsets.reshape(by_order)
        return rows.reshape(tables, len(windows), self.columns)

    def _rows_of_few(self, windows: list[list[int]]) -> list[int]:
        """As `rows`, flat: between two forwards, starting operations on arrays costs more than sums."""
        rows: list[int] = []
        for multipliers, orders in self._numbers:
            for window in windows:
                mixed = window[-1] * multipliers[0]
                for back, columns in enumerate(orders, start=1):
                    mixed ^= window[-1 - back] * multipliers[back]
                    rows += [mixed % prime + offset for prime, offset in columns]
        return rows

    @cached_property
    def _numbers(self) -> list[tuple[list[int], list[list[tuple[int, int]]]]]:
        """Each table's multipliers, and by order the prime and the offset of each column."""
        heads = self.heads
        tables = zip(self.multipliers.tolist(), self.primes.tolist(), self.offsets.tolist(), strict=True)
        return [
            (
                multipliers,
                [
                    list(zip(primes[at : at + heads], offsets[at : at + heads], strict=True))
                    for at in range(0, self.columns, heads)
                ],
            )
            for multipliers, primes, offsets in tables
        ]
