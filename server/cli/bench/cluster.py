"""`loci bench cluster`: what the way between two parts of a model costs a step, and what two replicas find in
their caches, on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quant.errors import ConfigError
from server.cli.arguments import JsonFile, Model
from server.cli.bench.figures import print_figures

if TYPE_CHECKING:
    from memory.hardware.this_machine import Result

TARGET_MS = 3.0
WARM_UP = 20  # steps that are not counted
PROMPT = 32
PATIENCE_S = 60.0  # for a step of a compiled graph


def cluster(
    model: Model,
    steps: Annotated[int, typer.Option(min=10, max=10_000, help="Steps of one answer.")] = 200,
    dram_budget: Annotated[str | None, typer.Option(help="Memory for each part's weights.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Decode one sequence through two parts in processes of Ray, and compare with what the parts compute;
    then hold conversations with one server and with two replicas, and compare what was found in caches.

    Ray is started for that, on this machine alone. Needs the extra `cluster`.

    Example: loci bench cluster demo --dram-budget 300MiB
    """
    from server.cli.bench.prefix_share import prefix_share
    from server.cluster.ray_stages import check_installed

    check_installed()
    of_replicas = prefix_share(model, dram_budget)
    of_parts = _measure(model, steps, dram_budget)
    print_figures("a model in two parts", of_parts)
    print_figures("two replicas", of_replicas)
    found = [*of_parts, *of_replicas]
    if json_file is not None:
        from memory.hardware.detect import detect
        from memory.hardware.this_machine import write_results

        write_results(json_file, detect(), found)
        print(f"written to {json_file}")


def _measure(model: Path, steps: int, dram_budget: str | None) -> list[Result]:
    """Medians. Raises ConfigError where the model cannot be cut."""
    from engine.cluster.stages import StagedModel
    from engine.families.base import Batch
    from engine.families.loader import open_model
    from memory.hardware.this_machine import Result
    from memory.planner.stages import spread
    from server.cluster.on_machine import passed
    from server.cluster.ray_stages import LOCAL, RayStage, connect, get
    from server.settings import Settings

    opened = open_model(model)
    cuts = opened.family.cuts(opened.checkpoint)
    if not cuts:
        raise ConfigError(
            f"{opened.checkpoint.path}: the {opened.family.name} family runs on one machine only"
        )
    context = min(WARM_UP + steps + PROMPT, opened.info.max_context)
    settings = Settings(
        model=str(opened.checkpoint.path), max_num_seqs=1, max_model_len=context, dram_budget=dram_budget,
        prefix_cache="0",
    )  # fmt: skip
    shape = opened.family.loaded_shape(opened.checkpoint, opened.kv_format("auto"))
    spans = spread(shape, cuts, (1.0, 1.0))
    (node, *_) = connect(LOCAL).nodes
    stages = [RayStage(passed(settings), span, node, threads=1) for span in spans]
    parts = [get(call) for call in [stage.ask_load({}, 1) for stage in stages]]
    staged = StagedModel(stages, parts, spans)
    try:
        cache = staged.new_cache(1, context)
        staged.forward(Batch.of([(0, 0, [5] * PROMPT)]), cache)
        whole: list[float] = []
        beyond: list[float] = []
        hops: list[float] = []
        computed: list[tuple[float, ...]] = []
        for number in range(context - PROMPT):
            before, begun = list(staged.hops.computed), time.perf_counter()
            staged.forward(Batch.of([(0, PROMPT + number, [7])]), cache)
            seconds = time.perf_counter() - begun
            each = tuple(now - then for now, then in zip(staged.hops.computed, before, strict=True))
            if number >= WARM_UP:
                whole.append(seconds)
                computed.append(each)
                beyond.append(seconds - max(each))
                hops.append(seconds - sum(each))
        steps_done = staged.hops.steps
        width = staged.hops.nbytes[0] // (steps_done - 1 + PROMPT) // 4
        calls = _calls(width, opened.info.vocab_size, steps)
    finally:
        staged.close()
        for stage in stages:
            stage.stop()
    ms = 1e3 * median(beyond)
    return [
        Result("cluster_step_ms", 1e3 * median(whole), "ms"),
        Result("cluster_stage_0_ms", 1e3 * median(each[0] for each in computed), "ms"),
        Result("cluster_stage_1_ms", 1e3 * median(each[1] for each in computed), "ms"),
        Result("cluster_stage_overhead_ms", ms, "ms", TARGET_MS, ms <= TARGET_MS),
        Result("cluster_hops_ms", 1e3 * median(hops), "ms"),
        Result("cluster_hop_bytes", 4 * width, "bytes"),
        *calls,
    ]


def _calls(width: int, vocab: int, count: int) -> list[Result]:
    """A step of two processes that compute nothing, called as parts are, and by a compiled graph."""
    import numpy as np

    from memory.hardware.this_machine import Result
    from server.cluster.ray_stages import ray_module

    class Hands:
        def __init__(self, width: int) -> None:
            self._values = np.zeros((1, width), np.float32)

        def hand(self, received: object) -> object:
            return self._values

    ray: Any = ray_module()
    first, last = (ray.remote(Hands).options(num_cpus=0).remote(size) for size in (width, vocab))

    def by_calls() -> None:
        ray.get(last.hand.remote(first.hand.remote(None)))

    found = [Result("cluster_actor_calls_ms", _median_ms(by_calls, count), "ms")]
    from ray.dag import InputNode

    with InputNode() as given:
        graph = last.hand.bind(first.hand.bind(given)).experimental_compile()
    try:
        in_graph = _median_ms(lambda: ray.get(graph.execute(0), timeout=PATIENCE_S), count)
        found.append(Result("cluster_compiled_graph_ms", in_graph, "ms"))
    finally:
        graph.teardown()
        for actor in (first, last):
            ray.kill(actor)
    return found


def _median_ms(work: Any, count: int) -> float:
    times = []
    for _ in range(WARM_UP + count):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return 1e3 * median(times[WARM_UP:])
