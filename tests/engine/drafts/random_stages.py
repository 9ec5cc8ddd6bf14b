"""Checkpoints with random draft stages beside a golden one's tensors, stored as releases store them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.engine.families.golden_families import family_path

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


@dataclass(frozen=True)
class StageKeys:
    """What config.json says of the stages."""

    stages: int = 3
    block: int = 5
    noise: int = 7
    targets: tuple[int, ...] = (5, 6, 7)
    rank: int = 32
    experts: int = 8
    top_k: int = 3

    def keys(self) -> dict[str, Any]:
        return {
            "num_nextn_predict_layers": self.stages,
            "dspark_block_size": self.block,
            "dspark_noise_token_id": self.noise,
            "dspark_target_layer_ids": list(self.targets),
            "dspark_markov_rank": self.rank,
            "dspark_n_routed_experts": self.experts,
            "dspark_num_experts_per_tok": self.top_k,
        }


class RandomTensors:
    """Random tensors in stored formats; scales differ from tile to tile."""

    def __init__(self, seed: int, tile: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._draw = torch.Generator().manual_seed(seed)
        self._tile = tile

    def floats(
        self, name: str, *shape: int, around: float = 0.0, spread: float, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        values = around + spread * torch.randn(shape, generator=self._draw)
        self.tensors[name] = values.to(dtype)

    def dense(self, name: str, rows: int, cols: int) -> None:
        """FP8 in tiles."""
        values = (torch.randn(rows, cols, generator=self._draw) * 8).to(E4M3)
        shape = -(-rows // self._tile), -(-cols // self._tile)
        self.tensors[f"{name}.weight"] = values
        self.tensors[f"{name}.scale"] = self._scales(shape, 8.0 * cols**0.5)

    def four_bits(self, name: str, rows: int, cols: int) -> None:
        """FP4 in groups of 32."""
        codes = torch.randint(0, 256, (rows, cols // 2), generator=self._draw, dtype=torch.uint8)
        self.tensors[f"{name}.weight"] = codes.view(torch.int8)
        self.tensors[f"{name}.scale"] = self._scales((rows, cols // 32), 2.9 * cols**0.5)

    def _scales(self, shape: tuple[int, ...], divisor: float) -> torch.Tensor:
        exponent = 127 - round(torch.tensor(divisor).log2().item())
        codes = torch.randint(exponent - 1, exponent + 2, shape, generator=self._draw)
        return codes.to(torch.uint8).view(E8M0)


def block_tensors(draw: RandomTensors, prefix: str, c: dict[str, Any], experts: int) -> None:
    """A stage's block, which is a layer with a window alone."""
    hidden, hc, heads, dim = c["hidden_size"], c["hc_mult"], c["num_attention_heads"], c["head_dim"]
    groups, o_lora, q_lora = c["o_groups"], c["o_lora_rank"], c["q_lora_rank"]
    for sub in ("attn", "ffn"):
        draw.floats(f"{prefix}.{sub}_norm.weight", hidden, around=1, spread=0.2)
        fn = f"{prefix}.hc_{sub}"
        wide = (2 + hc) * hc
        draw.floats(f"{fn}_fn", wide, hc * hidden, spread=(hc * hidden) ** -0.5, dtype=torch.float32)
        draw.floats(f"{fn}_base", wide, spread=0.5, dtype=torch.float32)
        draw.floats(f"{fn}_scale", 3, around=0.5, spread=0.1, dtype=torch.float32)
    attn = f"{prefix}.attn"
    draw.dense(f"{attn}.wq_a", q_lora, hidden)
    draw.dense(f"{attn}.wq_b", heads * dim, q_lora)
    draw.dense(f"{attn}.wkv", dim, hidden)
    draw.dense(f"{attn}.wo_a", groups * o_lora, heads * dim // groups)
    draw.dense(f"{attn}.wo_b", hidden, groups * o_lora)
    draw.floats(f"{attn}.q_norm.weight", q_lora, around=1, spread=0.2)
    draw.floats(f"{attn}.kv_norm.weight", dim, around=1, spread=0.2)
    draw.floats(f"{attn}.attn_sink", heads, spread=2, dtype=torch.float32)
    width = c["moe_intermediate_size"]
    draw.floats(f"{prefix}.ffn.gate.weight", experts, hidden, spread=hidden**-0.5)
    draw.floats(f"{prefix}.ffn.gate.bias", experts, spread=0.1, dtype=torch.float32)
    matrices = ("w1", width, hidden), ("w3", width, hidden), ("w2", hidden, width)
    for name, rows, cols in matrices:
        draw.dense(f"{prefix}.ffn.shared_experts.{name}", rows, cols)
        for expert in range(experts):
            draw.four_bits(f"{prefix}.ffn.experts.{expert}.{name}", rows, cols)


def v41_stages(c: dict[str, Any], keys: StageKeys, seed: int = 5) -> dict[str, torch.Tensor]:
    """DSpark stages of V4.1, by name."""
    draw = RandomTensors(seed, 32)
    hidden, vocab = c["hidden_size"], c["vocab_size"]
    for stage in range(keys.stages):
        block_tensors(draw, f"mtp.{stage}", c, keys.experts)
        draw.floats(f"mtp.{stage}.ffn.gate.bias_vl", keys.experts, spread=5, dtype=torch.float32)
    draw.dense("mtp.0.main_proj", hidden, len(keys.targets) * hidden)
    draw.floats("mtp.0.main_norm.weight", hidden, around=1, spread=0.2)
    last = f"mtp.{keys.stages - 1}"
    draw.floats(f"{last}.norm.weight", hidden, around=1, spread=0.2)
    draw.floats(f"{last}.markov_head.embed.weight", vocab, keys.rank, spread=1)
    draw.floats(f"{last}.markov_head.head.weight", vocab, keys.rank, spread=keys.rank**-0.5)
    draw.floats(f"{last}.confidence_head.proj.weight", 1, hidden + keys.rank, spread=0.1)
    return draw.tensors


def v4_stages(c: dict[str, Any], keys: StageKeys, seed: int = 5) -> dict[str, torch.Tensor]:
    """DSpark stages of V4, by name; their experts are as the model's."""
    draw = RandomTensors(seed, 128)
    hidden, vocab, hc = c["hidden_size"], c["vocab_size"], c["hc_mult"]
    for stage in range(keys.stages):
        block_tensors(draw, f"mtp.{stage}", c, c["n_routed_experts"])
    draw.dense("mtp.0.main_proj", hidden, len(keys.targets) * hidden)
    draw.floats("mtp.0.main_norm.weight", hidden, around=1, spread=0.2)
    last = f"mtp.{keys.stages - 1}"
    draw.floats(f"{last}.norm.weight", hidden, around=1, spread=0.2)
    draw.floats(f"{last}.hc_head_fn", hc, hc * hidden, spread=(hc * hidden) ** -0.5, dtype=torch.float32)
    draw.floats(f"{last}.hc_head_base", hc, spread=0.5, dtype=torch.float32)
    draw.floats(f"{last}.hc_head_scale", 1, around=0.5, spread=0.1, dtype=torch.float32)
    draw.floats(f"{last}.markov_head.markov_w1.weight", vocab, keys.rank, spread=1)
    draw.floats(f"{last}.markov_head.markov_w2.weight", vocab, keys.rank, spread=keys.rank**-0.5)
    draw.floats(f"{last}.confidence_head.proj.weight", 1, hidden + keys.rank, spread=0.1)
    return draw.tensors


def v4_with_stages(to: Path, seed: int = 5) -> Path:
    """The golden V4 with stages in place of its draft layer."""
    golden = family_path("deepseek_v4")
    config = json.loads((golden / "config.json").read_text())
    stages = config["num_hidden_layers"]
    keys = StageKeys(noise=7, targets=(stages - 3, stages - 2, stages - 1))
    said = {name: value for name, value in keys.keys().items() if not name.endswith(("experts", "per_tok"))}
    said |= {"num_nextn_predict_layers": 1, "compress_ratios": [*config["compress_ratios"][:stages], 0, 0, 0]}
    with_stages(golden, to, v4_stages(config, keys, seed), said)
    index = json.loads((to / "model.safetensors.index.json").read_text())
    for file in to.glob("model-*.safetensors"):
        kept = {name: value for name, value in load_file(file).items() if not name.startswith("mtp.")}
        save_file(kept, file)
    index["weight_map"] = {
        name: file
        for name, file in index["weight_map"].items()
        if not name.startswith("mtp.") or file == "stages.safetensors"
    }
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


def with_stages(golden: Path, to: Path, stages: dict[str, torch.Tensor], keys: dict[str, Any]) -> Path:
    """A copy of a golden checkpoint with stages in a shard of their own, and keys in its config."""
    shutil.copytree(golden, to)
    save_file(stages, to / "stages.safetensors")
    index_file, config_file = to / "model.safetensors.index.json", to / "config.json"
    index, config = json.loads(index_file.read_text()), json.loads(config_file.read_text())
    index["weight_map"] |= dict.fromkeys(stages, "stages.safetensors")
    config.get("text_config", config).update(keys)
    index_file.write_text(json.dumps(index))
    config_file.write_text(json.dumps(config))
    return to
