"""How much error the scale search saves: `python tests/bench/scale_search.py [--json FILE] [--weights FILE]`.

Weights are drawn from distributions with lighter and heavier tails, or read from a safetensors file
(its float matrices). Activations have columns of very unequal size, as those of real models have.
Figures are relative root mean square errors: of the weights, and of the product of weights and
activations, first with covering scales, then with searched ones, then searched with importance.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from quant.formats.int4 import INT4_32, INT4_64, INT4_128, INT4_OFFSET_32, INT4_OFFSET_128
from quant.formats.mxfp4 import MXFP4
from quant.formats.nf4 import NF4
from quant.scale_search import encode_searched

FORMATS = (MXFP4, NF4, INT4_32, INT4_64, INT4_128, INT4_OFFSET_32, INT4_OFFSET_128)
SHAPE = (512, 2048)
TOKENS = 512
MAX_MATRICES = 4


def drawn() -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of three distributions."""
    yield "normal", torch.randn(SHAPE)
    yield "laplace", torch.distributions.Laplace(0.0, 1.0).sample(SHAPE)
    yield "student t, 5", torch.distributions.StudentT(5.0).sample(SHAPE)


def stored(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The first few float matrices of a safetensors file whose rows are whole blocks of every format."""
    found = 0
    with safe_open(file, "pt") as tensors:
        for name in sorted(tensors.keys()):
            shape, dtype = tensors.get_slice(name).get_shape(), tensors.get_slice(name).get_dtype()
            if (
                len(shape) == 2
                and shape[1] % 128 == 0
                and dtype in ("F32", "BF16", "F16")
                and found < MAX_MATRICES
            ):
                found += 1
                yield name, tensors.get_tensor(name).float()


def relative(error: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of `error` as a share of that of `exact`."""
    return (error.square().sum() / exact.square().sum()).sqrt().item()


def measure(weights: torch.Tensor) -> Iterator[tuple[str, list[float]]]:
    """For each format: weight error plain and searched, product error plain, searched, with importance."""
    spread = torch.linspace(-2, 2, weights.shape[1]).exp()[torch.randperm(weights.shape[1])]
    x = torch.randn(TOKENS, weights.shape[1]) * spread
    exact = x @ weights.T
    for format_ in FORMATS:
        plain = format_.encode(weights).decode() - weights
        searched = encode_searched(format_, weights).decode() - weights
        weighted = encode_searched(format_, weights, x.square().mean(0)).decode() - weights
        yield (
            format_.name,
            [relative(plain, weights), relative(searched, weights)]
            + [relative(x @ error.T, exact) for error in (plain, searched, weighted)],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--weights", type=Path, help="measure on the matrices of this safetensors file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    headings = ("weights", "searched", "product", "searched", "with importance")
    table = Table("values", "format", *headings, title="relative error")
    results = []
    for source, weights in stored(arguments.weights) if arguments.weights else drawn():
        for name, figures in measure(weights):
            table.add_row(source, name, *(f"{figure:.4f}" for figure in figures))
            for what, figure, plain in (
                ("weights", figures[1], figures[0]),
                ("product", figures[3], figures[2]),
                ("product_importance", figures[4], figures[2]),
            ):
                ratio = figure / plain
                results.append(
                    {
                        "name": f"scale_search_{what}_{name}_{source}",
                        "value": ratio,
                        "unit": "of the error with covering scales",
                        "target": 1.0,
                        "met": ratio < 1.0,
                    }
                )
    Console(width=120).print(table)
    if arguments.json:
        machine = {"machine": platform.machine(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
