"""The order in which training sees the corpus: shuffled documents, packed into rows, pass after pass."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from data import read_documents
from packing import lay_out, pack


class Corpus:
    """All training documents, and a fingerprint of them."""

    def __init__(self, directory: Path) -> None:
        files = sorted(directory.glob("train-*.safetensors"))
        if not files:
            raise SystemExit(f"no corpus in {directory}: run `python deploy/demo/data.py` first")
        self.documents = read_documents(files)
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.tobytes())
        self.fingerprint = digest.hexdigest()[:16]


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
        order = rng.permutation(len(corpus.documents))
        pieces = lay_out([len(corpus.documents[i]) for i in order], context, step)
        rows = [[(int(order[d]), start, stop) for d, start, stop in row] for row in pieces]
        return cls(corpus, [rows[i] for i in rng.permutation(len(rows))], context, step)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Token ids and document numbers of `count` rows from `first`, `[count, context]`."""
        rows = self.rows[first : first + count]
        pieces = [[self.corpus.documents[d][start:stop] for d, start, stop in row] for row in rows]
        return pack(pieces, self.context, self.step)
