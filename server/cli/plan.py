"""`loci plan`: where a model would lie on a machine, how fast it would be there, what would help."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.embedded import EMBEDDED, hub_model, model_path
from quant.errors import ConfigError
from quant.formats.kv_names import KvChoice
from server.cli.arguments import ExpertsFormat, KvFormatOption, complete_model
from server.cli.money_arguments import Against, CostFiles, CostsFile, Plot, Price, PricesFile, not_negative
from server.cli.plan_drafts import show_drafts
from server.cli.plan_economics import show_economics
from server.cli.plan_purchase import Goal, Purchase, show_purchase
from server.cli.plan_report import DEFAULT_BATCH, plan_report, print_plan, workload_of

if TYPE_CHECKING:
    from memory.hardware.profiles import HardwareProfile
    from memory.planner.calibration import Learned
    from memory.planner.shape import ModelShape

DOES_NOT_FIT = 3  # exit code


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory, GGUF file, config.json, ORG/MODEL of the Hugging Face Hub, demo, "
            "smollm2, or a name like gpt-oss-20b.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ],
    hardware: Annotated[
        list[str] | None,
        typer.Option(
            help="A shipped profile, `this` for this machine, or a TOML file (docs/planner.md). Several: the "
            "model in parts on these machines (docs/cluster.md). Default: this.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[str, typer.Option(help="Between several machines, e.g. 10Gbps.")] = "10Gbps",
    context: Annotated[
        int | None,
        typer.Option(
            help="Maximum tokens of a sequence. Default: 8192, or the model's context length if shorter.",
            min=1,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.", min=1, max=4096)] = DEFAULT_BATCH,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(help="Prompt tokens per step. Default: as many as pay.", min=1, show_default=False),
    ] = None,
    experts: ExpertsFormat = None,
    kv_format: KvFormatOption = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            help="Use only these GPUs, with budgets: cuda:22GiB,... or virtual:24GiB@12.5GB/s,...",
            show_default=False,
        ),
    ] = None,
    dram: Annotated[
        str | None,
        typer.Option(help="DRAM to use, e.g. 64GiB. Default: all.", show_default=False),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Routing trace recorded by `loci profile`, for hit rates.", show_default=False),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            help="What a server measured (loci serve --measured-file): its routing and this machine's rates.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show each layer on its own line.")] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Show which machine of listed parts this much money should buy, and its plan.",
            callback=not_negative,
            show_default=False,
        ),
    ] = None,
    parts: Annotated[
        Path | None,
        typer.Option(help="TOML of parts (docs/economics.md). Default: an example.", show_default=False),
    ] = None,
    own: Annotated[
        list[str] | None,
        typer.Option(help="Parts that are there already, such as 'RTX 4090=2'.", show_default=False),
    ] = None,
    goal: Annotated[
        Goal, typer.Option(help="What --budget is for: one answer alone, or --batch of them together.")
    ] = "alone",
    save: Annotated[
        Path | None,
        typer.Option(help="Also write that machine to this file, for --hardware.", show_default=False),
    ] = None,
    economics: Annotated[
        bool, typer.Option("--economics", help="Show what tokens cost there, and elsewhere, instead.")
    ] = False,
    price: Price = None,
    costs: CostsFile = None,
    prices: PricesFile = None,
    against: Against = None,
    plot: Plot = None,
    drafts: Annotated[
        bool, typer.Option("--drafts", help="Show one answer's speed with drafted tokens instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where everything goes, how fast it runs, what limits it and what would help. Loads nothing.

    Of a model of the Hub that is not on this machine, configuration and headers are fetched for that. The
    exit code is 3 if the model does not fit.

    Example: loci plan deepseek-v4.1-flash --hardware 2x4090-256g --context 32768
    """
    from memory.experts.traces import RoutingTrace
    from memory.planner.placing import plan as make_plan
    from memory.planner.routing import from_counts, of_trace

    shape = _shape(model, experts, kv_format)
    learned = None if measured is None else _learned(measured, shape)
    recorded = None if trace is None else of_trace(RoutingTrace.load(trace), shape, str(trace))
    if learned is not None and learned.uses:
        recorded = from_counts(learned.uses, f"{measured}, as a server learned it")
    if context is not None and context > shape.max_context:
        raise ConfigError(f"--context {context}: {shape.name} supports at most {shape.max_context} tokens")
    if trace is not None and measured is not None:
        raise ConfigError("--trace and --measured: give one of them, both say how experts are used")
    if economics and drafts:
        raise ConfigError("--economics and --drafts: one after the other")
    of_costs = {"--price": price, "--costs": costs, "--prices": prices, "--against": against, "--plot": plot}
    if not economics:
        _refuse(of_costs, "says what tokens cost; give --economics too")
    if budget is None:
        _refuse(
            {"--parts": parts, "--own": own or None, "--save": save},
            "says what --budget may buy; give --budget too",
        )
    else:
        if economics:
            raise ConfigError("--budget and --economics: one after the other, with --save and --hardware")
        of_machine = {"--hardware": hardware or None, "--devices": devices, "--dram": dram}
        _refuse(of_machine, "names a machine, but --budget buys one; give one of them")
        of_plan = {"--prefill-chunk": prefill_chunk, "--layers": layers or None, "--drafts": drafts or None}
        _refuse(of_plan, "is not for --budget; write the machine with --save, then plan it with --hardware")
        purchase = Purchase(budget, parts, own or [], goal, save)
        if not show_purchase(shape, context, batch, recorded, purchase, as_json=as_json):
            raise typer.Exit(DOES_NOT_FIT)
        return
    machines = hardware or ["this"]
    if len(machines) > 1:
        of_one = {
            "--economics": economics or None,
            "--drafts": drafts or None,
            "--layers": layers or None,
            "--trace": trace,
            "--measured": measured,
        }
        _refuse(of_one, "says something of one machine; give --hardware once")
        from server.cli.plan_stages import bits_per_s, cuts_of, show_stages

        profiles = [_hardware(name, devices, dram, shape, _lies_at(model)) for name in machines]
        asked, rate = (context, batch, prefill_chunk), bits_per_s(network)
        if not show_stages(shape, cuts_of(model, shape), profiles, asked, rate, as_json=as_json):
            raise typer.Exit(DOES_NOT_FIT)
        return
    rates = None if learned is None or machines != ["this"] else learned.rates
    machine = _hardware(machines[0], devices, dram, shape, _lies_at(model), rates)
    workload = workload_of(shape, machine, context, batch, prefill_chunk)
    if (drafts or economics) and not make_plan(shape, machine, workload).fits:
        without = f"without {'--drafts' if drafts else '--economics'}, its plan says why"
        print(f"loci: {shape.name} does not fit on {machine.name}; {without}", file=sys.stderr)
        raise typer.Exit(DOES_NOT_FIT)
    if drafts:
        show_drafts(shape, machine, workload, recorded, as_json=as_json)
        return
    if economics:
        files = CostFiles(price, costs, prices, against)
        show_economics(shape, machine, workload, recorded, files, plot, as_json=as_json)
        return
    if as_json:
        placement = make_plan(shape, machine, workload)
        print(json.dumps(plan_report(shape, machine, placement, recorded), indent=1))
        fits = placement.fits
    else:
        fits = print_plan(shape, machine, workload, recorded=recorded, by_layer=layers)
        for what, ratio in () if learned is None else learned.ratios.items():
            print(f"{what}: measured {ratio:.2f} times what was expected then")
    if not fits:
        raise typer.Exit(DOES_NOT_FIT)


