"""Qwen3-Next's own ways: packed releases, and states that cannot be taken back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.cache.prefix import PrefixCache
from engine.families.base import Batch
from engine.families.loader import open_checkpoint
from engine.families.registry import family_of
from quant.formats.fp8 import FP8_128
from quant.kernels.choice import choose
from tests.engine.families.golden_families import assert_close, golden_family, loaded, logits_in_chunks

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_next", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 256, "partial_rotary_factor": 0.25, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "intermediate_size": 128, "num_experts": 2,
    "num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
    "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 1e7, "vocab_size": 64,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
# What releases in FP8 keep as it is.
PLAIN = ("embed_tokens", "lm_head", "in_proj_ba", "mlp.gate.", "shared_expert_gate")


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of CONFIG."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 128),
        "model.norm.weight": (128,),
        "lm_head.weight": (64, 128),
        "model.layers.0.linear_attn.in_proj_qkvz.weight": (1536, 128),
        "model.layers.0.linear_attn.in_proj_ba.weight": (8, 128),
        "model.layers.0.linear_attn.conv1d.weight": (1024, 1, 4),
        "model.layers.0.linear_attn.A_log": (4,),
        "model.layers.0.linear_attn.dt_bias": (4,),
        "model.layers.0.linear_attn.norm.weight": (128,),
        "model.layers.0.linear_attn.out_proj.weight": (128, 512),
        "model.layers.1.self_attn.q_proj.weight": (1024, 128),
        "model.layers.1.self_attn.k_proj.weight": (256, 128),
        "model.layers.1.self_attn.v_proj.weight": (256, 128),
        "model.layers.1.self_attn.o_proj.weight": (128, 512),
        "model.layers.1.self_attn.q_norm.weight": (256,),
        "model.layers.1.self_attn.k_norm.weight": (256,),
    }
    for layer in ("model.layers.0.", "model.layers.1."):
        found[f"{layer}input_layernorm.weight"] = found[f"{layer}post_attention_layernorm.weight"] = (128,)
        found[f"{layer}mlp.gate.weight"] = (2, 128)
        found[f"{layer}mlp.shared_expert_gate.weight"] = (1, 128)
        for network in ("shared_expert", "experts.0", "experts.1"):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                found[f"{layer}mlp.{network}.{matrix}.weight"] = (128, 128)
    return found


def written(path: Path, *, is_packed: bool) -> Path:
    """A random checkpoint in FP8, or one of the values that it stands for."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes().items():
        values = torch.randn(shape, generator=generator) / 8
        if len(shape) != 2 or any(part in name for part in PLAIN):
            tensors[name] = values
            continue
        values *= 1 + torch.arange(shape[0] // 128).repeat_interleave(128).unsqueeze(1)  # tiles differ
        packed = FP8_128.encode(values, FP8_128.float_scales(values))
        assert packed.scales is not None
        if is_packed:
            tensors[name] = packed.codes.view(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = packed.scales
        else:
            tensors[name] = packed.decode()
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    config = CONFIG | ({"quantization_config": FP8} if is_packed else {})
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_rows_of_packed_projections_part_with_their_scales(tmp_path: Path) -> None:
    ids = torch.randint(0, 64, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    found = []
    for is_packed in (True, False):
        path = written(tmp_path / str(is_packed), is_packed=is_packed)
        checkpoint = open_checkpoint(path)
        family_of(checkpoint).check(checkpoint)
        with loaded(path, choose()) as model:
            found.append(logits_in_chunks(model, ids, [7, 1]))
    assert found[1].std() > 0.1
    assert_close(*found)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe"])
def test_a_sequence_is_kept_in_rows_of_full_attention_and_in_states_of_fixed_size(name: str) -> None:
    with loaded(golden_family(name).path, choose()) as model:
        layout = model.cache_layout
        sizes = [[layout.layer_bytes(layer, 1, context) for context in (100, 400)] for layer in range(4)]
    assert [small == large for small, large in sizes] == [True, True, True, False]


def test_a_prefix_is_restored_where_its_state_was_kept_and_nowhere_else() -> None:
    golden = golden_family("qwen3_next")
    ids = golden.ids()
    with loaded(golden.path, choose()) as model:
        cache = model.new_cache(1, len(ids))
        prefixes = PrefixCache(cache, 1 << 24)
        for start, stop in ((0, 40), (40, 90), (90, 150)):
            model.forward(Batch.of([(0, start, ids[start:stop])]), cache)
            if stop < 150:
                prefixes.save(0, ids[:stop])
        for prompt, length in ((ids, 90), (ids[:90], 40), (ids[:60], 40), (ids[:40], 0)):
            cache.reset(0)
            assert prefixes.restore(0, prompt).length == length
