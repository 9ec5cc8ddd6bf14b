"""Checkpoints on disk: which tensors there are and where, read without loading them.

`Checkpoint` is what families see: a config and named ranges of files that can be read. Two
kinds exist: safetensors directories (`memory/checkpoint/safetensors_files.py`) and GGUF files
(`memory/checkpoint/gguf_files.py`). Nothing here unpickles anything.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memory.checkpoint.entries import TensorEntry, TensorSpec
from memory.checkpoint.reads import read_tensor
from quant.errors import CheckpointError

# How names of GGUF files end, those of one part too.
GGUF_ENDING = re.compile(r"(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)


class Checkpoint:
    """A config and the ranges of files that hold its tensors.

    path        directory or GGUF file
    model_type  what picks the family
    config      config.json as a dict, or the GGUF metadata
    entries     name -> TensorEntry
    problems    errors found while reading index and headers
    """

    def __init__(
        self,
        path: Path,
        model_type: str,
        config: Mapping[str, Any],
        entries: Mapping[str, TensorEntry],
        problems: list[str],
    ) -> None:
        self.path = path
        self.model_type = model_type
        self.config = config
        self.entries = entries
        self.problems = problems

    @property
    def name(self) -> str:
        """The name of the directory or file."""
        return name_of(self.path)

    def used(self, ignored: re.Pattern[str] | None) -> dict[str, TensorEntry]:
        """The entries, without those whose whole names match `ignored`."""
        return {
            name: entry
            for name, entry in self.entries.items()
            if ignored is None or not ignored.fullmatch(name)
        }

    def verify(
        self,
        specs: Mapping[str, TensorSpec],
        ignored: re.Pattern[str] | None = None,
        unreadable: Mapping[str, str] | None = None,
    ) -> None:
        """Compare the tensors with what a family expects; only headers are read.

        unreadable: names of matrices, without endings, that no format has, and why. Raises one
        CheckpointError that lists every problem: missing and unexpected tensors, wrong shapes and dtypes, and
        what reading index and headers had found.
        """
        unreadable = unreadable or {}
        problems = [*self.problems, *unreadable.values()]
        for name, spec in specs.items():
            entry = self.entries.get(name)
            if entry is None:
                problems.append(f"missing tensor {name} {list(spec.shape)}")
                continue
            if entry.shape != spec.shape:
                problems.append(f"{name}: shape {list(entry.shape)}, expected {list(spec.shape)}")
            if entry.dtype not in spec.dtypes:
                problems.append(f"{name}: dtype {entry.dtype}, expected {' or '.join(spec.dtypes)}")
        problems.extend(
            f"unexpected tensor {name} {list(self.entries[name].shape)}"
            for name in sorted(self.used(ignored).keys() - specs.keys())
            if name.rpartition(".")[0] not in unreadable
        )
        if problems:
            raise CheckpointError(_list_problems(self.path, problems))

    def read(self, name: str) -> torch.Tensor:
        """The raw bytes of a tensor, uint8 `[nbytes]`. Raises CheckpointError where they cannot be read."""
        return read_tensor(self.entries[name])


def name_of(path: Path) -> str:
    """The name of a model's directory or file, without `.gguf` and its part; of a link, the link's own name.

    In a Hugging Face Hub cache, a GGUF file's target is named by its hash, and a directory by its commit:
    that one's name is the repository's, ORG/MODEL.
    """
    named = Path(os.path.abspath(path))
    if GGUF_ENDING.search(named.name):
        return GGUF_ENDING.sub("", named.name)
    kind, _, repository = named.parents[1].name.partition("--") if len(named.parents) > 1 else ("", "", "")
    if named.parent.name == "snapshots" and kind == "models" and repository:
        return repository.replace("--", "/")
    return named.name


SHOWN_PROBLEMS = 40


def _list_problems(path: Path, problems: list[str]) -> str:
    shown = problems[:SHOWN_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    lines = "\n  ".join(shown)
    return f"{path}: {len(problems)} problem(s) in the checkpoint; nothing was loaded:\n  {lines}"
