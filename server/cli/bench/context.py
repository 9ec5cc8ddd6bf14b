"""`loci bench context`: what a long context costs, by depth, and what its KV cache keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import ConfigError
from quant.formats.kv_names import KvFormat
from server.cli.arguments import DramBudget, JsonFile, KvFormatOption, OptionalModel, can_be_written
from server.cli.bench.figures import print_figures
from server.cli.plotting import need_matplotlib
from server.cli.progress import progress

if TYPE_CHECKING:
    from engine.bench.context import ContextRun
    from engine.bench.kv_quality import FormatQuality
    from engine.bench.needles import Found
    from engine.families.loader import Loaded, OpenedModel
    from memory.planner.budget import MemoryBudget

DEPTHS = (1 << 13, 1 << 15, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
TEXT_CONTEXTS = (128, 512, 2048)  # of needles in text
WINDOW, MOST_TOKENS = 2048, 8192  # of text on which formats are compared


def context(
    model: OptionalModel = None,
    depths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the sequence at which to measure, such as 8192,131072. Default: 8k, 32k, 128k, "
            "256k, 512k and 1M, as far as the model can.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Tokens to decode at each depth.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens of a step.")] = 256,
    deepest_prefill: Annotated[int, typer.Option(min=0, help="Depth up to which prefill is measured.")] = 1
    << 18,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text that the model can read, on which its KV formats are compared. The demonstration "
            "model has one.",
            show_default=False,
        ),
    ] = None,
    needles: Annotated[
        bool,
        typer.Option(
            help="Look for needles: with a model that is made for it, at all depths, and, where there is a "
            "text or the model comes with Loci, with MODEL itself."
        ),
    ] = True,
    dram_budget: DramBudget = None,
    kv_format: KvFormatOption = "auto",
    json_file: JsonFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Also draw decode time, prefill rate and needles by depth (PNG; needs matplotlib).",
            callback=can_be_written,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure decode time and prefill rate by depth, bytes of KV, memory against the plan, and what rounding
    KV loses.

    Two chunks are computed, and their rows repeated behind them, which cost as much to read and to choose
    among: a million tokens of prefill would take hours on most machines.

    Example: loci bench context ./slice --json context.json --plot context.png
    """
    from engine.embedded import embedded_name, embedded_text
    from engine.families.loader import open_model
    from memory.hardware.detect import detect
    from memory.hardware.this_machine import write_results
    from memory.planner.budget import MemoryBudget
    from server.cli.bench.context_report import (
        Report,
        details,
        draw,
        figures,
        print_depths,
        print_needles,
        print_qualities,
    )

    assert model is not None
    if plot is not None:
        need_matplotlib()
    opened = open_model(model)
    form = opened.kv_format(kv_format)
    asked = _parsed(depths) if depths is not None else None
    text = text or embedded_text(model)
    windows = [] if text is None else _windows(opened, text)
    budget = MemoryBudget.of_this_machine(dram_budget, kv_format=form)

    run = _run(opened, budget, asked, steps, chunk, deepest_prefill)
    print_depths(run, form)
    qualities = _qualities(opened, windows, budget)
    if qualities:
        print_qualities(qualities, f"{sum(map(len, windows)):,} tokens of {text}")
    found: dict[str, list[Found]] = {}
    if needles:
        found["made"] = _needles_made([depth.tokens for depth in run.depths], budget)
        if text is not None or embedded_name(model) is not None:
            found["text"] = _needles_in_text(opened, budget)
    names = {"made": "a model made for it", "text": opened.info.name}
    for kind, of_kind in found.items():
        if of_kind:
            print_needles(names[kind], of_kind)
    report = Report(run, qualities, {kind: of_kind for kind, of_kind in found.items() if of_kind})
    results = figures(report, form, is_v41=opened.checkpoint.model_type == "deepseek_v41")
    print()
    print_figures("context", results)
    if plot is not None:
        draw(report, plot)
        print(f"written to {plot}")
    if json_file is not None:
        write_results(json_file, detect(), [*results, *details(report)])
        print(f"written to {json_file}")


