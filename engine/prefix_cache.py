"""Prefixes that were computed before: a radix tree of token ids, with the cache state behind them.

What a cache appends (keys and values, compressed entries) hangs on the tree's edges, so prompts that
begin alike share it. What later tokens overwrite (window rings, unfinished groups) is kept at chosen
positions only: ends of prompts and of answers, every so often within a long prompt, and where two
prompts were seen to part. Token ids themselves are compared, no hashes of them, and everything is
copied in and out, so a sequence never holds on to the tree.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from engine.model import KvCache

Ids = NDArray[np.int32]
Saved = tuple[torch.Tensor, ...]

# A position where prompts part is worth a stop of the prefill if it spares at least so many tokens.
LEAST_GAIN = 32


@dataclass(frozen=True)
class Prefix:
    """What was put into a slot.

    length  tokens that the slot now holds, 0 where nothing fitted
    logits  `[vocab]` behind the last of them, where that is the whole prompt
    parting where the prompt leaves all others, if the state there is worth saving; None if not
    """

    length: int
    logits: torch.Tensor | None = None
    parting: int | None = None


@dataclass(frozen=True)
class PrefixStats:
    """A snapshot for metrics; all but nbytes and budget_bytes only grow."""

    queries: int
    hits: int
    cached_tokens: int
    evictions: int
    nbytes: int
    budget_bytes: int


@dataclass(eq=False)
class _Node:
    """An edge of the tree and its end.

    rows has what the cache appended for `tokens`, which begin at position `start`; recent what it
    held at the end besides, None where only rows are known.
    """

    start: int
    tokens: Ids
    rows: Saved
    parent: _Node | None
    recent: Saved | None = None
    logits: torch.Tensor | None = None
    children: dict[int, _Node] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    @property
    def end_bytes(self) -> int:
        logits = () if self.logits is None else (self.logits,)
        return sum(t.nbytes for t in (*(self.recent or ()), *logits))

    @property
    def edge_bytes(self) -> int:
        return self.tokens.nbytes + sum(t.nbytes for t in self.rows)


class PrefixCache:
    """Saves and restores the state of a cache's slots, within `budget_bytes`; the least recently used
    goes first. Used by one thread; `stats` may be read by others.

    Prefixes saved under one `salt` are found under the same only.
    """

    def __init__(self, cache: KvCache, budget_bytes: int) -> None:
        self._cache = cache
        self._budget_bytes = budget_bytes
        self._resumes_anywhere = not cache.recent(0, 0)
        self._roots: dict[str, _Node] = {}
        self._ends: OrderedDict[_Node, None] = OrderedDict()  # nodes one can go on from, oldest use first
        self._nbytes = 0
        self._queries = self._hits = self._cached_tokens = self._evictions = 0

    @property
    def stats(self) -> PrefixStats:
        """Counters and gauges of this moment."""
        return PrefixStats(
            self._queries, self._hits, self._cached_tokens, self._evictions, self._nbytes, self._budget_bytes
        )

    def restore(self, slot: int, prompt: list[int], salt: str = "") -> Prefix:
        """Put the longest known prefix of `prompt` into the empty `slot`.

        At least one token is left to compute, unless the logits behind the whole prompt are known.
        """
        self._queries += 1
        ids = np.asarray(prompt, dtype=np.int32)
        path = self._walk(ids, salt)
        last = len(ids) - 1
        shared = path[-1][0].start + path[-1][1] if path else 0
        ends = [n for n, count in path if n.recent is not None and count == len(n.tokens)]
        end = next((n for n in reversed(ends) if n.stop <= last or n.logits is not None), None)
        length = end.stop if end is not None else 0
        if self._resumes_anywhere and length <= last:
            length = min(shared, last)
            end = next((node for node, _ in path if node.stop >= length), None)
        parting = min(shared, last)
        if length == 0 or end is None:
            return Prefix(0, None, self._worth_saving(parting, 0))
        self._hits += 1
        self._cached_tokens += length
        self._load(slot, [node for node, _ in path if node.start < length], length)
        if self._resumes_anywhere and end.recent is None:
            end.recent = ()
        self._ends[end] = None
        self._ends.move_to_end(end)
        return Prefix(length, end.logits if length > last else None, self._worth_saving(parting, length))

    def save(self, slot: int, tokens: list[int], salt: str = "", logits: torch.Tensor | None = None) -> None:
        """Keep the state of `slot`, which holds just `tokens`; `logits` `[vocab]` are those behind them.

        Does nothing where the budget could not hold it.
        """
        ids = np.asarray(tokens, dtype=np.int32)
        recent = self._cache.recent(slot, len(ids))
        at_end = sum(t.nbytes for t in recent) + (0 if logits is None else logits.nbytes)
        if self._edge_bytes(slot, 0, len(ids)) + at_end > self._budget_bytes:
            return
        while True:
            path = self._walk(ids, salt)
            node, count = path[-1] if path else (None, 0)
            shared = node.start + count if node is not None else 0
            if node is not None and shared == len(ids) and self._holds(node, count, logits):
                return
            needed = self._edge_bytes(slot, shared, len(ids)) + at_end
            if self._nbytes + needed <= self._budget_bytes:
                break
            self._evict()
        if node is None:
            node = self._roots.setdefault(salt, _Node(0, np.empty(0, np.int32), (), None))
        elif count < len(node.tokens):
            node = self._split(node, count)
        if shared < len(ids):
            node = self._grow(node, slot, ids[shared:].copy())
        self._nbytes -= node.end_bytes
        node.recent = tuple(t.clone() for t in recent)
        node.logits = node.logits if logits is None else logits.clone()
        self._nbytes += node.end_bytes
        self._ends[node] = None
        self._ends.move_to_end(node)

    def _walk(self, ids: Ids, salt: str) -> list[tuple[_Node, int]]:
        """The nodes along `ids`, and how many tokens of each one's edge agree (all but in the last)."""
        path: list[tuple[_Node, int]] = []
        node, at = self._roots.get(salt), 0
        while node is not None and at < len(ids):
            node = node.children.get(int(ids[at]))
            if node is None:
                break
            most = min(len(node.tokens), len(ids) - at)
            agree = node.tokens[:most] == ids[at : at + most]
            count = most if agree.all() else int(agree.argmin())
            path.append((node, count))
            at += count
            if count < len(node.tokens):
                break
        return path

    def _worth_saving(self, parting: int, held: int) -> int | None:
        return None if self._resumes_anywhere or parting - held < LEAST_GAIN else parting

    def _holds(self, node: _Node, count: int, logits: torch.Tensor | None) -> bool:
        """True where saving the position after `count` tokens of the edge would add nothing."""
        if count < len(node.tokens) or node.recent is None:
            return self._resumes_anywhere and logits is None
        return logits is None or node.logits is not None

    def _edge_bytes(self, slot: int, start: int, stop: int) -> int:
        """Bytes of the edge with the tokens from `start` to `stop`."""
        rows = sum(
            (stop // ratio - start // ratio) * view[:1].nbytes for ratio, view in self._cache.appended(slot)
        )
        return rows + (stop - start) * np.dtype(np.int32).itemsize

    def _load(self, slot: int, nodes: list[_Node], length: int) -> None:
        for node in nodes:
            for (ratio, view), saved in zip(self._cache.appended(slot), node.rows, strict=True):
                first, stop = node.start // ratio, min(node.stop, length) // ratio
                view[first:stop] = saved[: stop - first]
        for view, saved in zip(self._cache.recent(slot, length), nodes[-1].recent or (), strict=True):
            view.copy_(saved)
        self._cache.resume(slot, length)

    def _grow(self, parent: _Node, slot: int, tokens: Ids) -> _Node:
        """A new node behind `parent`, its rows copied from the slot."""
        start, stop = parent.stop, parent.stop + len(tokens)
        rows = tuple(
            view[start // ratio : stop // ratio].clone() for ratio, view in self._cache.appended(slot)
        )
        node = parent.children[int(tokens[0])] = _Node(start, tokens, rows, parent)
        self._nbytes += node.edge_bytes
        return node

    def _split(self, node: _Node, count: int) -> _Node:
        """Cut an edge behind its first `count` tokens; returns the new, upper node."""
        parent = node.parent
        assert parent is not None
        upper_rows, lower_rows = [], []
        for (ratio, _), rows in zip(self._cache.appended(0), node.rows, strict=True):
            at = (node.start + count) // ratio - node.start // ratio
            upper_rows.append(rows[:at].clone())
            lower_rows.append(rows[at:].clone())  # views would keep all of it allocated
        upper = _Node(node.start, node.tokens[:count].copy(), tuple(upper_rows), parent)
        node.start += count
        node.tokens, node.rows, node.parent = node.tokens[count:].copy(), tuple(lower_rows), upper
        upper.children[int(node.tokens[0])] = node
        parent.children[int(upper.tokens[0])] = upper
        return upper

    def _evict(self) -> None:
        """Give up the end that was not used for longest, and the edges that lead to no other."""
        node, _ = self._ends.popitem(last=False)
        self._evictions += 1
        self._nbytes -= node.end_bytes
        node.recent = node.logits = None
        while node.parent is not None and not node.children and node.recent is None:
            self._nbytes -= node.edge_bytes
            del node.parent.children[int(node.tokens[0])]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {salt: root for salt, root in self._roots.items() if root is not node}
