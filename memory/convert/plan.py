"""What a conversion will write, decided from headers alone: every output tensor, its place and its source.

Sizes of all formats follow from shapes, so the header of each output shard is known before a weight
is read. Shards keep the names of their sources; a scale moves to the shard of its weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorEntry
from memory.checkpoint.safetensors_layout import PlacedTensor, place_tensors
from quant.errors import CheckpointError, ConfigError, FormatError
from quant.formats.four_bit import FourBit
from quant.formats.fp8 import Fp8
from quant.formats.quantization_config import QuantizationConfig, Role, describe_formats
from quant.formats.stored import DTYPE_NAMES, FLOAT_DTYPES, Stored, format_of, stored_as
from quant.packed import Format

MODEL_TYPES = ("deepseek_v4", "deepseek_v41")
EXPERT = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")
ENGRAM = re.compile(r"\.engram\.embed\.weight$")
# What the released checkpoints store in FP8.
DENSE = re.compile(
    r"\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight$|\.shared_experts\.w[123]\.weight$|\.engram\.wkv\.weight$"
)


@dataclass(frozen=True)
class Choices:
    """What to convert to; None keeps what is there.

    experts  a four-bit format
    dense    FP8 in 32x32 tiles, or bfloat16
    engram   FP8 rows or MXFP4
    """

    experts: FourBit | None = None
    dense: Fp8 | torch.dtype | None = None
    engram: Format | None = None

    def target(self, role: Role) -> Format | torch.dtype | None:
        """The choice for weights of `role`."""
        return {Role.EXPERT: self.experts, Role.DENSE: self.dense, Role.ENGRAM: self.engram}[role]


@dataclass(frozen=True)
class Copy:
    """A tensor that stays as it is."""

    source: TensorEntry
    output: PlacedTensor


@dataclass(frozen=True)
class Convert:
    """A matrix that changes its format; a side is a Format, or a dtype of plain floats."""

    shape: tuple[int, int]
    source: Format | torch.dtype
    weight: TensorEntry
    scale: TensorEntry | None
    target: Format | torch.dtype
    weight_output: PlacedTensor
    scale_output: PlacedTensor | None


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its header with the length before it, its size, and the work that fills it."""

    name: str
    header: bytes
    nbytes: int
    jobs: tuple[Copy | Convert, ...]


@dataclass(frozen=True)
class Plan:
    """A whole conversion."""

    shards: tuple[ShardPlan, ...]
    config: dict[str, Any]
    index: dict[str, Any]

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(job_bytes(job) for shard in self.shards for job in shard.jobs)


def job_bytes(job: Copy | Convert) -> int:
    """Bytes that a job reads."""
    if isinstance(job, Copy):
        return job.source.nbytes
    return job.weight.nbytes + (job.scale.nbytes if job.scale else 0)


@dataclass(frozen=True)
class _Change:
    """A matrix before places in files are known. source: None for floats; target: None to keep it."""

    role: Role
    shape: tuple[int, int]
    source: Format | None
    target: Format | torch.dtype | None

    @property
    def after(self) -> Format | None:
        """The format in the converted checkpoint; None for floats."""
        if self.target is None:
            return self.source
        return self.target if isinstance(self.target, Format) else None


def make_plan(checkpoint: Checkpoint, choices: Choices) -> Plan:
    """The conversion of `checkpoint` to `choices`.

    Raises ConfigError for a model whose tensor names are not known here or a choice that finds
    nothing to convert, CheckpointError listing all that is wrong with the files.
    """
    if checkpoint.model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ConfigError(f"{checkpoint.path}: can convert {known}, not {checkpoint.model_type}")
    packing = QuantizationConfig.parse(checkpoint.config)
    problems = list(checkpoint.problems)
    changes: dict[str, _Change] = {}
    for name, entry in checkpoint.entries.items():
        scale = checkpoint.entries.get(_scale_name(name)) if name.endswith(".weight") else None
        role = role_of(name, is_packed=scale is not None)
        if role is None or len(entry.shape) != 2:
            continue
        try:
            changes[name] = _change(role, entry, scale, packing, choices)
        except FormatError as error:
            problems.append(f"{name}: {error}")
    if problems:
        listed = "\n  ".join(problems[:40])
        raise CheckpointError(
            f"{checkpoint.path}: {len(problems)} problem(s), nothing was converted:\n  {listed}"
        )
    for role in Role:
        if choices.target(role) is not None and not any(change.role is role for change in changes.values()):
            raise ConfigError(f"{checkpoint.path}: has no {role} weights to convert")
    shards = _lay_out(checkpoint, changes)
    weight_map = {
        output.name: shard.name for shard in shards for job in shard.jobs for output in outputs(job)
    }
    total = sum(output.nbytes for shard in shards for job in shard.jobs for output in outputs(job))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    formats = {role: {c.after for c in changes.values() if c.role is role} for role in Role}
    return Plan(tuple(shards), describe_formats(checkpoint.config, formats), index)


