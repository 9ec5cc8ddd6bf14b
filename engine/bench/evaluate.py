"""What a conversion did to a model: perplexity on a text before and after, and how far predictions moved.

The models run one after the other, so that each has the machine's memory for itself; the first one's
logits wait in a temporary file.
"""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.families.base import Batch, Model
from engine.families.loader import load
from quant.errors import ConfigError

MAX_TEXT_BYTES = 1 << 20
MAX_TOKENS = 4096
WINDOW_TOKENS = 1024
CHUNK_TOKENS = 128


@dataclass(frozen=True)
class Evaluation:
    """Two models on the same text; `tokens` of it were predicted.

    perplexity_before, perplexity_after   exp of the mean negative log probability of the next token
    mean_kl            mean over positions of KL(before || after), in nats
    top1_agreement     share of positions at which both think the same token the likeliest
    """

    tokens: int
    perplexity_before: float
    perplexity_after: float
    mean_kl: float
    top1_agreement: float


@torch.inference_mode()
def compare(before: Path, after: Path, text_file: Path) -> Evaluation:
    """Run the checkpoints `before` and `after` on the first tokens of a text file.

    Windows of 1024 tokens, 4096 tokens at most. Raises ConfigError for a text that is too short, not
    UTF-8 or not there, and what loading raises.
    """
    text = read_text(text_file)
    loaded = load(before)
    ids = loaded.tokenizer.encode(text, add_special_tokens=True)[:MAX_TOKENS]
    if len(ids) < 2:
        raise ConfigError(f"{text_file}: {len(ids)} tokens; at least two are needed to predict one")
    vocab = loaded.model.info.vocab_size
    with tempfile.TemporaryFile() as file:
        for logits in _logits(loaded.model, ids):
            file.write(logits.contiguous().numpy().data)
        file.seek(0)
        del loaded
        gc.collect()
        totals = torch.zeros(4, dtype=torch.float64)
        position = 0
        for logits in _logits(load(after).model, ids):
            raw = bytearray(file.read(logits.shape[0] * vocab * 4))
            reference = torch.frombuffer(raw, dtype=torch.float32).view(-1, vocab)
            totals += compare_rows(reference, logits, _targets(ids, position, len(logits)))
            position += len(logits)
    tokens = sum(target >= 0 for target in _targets(ids, 0, len(ids)).tolist())
    nll_before, nll_after, divergence, agreed = (totals / tokens).tolist()
    return Evaluation(tokens, math.exp(nll_before), math.exp(nll_after), divergence, agreed)


def read_text(file: Path) -> str:
    """The text of `file`, of a large one its beginning. Raises ConfigError where there is none."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_TEXT_BYTES + 1)
        # A character that the limit cuts is no fault of the file.
        return raw[:MAX_TEXT_BYTES].decode("utf-8", "strict" if len(raw) <= MAX_TEXT_BYTES else "ignore")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not UTF-8 text") from None


def _windows(ids: list[int]) -> Iterator[list[int]]:
    for start in range(0, len(ids), WINDOW_TOKENS):
        yield ids[start : start + WINDOW_TOKENS]


def _logits(model: Model, ids: list[int]) -> Iterator[torch.Tensor]:
    """Logits of all positions, window by window, in chunks `[tokens, vocab]`."""
    window = min(WINDOW_TOKENS, len(ids))
    cache = model.new_cache(1, window)
    for part in _windows(ids):
        cache.reset(0)
        for start in range(0, len(part), CHUNK_TOKENS):
            piece = part[start : start + CHUNK_TOKENS]
            yield model.forward(Batch.of([(0, start, piece)], all_logits=True), cache)


def _targets(ids: list[int], start: int, count: int) -> torch.Tensor:
    """The token that each position should predict; -1 for the last of a window."""
    targets = [target for part in _windows(ids) for target in (*part[1:], -1)]
    return torch.tensor(targets[start : start + count])


def compare_rows(before: torch.Tensor, after: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sums over positions with a target: both negative log likelihoods, divergence, agreements."""
    has_target = targets >= 0
    before, after = before[has_target].log_softmax(-1), after[has_target].log_softmax(-1)
    chosen = targets[has_target].unsqueeze(1)
    return torch.stack(
        [
            -before.gather(1, chosen).sum(dtype=torch.float64),
            -after.gather(1, chosen).sum(dtype=torch.float64),
            (before.exp() * (before - after)).sum(dtype=torch.float64),
            (before.argmax(-1) == after.argmax(-1)).sum().double(),
        ]
    )
