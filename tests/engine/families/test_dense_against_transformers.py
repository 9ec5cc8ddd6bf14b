"""Dense Qwen3 and Mistral, tiny and random, against `transformers` in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.families.base import Batch
from quant.kernels.choice import choose
from tests.engine.families.golden_families import assert_close, loaded, logits_in_chunks

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
VOCAB = 160
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"rms_norm_eps": 1e-6}),
    "qwen3 with biases": ("Qwen3", {"attention_bias": True}),
    "qwen3, tied": ("Qwen3", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 12}),
}
LENGTH = 50


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_whole_cut_and_decoded(name: str, tmp_path: Path) -> None:
    kind, changes = MODELS[name]
    torch.manual_seed(11)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes, attn_implementation="eager")
    reference = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in reference.parameters():  # norms and biases that are not all alike
        parameter.data += 0.1 * torch.randn(parameter.shape)
    path = written(reference, tmp_path / "model")
    ids = torch.randint(VOCAB, (LENGTH,)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]

    with loaded(path, choose()) as model:
        for sizes in ([LENGTH], [7], [1]):
            assert_close(logits_in_chunks(model, ids, sizes), expected)
        cache = model.new_cache(1, LENGTH)
        model.forward(Batch.of([(0, 0, ids[:-1])]), cache)
        assert_close(model.forward(Batch.of([(0, LENGTH - 1, ids[-1:])]), cache), expected[-1:])


def written(model: Any, path: Path) -> Path:
    """The model as a checkpoint directory."""
    path.mkdir()
    config = {key: value for key, value in model.config.to_dict().items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, path / "model.safetensors")
    return path
