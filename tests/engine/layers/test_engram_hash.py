"""Engram addresses: primes, multipliers, token folding, and the cache of token maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from engine.layers.engram_hash import EngramHash, build_token_map, load_token_map, table_primes
from quant.errors import ConfigError
from tests.conftest import golden_path


def tokenizer_of(*tokens: str) -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def test_tokens_that_differ_in_case_accents_or_space_share_an_id() -> None:
    tokenizer = tokenizer_of("Cat", "Ġcat", "CÃ¡t", "dog", "Ġ", "ĊĊ", "catĠ")
    assert build_token_map(tokenizer, 7).tolist() == [0, 0, 0, 1, 2, 2, 0]


def test_half_a_character_is_known_by_its_raw_token() -> None:
    tokenizer = tokenizer_of("Ã", "Â", "a", "Ã")
    assert build_token_map(tokenizer, 3).tolist() == [0, 1, 2]


def test_primes_are_successive_unused_and_start_again_for_each_order() -> None:
    assert table_primes(layers=2, orders=2, heads=2, vocab_size=10) == [[11, 13, 17, 19], [23, 29, 31, 37]]


@pytest.mark.parametrize("name", ["v41-a", "v41-c"])
def test_golden_table_sizes_follow_from_the_primes(name: str) -> None:
    import json

    config = json.loads((golden_path(name) / "config.json").read_text())["text_config"]
    primes = table_primes(
        len(config["engram_layer_ids"]),
        config["engram_max_ngram_size"] - 1,
        config["engram_n_heads"],
        config["engram_vocab_size"],
    )
    assert [sum(p) for p in primes] == config["engram_num_embeddings"]


def test_released_table_sizes_follow_from_the_primes() -> None:
    """Layers 1 and 14 of DeepSeek-V4.1-Flash: orders 2 to 4, 8 heads."""
    primes = table_primes(layers=2, orders=3, heads=8, vocab_size=16_000_000)
    assert [sum(p) for p in primes] == [384_006_168, 384_016_682]


@given(keys=st.lists(st.integers(0, 99_999), min_size=4, max_size=40))
def test_rows_are_what_the_definition_says_in_exact_arithmetic(keys: list[int]) -> None:
    primes = [401, 409, 419, 421, 431, 433]
    hashed = EngramHash.for_layers([2, 5], [primes[::-1], primes], compressed_vocab=100_000, max_ngram=4)
    multipliers = hashed.multipliers[1].tolist()
    found = hashed.rows(np.lib.stride_tricks.sliding_window_view(np.array(keys), 4))[1].tolist()
    for at, row in enumerate(found, start=3):
        expected, mixed, offset = [], keys[at] * multipliers[0], 0
        assert mixed < 2**63
        for order in range(1, 4):
            mixed ^= keys[at - order] * multipliers[order]
            for prime in primes[2 * order - 2 : 2 * order]:
                expected.append(mixed % prime + offset)
                offset += prime
        assert row == expected


@given(st.lists(st.tuples(*[st.integers(0, 128_000)] * 4), min_size=5, max_size=20))
def test_a_token_alone_has_the_rows_it_has_among_others(windows: list[tuple[int, ...]]) -> None:
    hashing = EngramHash.for_layers([1, 14], table_primes(2, 3, 4, 9000), 128_001, 4)
    together = hashing.rows(np.array(windows))
    for at, window in enumerate(windows):
        assert np.array_equal(hashing.rows(np.array([window])), together[:, at : at + 1])


def test_multipliers_are_odd_and_belong_to_their_layer() -> None:
    first, second = EngramHash.for_layers([1, 2], [[5, 7]] * 2, 1000, 3).multipliers
    alone = EngramHash.for_layers([2], [[5, 7]], 1000, 3).multipliers
    assert (first % 2 == 1).all()
    assert not np.array_equal(first, second)
    assert np.array_equal(second, alone[0])


def test_a_token_map_is_built_once_and_then_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = golden_path("v41-c") / "tokenizer.json"
    built = load_token_map(file, 1024, 758)
    monkeypatch.setattr(
        "engine.layers.engram_hash.build_token_map", lambda *_: pytest.fail("built a second time")
    )
    assert np.array_equal(load_token_map(file, 1024, 758), built)


def test_a_damaged_cached_token_map_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = golden_path("v41-c") / "tokenizer.json"
    built = load_token_map(file, 1024, 758)
    cached = next(tmp_path.rglob("*.npy"))
    cached.write_bytes(cached.read_bytes()[:100])
    assert np.array_equal(load_token_map(file, 1024, 758), built)


def test_a_map_of_another_size_than_the_config_says_is_refused() -> None:
    with pytest.raises(ConfigError, match="folds to 758 Engram keys, but the config expects 757"):
        load_token_map(golden_path("v41-c") / "tokenizer.json", 1024, 757)