def _run(
    opened: OpenedModel,
    budget: MemoryBudget,
    depths: list[int] | None,
    steps: int,
    chunk: int,
    deepest_prefill: int,
) -> ContextRun:
    from engine.bench.context import WARM_STEPS, run_context

    loaded = opened.load(budget)
    try:
        most = loaded.model.info.max_context - chunk - WARM_STEPS - steps
        asked = depths or _default_depths(most)
        with progress("depths") as on_progress:
            return run_context(
                loaded.model,
                asked,
                steps=steps,
                chunk=chunk,
                deepest_prefill=deepest_prefill,
                on_progress=lambda done: on_progress(done, len(asked)),
            )
    finally:
        loaded.model.close()


def _windows(opened: OpenedModel, text: Path) -> list[list[int]]:
    """The text's first tokens, cut into pieces that the model can."""
    from engine.bench.evaluate import read_text

    ids = opened.tokenizer.encode(read_text(text), add_special_tokens=True)[:MOST_TOKENS]
    size = min(WINDOW, opened.info.max_context, len(ids))
    if size < 2:
        raise ConfigError(f"{text}: {len(ids)} tokens; at least two are needed to predict one")
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def _qualities(opened: OpenedModel, windows: list[list[int]], budget: MemoryBudget) -> list[FormatQuality]:
    from engine.bench.kv_quality import compare_formats

    if not windows:
        return []
    forms, found = _formats(opened), []
    with progress("formats") as on_progress:
        for quality in compare_formats(lambda form: _loaded(opened, budget, form).model, forms, windows):
            found.append(quality)
            on_progress(len(found), len(forms))
    return found


def _formats(opened: OpenedModel) -> list[KvFormat]:
    from engine.bench.kv_quality import float32_first

    return float32_first(opened.family.kv_formats(opened.checkpoint))


def _loaded(opened: OpenedModel, budget: MemoryBudget, form: KvFormat) -> Loaded:
    return opened.load(replace(budget, kv_format=form))


def _needles_made(depths: list[int], budget: MemoryBudget) -> list[Found]:
    """Needles in contexts of these depths, with the model that is made for them."""
    import tempfile

    from engine.bench.needle_model import CONTEXT, write_needle_model
    from engine.bench.needles import LEAST_MADE, find_made
    from engine.families.loader import open_model

    contexts = [depth for depth in depths if LEAST_MADE <= depth <= CONTEXT] or [LEAST_MADE]
    found: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="loci-") as folder, progress("needles") as on_progress:
        write_needle_model(Path(folder) / "needle")
        opened = open_model(Path(folder) / "needle")
        forms = _formats(opened)
        for number, form in enumerate(forms):
            model = _loaded(opened, budget, form).model
            try:
                for context in contexts:
                    found += find_made(model, form, context)
            finally:
                model.close()
            on_progress(number + 1, len(forms))
    return found


def _needles_in_text(opened: OpenedModel, budget: MemoryBudget) -> list[Found]:
    """Needles in contexts that the model can, with each of its formats."""
    from engine.bench.needles import find_in_text

    contexts = [context for context in TEXT_CONTEXTS if context <= opened.info.max_context]
    found: list[Found] = []
    if not contexts:
        return found
    with progress("needles in text") as on_progress:
        forms = _formats(opened)
        for number, form in enumerate(forms):
            loaded = _loaded(opened, budget, form)
            try:
                found += find_in_text(loaded, form, contexts)
            finally:
                loaded.model.close()
            on_progress(number + 1, len(forms))
    return found


def _parsed(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ConfigError(f"--depths {text}: expected numbers of tokens, such as 8192,131072") from None
    if not found or found[0] < 1:
        raise ConfigError(f"--depths {text}: expected numbers of tokens from 1 on")
    return found


def _default_depths(most: int) -> list[int]:
    """DEPTHS, as far as the model can: the deepest as deep as that."""
    if most < 1:
        raise ConfigError("the model's context is too short to measure; lower --chunk or --steps")
    fitting = [depth for depth in DEPTHS if depth <= most]
    beyond = next((depth for depth in DEPTHS if depth > most), None)
    return fitting if beyond is None else [*fitting, most]
