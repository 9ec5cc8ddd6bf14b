"""Settings: flags over variables over file over defaults, and errors that name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from quant.errors import ConfigError
from server.settings import Settings, resolve_settings


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"LOCI_{name.upper()}", raising=False)
    path = tmp_path / "loci.toml"
    path.write_text('port = 1001\nhost = "::1"\nmax_num_seqs = 3\n')
    return path


def test_flags_win_over_variables_over_the_file_over_defaults(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCI_PORT", "1002")
    monkeypatch.setenv("LOCI_HOST", "127.0.0.2")

    settings = resolve_settings({"port": 1003, "host": None}, file)

    assert settings.port == 1003
    assert settings.host == "127.0.0.2"
    assert settings.max_num_seqs == 3
    assert settings.max_waiting == 256


def test_an_empty_variable_counts_as_not_set(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCI_PORT", "")

    assert resolve_settings({}, file).port == 1001


@pytest.mark.parametrize("value", ["one, two", ["one", "two"], ["one,two"]])
def test_keys_come_as_a_list_or_separated_by_commas(file: Path, value: object) -> None:
    keys = resolve_settings({"api_key": value}).api_key

    assert [key.get_secret_value() for key in keys] == ["one", "two"]
    assert "one" not in repr(keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "prot: no such setting; known: allowed_hosts, any_model, api_key, "),
        ("port = 70000", "port: Input should be less than or equal to 65535, got 70000"),
        ("max_num_seqs = 'many'", "max_num_seqs: Input should be a valid integer"),
        (
            "log_level = 'loud'",
            "log_level: Input should be 'debug', 'info', 'warning' or 'error', got 'loud'",
        ),
        ("port = = 1", "loci.toml: Invalid value"),
        ("api_key = 5", "api_key: "),
    ],
)
def test_a_wrong_setting_is_named(file: Path, text: str, message: str) -> None:
    file.write_text(text)

    with pytest.raises(ConfigError) as caught:
        resolve_settings({}, file)

    assert message in str(caught.value)


def test_the_message_about_a_wrong_key_does_not_show_it(file: Path) -> None:
    file.write_text("api_key = [12345]")

    with pytest.raises(ConfigError) as caught:
        resolve_settings({}, file)

    assert "12345" not in str(caught.value)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.7", False)],
)
def test_only_loopback_addresses_are_private(host: str, is_loopback: bool) -> None:
    assert resolve_settings({"host": host}).is_loopback is is_loopback


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())
