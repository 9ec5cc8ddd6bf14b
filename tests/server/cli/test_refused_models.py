"""`loci info` and `loci plan` say of a damaged model what loading it would say, and fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memory.experts.traces import FILE_NAME, RoutingTrace
from tests.server.harness import invoke

COMMANDS = [("info", "--no-load"), ("plan", "--hardware", "4090-128g")]


def refusal(command: tuple[str, ...], model: Path) -> str:
    """What a command says of a model that it refuses; it must be all that loading says."""
    name, *flags = command
    refused, loading = invoke(name, model, *flags), invoke("run", model, "Hello", "--max-tokens", "1")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr == loading.stderr
    return refused.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_and_truncated_shards_are_said_together(
    checkpoint_copy: Path, command: tuple[str, ...]
) -> None:
    first, second = sorted(checkpoint_copy.glob("model-*.safetensors"))
    content = second.read_bytes()
    first.unlink()
    second.write_bytes(content[:-1000])

    said = refusal(command, checkpoint_copy)

    assert f"missing shard {first.name}" in said
    assert f"{second.name}: truncated, {len(content) - 1000} bytes of {len(content)}" in said
    assert "missing tensor " in said


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_wrong_beside_the_tensors_is_said_with_them(
    checkpoint_copy: Path, command: tuple[str, ...]
) -> None:
    min(checkpoint_copy.glob("model-*.safetensors")).unlink()
    (checkpoint_copy / "tokenizer.json").unlink()
    (checkpoint_copy / "generation_config.json").write_text("{")
    RoutingTrace(torch.zeros(4, 99, 1)).save(checkpoint_copy / FILE_NAME)

    said = refusal(command, checkpoint_copy)

    for problem in ("missing shard ", "tokenizer.json", "generation_config.json: not", "covers 99 layers"):
        assert problem in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_whose_layers_are_missing_is_not_planned(
    checkpoint_copy: Path, command: tuple[str, ...]
) -> None:
    file = checkpoint_copy / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"] += 1
    text["compress_ratios"] = [*text["compress_ratios"], text["compress_ratios"][-1]]
    file.write_text(json.dumps(config))

    said = refusal(command, checkpoint_copy)

    assert f"missing tensor layers.{text['num_hidden_layers'] - 1}.attn_norm.weight" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_truncated_gguf_file_is_refused(tmp_path: Path, command: tuple[str, ...]) -> None:
    from tests.engine.families.tiny_llama import tiny_values, write_gguf

    file = write_gguf(tmp_path / "m.gguf", tiny_values())
    file.write_bytes(file.read_bytes()[:-100])

    assert "m.gguf: truncated" in refusal(command, file)


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_are_not_the_models_are_nobodys_business(
    checkpoint_copy: Path, command: tuple[str, ...]
) -> None:
    save_file({"lora": torch.ones(2)}, checkpoint_copy / "adapter_model.safetensors")

    name, *flags = command

    assert invoke(name, checkpoint_copy, *flags).returncode == 0


def test_what_lies_beside_or_above_a_model_says_where_the_model_is(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x--y" / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"")
    gguf = tmp_path / "files" / "m.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")

    for wrong, right in (
        (tmp_path / "models--x--y", snapshot),
        (snapshot / "model.safetensors", snapshot),
        (gguf.parent, gguf),
    ):
        refused = invoke("info", wrong)
        assert refused.returncode == 1
        assert refused.stderr.startswith(f"loci: {wrong}: ")
        assert f"{right}" in refused.stderr.removeprefix(f"loci: {wrong}: ")
