"""A model's own sampling parameters, where a request does not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.sampling.defaults import FILE_NAME, sampling_defaults
from quant.errors import ConfigError


def test_without_a_file_nothing_is_set(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}


def test_known_fields_are_read_and_others_left(tmp_path: Path) -> None:
    config = {"temperature": 1, "top_k": 20, "top_p": 0.9, "eos_token_id": [1, 2], "min_p": None}
    (tmp_path / FILE_NAME).write_text(json.dumps(config))
    assert sampling_defaults(tmp_path) == {"temperature": 1.0, "top_k": 20, "top_p": 0.9}


def test_no_sampling_is_greedy(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"do_sample": false, "temperature": 0.6}')
    assert sampling_defaults(tmp_path) == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[]", "expected a JSON object"), ('{"top_p": "x"}', "top_p is 'x'")],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ConfigError, match=message):
        sampling_defaults(tmp_path)
