"""Of all files of a repository, those are chosen that Loci reads, in one format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memory.hub.names import HubModel
from memory.hub.selection import small_files, weights_of
from quant.errors import ConfigError

REPO = HubModel("org/model")
QUANTS = {
    "model-Q4_K_M.gguf": 4_900_000_000,
    "model-Q4_K_S.gguf": 4_500_000_000,
    "model-IQ4_XS.gguf": 4_200_000_000,
    "Q8_0/model-Q8_0-00001-of-00002.gguf": 40_000_000_000,
    "Q8_0/model-Q8_0-00002-of-00002.gguf": 30_000_000_000,
    "UD-Q2_K_XL/model-UD-Q2_K_XL.gguf": 2_000_000_000,
    "mmproj-F16.gguf": 800_000_000,
    "imatrix_unsloth.gguf": 1_000,
    "config.json": 800,
}


def weights(names: dict[str, int] | list[str], folder: Path, part: str | None = None) -> list[str]:
    sizes = names if isinstance(names, dict) else dict.fromkeys(names, 10)
    return weights_of(HubModel("org/model", part=part), sizes, folder)


def test_nothing_but_what_is_read_is_chosen_beside_the_weights() -> None:
    names = ["README.md", "config.json", "modeling.py", "tokenizer.json", "tokenizer.model", "LICENSE",
             "chat_template.jinja", "model.safetensors.index.json", "sub/config.json", "x.bin"]  # fmt: skip

    assert small_files(names) == [
        "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json",
    ]  # fmt: skip


def test_the_index_says_which_safetensors(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    others = ("consolidated.safetensors", "pytorch_model.bin", "model.gguf", "onnx/model.onnx")
    names = ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", *others]

    assert weights(names, tmp_path) == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "consolidated.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"],
         ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]),
        (["weights.safetensors", "adapter_model.safetensors"], ["weights.safetensors"]),
        (["only.gguf", "mmproj.gguf", "README.md"], ["only.gguf"]),
    ],
)  # fmt: skip
def test_without_an_index_it_is_the_model_that_is_there(
    tmp_path: Path, names: list[str], chosen: list[str]
) -> None:
    assert weights(names, tmp_path) == chosen


@pytest.mark.parametrize(
    ("part", "chosen"),
    [
        ("Q4_K_M", ["model-Q4_K_M.gguf"]),
        ("q4_k_m", ["model-Q4_K_M.gguf"]),
        ("model-Q4_K_S.gguf", ["model-Q4_K_S.gguf"]),
        ("IQ4_XS", ["model-IQ4_XS.gguf"]),
        ("Q2_K_XL", ["UD-Q2_K_XL/model-UD-Q2_K_XL.gguf"]),
        ("UD-Q2_K_XL", ["UD-Q2_K_XL/model-UD-Q2_K_XL.gguf"]),
        ("Q8_0", [name for name in QUANTS if name.startswith("Q8_0/")]),
        ("model-Q8_0.gguf", [name for name in QUANTS if name.startswith("Q8_0/")]),
        ("Q8_0/model-Q8_0-00001-of-00002.gguf", [name for name in QUANTS if name.startswith("Q8_0/")]),
    ],
)
def test_a_gguf_model_is_named_by_quantization_or_file_with_all_its_parts(
    tmp_path: Path, part: str, chosen: list[str]
) -> None:
    assert weights(QUANTS, tmp_path, part) == chosen


@pytest.mark.parametrize("part", ["Q5_K_M", "Q4_K", "Q4_XS", "nothing.gguf", None])
def test_what_is_not_one_model_is_answered_with_those_there_are(tmp_path: Path, part: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        weights(QUANTS, tmp_path, part)

    assert str(error.value).endswith(
        "choose one, as in org/model:UD-Q2_K_XL: UD-Q2_K_XL (2 GB), IQ4_XS (4.2 GB), Q4_K_S (4.5 GB), "
        "Q4_K_M (4.9 GB), Q8_0 (70 GB)"
    )


@pytest.mark.parametrize(
    ("names", "part", "message"),
    [
        (
            ["config.json", "pytorch_model.bin"],
            None,
            r"pickled weights \(pytorch_model.bin\), which are never",
        ),
        (["config.json", "pytorch_model.bin"], "Q4_K_M", "no GGUF file Q4_K_M, and pickled weights"),
        (["config.json"], None, "neither safetensors nor GGUF files, but no weights"),
        (["m-Q4_0-00001-of-00003.gguf"], "Q4_0", "lacks parts of m-Q4_0-00001-of-00003.gguf"),
        (["m-00001-of-00002.safetensors"], None, "lacks m-00002-of-00002.safetensors"),
        (["a.safetensors", "b.safetensors"], None, "any of a.safetensors, b.safetensors could be the model"),
    ],
)
def test_repositories_without_whole_weights_are_refused(
    tmp_path: Path, names: list[str], part: str | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        weights(names, tmp_path, part)


def test_an_index_cannot_point_elsewhere(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(ConfigError, match="which is not a file next to the index"):
        weights(["a.safetensors", "model.safetensors.index.json"], tmp_path)
