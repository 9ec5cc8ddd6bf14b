# ruff: noqa: E402 -- the repository root must be importable before its packages are
"""Write the trained model as a checkpoint in the released layout.

    python deploy/demo/export.py

FP4 experts, FP8 dense matrices, each Engram table in a shard of its own, index, config and
tokenizer (spec section 2). What was written is read back and compared before it takes its name.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.embedded import DEMO_NAME
from engine.families.deepseek_v41.config import parse_config
from model import Model
from paths import demo_directory
from prompts import BOS, EOS, PAD
from quantise import round_fp8_rows
from released import TRAINED_TOKENS, from_released, read_files, table_to_released, to_released
from shape import TEXT_CONFIG, config_for
from state import read_trained

LARGEST_BYTES = 40_000_000


def shards_of(model: Model, tables: list[Tensor]) -> list[dict[str, Tensor]]:
    """The files' contents: everything but tables, then a table each."""
    layers = model.config.engram_layer_ids
    return [
        {name: tensor.contiguous() for name, tensor in to_released(model)},
        *(dict(table_to_released(layer, table)) for layer, table in zip(layers, tables, strict=True)),
    ]


def write_checkpoint(
    directory: Path, model: Model, tables: list[Tensor], tokenizer_file: Path, trained_tokens: int
) -> None:
    """All files of a checkpoint, into an empty directory; each shard says how far it was trained."""
    shards = shards_of(model, tables)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt", TRAINED_TOKENS: str(trained_tokens)})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": TEXT_CONFIG["max_position_embeddings"],
    }
    _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", config_for(tokenizer_file))
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    shutil.copyfile(tokenizer_file, directory / "tokenizer.json")


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def check(directory: Path, model: Model, tables: list[Tensor]) -> None:
    """Raise SystemExit unless the files hold exactly the numbers that the rounding model computes with."""
    read = Model(model.config)
    read_tables = from_released(read, read_files(directory))
    ids = torch.arange(model.config.sliding_window).unsqueeze(0) % model.config.vocab_size
    documents = torch.zeros_like(ids)
    columns = (model.config.engram_max_ngram_size - 1) * model.config.engram_n_heads
    rows = torch.arange(ids.numel() * columns)
    values = [table[rows].view(ids.numel(), -1) for table in read_tables]
    rounded = [round_fp8_rows(table[rows]).view(ids.numel(), -1) for table in tables]
    model.set_rounding(True)
    trained = model.eval().head(model(ids, documents, rounded).states)
    stored = read.eval().head(read(ids, documents, values).states)
    if not torch.equal(trained, stored):
        worst = float((trained - stored).abs().max())
        raise SystemExit(f"{directory}: the files differ from the model, logits by up to {worst}")


def pin_state(directory: Path) -> Path:
    """The state that is exported, under a name that later saves leave alone: `evaluate.py` needs it."""
    state, pinned = directory / "state.safetensors", directory / "exported.safetensors"
    if not state.exists():
        raise SystemExit(f"{state} is missing: run `python deploy/demo/train.py` first")
    pinned.unlink(missing_ok=True)
    pinned.hardlink_to(state)  # saves replace the name, never the content
    return pinned


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="where training left its state")
    parser.add_argument("--out", type=Path, default=HERE / DEMO_NAME, help="the checkpoint's directory")
    args = parser.parse_args()

    tokenizer_file = args.dir / "tokenizer.json"
    config = parse_config(config_for(tokenizer_file))
    model = Model(config)
    pinned = pin_state(args.dir)
    tables, progress = read_trained(pinned, model)
    unfinished = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_checkpoint(unfinished, model, tables, tokenizer_file, progress.all_tokens)
    check(unfinished, model, tables)
    size = sum(file.stat().st_size for file in unfinished.iterdir())
    if size > LARGEST_BYTES:
        raise SystemExit(
            f"{unfinished}: {size:,} bytes, more than the {LARGEST_BYTES:,} it may have; shrink the shape"
        )
    shutil.rmtree(args.out, ignore_errors=True)
    unfinished.rename(args.out)
    print(f"{args.out}: {size / 1e6:.1f} MB, after {progress.all_tokens:,} tokens of training")


if __name__ == "__main__":
    main()
