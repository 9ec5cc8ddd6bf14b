"""`loci bench experts`: which policy keeps the right experts, on recorded routing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quant.errors import ConfigError
from server.cli.arguments import JsonFile
from server.cli.terminal import print_table

# Of Belady's hits, what the default policy should reach.
TARGET = 0.9
# The policy that serves, and the share of DeepSeek-V4.1-Flash's experts that two RTX 4090 and 128 GB hold
# (`loci plan deepseek-v4.1-flash --hardware 2x4090-128g`); 256 GB hold all.
DEFAULT_POLICY, PLANNED_SHARE = "predictive", 0.556


def experts(
    trace: Annotated[
        Path, typer.Option(help="Routing trace recorded by `loci profile`.", show_default=False)
    ],
    count: Annotated[
        int, typer.Option("--experts", min=2, help="Routed experts per layer.", show_default=False)
    ],
    shares: Annotated[
        str, typer.Option(help="Slots as fractions of a layer's experts, comma-separated.")
    ] = "0.25,0.5,0.75",
    json_file: JsonFile = None,
) -> None:
    """Replay a routing trace through each eviction policy, and compare with the best possible (Belady).

    Then shows the exchanges between GPU and DRAM, with and without the required margin of benefit.

    Example: loci bench experts --trace routing.safetensors --experts 384
    """
    from memory.experts.replay import compare_margins, compare_policies
    from memory.experts.traces import RoutingTrace
    from memory.hardware.detect import detect
    from memory.hardware.this_machine import Result, write_results

    try:
        fractions = tuple(float(part) for part in shares.split(","))
    except ValueError:
        raise ConfigError(f"--shares {shares!r}: expected numbers such as 0.1,0.5") from None
    if not all(0 < f <= 1 for f in fractions):
        raise ConfigError(f"--shares {shares!r}: each must be above 0 and at most 1")
    recorded = RoutingTrace.load(trace)
    recorded.shares(count)  # refuses a trace of more experts
    scores = compare_policies(recorded, count, (*fractions, PLANNED_SHARE))
    print_table(
        ["policy", "slots", "hits", "Belady's hits", "of Belady's"],
        [
            (
                s.policy,
                f"{s.slots_share:.0%}",
                f"{s.hit_rate:.1%}",
                f"{s.belady_rate:.1%}",
                f"{s.of_belady:.3f}",
            )
            for s in scores
        ],
        right=(1, 2, 3, 4),
    )
    margins = compare_margins(recorded, count, fractions)
    print("\nA full GPU with DRAM behind it, predictive policy; an exchange moves one expert in and one back")
    print_table(
        ["routing", "slots", "margin", "hits", "exchanges a use"],
        [
            (
                m.routing,
                f"{m.slots_share:.0%}",
                f"{m.margin:g}",
                f"{m.hit_rate:.1%}",
                f"{m.exchange_rate:.3f}",
            )
            for m in margins
        ],
        right=(1, 2, 3, 4),
    )
    if json_file is not None:
        results = [
            Result(
                f"expert_hits_of_belady_{s.policy}_{s.slots_share:g}",
                s.of_belady,
                "ratio",
                TARGET,
                s.of_belady >= TARGET,
            )
            for s in scores
        ]
        planned = next(s for s in reversed(scores) if s.policy == DEFAULT_POLICY).of_belady
        results.append(Result("expert_hits_vs_belady", planned, "ratio", TARGET, planned >= TARGET))
        for m in margins:
            name = f"{m.routing}_{m.slots_share:g}_margin_{m.margin:g}"
            results.append(Result(f"gpu_hits_{name}", m.hit_rate, "ratio"))
            results.append(Result(f"gpu_exchanges_{name}", m.exchange_rate, "per use"))
        write_results(json_file, detect(), results)
        print(f"written to {json_file}")
