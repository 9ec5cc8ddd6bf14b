"""Running the training model over held-out text, and what can be counted while it runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model import Model
from packing import alignment, lay_out, pack, targets
from rows import RowFinder

CONTEXT = 512


@dataclass
class Subject:
    """A model to be judged: its weights, its Engram tables, and what addresses them."""

    model: Model
    tables: list[Tensor]
    find_rows: RowFinder

    def hidden(self, ids: Tensor, documents: Tensor, engram: EngramMode) -> tuple[Tensor, list[Tensor]]:
        """Final states `[N, hidden]` and each layer's router choice `[N, top_k]`."""
        rows = self.find_rows(ids, documents)
        values = [engram(table, r).flatten(1) for table, r in zip(self.tables, rows, strict=True)]
        out = self.model(ids, documents, values)
        return out.states, out.router_ids

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], stop: int, limit: int) -> list[int]:
        """What follows `prompt` at temperature 0, up to `stop` (left out) or `limit` tokens."""
        ids, window = list(prompt), self.model.config.sliding_window
        while len(ids) < len(prompt) + limit:
            gap = -len(ids) % window
            documents = torch.tensor([[0] * len(ids) + [-1] * gap])
            states, _ = self.hidden(torch.tensor([ids + [0] * gap]), documents, plain)
            token = int(self.model.head(states[len(ids) - 1]).argmax())
            if token == stop:
                break
            ids.append(token)
        return ids[len(prompt) :]


EngramMode = Callable[[Tensor, Tensor], Tensor]


def plain(table: Tensor, rows: Tensor) -> Tensor:
    """Engram as trained: `[N, columns, dim]`."""
    return table[rows]


def off(table: Tensor, rows: Tensor) -> Tensor:
    """Engram switched off: every row reads as zeros."""
    return table.new_zeros(*rows.shape, table.shape[1])


def shuffled(table: Tensor, rows: Tensor) -> Tensor:
    """Engram with its rows in another order."""
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(7))
    return table[order[rows]]


@dataclass
class Result:
    """Losses of the tokens that have a predecessor in their row, and where those tokens stand."""

    loss: float
    places: list[tuple[int, int]] = field(default_factory=list)  # (document, index of the predicted token)
    router_load: Tensor | None = None  # [layers, experts]


@torch.inference_mode()
def evaluate(subject: Subject, documents: list[np.ndarray], engram: EngramMode = plain) -> Result:
    """Mean loss in nats of every token of `documents` but each row piece's first."""
    model = subject.model.eval()
    config = model.config
    step = alignment(config)
    rows = lay_out([len(d) for d in documents], CONTEXT, step)
    load = torch.zeros(config.num_hidden_layers, config.n_routed_experts)
    total, count = 0.0, 0
    places: list[tuple[int, int]] = []
    for row in rows:
        ids, numbers = pack([[documents[d][start:stop] for d, start, stop in row]], CONTEXT, step)
        following, known = targets(ids, numbers)
        states, router_ids = subject.hidden(ids, numbers, engram)
        logits = model.head(states[known[0]])
        total += float(torch.nn.functional.cross_entropy(logits, following[known], reduction="sum"))
        count += len(logits)
        places += [(d, i) for d, start, stop in row for i in range(start + 1, stop)]
        real = numbers.flatten() >= 0
        for layer, chosen in enumerate(router_ids):
            load[layer] += chosen[real].flatten().bincount(minlength=load.shape[1])
    return Result(total / count, places, load)


def routing_entropy(load: Tensor) -> Tensor:
    """Entropy of each layer's expert load as a share of ln(experts), `[layers]`."""
    p = load / load.sum(1, keepdim=True)
    return -(torch.xlogy(p, p)).sum(1) / np.log(load.shape[1])


def look_ups(find_rows: RowFinder, documents: list[np.ndarray]) -> list[np.ndarray]:
    """Every row that the documents look up, per Engram layer `[tokens, columns]`."""
    found = []
    for document in documents:
        ids = torch.from_numpy(document).unsqueeze(0)
        found.append([r.numpy() for r in find_rows(ids, torch.zeros_like(ids))])
    return [np.concatenate(layer) for layer in zip(*found, strict=True)]


def share_of_hot_rows(
    seen: np.ndarray, asked: np.ndarray, tables: Sequence[int], tenth: float = 0.1
) -> float:
    """Share of `asked` look-ups that hit the tenth of each table's rows used most in `seen`.

    seen, asked `[tokens, columns]`, one table per column; tables: their sizes.
    """
    served = 0
    for column, size in enumerate(tables):
        first = int(min(seen[:, column].min(), asked[:, column].min()))
        uses = np.bincount(seen[:, column] - first, minlength=size)
        hot = np.argsort(-uses, kind="stable")[: int(tenth * size)] + first
        served += int(np.isin(asked[:, column], hot).sum())
    return served / asked.size


def lru_hit_rate(asked: np.ndarray, rows: int) -> float:
    """Hits of a least-recently-used cache of `rows` rows over the look-ups `[tokens, columns]` in order."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for row in asked.flatten().tolist():
        if row in cache:
            hits += 1
            cache.move_to_end(row)
        else:
            cache[row] = None
            if len(cache) > rows:
                cache.popitem(last=False)
    return hits / asked.size
