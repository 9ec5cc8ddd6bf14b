"""A step taken apart adds up to the step, and nothing stays of the watching."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator

import pytest
import torch

from engine.bench.step import BLOCK, PARTS, Steps, StepTimes, answer_tokens, measure_steps, token_bytes
from engine.bench.watch import KERNELS, LOOP, Watch
from engine.drafts import verify
from engine.engine import Engine
from engine.families.loader import load, open_checkpoint
from engine.families.shapes import shape_of
from engine.sampling.draw import draw_tokens
from engine.sampling.params import SamplingParams
from engine.scheduler import Scheduler
from quant.errors import LociError
from quant.kernels.choice import choose
from quant.kernels.cpu import library
from tests.server.harness import GOLDEN

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

MODEL = GOLDEN / "v41-c"
PAIRS = 2
UNUSED = {"waiting", "policy", "masks", "log probabilities"}  # all weights are in memory, and nobody asked


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    loaded = load(MODEL)
    engine = Engine(loaded.model, loaded.tokenizer, max_sequences=1, max_context=128)
    engine.start()
    yield engine
    engine.stop()
    loaded.model.close()


@pytest.fixture(scope="module")
def times(engine: Engine) -> StepTimes:
    tokens = answer_tokens(PAIRS * 2 * BLOCK)
    return measure_steps(
        engine, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True), 1, lambda: 1e9
    )


def test_every_moment_of_a_watched_step_belongs_to_one_part(times: StepTimes) -> None:
    assert len(times.plain) == len(times.watched) == len(times.read_bytes_per_s) == PAIRS
    for steps in times.watched:
        assert sum(steps.seconds.values()) == pytest.approx(steps.step_s, rel=0.01)
        assert steps.seconds.keys() <= {*PARTS, *KERNELS}
        assert all(steps.seconds[part] > 0 for part in PARTS if part not in UNUSED)
        assert steps.calls["forward"] == 1
    assert not any(steps.seconds for steps in times.plain)


def test_kernels_are_compared_with_steps_that_nobody_watched() -> None:
    watched = Steps(0.012, {"loci_linear": 0.005, "loci_moe": 0.001, "forward": 0.004, "sampling": 0.002})
    times = StepTimes([Steps(0.010)], [watched], [4e9])

    assert times.kernel_share == pytest.approx(0.6)
    assert times.part_s("sampling") == pytest.approx(0.002)
    assert times.part_s("forward") == pytest.approx(0.004)
    assert times.watching_s == pytest.approx(0.002)
    assert [name for name, _, _ in times.kernels()] == ["loci_linear", "loci_moe"]
    assert times.read_ratio(20_000_000) == pytest.approx(0.5)


def test_kernels_are_counted_by_name(times: StepTimes) -> None:
    assert times.kernel_share > 0
    assert sum(calls for _, _, calls in times.kernels()) >= 1


def test_nothing_stays_replaced(times: StepTimes, engine: Engine) -> None:
    assert "forward" not in vars(engine.model)
    assert vars(verify)["draw_tokens"] is draw_tokens
    assert Scheduler.admit.__qualname__ == "Scheduler.admit"
    assert not inspect.isfunction(library.load().loci_linear)


@pytest.mark.parametrize(("steps", "tokens"), [(1, 34), (32, 34), (33, 66)])
def test_answers_are_long_enough_for_whole_pairs(steps: int, tokens: int) -> None:
    assert answer_tokens(steps) == tokens


def test_other_threads_are_not_watched(engine: Engine) -> None:
    watch, kernels = Watch(), choose()

    def call() -> None:
        kernels.rms_norm(torch.ones(1, 8), None, 1e-6)

    with watch.on(engine):
        watch.reset()
        call()
        elsewhere = threading.Thread(target=call)
        elsewhere.start()
        elsewhere.join()
    watch.switch(LOOP)

    assert watch.calls == {"loci_rms_norm": 1}
    assert watch.seconds["loci_rms_norm"] > 0


def test_a_model_that_fails_is_said(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> torch.Tensor:
        raise LociError("the disk is gone")

    monkeypatch.setattr(engine.model, "forward", fail)

    with pytest.raises(LociError, match="the disk is gone"):
        measure_steps(engine, SamplingParams(max_tokens=answer_tokens(1), ignore_eos=True), 1, lambda: 1e9)


def test_a_token_reads_the_experts_it_chooses_and_no_table() -> None:
    shape = shape_of(open_checkpoint(MODEL))
    tables = sum(layer.table.nbytes for layer in shape.layers if layer.table)
    unused = sum((layer.experts - shape.top_k) * layer.expert.nbytes for layer in shape.layers)

    assert token_bytes(shape) == shape.nbytes - shape.embedding.nbytes - tables - unused
