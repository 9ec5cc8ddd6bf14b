"""The order in which training sees the corpus: shuffled documents, packed into rows, pass after pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import read_documents
from packing import lay_out, pack
from tables import FOLDS, fingerprint

MOVED_ROWS = 1000


class Corpus:
    """All training documents, how often each occurs in a pass, and a fingerprint of all that.

    mix: part -> times, 1 where nothing is said; advice: part -> share of soft targets, else none.
    """

    def __init__(self, directory: Path, mix: Mapping[str, float], advice: Mapping[str, float]) -> None:
        files = sorted(directory.glob("train-*.safetensors"))
        if not files:
            raise SystemExit(f"no corpus in {directory}: run `python deploy/demo/data.py` first")
        self.documents: list[np.ndarray] = []
        times: list[float] = []
        advised: list[float] = []
        for file in files:
            part = read_documents([file])
            self.documents += part
            name = file.stem.removeprefix("train-")
            times += [mix.get(name, 1.0)] * len(part)
            advised += [advice.get(name, 0.0)] * len(part)
        self.times, self.advised = np.array(times), np.array(advised)
        self.fingerprint = fingerprint([*self.documents, self.times])


@dataclass(frozen=True)
class Rows:
    """Packed rows, all `[rows, context]`: token ids, documents' numbers within the row, and of each token's
    document the fold and the share of soft targets."""

    ids: Tensor
    documents: Tensor
    folds: Tensor
    advised: Tensor

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.ids[part], self.documents[part], self.folds[part], self.advised[part])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Pass:
    """One way through the corpus at one row length; what it is follows from its seed alone."""

    corpus: Corpus
    rows: list[list[tuple[int, int, int]]]
    context: int
    step: int

    @classmethod
    def of(cls, corpus: Corpus, context: int, step: int, seed: tuple[int, int]) -> Pass:
        rng = np.random.default_rng(seed)
        copies = (corpus.times + rng.random(len(corpus.times))).astype(np.int64)
        # A document's copies are spread over the pass: no text comes again while other text waits.
        order = np.repeat(np.arange(len(copies)), copies)
        number = np.arange(len(order)) - np.repeat(copies.cumsum() - copies, copies)  # of the copy
        order = order[np.argsort((number + rng.random(len(order))) / copies[order], kind="stable")]
        pieces = lay_out([len(corpus.documents[i]) for i in order], context, step)
        rows = [[(int(order[d]), start, stop) for d, start, stop in row] for row in pieces]
        # Rows move a little, so that a long document's pieces do not make up one batch.
        moved = np.argsort(np.arange(len(rows)) + rng.random(len(rows)) * MOVED_ROWS, kind="stable")
        return cls(corpus, [rows[i] for i in moved], context, step)

    def batch(self, first: int, count: int) -> Rows:
        """`count` rows from `first`."""
        rows = self.rows[first : first + count]
        pieces = [[self.corpus.documents[d][start:stop] for d, start, stop in row] for row in rows]
        ids, numbers = pack(pieces, self.context, self.step)
        folds, advised = torch.zeros_like(numbers), torch.zeros(numbers.shape)
        for i, row in enumerate(rows):
            documents = torch.tensor([d for d, _, _ in row])[numbers[i].clamp(min=0)]
            folds[i] = documents % FOLDS
            advised[i] = torch.from_numpy(self.corpus.advised)[documents]
        return Rows(ids, numbers, folds, advised)
