"""Everything that training needs to go on bit for bit, in one safetensors file written at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import Model

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum")  # what AdamW and Muon keep of a parameter


@dataclass
class Progress:
    """Where training stands: counters and the place in the data."""

    step: int = 0
    tokens: int = 0
    stage: int = 0
    passes: int = 0  # over the corpus, in this stage
    row: int = 0  # next row of this pass
    corpus: str = ""  # fingerprint of the data this pass is laid out from
    earlier_tokens: int = 0  # seen before this schedule, by the checkpoint that training began with

    @property
    def all_tokens(self) -> int:
        """Tokens seen since the weights were random."""
        return self.earlier_tokens + self.tokens


class TrainingState:
    """Model, optimisers and progress, saved and loaded together; the exported tables are saved with them."""

    def __init__(
        self, model: Model, optimisers: Sequence[torch.optim.Optimizer], tables: list[Tensor]
    ) -> None:
        self.model, self.optimisers, self.tables = model, optimisers, tables
        self.progress = Progress()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for optimiser in self.optimisers:
            for parameter, moments in optimiser.state.items():
                for kind, value in moments.items():
                    tensors[f"optimiser.{kind}.{self._names[id(parameter)]}"] = value
        return tensors | {f"table.{i}.weight": table for i, table in enumerate(self.tables)}

    def save(self, file: Path) -> None:
        """Write to a temporary name, then rename: a kill at any moment leaves a whole file."""
        temporary = file.with_suffix(".tmp")
        save_file(self._tensors(), temporary, metadata={"progress": json.dumps(asdict(self.progress))})
        temporary.replace(file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Take over what `save` wrote. Raises RuntimeError where the shapes are another model's."""
        with safe_open(file, framework="pt") as stored:
            self.progress = Progress(**json.loads(stored.metadata()["progress"]))
            names = set(stored.keys())
            for name, value in self.model.state_dict().items():
                value.copy_(stored.get_tensor(f"model.{name}"))
            for optimiser in self.optimisers:
                for parameter in (p for group in optimiser.param_groups for p in group["params"]):
                    name = self._names[id(parameter)]
                    kinds = [kind for kind in MOMENTS if f"optimiser.{kind}.{name}" in names]
                    if kinds:
                        optimiser.state[parameter] = {
                            kind: stored.get_tensor(f"optimiser.{kind}.{name}") for kind in kinds
                        }


@torch.no_grad()
def read_trained(file: Path, model: Model) -> tuple[list[Tensor], Progress]:
    """Fill `model` with a saved state's weights; returns its Engram tables and how far it was trained."""
    if not file.exists():
        raise SystemExit(f"{file} is missing: run train.py, then export.py")
    with safe_open(file, framework="pt") as stored:
        for name, value in model.state_dict().items():
            value.copy_(stored.get_tensor(f"model.{name}"))
        tables = [stored.get_tensor(f"table.{i}.weight") for i in range(len(model.config.engram_layer_ids))]
        return tables, Progress(**json.loads(stored.metadata()["progress"]))