def role_of(name: str, *, is_packed: bool) -> Role | None:
    """The role of tensor `name`, None for what is never converted. Any other packed matrix is dense."""
    if EXPERT.search(name):
        return Role.EXPERT
    if ENGRAM.search(name):
        return Role.ENGRAM
    return Role.DENSE if is_packed or DENSE.search(name) else None


def outputs(job: Copy | Convert) -> tuple[PlacedTensor, ...]:
    """The tensors that a job writes."""
    if isinstance(job, Copy):
        return (job.output,)
    return (job.weight_output,) if job.scale_output is None else (job.weight_output, job.scale_output)


def _scale_name(weight: str) -> str:
    return weight.removesuffix(".weight") + ".scale"


def _change(
    role: Role, entry: TensorEntry, scale: TensorEntry | None, packing: QuantizationConfig, choices: Choices
) -> _Change:
    source = format_of(role, entry.dtype, scale.dtype if scale else None, packing)
    rows, cols = entry.shape
    if isinstance(source, FourBit):
        cols *= 2
    target = choices.target(role)
    if source is not None:
        assert scale is not None
        expected_weight, expected_scale = stored_as(source, rows, cols)
        source.expect("weight shape", entry.shape, expected_weight.shape)
        source.expect("scale shape", scale.shape, expected_scale.shape)
    is_there = target is source if source is not None else target is FLOAT_DTYPES[entry.dtype]
    if target is None or is_there:
        return _Change(role, (rows, cols), source, None)
    if isinstance(target, Format):
        stored_as(target, rows, cols)
    return _Change(role, (rows, cols), source, target)


def _lay_out(checkpoint: Checkpoint, changes: Mapping[str, _Change]) -> list[ShardPlan]:
    """Output tensors in shards, in the order of their sources' names."""
    files: dict[str, dict[str, Stored]] = {}
    for name, entry in checkpoint.entries.items():
        change = changes.get(name)
        tensors = files.setdefault(entry.file.name, {})
        if change is not None and change.target is not None:
            if isinstance(change.target, torch.dtype):
                tensors[name] = Stored((DTYPE_NAMES[change.target],), change.shape)
            else:
                tensors[name], tensors[_scale_name(name)] = stored_as(change.target, *change.shape)
        elif not _belongs_to_converted(name, changes):
            tensors[name] = Stored((entry.dtype,), entry.shape)
    return [
        _shard(checkpoint, changes, file_name, tensors)
        for file_name, tensors in sorted(files.items())
        if tensors
    ]


def _belongs_to_converted(name: str, changes: Mapping[str, _Change]) -> bool:
    """True for the scale of a matrix that gets another format."""
    weight = changes.get(name.removesuffix(".scale") + ".weight") if name.endswith(".scale") else None
    return weight is not None and weight.target is not None


def _shard(
    checkpoint: Checkpoint, changes: Mapping[str, _Change], file_name: str, tensors: Mapping[str, Stored]
) -> ShardPlan:
    header, placed, nbytes = place_tensors(
        {name: (stored.dtypes[0], stored.shape) for name, stored in tensors.items()}
    )
    jobs: list[Copy | Convert] = []
    for name in sorted(tensors):
        change = changes.get(name)
        entry = checkpoint.entries.get(name)
        if entry is None or (name.endswith(".scale") and _belongs_to_converted(name, changes)):
            continue  # a scale: written by the job of its weight
        if change is None or change.target is None:
            jobs.append(Copy(entry, placed[name]))
            continue
        scale = checkpoint.entries[_scale_name(name)] if change.source is not None else None
        source = change.source or FLOAT_DTYPES[entry.dtype]
        scale_output = placed[_scale_name(name)] if isinstance(change.target, Format) else None
        jobs.append(Convert(change.shape, source, entry, scale, change.target, placed[name], scale_output))
    return ShardPlan(file_name, header, nbytes, tuple(jobs))
