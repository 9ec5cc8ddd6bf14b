"""The built-in shapes weigh what was published of the models."""

from __future__ import annotations

import pytest

from engine.families.released import released_shape
from memory.planner.published import NAMES, built_in
from quant.errors import ConfigError


def test_parameters_are_the_published_number() -> None:
    assert round(built_in("deepseek-v4.1-flash").parameters / 1e9) == 552


def test_v41_flash_weighs_what_its_headers_say() -> None:
    shape = built_in("deepseek-v4.1-flash")
    experts = sum(layer.experts * layer.expert.nbytes for layer in shape.layers)
    tables = [layer.table for layer in shape.layers if layer.table]
    assert shape.expert_nbytes == 3 * 5120 * 2304 * 17 // 32  # 4 bits, and 8 for each 32 of them
    assert round(experts / 1e9) == 289
    assert [table.rows for table in tables] == [384_006_168, 384_016_682]
    assert [round(table.nbytes / 1e9) for table in tables] == [101, 101]
    assert 500e9 < shape.nbytes < 510.3e9  # the checkpoint also has draft stages and an image encoder


def test_a_decoded_token_reads_the_known_bytes_of_experts() -> None:
    shape = built_in("deepseek-v4.1-flash")
    read = sum(shape.top_k * layer.expert.nbytes for layer in shape.layers)
    assert read / 1e9 == pytest.approx(4.5, rel=0.01)


def test_a_million_tokens_of_v41_cache_are_small_beside_those_of_v3() -> None:
    v41, v3 = built_in("deepseek-v4.1-flash"), released_shape("deepseek-v3")
    assert v41.kv_bytes(1 << 20, 1) < v3.kv_bytes(1 << 20, 1) / 20


def test_kv_of_several_sequences_is_that_of_one_times_as_many() -> None:
    for name in NAMES:
        shape = built_in(name)
        assert shape.kv_bytes(4096, 5) == 5 * shape.kv_bytes(4096, 1)


def test_sparse_attention_reads_less_of_a_long_text() -> None:
    names = (*NAMES, "deepseek-v4-flash", "deepseek-v4-pro", "deepseek-v3.2", "deepseek-v3")
    shapes = [released_shape(name) for name in names]
    *reads, everything = (sum(layer.kv.read_bytes(100_000) for layer in shape.layers) for shape in shapes)
    assert max(reads) < everything / 3


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"deepseek-v9.*deepseek-v4\.1-flash"):
        built_in("deepseek-v9")
