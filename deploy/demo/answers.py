# ruff: noqa: E402 -- the repository root must be importable before its packages are
"""Let the demonstration model answer the corpus' questions itself: what its draft stages learn from.

    python deploy/demo/answers.py

A draft is right where it is what the model says, not what a person said. So whatever the other side says is
taken from the corpus, in conversations of a few turns, and each answer is the model's own at temperature 0.
Writes `answers-train.safetensors` and `answers-heldout.safetensors` into the data directory: token ids, the
conversations' lengths, and which tokens were chosen by the model.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch
from safetensors.torch import load_file, save_file

from data import read_documents
from engine.embedded import DEMO_NAME
from engine.engine import Engine
from engine.families.loader import load
from engine.output import Output
from engine.sampling.params import SamplingParams
from paths import demo_directory
from prompts import ASSISTANT, BOS, EOS, THINK_END, USER

LONGEST_ANSWER = 96
MOST_TURNS = 5
AT_ONCE = 16
SAVE_EVERY_S = 300
# Documents of a part that are answered, at most; drafts are judged by small talk alone.
PARTS = {
    "train": {"smalltalk": 10**9, "composed": 9_000, "stories": 1_500},
    "heldout": {"smalltalk": 10**9},
}


@dataclass
class Conversation:
    """Turns of the other side that are still to come, as token ids, and all tokens so far."""

    turns: list[list[int]]
    token_ids: list[int]
    chosen: list[bool] = field(default_factory=list)

    def say(self, ids: list[int], *, chosen: bool) -> None:
        """Append tokens."""
        self.token_ids += ids
        self.chosen += [chosen] * len(ids)


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens around turns."""

    bos: int
    eos: int
    user: int
    assistant: int
    think_end: int

    @classmethod
    def of(cls, ids: dict[str, int]) -> Marks:
        return cls(*(ids[token] for token in (BOS, EOS, USER, ASSISTANT, THINK_END)))

    def turns(self, document: list[int]) -> list[list[int]]:
        """What the other side says in a document, each turn with its mark."""
        found, at = [], 0
        while self.user in document[at:]:
            at = document.index(self.user, at)
            end = next(
                (i for i in range(at + 1, len(document)) if document[i] in (self.assistant, self.eos)),
                len(document),
            )
            if end < len(document) and document[end] == self.assistant:
                found.append(document[at:end])
            at = end
        return found


def conversations(directory: Path, which: str, marks: Marks, rng: random.Random) -> Iterator[Conversation]:
    """Conversations of a few turns from the corpus' documents, in a shuffled order."""
    found = []
    for part, most in PARTS[which].items():
        documents = read_documents([directory / f"{which}-{part}.safetensors"])
        rng.shuffle(documents)
        for document in documents[:most]:
            turns = marks.turns(document.tolist())
            while turns:
                count = rng.randint(1, MOST_TURNS)
                found.append(turns[:count])
                turns = turns[count:]
    rng.shuffle(found)
    for turns in found:
        conversation = Conversation(turns, [])
        conversation.say([marks.bos], chosen=False)
        yield conversation


class Answering:
    """Conversations that the model takes part in, some at once, until there are enough tokens or no more
    time."""

    def __init__(self, engine: Engine, marks: Marks, waiting: Iterator[Conversation], until_s: float) -> None:
        self._engine, self._marks, self._waiting = engine, marks, waiting
        self._until_s = until_s
        self._lock, self._free = threading.Lock(), threading.Semaphore(0)
        self.done: list[Conversation] = []
        self._alive = 0

    def run(self) -> list[Conversation]:
        """All that were begun, as far as they came."""
        for _ in range(AT_ONCE):
            self._begin()
        while self._alive:
            self._free.acquire()
        return self.done

    def _begin(self) -> None:
        with self._lock:
            conversation = next(self._waiting, None) if time.monotonic() < self._until_s else None
            if conversation is None:
                return
            self._alive += 1
        self._ask(conversation)

    def _ask(self, conversation: Conversation) -> None:
        marks = self._marks
        question = [*conversation.turns.pop(0), marks.assistant, marks.think_end]
        conversation.say(question, chosen=False)
        params = SamplingParams(temperature=0.0, max_tokens=LONGEST_ANSWER)

        def on_output(output: Output) -> None:
            conversation.say(list(output.token_ids), chosen=True)
            if output.finish_reason is None:
                return
            goes_on = conversation.turns and len(conversation.token_ids) < 384
            if goes_on and conversation.token_ids[-1] == marks.eos and time.monotonic() < self._until_s:
                threading.Thread(target=self._ask, args=(conversation,), daemon=True).start()
                return
            self.done.append(conversation)
            threading.Thread(target=self._next, daemon=True).start()

        self._engine.submit(conversation.token_ids, params, on_output)

    def _next(self) -> None:
        self._begin()
        with self._lock:
            self._alive -= 1
        self._free.release()


def save(file: Path, done: list[Conversation]) -> None:
    """Write conversations under a temporary name until the file is whole."""
    temporary = file.with_suffix(".tmp")
    save_file(
        {
            "tokens": torch.tensor([i for c in done for i in c.token_ids], dtype=torch.int32),
            "lengths": torch.tensor([len(c.token_ids) for c in done], dtype=torch.int32),
            "chosen": torch.tensor([i for c in done for i in c.chosen], dtype=torch.bool),
        },
        temporary,
    )
    temporary.replace(file)


def read(file: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each conversation's token ids, int64, and which of them the model chose."""
    if not file.exists():
        raise SystemExit(f"{file} is missing: run `python deploy/demo/answers.py` first")
    part = load_file(file)
    lengths = part["lengths"].tolist()
    pieces = (torch.split(part[name], lengths) for name in ("tokens", "chosen"))
    return [(ids.long(), chosen) for ids, chosen in zip(*pieces, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="where the corpus lies")
    parser.add_argument("--model", type=Path, default=HERE / DEMO_NAME)
    parser.add_argument("--minutes", type=float, default=30, help="for answers to learn from")
    args = parser.parse_args()
    loaded = load(args.model)
    ids = loaded.tokenizer.added_tokens
    marks = Marks.of(dict(ids))
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        max_sequences=AT_ONCE,
        max_context=1024,
        prefix_cache_bytes=200_000_000,
    )
    engine.start()
    for which, minutes in (("heldout", args.minutes / 15), ("train", args.minutes)):
        waiting, end = (
            conversations(args.dir, which, marks, random.Random(which)),
            time.monotonic() + 60 * minutes,
        )
        done: list[Conversation] = []
        while time.monotonic() < end:  # saved now and then, so that learning can begin
            done += Answering(engine, marks, waiting, min(end, time.monotonic() + SAVE_EVERY_S)).run()
            save(args.dir / f"answers-{which}.safetensors", done)
            tokens, chosen = sum(len(c.token_ids) for c in done), sum(sum(c.chosen) for c in done)
            print(
                f"{which}: {len(done):,} conversations, {tokens:,} tokens, {chosen:,} of the model",
                flush=True,
            )
    engine.stop()
    loaded.model.close()


if __name__ == "__main__":
    main()
