"""Models behind links, as a cache of the Hugging Face Hub has them: files by hash, links by name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from engine.families.loader import open_model
from quant.errors import CheckpointError
from server.cli.local_talk import LocalTalk
from server.cli.talk import Sampling
from tests.engine.families.tiny_llama import VOCAB, tiny_values, write_gguf
from tests.server.harness import TINY, invoke

LETTERS = [chr(ord("a") + i) for i in range(26)]
TOKENS = LETTERS + [f"{a}{b}" for a in LETTERS[:3] for b in LETTERS[:18]]
VOCABULARY: dict[str, object] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * VOCAB,
    "tokenizer.ggml.merges": [f"{pair[0]} {pair[1]}" for pair in TOKENS[26:]],
}


def in_hub_cache(cache: Path, files: list[Path]) -> Path:
    """A snapshot of `files` in a new Hub cache: relative links to files that are called by their hashes."""
    snapshot = cache / "models--someone--tiny" / "snapshots" / "0123abc"
    blobs = cache / "models--someone--tiny" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in files:
        content = file.read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny-f32.gguf", tiny_values(), metadata=VOCABULARY)


def served(path: Path) -> tuple[str, str]:
    """What a model is called, and what it writes."""
    talk = LocalTalk(path)
    try:
        sampling = Sampling(temperature=0.0, max_tokens=6)
        return talk.name, "".join(talk.continue_text("abcab", sampling))
    finally:
        talk.close()


def test_a_linked_gguf_file_answers_as_the_file_does_under_the_links_name(
    tmp_path: Path, gguf_file: Path
) -> None:
    name, answer = served(gguf_file)
    linked = in_hub_cache(tmp_path / "hub", [gguf_file]) / gguf_file.name

    assert name == "tiny-f32"
    assert answer
    assert served(linked) == (name, answer)
    assert served(linked.resolve()) == (linked.resolve().name, answer)


@pytest.mark.parametrize("command", ["run", "info", "plan", "logits"])
def test_commands_take_a_linked_gguf_file(tmp_path: Path, gguf_file: Path, command: str) -> None:
    linked = in_hub_cache(tmp_path / "hub", [gguf_file]) / gguf_file.name
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    more = {
        "run": ("abc", "--max-tokens", "2"),
        "logits": ("--ids-file", tmp_path / "ids.json", "--out", tmp_path / "out"),
    }

    result = invoke(command, linked, *more.get(command, ()))

    assert (result.returncode, result.stderr) == (0, "")


def test_a_directory_of_links_answers_as_the_files_do(tmp_path: Path) -> None:
    snapshot = in_hub_cache(tmp_path / "hub", [file for file in TINY.iterdir() if file.is_file()])
    (tmp_path / "my-model").symlink_to(snapshot)
    answer = served(TINY)[1]

    assert served(snapshot) == ("someone/tiny", answer)
    assert served(tmp_path / "my-model") == ("my-model", answer)
    assert open_model(tmp_path / "my-model").info.name == "my-model"


def test_a_model_in_the_working_directory_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(TINY)

    assert served(Path(".")) == served(TINY)


def test_links_that_lead_nowhere_are_named(tmp_path: Path, gguf_file: Path) -> None:
    linked = in_hub_cache(tmp_path / "gguf", [gguf_file]) / gguf_file.name
    linked.resolve().unlink()
    snapshot = in_hub_cache(tmp_path / "hub", [file for file in TINY.iterdir() if file.is_file()])
    shard = min(snapshot.glob("model-*.safetensors"))
    shard.resolve().unlink()

    with pytest.raises(CheckpointError, match=r"tiny-f32\.gguf: a broken link to \.\./\.\./blobs/\w+;"):
        open_model(linked)
    with pytest.raises(CheckpointError, match=f"missing shard {shard.name}, a broken link to ../../blobs"):
        open_model(snapshot)
