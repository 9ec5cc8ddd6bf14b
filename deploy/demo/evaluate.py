# ruff: noqa: E402 -- the repository root must be importable before its packages are
"""Judge the exported model, with an untrained one of the same shape as the control that must fail.

    python deploy/demo/evaluate.py            # prints the table
    python deploy/demo/evaluate.py --card     # and writes it, with ten answers, into README.md

Every line names a figure, its limit, and what the control reaches. Held-out text is text that
neither the model, nor its vocabulary, nor the 5-gram baseline has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np
import tokenizers
import torch

from corpus import chat
from data import read_documents
from engine.embedded import DEMO_NAME
from engine.families.deepseek_v41.config import V41Config, parse_config
from engine.layers.engram_hash import build_token_map, table_primes
from kneser_ney import KneserNey
from measure import (
    Result,
    Subject,
    evaluate,
    look_ups,
    lru_hit_rate,
    off,
    routing_entropy,
    share_of_hot_rows,
    shuffled,
)
from model import Model
from paths import demo_directory
from prompts import EOS, prompt
from released import from_released, read_files
from rows import RowFinder
from state import Progress, read_trained

PROMPTS = [
    "Hello! How are you?",
    "Who are you?",
    "What is the capital of France?",
    "What is 3 + 4?",
    "Which day comes after Monday?",
    "What does a cow eat?",
    "Tell me a story about a fox.",
    "What is Engram?",
    "The key was in the kitchen. Anna was in the kitchen. Anna took the key. "
    "Anna went to the garden. Where is the key?",
    "I had a bad day.",
]
MAX_ANSWER_TOKENS = 120
SMALLTALK_TOKENS = 24_000  # judged for losses
MIXED_TOKENS = 60_000  # of every part alike, for routing and table traffic
SEEN_DOCUMENTS = 20_000
CARD_BEGIN, CARD_END = "<!-- measured: written by evaluate.py -->", "<!-- end of measured -->"


@dataclass(frozen=True)
class Line:
    """One line of the acceptance table."""

    name: str
    value: float
    limit: str
    passed: bool

    @classmethod
    def at_most(cls, name: str, value: float, limit: float) -> Line:
        return cls(name, value, f"<= {limit:g}", value <= limit)

    @classmethod
    def at_least(cls, name: str, value: float, limit: float) -> Line:
        return cls(name, value, f">= {limit:g}", value >= limit)

    @classmethod
    def between(cls, name: str, value: float, low: float, high: float) -> Line:
        return cls(name, value, f"{low:g} to {high:g}", low <= value <= high)


def first_tokens(documents: list[np.ndarray], limit: int) -> list[np.ndarray]:
    """Whole documents from the first on, until they hold `limit` tokens."""
    ends = np.cumsum([len(document) for document in documents])
    return documents[: int(np.searchsorted(ends, limit)) + 1]


class HeldOut:
    """Held-out text, the 5-gram's verdict on it, and training text for what needs statistics."""

    def __init__(self, directory: Path, vocabulary: int) -> None:
        parts = {
            file.stem: read_documents([file]) for file in sorted(directory.glob("heldout-*.safetensors"))
        }
        self.smalltalk = first_tokens(parts["heldout-smalltalk"], SMALLTALK_TOKENS)
        each = MIXED_TOKENS // len(parts)
        self.mixed = [document for part in parts.values() for document in first_tokens(part, each)]
        training = read_documents(sorted(directory.glob("train-*.safetensors")))
        order = np.random.default_rng(3).permutation(len(training))
        self.seen = [training[i] for i in order[:SEEN_DOCUMENTS]]
        baseline = KneserNey(training, vocabulary)
        self.baseline = [baseline.log_probabilities(document) for document in self.smalltalk]

    def baseline_loss(self, result: Result) -> float:
        """The 5-gram's mean loss on the very tokens that a model was asked for."""
        return -float(np.mean([self.baseline[document][i] for document, i in result.places]))


