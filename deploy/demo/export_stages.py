# ruff: noqa: E402 -- the repository root must be importable before its packages are
"""Write trained draft stages into the exported checkpoint, beside what is there already.

    python deploy/demo/export_stages.py           # writes a file of them, and their keys into config.json
    python deploy/demo/export_stages.py --card    # and what they reach into README.md

No byte of the model's own weights changes. Stages have a file of their own, with the released names `mtp.S`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.embedded import DEMO_NAME
from engine.families.deepseek_v41.config import parse_config
from export import LARGEST_BYTES
from layers import Precision
from paths import demo_directory
from released import named_tensors
from stages import Stages
from train_stages import Trainer

FILE = "model-stages.safetensors"
CARD_BEGIN, CARD_END = "<!-- stages: written by export_stages.py -->", "<!-- end of stages -->"


def stage_tensors(stages: Stages) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as releases name it: the first stage has what makes its keys, the last one the heads."""
    last = f"mtp.{stages.shape.stages - 1}"
    for name, tensor in named_tensors(stages):
        if name.startswith("main_"):
            yield f"mtp.0.{name}", tensor
        elif name.startswith(("norm.", "markov_head.", "confidence_head.")):
            yield f"{last}.{name}", tensor
        else:
            yield name, tensor


@torch.no_grad()
def read_stages(file: Path, stages: Stages) -> dict[str, float]:
    """Fill `stages` with a saved state's weights; returns how far they were trained."""
    if not file.exists():
        raise SystemExit(f"{file} is missing: run train_stages.py first")
    with safe_open(file, framework="pt") as stored:
        for name, value in stages.state_dict().items():
            value.copy_(stored.get_tensor(f"model.{name}"))
        progress: dict[str, float] = json.loads(stored.metadata()["progress"])
        return progress


def write(directory: Path, stages: Stages) -> None:
    """A file of stages, its names in the index, their keys in the config; each renamed when it is whole."""
    tensors = {name: tensor.contiguous() for name, tensor in stage_tensors(stages)}
    temporary = directory / f"{FILE}.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    others = sum(f.stat().st_size for f in directory.iterdir() if f.name not in (FILE, temporary.name))
    if others + temporary.stat().st_size > LARGEST_BYTES:
        temporary.unlink()
        raise SystemExit(f"with stages, {directory} would have more than {LARGEST_BYTES:,} bytes")
    temporary.replace(directory / FILE)
    index_file, config_file = directory / "model.safetensors.index.json", directory / "config.json"
    index, config = json.loads(index_file.read_text()), json.loads(config_file.read_text())
    own = {name: file for name, file in index["weight_map"].items() if not name.startswith("mtp.")}
    index["weight_map"] = own | dict.fromkeys(tensors, FILE)
    index["metadata"]["total_size"] = _stored_bytes(directory, set(index["weight_map"].values()))
    text = config["text_config"]
    layers = text["num_hidden_layers"]
    text |= {
        **stages.shape.keys(),
        "compress_ratios": text["compress_ratios"][:layers] + [0] * stages.shape.stages,
    }
    for file, content in ((index_file, index), (config_file, config)):
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(file)


def _stored_bytes(directory: Path, files: set[str]) -> int:
    total = 0
    for name in files:
        with safe_open(directory / name, framework="pt") as shard:
            total += sum(shard.get_tensor(key).nbytes for key in shard.keys())  # noqa: SIM118 - not a dict
    return total


def card(mean: float, chances: list[float], progress: dict[str, float]) -> str:
    """What the stages reach, in Markdown."""
    places = " | ".join(str(place) for place in range(1, len(chances) + 1))
    shares = " | ".join(f"{chance:.2f}" for chance in chances)
    return (
        f"After {progress['anchors'] / 1e6:.2f} million blocks, on held-out small talk that the model "
        f"answers itself: **{mean:.2f} of {len(chances)} drafted tokens are accepted**\n"
        "of a block in the mean.\n\n"
        f"| place in the block | {places} |\n|---|{'---|' * len(chances)}\n"
        f"| accepted, those before it accepted | {shares} |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="where training left its state")
    parser.add_argument("--out", type=Path, default=HERE / DEMO_NAME, help="the exported checkpoint")
    parser.add_argument("--card", action="store_true", help="measure, and write the result into README.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    stages = Stages(parse_config(json.loads((args.out / "config.json").read_text())))
    progress = read_stages(args.dir / "stages.safetensors", stages)
    write(args.out, stages)
    print(f"{args.out / FILE}: {(args.out / FILE).stat().st_size / 1e6:.1f} MB")
    if args.card:
        Precision.products = torch.float32
        trainer = Trainer(args.dir, args.out, 0, parts=("heldout",))
        trainer.load(args.dir / "stages.safetensors")
        text = card(*trainer.held_out(), progress)
        print(text)
        readme = HERE / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition(CARD_BEGIN)
        after = rest.partition(CARD_END)[2]
        temporary = readme.with_suffix(".tmp")
        temporary.write_text(f"{before}{CARD_BEGIN}\n{text}\n{CARD_END}{after}", encoding="utf-8")
        temporary.replace(readme)


if __name__ == "__main__":
    main()
