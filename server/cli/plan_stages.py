"""`loci plan` with several machines: which layers go where, and what that brings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from engine.embedded import EMBEDDED, hub_model
from quant.errors import ConfigError
from server.cli.plan_report import workload_of
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from memory.checkpoint.part import Span
    from memory.hardware.profiles import HardwareProfile
    from memory.planner.shape import ModelShape

Asked = tuple[int | None, int, int | None]  # context, sequences, chunk
# Of a call from one process of Ray to another. Assumed; `loci bench cluster` measures it.
HOP_S = 1e-3


@dataclass(frozen=True)
class StagePlan:
    """A machine's layers, and seconds of a step there: of one sequence, and of a piece of all."""

    machine: str
    layers: str
    nbytes: int
    fits: bool
    alone_s: float
    piece_s: float


def cuts_of(model: str, shape: ModelShape) -> tuple[int, ...]:
    """Where a model may be cut. Raises ConfigError for one whose headers are not there to say."""
    from pathlib import Path

    if model not in EMBEDDED and not Path(model).exists() and hub_model(model) is None:
        raise ConfigError(f"{model}: its checkpoint says where it may be cut; name that for several machines")
    from engine.families.loader import open_model
    from server.cli.fetch import headers_of

    with headers_of(model) as path:
        opened = open_model(path)
        return opened.family.cuts(opened.checkpoint)


def bits_per_s(network: str) -> float:
    """What `10Gbps` means. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([GM])(?:bps|bit/s)", network.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"--network {network!r}: a rate like 10Gbps or 940Mbps is expected")
    return float(found[1]) * {"G": 1e9, "M": 1e6}[found[2]]


def show_stages(
    shape: ModelShape,
    cuts: Sequence[int],
    machines: Sequence[HardwareProfile],
    asked: Asked,
    network: float,
    *,
    as_json: bool,
) -> bool:
    """Print the plan; True if every part fits.

    network  bits per second
    """
    from memory.planner.stages import spread

    rooms = [float(m.dram_bytes + sum(gpu.memory_bytes for gpu in m.gpus)) for m in machines]
    spans = spread(shape, cuts, rooms)
    pieces = min(len(machines), asked[1])
    piece = -(-asked[1] // pieces)
    stages = [_stage(shape, span, m, asked, piece) for span, m in zip(spans, machines, strict=True)]
    whole = [_stage(shape, _all(shape), machine, asked, asked[1]) for machine in machines]
    state_s, logits_s = 8 * shape.state_bytes / network, 8 * 4 * shape.vocab_size / network
    way = (len(stages) - 1) * (HOP_S + state_s) + HOP_S + logits_s
    alone = 1 / (sum(stage.alone_s for stage in stages) + way)
    sent = [piece * state_s] * (len(stages) - 1) + [piece * logits_s]
    each = [stage.piece_s + HOP_S + sent_s for stage, sent_s in zip(stages, sent, strict=True)]
    together = asked[1] / (sum(each) + (pieces - 1) * max(each))  # a step ends with its last piece
    if as_json:
        report = {"stages": [asdict(stage) for stage in stages], "tokens_per_s": alone,
                  "together_tokens_per_s": together, "way_ms": 1e3 * way,
                  "each_alone": [asdict(each) for each in whole]}  # fmt: skip
        print(json.dumps(report, indent=1))
        return all(stage.fits for stage in stages)
    print_table(
        ("machine", "layers", "weights", "fits", "ms of a token"),
        [
            (s.machine, s.layers, bytes_text(s.nbytes), "yes" if s.fits else "no", f"{1e3 * s.alone_s:.3g}")
            for s in stages
        ],
    )
    on_the_way = f"{1e3 * way:.2g} ms of a token on the way ({HOP_S * 1e3:g} ms a call, assumed)"
    print(f"one answer: {alone:.3g} tokens/s, {on_the_way}")
    print(f"{asked[1]} answers together: {together:.3g} tokens/s, in {pieces} pieces, one behind the other")
    for one in whole:
        speeds = f"{1 / one.alone_s:.3g} and {asked[1] / one.piece_s:.3g} tokens/s"
        print(f"{one.machine} by itself: {speeds if one.fits else 'it does not fit'}")
    return all(stage.fits for stage in stages)


def _stage(
    shape: ModelShape,
    span: Span,
    machine: HardwareProfile,
    asked: Asked,
    piece: int,
) -> StagePlan:
    from memory.planner.placing import plan
    from memory.planner.prefill import PrefillModel
    from memory.planner.serving import routing_of
    from memory.planner.stages import part_of

    part = part_of(shape, span)
    context, batch, chunk = asked
    workload = workload_of(part, machine, context, batch, chunk)
    placement = plan(part, machine, workload)
    model = PrefillModel(part, machine, placement, routing_of(part))
    half = workload.context // 2
    one, several = (count / model.decode(count, half).tokens_per_s for count in (1, piece))
    return StagePlan(machine.name, str(span), part.nbytes, placement.fits, one, several)


def _all(shape: ModelShape) -> Span:
    from memory.checkpoint.part import Span

    return Span(0, len(shape.layers), len(shape.layers))