def table_lines(config: V41Config, find_rows: RowFinder, held_out: HeldOut) -> list[Line]:
    """How skewed Engram traffic is; a property of text and hash, so the control has the same."""
    orders = config.engram_max_ngram_size - 1
    primes = table_primes(
        len(config.engram_layer_ids), orders, config.engram_n_heads, config.engram_vocab_size
    )[0]
    heads = config.engram_n_heads
    seen, asked = (look_ups(find_rows, texts)[0] for texts in (held_out.seen, held_out.mixed))
    bigram = share_of_hot_rows(seen[:, :heads], asked[:, :heads], primes[:heads])
    trigram = share_of_hot_rows(
        seen[:, heads : 2 * heads], asked[:, heads : 2 * heads], primes[heads : 2 * heads]
    )
    return [
        Line.at_least("hottest tenth of Engram rows, share of bigram look-ups", bigram, 0.5),
        Line.at_least("hottest tenth of Engram rows, share of trigram look-ups", trigram, 0.28),
        Line.at_least(
            "hit rate of an LRU of a tenth of the rows",
            lru_hit_rate(asked, sum(primes) // 10),
            0.3,
        ),
    ]


def lines_for(stored: Subject, exact: Subject, held_out: HeldOut) -> list[Line]:
    """The acceptance table of one model: as stored, and with its unrounded weights."""
    result = evaluate(stored, held_out.smalltalk)
    ratio = math.exp(result.loss - held_out.baseline_loss(result))
    without = evaluate(stored, held_out.smalltalk, off).loss - result.loss
    wrong = evaluate(stored, held_out.smalltalk, shuffled).loss - result.loss
    rounding = result.loss - evaluate(exact, held_out.smalltalk).loss
    load = evaluate(stored, held_out.mixed).router_load
    assert load is not None
    entropy, busiest = routing_entropy(load), load.amax(1) / load.mean(1)
    return [
        Line.at_most("perplexity on small talk, over the 5-gram's", ratio, 0.65),
        Line.at_least("loss with Engram off, nats more", without, 0.10),
        Line.at_least("loss with Engram rows shuffled, nats more", wrong, 0.10),
        Line.at_most("loss of the stored model over the exact one, nats", rounding, 0.05),
        Line.between("routing entropy of ln E, most even layer", float(entropy.max()), 0.75, 0.98),
        Line.between("routing entropy of ln E, least even layer", float(entropy.min()), 0.75, 0.98),
        Line.between("busiest expert over the mean, calmest layer", float(busiest.min()), 1.3, 4.0),
        Line.between("busiest expert over the mean, wildest layer", float(busiest.max()), 1.3, 4.0),
        *table_lines(stored.model.config, stored.find_rows, held_out),
    ]


def answers(subject: Subject, tokenizer: tokenizers.Tokenizer) -> list[tuple[str, str]]:
    """The ten fixed prompts and what the model says at temperature 0, unedited."""
    stop = tokenizer.token_to_id(EOS)
    assert stop is not None
    found = []
    for question in PROMPTS:
        ids = tokenizer.encode(prompt(chat(question)), add_special_tokens=False).ids
        found.append((question, tokenizer.decode(subject.generate(ids, stop, MAX_ANSWER_TOKENS))))
    return found


def untrained(config: V41Config, find_rows: RowFinder) -> Subject:
    """The control: the same shape, straight from its random beginning."""
    torch.manual_seed(0)
    tables = [torch.randn(rows, config.engram_head_dim) * 0.01 for rows in config.engram_num_embeddings]
    return Subject(Model(config), tables, find_rows)


def report(lines: list[Line], control: list[Line], said: list[tuple[str, str]], progress: Progress) -> str:
    """Table and answers in Markdown."""
    rows = [
        f"| {line.name} | {line.value:.3f} | {line.limit} | {'yes' if line.passed else '**no**'} "
        f"| {other.value:.3f} ({'yes' if other.passed else 'no'}) |"
        for line, other in zip(lines, control, strict=True)
    ]
    dialogue = "\n".join(f"> **{question}**\n>\n> {' '.join(answer.split())}\n" for question, answer in said)
    return (
        f"After {progress.all_tokens / 1e6:.1f} million tokens of training:\n\n"
        "| measured on held-out text | figure | limit | met | untrained |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nTen fixed prompts, temperature 0, unedited:\n\n{dialogue}"
    )


def write_card(text: str) -> None:
    """Put the measured part between its marks in README.md."""
    card = HERE / "README.md"
    before, _, rest = card.read_text(encoding="utf-8").partition(CARD_BEGIN)
    after = rest.partition(CARD_END)[2]
    temporary = card.with_suffix(".tmp")
    temporary.write_text(f"{before}{CARD_BEGIN}\n{text}\n{CARD_END}{after}", encoding="utf-8")
    temporary.replace(card)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", type=Path, default=demo_directory(), help="where data and the training state lie"
    )
    parser.add_argument("--model", type=Path, default=HERE / DEMO_NAME, help="the exported checkpoint")
    parser.add_argument("--card", action="store_true", help="write the result into README.md")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    config = parse_config(json.loads((args.model / "config.json").read_text()))
    tokenizer = tokenizers.Tokenizer.from_file(str(args.model / "tokenizer.json"))
    find_rows = RowFinder(config, build_token_map(tokenizer, config.vocab_size))
    exact_model, stored_model = Model(config), Model(config)
    exact_tables, progress = read_trained(args.dir / "exported.safetensors", exact_model)
    stored = Subject(stored_model, from_released(stored_model, read_files(args.model)), find_rows)
    exact = Subject(exact_model, exact_tables, find_rows)
    held_out = HeldOut(args.dir, config.vocab_size)

    lines = lines_for(stored, exact, held_out)
    fresh = untrained(config, find_rows)
    control = lines_for(fresh, fresh, held_out)
    text = report(lines, control, answers(stored, tokenizer), progress)
    print(text)
    if args.card:
        write_card(text)
    failed = [line.name for line in lines if not line.passed]
    if all(line.passed for line in control):
        raise SystemExit("the control passes: this table proves nothing")
    if failed:
        raise SystemExit(f"missed: {'; '.join(failed)}")
    print("all lines met; the control fails as it must")


if __name__ == "__main__":
    main()
