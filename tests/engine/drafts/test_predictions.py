"""What a client expects is drafted, and it is told with each token what came of that."""

from __future__ import annotations

from engine.drafts.lookup import PredictionDrafter
from engine.engine import Engine
from engine.families.loader import load
from engine.sampling.params import SamplingParams
from memory.planner.budget import MemoryBudget
from tests.conftest import golden_path
from tests.engine.chat.answers import Answer


def test_accepted_and_rejected_tokens_are_told_while_an_answer_comes() -> None:
    loaded = load(golden_path("v41-a"), MemoryBudget(dram_bytes=1 << 30))
    drafters = [PredictionDrafter()]
    engine = Engine(
        loaded.model, loaded.tokenizer, max_sequences=1, max_context=64, drafters=drafters, always_draft=3
    )
    engine.start()
    try:
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        first, second = Answer(), Answer()
        engine.submit([5, 6, 7, 8], params, first)
        expected = first.wait().token_ids
        wrong = [*expected[:10], expected[10] ^ 1, *expected[11:]]
        engine.submit([5, 6, 7, 8], params, second, prediction=wrong)
        assert second.wait().token_ids == expected
    finally:
        engine.stop()
        loaded.model.close()

    told = [output.predicted for output in second.outputs]
    assert told == sorted(told)
    assert told[-1][0] > 12 > told[len(told) // 2][0] > 0  # accepted
    assert told[-1][1] > 0  # rejected
    assert {output.predicted for output in first.outputs} == {(0, 0)}
