"""What a prefix cache holds, as hashes that are small enough to be sent elsewhere: whoever has several
servers to choose from gives a prompt to the one that knows most of it.

Tokens are cut into blocks; a block's hash is of everything up to its end, under the salt that it is kept by.
A hash that two prefixes share by chance costs a prompt its best place, nothing else: the cache itself
compares tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.cache.prefix import MIN_GAIN

Ids = NDArray[np.int32]

BLOCK = MIN_GAIN  # tokens
HASH_BYTES = 8
MOST_BLOCKS = 1 << 16  # that are told, 2 million tokens: half a megabyte
# Of the time of the thread that makes it, at most.
SHARE = 0.02


class Edge(Protocol):
    """Tokens of a radix tree, and the edges behind them."""

    @property
    def tokens(self) -> Ids:
        """What the edge adds."""
        ...

    @property
    def children(self) -> Mapping[int, Edge]:
        """The edges behind it, by their first token."""
        ...


class Tree(Protocol):
    """What keeps prefixes in a radix tree for each salt."""

    @property
    def roots(self) -> Mapping[str, Edge]:
        """The tree of each salt."""
        ...

    @property
    def changes(self) -> int:
        """A number that changes with what is kept."""
        ...


class _Chain:
    """The running hash of a prefix, and its tokens that do not fill a block yet."""

    def __init__(self, salt: str) -> None:
        name = salt.encode("utf-8", "surrogatepass")
        self._hash = hashlib.blake2b(len(name).to_bytes(4, "little") + name, digest_size=HASH_BYTES)
        self._rest = b""

    def fork(self) -> _Chain:
        """The same, to go on from on its own."""
        copy = _Chain.__new__(_Chain)
        copy._hash, copy._rest = self._hash.copy(), self._rest
        return copy

    def extend(self, tokens: Ids) -> Iterator[bytes]:
        """The hash of each block that is full now."""
        nbytes = BLOCK * np.dtype(np.int32).itemsize
        data = self._rest + np.ascontiguousarray(tokens, dtype=np.int32).tobytes()
        full = len(data) // nbytes * nbytes
        self._rest = data[full:]
        for at in range(0, full, nbytes):
            self._hash.update(data[at : at + nbytes])
            yield self._hash.copy().digest()


def block_hashes(ids: Ids, salt: str) -> tuple[bytes, ...]:
    """The hash of each whole block of a prompt `[tokens]`, in order."""
    return tuple(_Chain(salt).extend(ids))


@dataclass(frozen=True)
class _Hashed:
    """An edge's blocks, which stay what they are while its tokens and the chain `before` it are the same."""

    tokens: Ids
    before: _Chain
    hashes: bytes
    after: _Chain


class PrefixDigest:
    """The hashes of a cache, kept up to date by the thread that uses it; others read `hashes`.

    Only edges that are new since the last time are hashed.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._roots: dict[str, _Chain] = {}
        self._edges: dict[int, _Hashed] = {}  # by the identity of what they are of
        self._known = -1
        self._next_s = 0.0
        self.hashes = b""

    def refresh(self, *, at_once: bool) -> None:
        """Look again where something has changed; unless at once, not so often that it costs time."""
        if self._tree.changes == self._known:
            return
        begun = time.perf_counter()
        if not at_once and begun < self._next_s:
            return
        self._known = self._tree.changes
        self.hashes = self._held()
        ended = time.perf_counter()
        self._next_s = ended + (ended - begun) / SHARE

    def _held(self) -> bytes:
        """The hashes of all blocks that the cache holds, one behind the other."""
        known, self._edges = self._edges, {}
        self._roots = {salt: self._roots.get(salt) or _Chain(salt) for salt in self._tree.roots}
        found: list[bytes] = []
        room = MOST_BLOCKS * HASH_BYTES
        for salt, root in self._tree.roots.items():
            below = [(root, self._roots[salt])]
            while below and room > 0:
                edge, before = below.pop()
                hashed = known.get(id(edge))
                if hashed is None or hashed.tokens is not edge.tokens or hashed.before is not before:
                    after = before.fork()
                    hashed = _Hashed(edge.tokens, before, b"".join(after.extend(edge.tokens)), after)
                self._edges[id(edge)] = hashed
                found.append(hashed.hashes[:room])
                room -= len(hashed.hashes)
                below += ((child, hashed.after) for child in edge.children.values())
        return b"".join(found)