def _refuse(options: Mapping[str, object], why: str) -> None:
    """Raises ConfigError where one of these options was given, since it would do nothing."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name}: {why}")


def _shape(model: str, experts: str | None, kv_format: KvChoice) -> ModelShape:
    from engine.families.released import NAMES, released_shape

    if model.endswith(".json") and Path(model).is_file():
        from engine.families.decoder.config_only import config_shape
        from memory.checkpoint.safetensors_files import read_json

        config = Path(model)
        return config_shape(read_json(config), config.resolve().parent.name, experts, kv_format)
    if model in NAMES and not Path(model).exists():
        return released_shape(model, experts, kv_format)
    if model in EMBEDDED or Path(model).exists() or hub_model(model) is not None:
        from engine.families.loader import open_model
        from engine.families.shapes import loaded_shape_of
        from server.cli.fetch import headers_of

        with headers_of(model) as path:
            opened = open_model(path, experts=experts)
            return loaded_shape_of(opened.checkpoint, opened.kv_format(kv_format))
    names = ", ".join((*EMBEDDED, *NAMES))
    raise ConfigError(f"{model}: no such file or directory, and not one of {names}")


def _learned(file: Path, shape: ModelShape) -> Learned:
    """What a server measured. Raises ConfigError where that was another model."""
    from memory.planner.calibration import Learned

    learned = Learned.read(file)
    layers = [len(layer) for layer in learned.uses]
    if layers and layers != [layer.experts for layer in shape.layers]:
        raise ConfigError(
            f"{file}: measured with {learned.model}, whose experts are not those of {shape.name}"
        )
    return learned


def _lies_at(model: str) -> Path | None:
    """Where the model lies on this machine; None where it doesn't, or where only its config does."""
    try:
        path = model_path(model)
    except ConfigError:
        return None
    return path if path.exists() and path.suffix != ".json" else None


def _hardware(
    name: str,
    devices: str | None,
    dram: str | None,
    shape: ModelShape,
    lies_at: Path | None,
    rates: Mapping[str, float] | None = None,
) -> HardwareProfile:
    """The machine asked for; lies_at is where this one has the model already, `rates` what was measured of
    it. Raises ConfigError where it has not as much as was asked for."""
    from memory.hardware.detect import detect
    from memory.hardware.profiles import load_profile, parse_bytes, parse_devices
    from memory.hardware.this_machine import disk_of, kept_rates, this_machine

    if name != "this":
        machine = load_profile(name)
    else:
        here = detect(lies_at)
        disk = None if lies_at is None else disk_of(lies_at)
        machine = this_machine(here, dict(rates) if rates else kept_rates(here, disk))
        if lies_at is not None:
            machine = replace(machine, disk_bytes=machine.disk_bytes + shape.disk_bytes)
    if devices is not None:
        machine = machine.with_devices(parse_devices(devices))
    if dram is None:
        return machine
    asked = parse_bytes(dram)
    if asked > machine.dram_bytes:
        raise ConfigError(
            f"--dram {dram}: {machine.name} has {machine.dram_bytes / 1e9:.1f} GB of DRAM for models, but "
            f"{asked / 1e9:.1f} GB was requested"
        )
    return replace(machine, dram_bytes=asked)
