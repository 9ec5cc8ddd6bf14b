"""The prefix cache: a radix tree of token ids with the KV cache state of each prefix.

Append-only state (keys and values, compressed entries) is stored on the tree's edges, so prompts with a
common prefix share it. State that later tokens overwrite (window rings, unfinished groups, DeltaNet's) is
stored at chosen positions only: the ends of prompts and answers, at intervals within a long prompt, where two
prompts were seen to diverge, and, if it cannot be taken back from there, shortly before a prompt's end. Token
ids are compared directly, not by hash. What is appended is shared page by page with the slots that it came
from and goes to (shared_rows.py), the rest is copied: a sequence never keeps a state from being forgotten.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from engine.cache.prefixes import Prefix, PrefixStats
from engine.cache.shared_rows import Kept, RowShelf
from engine.cache.stored_states import StoredStates
from engine.families.base import KvCache
from memory.planner.published import KV_MARGIN

Ids = NDArray[np.int32]
Saved = tuple[torch.Tensor, ...]
SavedRows = tuple[Kept, ...]

# The prefill pauses to save a state if that may spare a later prompt so many tokens.
MIN_GAIN = 32


@dataclass(eq=False)
class _Node:
    """An edge of the tree and the node at its end.

    rows has what the cache appended for `tokens`, which begin at position `start`; recent what it
    held at the end besides, None where only rows are known. That can be taken back to `shortest`.
    """

    start: int
    tokens: Ids
    rows: SavedRows
    parent: _Node | None
    recent: Saved | None = None
    shortest: int = 0
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


@dataclass(frozen=True)
class _Step:
    """A node on a path through the tree, and how many tokens of its edge match."""

    node: _Node
    count: int

    @property
    def stop(self) -> int:
        return self.node.start + self.count


class PrefixCache:
    """Saves and restores the state of a cache's slots, within `budget_bytes`; the least recently used
    goes first. Used by one thread; `stats` may be read by others.

    Prefixes saved under one `salt` are found under the same only. With `stored`, they are saved to disk too,
    and longer ones found there.
    """

    def __init__(self, cache: KvCache, budget_bytes: int, stored: StoredStates | None = None) -> None:
        self._cache = cache
        self._stored = stored
        self.rows = RowShelf(cache.pages)
        # Of what is appended: tokens per row, and a row's bytes.
        self._sizes = [(ratio, view[:1].nbytes) for ratio, view in cache.appended(0)]
        self._budget_bytes = budget_bytes
        self._roots: dict[str, _Node] = {}
        self._ends: OrderedDict[_Node, None] = OrderedDict()  # restorable, oldest use first
        self._nbytes = self._lent = 0
        self._queries = self._hits = self._cached_tokens = self._evictions = 0
        self._saves = 0

    @property
    def roots(self) -> Mapping[str, _Node]:
        """The tree of each salt; every edge leads to a state that can be restored."""
        return self._roots

    @property
    def changes(self) -> int:
        """How often a state was saved or forgotten."""
        return self._saves + self._evictions

    @property
    def stats(self) -> PrefixStats:
        """Current counters and gauges."""
        return PrefixStats(
            self._queries,
            self._hits,
            self._cached_tokens,
            self._evictions,
            self._nbytes + self._lent,
            self._budget_bytes,
        )

    def lend(self, nbytes: int) -> bool:
        """Give up so much of the budget until `take_back`, and the states that are then too many; False, and
        no state is lost, where it has not so much."""
        if nbytes > self._budget_bytes - self._lent:
            return False
        self._lent += nbytes
        while self._nbytes + self._lent > self._budget_bytes:
            self._evict()
        return True

    def take_back(self, nbytes: int) -> None:
        """So much that was lent is free again."""
        self._lent -= nbytes

    def restore(self, slot: int, prompt: list[int], salt: str = "") -> Prefix:
        """Restore the longest cached prefix of `prompt` into the empty `slot`.

        At least one token is left to compute, unless the logits behind the whole prompt are known.
        """
        self._queries += 1
        ids = np.asarray(prompt, dtype=np.int32)
        path = self._walk(ids, salt)
        last = len(ids) - 1
        shared = path[-1].stop if path else 0
        end, length = self._best_end(path, ids)
        logits = None
        on_disk = self._from_disk(slot, ids, salt, length + MIN_GAIN)
        if on_disk is not None:
            length, logits = on_disk
        elif end is not None:
            self._load(slot, path, end, length)
            self._ends.move_to_end(end)
            logits = end.logits if length > last else None
        self._hits += length > 0
        self._cached_tokens += length
        wanted = {min(shared, last)}
        if self._cache.margin < KV_MARGIN:
            wanted.add(len(ids) - KV_MARGIN)
        return Prefix(length, logits, tuple(stop for stop in sorted(wanted) if stop - length >= MIN_GAIN))

    def save(self, slot: int, tokens: list[int], salt: str = "", logits: torch.Tensor | None = None) -> None:
        """Save the state of `slot`, which holds exactly `tokens`; `logits` `[vocab]` are those after them.

        Does nothing where the budget could not hold it.
        """
        ids = np.asarray(tokens, dtype=np.int32)
        if self._stored is not None:
            self._stored.save(slot, ids, salt, logits)
        recent = self._cache.recent(slot, len(ids))
        at_end = sum(t.nbytes for t in recent) + (0 if logits is None else logits.nbytes)
        budget = self._budget_bytes - self._lent
        if self._edge_bytes(0, len(ids)) + at_end > budget:
            return
        while True:
            path = self._walk(ids, salt)
            shared = path[-1].stop if path else 0
            if shared == len(ids) and self._adds_nothing(path[-1], logits):
                return
            needed = self._edge_bytes(shared, len(ids)) + at_end
            if self._nbytes + needed <= budget:
                break
            self._evict()
        if path:
            node = self._split(path[-1].node, path[-1].count)
        else:
            node = self._roots.setdefault(salt, _Node(0, np.empty(0, np.int32), (), None))
        if shared < len(ids):
            node = self._grow(node, slot, ids[shared:].copy())
        self._nbytes -= node.end_bytes
        node.recent = tuple(t.to("cpu", copy=True) for t in recent)  # the budget is of DRAM
        node.shortest = self._cache.shortest(slot)
        node.logits = node.logits if logits is None else logits.clone()
        self._nbytes += node.end_bytes
        self._ends[node] = None
        self._ends.move_to_end(node)
        self._saves += 1

    def _from_disk(
        self, slot: int, ids: Ids, salt: str, least: int
    ) -> tuple[int, torch.Tensor | None] | None:
        """Restore what is on disk, if it is of at least so many tokens: its length, and the logits behind it
        if that is the whole prompt."""
        found = None if self._stored is None else self._stored.find(ids, salt)
        if self._stored is None or found is None or found.length < least:
            return None
        state = self._stored.restore(slot, found)
        return None if state is None else (found.length, state.logits if found.length == len(ids) else None)

    def _best_end(self, path: list[_Step], ids: Ids) -> tuple[_Node | None, int]:
        """The node that restores the longest prefix of `ids`, and the prefix length.

        Where `ids` leave the tree, ends a little further on will do, if they can be taken back.
        """
        last, best, length = len(ids) - 1, None, 0
        for node in [step.node for step in path if step.count == len(step.node.tokens)]:
            if node.recent is not None:
                usable = node.stop if node.stop <= last or node.logits is not None else last
                if usable >= max(node.shortest, length + 1):
                    best, length = node, usable
        if not path:
            return best, length
        divergence = min(path[-1].stop, last)
        below = [path[-1].node]
        while below and divergence > length:
            node = below.pop()
            if node.recent is not None and node.shortest <= divergence <= node.stop:
                return node, divergence
            if node.stop - self._cache.margin <= divergence:
                below += node.children.values()
        return best, length

    def _walk(self, ids: Ids, salt: str) -> list[_Step]:
        """The path of `ids` through the tree: all edges match completely, except perhaps the last."""
        path: list[_Step] = []
        node, at = self._roots.get(salt), 0
        while node is not None and at < len(ids):
            node = node.children.get(int(ids[at]))
            if node is None:
                break
            most = min(len(node.tokens), len(ids) - at)
            agree = node.tokens[:most] == ids[at : at + most]
            count = most if agree.all() else int(agree.argmin())
            path.append(_Step(node, count))
            at += count
            if count < len(node.tokens):
                break
        return path

    def _adds_nothing(self, step: _Step, logits: torch.Tensor | None) -> bool:
        """True where the state after `step` is known already, and its logits if there are any."""
        node = step.node
        if logits is None and node.recent is not None and node.shortest <= step.stop:
            return True
        return step.stop == node.stop and node.recent is not None and node.logits is not None

    def _edge_bytes(self, start: int, stop: int) -> int:
        """Bytes of the edge with the tokens from `start` to `stop`."""
        rows = sum((stop // ratio - start // ratio) * nbytes for ratio, nbytes in self._sizes)
        return rows + (stop - start) * np.dtype(np.int32).itemsize

    def _load(self, slot: int, path: list[_Step], end: _Node, length: int) -> None:
        """Fill a slot with the rows along `path` and what the cache held at `end`, taken back to `length`."""
        self._cache.pages.hold(slot, length)
        for node in [step.node for step in path if step.node.start < length]:
            for (ratio, view), saved in zip(self._cache.appended(slot), node.rows, strict=True):
                first, stop = node.start // ratio, min(node.stop, length) // ratio
                self.rows.load(slot, view, first, saved, stop - first)
        for view, saved in zip(self._cache.recent(slot, end.stop), end.recent or (), strict=True):
            view.copy_(saved)
        self._cache.resume(slot, length, end.shortest)

    def _grow(self, parent: _Node, slot: int, tokens: Ids) -> _Node:
        """A new node below `parent`, with rows of the slot."""
        start, stop = parent.stop, parent.stop + len(tokens)
        rows = tuple(
            self.rows.keep(slot, view, start // ratio, stop // ratio)
            for ratio, view in self._cache.appended(slot)
        )
        node = parent.children[int(tokens[0])] = _Node(start, tokens, rows, parent)
        self._nbytes += node.edge_bytes
        return node

    def _split(self, node: _Node, count: int) -> _Node:
        """Split an edge after its first `count` tokens, if it is longer; returns the node that ends there."""
        parent = node.parent
        if count == len(node.tokens) or parent is None:
            return node
        halves = [
            self.rows.split(rows, (node.start + count) // ratio - node.start // ratio)
            for (ratio, _), rows in zip(self._sizes, node.rows, strict=True)
        ]
        upper = _Node(node.start, node.tokens[:count].copy(), tuple(half for half, _ in halves), parent)
        node.start += count
        node.tokens, node.rows, node.parent = (
            node.tokens[count:].copy(),
            tuple(half for _, half in halves),
            upper,
        )
        upper.children[int(node.tokens[0])] = node
        parent.children[int(upper.tokens[0])] = upper
        return upper

    def _evict(self) -> None:
        """Evict the least recently used state, and edges that no longer lead to any."""
        node, _ = self._ends.popitem(last=False)
        self._evictions += 1
        self._nbytes -= node.end_bytes
        node.recent = node.logits = None
        while node.parent is not None and not node.children and node.recent is None:
            self._nbytes -= node.edge_bytes
            for kept in node.rows:
                self.rows.drop(kept)
            del node.parent.children[int(node.tokens[0])]
            node = node.parent
        if node.parent is None and not node.children:
            self._roots = {salt: root for salt, root in self._roots.items() if root is not node}
