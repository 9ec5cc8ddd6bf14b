"""`loci bench drafts`: how much sooner answers come with drafts, where these pay and where they do not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from server.cli.arguments import METAVAR, JsonFile, complete_model
from server.cli.terminal import print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.bench.drafts import Turns
    from engine.families.loader import Loaded

Part = Literal["demo", "lookup", "prose", "slice"]
DEMO_TARGET, LOOKUP_TARGET, NO_LOSS = 1.5, 1.8, 0.98
TALK_TOKENS, EDIT_TOKENS, PROSE_TOKENS, PROMPT_TOKENS = 120, 220, 200, 8
FEW = 12  # different tokens of an answer at random


def drafts(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model whose experts do not fit into the budget: the worst case. Default: none.",
            metavar=METAVAR,
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = None,
    dram_budget: Annotated[
        str | None,
        typer.Option(
            help="That model's memory for weights, e.g. 4GiB. Default: three quarters of what is free."
        ),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs for it, e.g. virtual:1GiB@12.5GB/s. Default: none.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, max=100_000, help="Tokens it decodes in a round.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Of each, with drafts and without in turns.")] = 5,
    limit: Annotated[
        float, typer.Option(min=0, help="Seconds after which no further round of one of them begins.")
    ] = 180.0,
    only: Annotated[Part | None, typer.Option(help="Measure one of them alone.", show_default=False)] = None,
    json_file: JsonFile = None,
) -> None:
    """Answer with drafts and without, in turns, and compare: small talk of the demonstration model, a text
    that SmolLM2 writes again with small changes, prose, and a model whose experts are on disk.

    Answers must be the same. Where drafts do not pay, they must not cost more than two hundredths; the first
    round, in which that is found out, is shown by itself.

    Example: loci bench drafts ./slice --dram-budget 4GiB
    """
    from engine.bench.drafts import EDITS, PROSE, SMALL_TALK, chats, take_turns
    from engine.drafts.choice import DraftChoice, drafters_of
    from engine.embedded import model_path
    from engine.families.loader import load, open_model
    from engine.sampling.params import SamplingParams
    from memory.hardware.detect import detect
    from memory.hardware.this_machine import Result, write_results
    from memory.planner.budget import MemoryBudget
    from memory.planner.placement import Workload
    from quant.errors import ConfigError
    from server.cli.bench.figures import print_figures
    from server.serving.draft_costs import draft_costs

    if only == "slice" and model is None:
        raise ConfigError("--only slice needs a model whose experts are on disk: give MODEL")
    machine = detect(model_path(model) if model is not None else Path.cwd())
    figures: list[Result] = []
    rows: list[tuple[str, ...]] = []

    def measure(
        name: str,
        target: float,
        loaded: Loaded,
        choice: DraftChoice,
        prompts: list[list[int]],
        params: SamplingParams,
        costs: Callable[[int], float] | None = None,
    ) -> None:
        longest = max(map(len, prompts)) + (params.max_tokens or 0)
        who = partial(drafters_of, choice, loaded, 1, longest)
        turns = take_turns(loaded, who, prompts, params, rounds, draft_costs=costs, limit_s=limit)
        figures.append(Result(name, turns.ratio, "ratio", target, turns.ratio >= target))
        rows.append(_row(name, turns))

    def greedy(count: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=count)

    drawn = SamplingParams(temperature=0.8, seed=1, max_tokens=PROSE_TOKENS)
    if only in (None, "demo"):
        demo = load(model_path("demo"), drafts="auto")
        measure("drafts_demo_gain", DEMO_TARGET, demo, "auto", chats(demo, SMALL_TALK), greedy(TALK_TOKENS))
        demo.model.close()
    if only in (None, "lookup", "prose"):
        small = load(model_path("smollm2"))
        if only != "prose":
            edits = chats(small, EDITS)
            measure("drafts_lookup_gain", LOOKUP_TARGET, small, "lookup", edits, greedy(EDIT_TOKENS))
        if only != "lookup":
            measure("drafts_prose_ratio", NO_LOSS, small, "auto", chats(small, PROSE), drawn)
        small.model.close()
    if model is not None and only in (None, "slice"):
        budget = MemoryBudget.of_this_machine(dram_budget, devices, Workload(PROMPT_TOKENS + tokens, 1))
        opened = open_model(model_path(model))
        shape = opened.family.loaded_shape(opened.checkpoint, budget.kv_format)
        costs = draft_costs(shape, budget.machine_for(shape), budget.limited_workload)
        loaded = opened.load(budget, drafts="auto")
        count = loaded.model.info.vocab_size - 10
        prompt = [7 * at % count + 5 for at in range(PROMPT_TOKENS)]
        # Of few tokens at random: there is always something to look up, and it is nearly always wrong.
        few = {97 * at % count + 5: 100.0 for at in range(FEW)}
        at_random = SamplingParams(
            temperature=10.0, top_k=FEW, seed=1, max_tokens=tokens, ignore_eos=True, logit_bias=few
        )
        measure("drafts_slice_ratio", NO_LOSS, loaded, "auto", [prompt], at_random, costs)
        loaded.model.close()
    print_table(
        ["answers", "tokens", "tok/s", "with drafts", "first round", "accepted", "in a row"],
        rows,
        right=(1, 2, 3, 4, 5, 6),
    )
    print()
    print_figures("drafts", figures)
    if json_file is not None:
        write_results(json_file, machine, figures)
        print(f"written to {json_file}")


def _row(name: str, turns: Turns) -> tuple[str, ...]:
    from statistics import median

    plain, drafted = (turns.tokens / median(seconds) for seconds in (turns.plain_s, turns.drafted_s))
    found = [] if turns.stats is None else list(turns.stats.by_drafter.values())
    steps, accepted = sum(one.steps for one in found), sum(one.accepted for one in found)
    in_a_row = f"{accepted / steps:.1f}" if steps else ""
    speeds = f"{plain:.1f}", f"{drafted:.1f}", f"x {turns.first_ratio:.2f}"
    return name, str(turns.tokens), *speeds, f"{turns.accepted:.0%}", in_a_row
