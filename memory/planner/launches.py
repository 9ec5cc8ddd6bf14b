"""Kernels that a layer on a GPU launches in a recorded step, and its hand-overs: what a plan counts with."""

from __future__ import annotations

# V4.1. Reading, mixing and writing the streams twice: 4; products: 7; norms, rotations and the router, which
# leaves what the GPU does not hold for the processor: 2; attention: 2; routed experts: 2.
LAYER = 17
SHARED = 2  # of these, the shared expert
HELD = 2  # and those that the GPU holds: all these are between the router and the sum
CHOICE = 2  # scores of entries, and the best of them
CHUNKS = 1  # the best of each chunk before, of more entries than one program looks at together
CHUNK = 4096
ENTRY = 1  # index keys on their way to the others
TABLE = 1  # gated values of table rows; their product goes along with others
STEP = 4  # the streams' beginning, rotations, the last norm and the head
HAND_OVERS = 1  # of a layer; one more where the next layer waits for table rows
SHARE = 3  # of another GPU, for the experts of a layer that it holds: their inputs fetched, and two as above


# A layer that keeps keys and values: projections; norms, rotations and the way to the cache; attention: 2;
# the way out; what it adds to the residual, with the next norm. Then the same of the feed-forward part.
KV_ATTENTION = 6
KV_ENCODED = 2  # keys and values on their way to a cache of other numbers
KV_MLP = 3  # gate and up together, down, the sum
KV_EXPERTS = 3 + HELD  # the router's product and choice, the experts, the sum


def beside(*, has_shared: bool) -> int:
    """Launches of a layer's experts between its router and the sum: while others compute what it lacks."""
    return HELD + (SHARED if has_shared else 0)


def kv_launches(*, has_experts: bool, has_shared: bool, is_encoded: bool) -> int:
    """Launches of a layer that keeps keys and values.

    is_encoded  these are not kept as float32
    """
    part = KV_EXPERTS + (SHARED if has_shared else 0) if has_experts else KV_MLP
    return KV_ATTENTION + part + (KV_ENCODED if is_encoded else 0)


def gpu_launches(*, owns_entries: bool, chooses_among: int, has_table: bool) -> int:
    """Launches of a layer.

    owns_entries   it makes compressed entries
    chooses_among  at most so many entries by an indexer of its own; 0 without one
    has_table      it adds rows of an Engram table
    """
    chosen = (CHOICE + (CHUNKS if chooses_among > CHUNK else 0)) if chooses_among else 0
    return LAYER + chosen + (ENTRY if owns_entries else 0) + (TABLE if has_table else 0)


# V4's sublayers read the streams by a mix of their own, which has to be there first: 2 more; heads of queries
# are normalised, and the router waits for nothing else: 3 more.
V4_LAYER = 22
V4_STEP = 5  # the streams' beginning, how the head reads them, the last norm and the head


def v4_launches(*, has_entries: bool, chooses_among: int, is_encoded: bool, is_turned: bool) -> int:
    """Launches of a layer of V4.

    has_entries    it makes entries, of which it sees all, or chooses among at most `chooses_among`
    is_encoded     what it keeps is not kept as float32
    is_turned      its index keys, and queries, are turned by a matrix
    """
    chosen = (CHOICE + (CHUNKS if chooses_among > CHUNK else 0)) if chooses_among else 0
    # latents, entries, and keys with a rotation that was part of writing them
    encoded = (1 + (1 if has_entries else 0) + (2 if chooses_among else 0)) if is_encoded else 0
    return V4_LAYER + chosen + encoded + (2 if is_turned and chooses_among else 0)


# A layer of latent attention: projections; norms; queries, and with them or behind them the way to the cache:
# 2; heads' matrices before and after attention, which are 2, as is attention itself; the way out; the sum.
LATENT_ATTENTION = 10
QUERY_LATENT = 1  # of these, if queries are made of a latent
INDEX_KEYS = 1  # centred
INDEX_ENCODED = 1  # on their way to a cache of other numbers
INDEX_TURNED = 3  # and they and queries turned by a matrix, queries by their positions first
INDEX_ROUNDED = 1  # and queries rounded behind


def latent_launches(
    *,
    has_query_latent: bool,
    chooses_among: int,
    is_encoded: bool,
    is_turned: bool,
    is_rounded: bool,
    has_experts: bool,
    has_shared: bool,
) -> int:
    """Launches of a layer with latent attention.

    chooses_among          at most so many tokens by an indexer of its own; 0 without one
    is_encoded, is_turned  of index keys: not kept as float32; turned by a Hadamard matrix
    is_rounded             queries are rounded by themselves
    """
    found = LATENT_ATTENTION - (0 if has_query_latent else QUERY_LATENT)
    if chooses_among:
        found += INDEX_KEYS + CHOICE + (CHUNKS if chooses_among > CHUNK else 0)
        found += (INDEX_ENCODED if is_encoded else 0) + (INDEX_TURNED if is_turned else 0)
        found += INDEX_ROUNDED if is_rounded else 0
    part = KV_EXPERTS + (SHARED if has_shared else 0) if has_experts else KV_MLP
    return found + part
