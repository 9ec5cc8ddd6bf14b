"""Which texts name a model of the Hub, and which are paths."""

from __future__ import annotations

import pytest

from memory.hub.names import HubModel, parse_hub_name


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("org/model", HubModel("org/model")),
        ("Qwen/Qwen3-30B-A3B", HubModel("Qwen/Qwen3-30B-A3B")),
        ("org/model@v1.0", HubModel("org/model", "v1.0")),
        ("org/model@refs/pr/3", HubModel("org/model", "refs/pr/3")),
        ("org/model:Q4_K_M", HubModel("org/model", part="Q4_K_M")),
        ("org/m@v1:UD-Q4_K_XL/m-00001-of-00002.gguf",
         HubModel("org/m", "v1", "UD-Q4_K_XL/m-00001-of-00002.gguf")),
    ],
)  # fmt: skip
def test_names_have_a_revision_and_a_part(text: str, model: HubModel) -> None:
    assert parse_hub_name(text) == model
    assert str(model) == text


@pytest.mark.parametrize(
    "text",
    [
        *("model", "demo", "./org/model", "../org/model", "/org/model", "~/org/model", "a/b/c", "org/"),
        *("org/model/", "models/llama.gguf", "models/model.safetensors", "org/mo..del", "org/model@"),
        *("org/model@../../etc", "org/model:", "org--x/model", "org/model:../x.gguf", "org/mo del"),
        *("https://example.org", "org/mödel"),
    ],
)
def test_paths_and_nonsense_are_no_names(text: str) -> None:
    assert parse_hub_name(text) is None
