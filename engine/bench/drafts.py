"""Answers with drafts and without, in turns: how much sooner they come, and that they are the same."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.drafts.base import Drafter
from engine.drafts.stats import DraftStats
from engine.engine import MOST_DRAFTED, Engine
from engine.families.loader import Loaded
from engine.output import Output
from engine.sampling.params import SamplingParams
from quant.errors import LociError

# Small talk, as people try a model out.
SMALL_TALK = (
    "Hello! How are you today?",
    "What is the capital of France?",
    "Tell me a story about a fox.",
    "Can you tell me what a baker does?",
    "Tell me a story about a rabbit who finds a key.",
)
# Prose that repeats nothing of its prompt.
PROSE = (
    "Write a long story about a sailor who finds an island.",
    "Describe a walk through a city at night.",
    "Explain why people keep diaries.",
)
_CODE = '''def area(width, height):
    """Return the area of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("width and height must not be negative")
    return width * height


def perimeter(width, height):
    """Return the perimeter of a rectangle."""
    if width < 0 or height < 0:
        raise ValueError("width and height must not be negative")
    return 2 * (width + height)
'''
_TEXT = (
    "The old mill stands at the edge of the village, where the river bends to the south. Every mornig the "
    "miller opens the heavy wooden door and looks at the water. When the river is high, the wheel turns fast "
    "and the flour is fine. When the river is low, he waits and mends his sacks. In the evening his daughter "
    "brings him bred and cheese, and they sit on the bench beside the wall until the sun is gone."
)
# A given text is written again with small changes.
EDITS = (
    f"Here is a Python file:\n\n```python\n{_CODE}```\n\n"
    "Write the whole file again, with the word rectangle replaced by box.",
    f"Correct the spelling of the following text and return the whole text:\n\n{_TEXT}",
)


@dataclass
class Turns:
    """Seconds from the first to the last token of all answers, of each turn without drafts and with.

    tokens  of a turn's answers
    first_ratio  of the first turn, which is not among these: the engine with drafts knows nothing yet
    stats   of the engine with drafts
    """

    plain_s: list[float] = field(default_factory=list)
    drafted_s: list[float] = field(default_factory=list)
    tokens: int = 0
    first_ratio: float = 1.0
    stats: DraftStats | None = None

    @property
    def ratio(self) -> float:
        """How much faster answers are with drafts, as the median of the turns."""
        pairs = zip(self.plain_s, self.drafted_s, strict=True)
        return statistics.median(plain / drafted for plain, drafted in pairs)

    @property
    def accepted(self) -> float:
        """Of the drafted tokens, the share that was right."""
        found = [] if self.stats is None else list(self.stats.by_drafter.values())
        return sum(one.accepted for one in found) / max(1, sum(one.drafted for one in found))


def chats(loaded: Loaded, questions: Sequence[str]) -> list[list[int]]:
    """The prompts of conversations that begin so. Raises LociError for a model that is not for chats."""
    if loaded.chat is None:
        raise LociError("this model has no chat template")
    said = [[{"role": "user", "content": question}] for question in questions]
    return [loaded.chat.render({"messages": messages}).token_ids for messages in said]


def take_turns(
    loaded: Loaded,
    drafters: Callable[[], list[Drafter]],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    rounds: int,
    *,
    draft_tokens: int = MOST_DRAFTED,
    draft_costs: Callable[[int], float] | None = None,
    limit_s: float = math.inf,
) -> Turns:
    """Answer the prompts one after the other, without drafts and with, `rounds` times each after a first that
    is counted by itself: a server answers for days, and learns within its first answers whether drafts pay.
    After `limit_s` seconds no further round begins, but one is always counted. Raises LociError where an
    answer is another one with drafts."""
    context = max(map(len, prompts)) + (params.max_tokens or 0) + 1
    engines = [
        Engine(loaded.model, loaded.tokenizer, max_sequences=1, max_context=context, drafters=who,
               draft_tokens=draft_tokens, draft_costs=draft_costs)
        for who in ([], drafters())
    ]  # fmt: skip
    found = Turns()
    try:
        for engine in engines:
            engine.start()
        began = time.perf_counter()
        for number in range(rounds + 1):
            if found.plain_s and time.perf_counter() - began > limit_s:
                break
            took = [0.0, 0.0]
            tokens: list[list[list[int]]] = [[], []]
            for which in (0, 1) if number % 2 else (1, 0):
                for prompt in prompts:
                    seconds, ids = _answer(engines[which], prompt, params)
                    took[which] += seconds
                    tokens[which].append(ids)
            if tokens[0] != tokens[1]:
                raise LociError("an answer is another one with drafts; please report this")
            if number:
                found.plain_s.append(took[0])
                found.drafted_s.append(took[1])
            else:
                found.first_ratio = took[0] / took[1]
            found.tokens = sum(map(len, tokens[0]))
        found.stats = engines[1].stats().drafts
    finally:
        for engine in engines:
            engine.stop()
    return found


def _answer(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> tuple[float, list[int]]:
    """Seconds from an answer's first token to its last, and its tokens."""
    ids: list[int] = []
    times: list[float] = []
    ended = threading.Event()

    def on_output(output: Output) -> None:
        ids.extend(output.token_ids)
        times.append(time.perf_counter())
        if output.finish_reason is not None:
            ended.set()

    engine.submit(prompt, params, on_output)
    ended.wait()
    return times[-1] - times[0], ids
