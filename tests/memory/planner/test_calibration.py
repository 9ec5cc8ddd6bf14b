"""A plan beside what ran: ratios of the same steps, and a file of what was learned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory.planner.calibration import ENOUGH_STEPS, Learned, StepTimes, compare
from memory.planner.placement import Workload
from memory.planner.placing import plan
from memory.planner.prefill import PrefillModel
from memory.planner.published import built_in
from memory.planner.routing import UNIFORM
from memory.telemetry import Snapshot, Telemetry
from quant.errors import ConfigError
from tests.memory.planner.hardware_strategies import MACHINE

V41 = built_in("deepseek-v4.1-flash")
HELD = 1000


def model() -> PrefillModel:
    machine = replace(MACHINE, gpus=())
    return PrefillModel(V41, machine, plan(V41, machine, Workload(8192, 4)), UNIFORM)


def times(steps: int, factor: float) -> StepTimes:
    """Steps of one and of three sequences that took so many times what the plan says."""
    found = StepTimes()
    for sequences in (1, 3):
        seconds = factor * model().decode(sequences, HELD).total_s
        for _ in range(steps // 2):
            found = found.plus([(HELD, 1)] * sequences, sequences, seconds)
    return found


def moved(**counts: Any) -> Snapshot:
    return replace(Telemetry().snapshot(), **counts)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_steps_that_take_longer_than_planned_have_that_ratio(factor: float) -> None:
    (found,) = compare(model(), times(ENOUGH_STEPS, factor), None)
    assert found.what == "decode"
    assert found.ratio == pytest.approx(factor)


def test_nothing_is_said_before_enough_steps() -> None:
    assert compare(model(), times(ENOUGH_STEPS - 2, 1.0), None) == []


def test_steps_of_prompts_and_answers_together_say_nothing_of_either() -> None:
    found = StepTimes().plus([(10, 1), (0, 64)], 1, 1.0)
    assert found == StepTimes()


def test_a_prompts_steps_are_compared_by_token() -> None:
    planned = model().prefill(256, 256)
    seen = times(ENOUGH_STEPS, 1.0)
    for _ in range(4):
        seen = seen.plus([(0, 256)], 0, 2 * planned.total_s)
    found = {each.what: each.ratio for each in compare(model(), seen, None)}
    assert found["prompts"] == pytest.approx(2.0)


def test_hits_and_reads_stand_beside_those_expected() -> None:
    uses, read = 10_000, 80_000_000
    counts = moved(
        hits={"dram": 9_000, "nvme": 1_000}, moved_bytes={"nvme": read}, stalled_s={"nvme demand": 2}
    )
    found = {each.what: each for each in compare(model(), times(ENOUGH_STEPS, 1.0), counts)}
    assert found["hits in dram"].measured == 9_000 / uses
    assert found["hits in dram"].planned + found["hits in nvme"].planned == pytest.approx(1.0)
    assert found["read from disk"].measured == read / 200
    assert found["waits for disk"].measured == 2 / ENOUGH_STEPS


def test_what_was_learned_is_read_as_it_was_written(tmp_path: Path) -> None:
    learned = Learned("model", ((), (1.0, 2.5)), {"dram_read": 40.0}, {"decode": 1.25})
    learned.write(tmp_path / "deep" / "learned.json")
    assert Learned.read(tmp_path / "deep" / "learned.json") == learned


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"model": "m", "uses": [["x"]], "rates": {}, "ratios": {}}',
     '{"model": "m", "uses": [[-1]], "rates": {}, "ratios": {}}',
     '{"model": "m", "uses": [], "rates": {"dram_read": 1e999}, "ratios": {}}'],
)  # fmt: skip
def test_another_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ConfigError, match="not a file of measurements") as refused:
        Learned.read(tmp_path / "f.json")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.json: No such file"):
        Learned.read(tmp_path / "nothing.json")
