"""A model as the planner needs it: bytes and arithmetic of its parts, layer by layer.

A `ModelShape` comes from a checkpoint's headers (`engine/families/shapes.py`) or, for well-known models
that need not be on this machine, from their published dimensions (`memory/planner/published.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from memory.pages.runs import run_bytes


@dataclass(frozen=True)
class Weights:
    """Bytes, of a checkpoint as its weights lie in memory, and the numbers in them (each costs a multiply and
    an add)."""

    nbytes: int = 0
    parameters: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.nbytes + other.nbytes, self.parameters + other.parameters)

    def times(self, count: int) -> Weights:
        """`count` of these."""
        return Weights(self.nbytes * count, self.parameters * count)


@dataclass(frozen=True)
class KeptRows:
    """Rows of a kind that a layer keeps of a sequence, one for each `ratio` tokens: in `runs` runs (one for
    each head, say) of `nbytes` a row, each of which takes whole pages."""

    ratio: int
    nbytes: int
    runs: int = 1

    def pages_bytes(self, tokens: int, page_bytes: int) -> int:
        """Bytes of the pages of a sequence of so many tokens."""
        return self.runs * run_bytes(tokens, self.ratio, self.nbytes, page_bytes)


@dataclass(frozen=True)
class KvShape:
    """What one layer keeps of a sequence, and what a token reads of it.

    fixed_bytes      a sequence's state whatever its length: sliding window, unfinished groups
    rows             that grow with a sequence; none where this layer stores none
    seen_ratio       tokens per entry that this layer looks at (another layer's, where it stores none)
    scan_bytes       bytes of each entry that are read to choose among them
    scan_flops       arithmetic per entry for that
    selected         most entries that attention then reads; None: all of them
    selected_bytes   bytes of a selected entry
    selected_flops   arithmetic per selected entry
    """

    fixed_bytes: int = 0
    fixed_flops: int = 0
    rows: tuple[KeptRows, ...] = ()
    seen_ratio: int = 0
    scan_bytes: int = 0
    scan_flops: int = 0
    selected: int | None = None
    selected_bytes: int = 0
    selected_flops: int = 0

    def nbytes(self, context: int) -> int:
        """Bytes kept for one sequence that may grow to `context` tokens."""
        return self.fixed_bytes + sum(context // r.ratio * r.runs * r.nbytes for r in self.rows)

    def pool_bytes(self, tokens: int, sequences: int, context: int, page_bytes: int) -> int:
        """Bytes of whole pages for so many tokens in all, of sequences of up to `context`. Where all of these
        may be full at once, each has pages of its own."""
        is_whole = tokens >= sequences * context
        count, held = (sequences, context) if is_whole else (1, tokens)
        rows = (r for r in self.rows if context >= r.ratio)
        return count * sum(r.pages_bytes(held, page_bytes) for r in rows)

    def read_bytes(self, held: int) -> int:
        """Bytes that the next token of a sequence of `held` tokens reads."""
        entries, chosen = self._entries(held)
        return self.fixed_bytes + entries * self.scan_bytes + chosen * self.selected_bytes

    def flops(self, held: int) -> int:
        """Arithmetic of attention, beyond the weights, for the next token after `held`."""
        entries, chosen = self._entries(held)
        return self.fixed_flops + entries * self.scan_flops + chosen * self.selected_flops

    def _entries(self, held: int) -> tuple[int, int]:
        entries = held // self.seen_ratio if self.seen_ratio else 0
        return entries, entries if self.selected is None else min(entries, self.selected)


@dataclass(frozen=True)
class Table:
    """An Engram table: rows addressed by hashes of recent tokens.

    scale_bytes  of a row's bytes, those of its scales, which lie apart
    """

    rows: int
    row_bytes: int
    rows_per_token: int
    scale_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole table."""
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class LayerShape:
    """One layer.

    dense    attention, norms, mixes, router, and a feed-forward part that is not made of experts
    shared   experts that every token uses
    experts  number of routed experts (0: none), of `expert` weights each
    operations  of a recorded decode step on the CPU
    launches    of one on a GPU; None where the family's step is not recorded there
    decoded     bytes that packed weights take in memory beyond those of the file: they are held as plain
                numbers
    tail        at most so many tokens at a prompt's end are computed; None where all are
    """

    dense: Weights
    kv: KvShape
    shared: Weights = Weights()
    experts: int = 0
    expert: Weights = Weights()
    table: Table | None = None
    operations: int = 40
    launches: int | None = None
    decoded: int = 0
    tail: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """A model for planning.

    top_k             routed experts per token and layer
    activation_bytes  what a token needs while a layer works on it (streams, queries, projections)
    held_bytes        what each further token of a long chunk needs, whose attention is computed in blocks:
                      streams, inputs and outputs of experts; 0 where all of a chunk is computed at once
    slot_bytes        what a routed expert takes in memory, the same for all; 0: as in the file
    host_bytes        look-up tables that are in DRAM wherever their layers are
    history_bytes     of each sequence, in DRAM wherever its KV is: what n-grams look back on
    copied_bytes      of weights of routers and experts that each GPU with experts has of all layers: biases
    stored_bytes      of the checkpoint's files; 0: the same as in memory
    embedding_stays   whether rows of the embedding can be read from its file, so that it may stay there
    tied              of the head, the matrix that is the embedding too; nothing where these are two
    streams           residual streams of a token, of `hidden` values each; several are sent with their mix
    """

    name: str
    vocab_size: int
    hidden: int
    max_context: int
    top_k: int
    embedding: Weights
    head: Weights
    layers: tuple[LayerShape, ...]
    activation_bytes: int
    held_bytes: int = 0
    slot_bytes: int = 0
    host_bytes: int = 0
    copied_bytes: int = 0
    history_bytes: int = 0
    stored_bytes: int = 0
    streams: int = 1
    embedding_stays: bool = True
    tied: Weights = Weights()

    @property
    def nbytes(self) -> int:
        """Bytes of everything that text generation uses, without KV."""
        total = self.embedding.nbytes + self.head.nbytes + self.host_bytes
        for layer in self.layers:
            total += layer.dense.nbytes + layer.shared.nbytes + layer.experts * layer.expert.nbytes
            total += layer.table.nbytes if layer.table else 0
        return total

    @property
    def state_bytes(self) -> int:
        """Bytes of what passes from layer to layer for a token."""
        return 4 * (self.hidden if self.streams == 1 else self.streams * (self.hidden + 1))

    @property
    def parameters(self) -> int:
        """Parameters of everything that text generation uses, Engram tables left out."""
        total = self.embedding.parameters + self.head.parameters
        for layer in self.layers:
            total += layer.dense.parameters + layer.shared.parameters
            total += layer.experts * layer.expert.parameters
        return total

    @property
    def expert_nbytes(self) -> int:
        """Bytes of the largest routed expert; 0 where there are none."""
        return max((layer.expert.nbytes for layer in self.layers if layer.experts), default=0)

    @property
    def slot_nbytes(self) -> int:
        """Bytes in memory that hold any routed expert; 0 where there are none."""
        return self.slot_bytes or self.expert_nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the checkpoint's files."""
        return self.stored_bytes or self.nbytes

    def kv_bytes(self, context: int, sequences: int) -> int:
        """Bytes of the cache of `sequences` sequences of up to `context` tokens."""
        return sequences * (self.history_bytes + sum(layer.kv.nbytes(context) for layer in self.layers))

    def pool_bytes(self, tokens: int, sequences: int, context: int, page_bytes: int) -> int:
        """Bytes of all layers' pages: see `KvShape.pool_bytes`."""
        return sum(layer.kv.pool_bytes(tokens, sequences, context, page_bytes) for layer in self.layers)
