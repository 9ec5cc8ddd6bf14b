"""What runs on each machine of a cluster: its look at the checkpoint, its plan, and its part of the model."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from typing import Any

from engine.cluster.messages import PlannedKv
from engine.cluster.part import Part
from engine.distribution import DISTRIBUTION, version_of
from engine.embedded import model_path
from engine.families.loader import OpenedModel, open_model
from memory.checkpoint.part import Span
from memory.hardware.detect import available_memory_bytes
from memory.planner.budget import GPU_SHARE
from server.cluster.fingerprint import fingerprint
from server.serving.planned import Planned, planned
from server.settings import Settings

# Where the checkpoint lies on a machine, and what may be used there, if not what the server's settings say.
OWN = {
    "model": "LOCI_STAGE_MODEL",
    "dram_budget": "LOCI_STAGE_DRAM_BUDGET",
    "devices": "LOCI_STAGE_DEVICES",
}
# What of a server's settings the parts must keep to.
PASSED = (
    "model", "max_model_len", "max_num_seqs", "kv_budget", "kv_format", "prefill_chunk", "prefix_cache",
    "dram_budget", "devices",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """A machine as a place for layers; `room` is bytes of memory that weights could take there."""

    host: str
    version: str
    path: str
    fingerprint: str
    room: int
    threads: int


@dataclass(frozen=True)
class Wish:
    """What a part's plan would serve by itself."""

    sequences: int
    context: int
    prefill_chunk: int


def passed(settings: Settings) -> dict[str, Any]:
    """The settings for the machines, without the server's secrets."""
    chosen = {name: getattr(settings, name) for name in PASSED}
    return {name: value for name, value in chosen.items() if value is not None}


def look(settings: dict[str, Any]) -> Look:
    """Look at this machine and its copy of the checkpoint. Raises LociError where that is not usable."""
    settings = on_this_machine(settings)
    opened = _opened(settings)
    gpus = 0
    if settings.get("devices") is None and "LOCI_DEVICES" not in os.environ:
        from memory.hardware.this_machine import this_machine

        gpus = int(GPU_SHARE * sum(gpu.memory_bytes for gpu in this_machine().gpus))
    return Look(
        host=socket.gethostname(),
        version=version_of(DISTRIBUTION) or "unknown",
        path=str(opened.checkpoint.path),
        fingerprint=fingerprint(opened.checkpoint),
        room=available_memory_bytes() + gpus,
        threads=os.cpu_count() or 1,
    )


class OnMachine:
    """A part of a model, from its plan to its work."""

    def __init__(self, settings: dict[str, Any], span: Span) -> None:
        self._settings, self._span = on_this_machine(settings), span
        self._part: Part | None = None

    def wish(self) -> Wish:
        """What this machine's plan for the part serves. Raises LociError where it does not fit."""
        workload = self._planned(self._settings).workload
        return Wish(workload.sequences, workload.context, workload.prefill_chunk)

    def load(self, agreed: dict[str, Any]) -> Part:
        """The part, loaded by the plan for what all machines have agreed on."""
        if self._part is None:
            settings = self._settings | agreed
            found = self._planned(settings)
            loaded = self._opened.load(found.budget)
            self._part = Part(
                loaded.model,
                is_last=self._span.is_last,
                kv=_planned_kv(found),
                prefix_bytes=found.workload.prefix_bytes,
            )
        return self._part

    def _planned(self, settings: dict[str, Any]) -> Planned:
        opened = _opened(settings)
        part = opened.family.part(opened.checkpoint, self._span)
        self._opened = replace(opened, checkpoint=part)
        return planned(Settings(**settings), self._opened)


def on_this_machine(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with what this machine's own variables say instead."""
    return settings | {name: value for name, own in OWN.items() if (value := os.environ.get(own))}


def _opened(settings: dict[str, Any]) -> OpenedModel:
    return open_model(model_path(settings["model"]), settings.get("max_model_len"))


def _planned_kv(found: Planned) -> PlannedKv:
    """The plan's rows in host memory."""
    work, placement = found.workload, found.plan.placement
    tokens = work.sequences * work.context if work.kv_tokens is None else work.kv_tokens
    return PlannedKv(placement.pool_bytes().get("dram", 0), tokens)
