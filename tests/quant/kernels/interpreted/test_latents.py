"""Recorded operations on latents, one by one, in Triton's interpreter against plain torch."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, started by test_triton.py", allow_module_level=True)

from quant.kernels.cpu.cache_notes import KvPlace
from quant.kernels.cpu.program import Buffer
from quant.kernels.cuda.kernels import TritonKernels
from quant.kernels.cuda.recorder import GpuRecorder
from quant.kernels.reference import ReferenceKernels

HOST = torch.device("cpu")
ROWS, SLOTS = 3, 4
REFERENCE = ReferenceKernels()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def ran(
    x: torch.Tensor, note: Callable[[GpuRecorder, Buffer], Buffer], slots: list[int], positions: list[int]
) -> torch.Tensor:
    """What an operation gives for rows `[n, width]` at these places."""
    recorder = GpuRecorder(TritonKernels(HOST), ROWS)
    source = recorder.input(x.shape[1])
    program = recorder.finish(source, note(recorder, source))
    program.source[: len(x)] = x
    program.run(slots, positions)
    return program.result[: len(x)]


@pytest.mark.parametrize(("ratio", "dim", "overlaps"), [(4, 24, True), (8, 40, False)])
def test_groups_are_pooled_of_earlier_tokens_and_of_this_steps(ratio: int, dim: int, overlaps: bool) -> None:
    """Tokens one by one, and the last three of a group at once; a row of the bias for each position."""
    width, tokens = dim * (1 + overlaps), 3 * ratio
    kv, gate, ape = random(tokens, width), random(tokens, width), random(ratio, width)
    weight = random(dim)
    rings = torch.zeros(SLOTS, 2 * ratio + 15, width), torch.zeros(SLOTS, 2 * ratio + 15, width)

    def note(recorder: GpuRecorder, x: Buffer) -> Buffer:
        parts = [torch.eye(2 * width)[:width], torch.eye(2 * width)[width:]]
        rows, gates = recorder.linears(x, parts)
        recorder.ring(rows, rings[0])
        recorder.ring(recorder.bias(gates, ape), rings[1])
        return recorder.norm(recorder.pool(*rings, ratio, overlaps=overlaps), weight, 1e-6)

    x, gates = torch.cat((kv, gate), 1), gate + ape.repeat(3, 1)
    for end in range(1, tokens + 1):
        count = 3 if end == 2 * ratio else 1
        if 2 * ratio - 3 < end < 2 * ratio:
            continue
        at = list(range(end - count, end))
        found = ran(x[at], note, [2] * count, at)
        if end % ratio:
            continue
        if overlaps:
            own, last = slice(end - ratio, end), slice(max(0, end - 2 * ratio), end - ratio)
            both = [torch.cat((of[last, :dim], of[own, dim:])) for of in (kv, gates)]
        else:
            both = [of[end - ratio : end] for of in (kv, gates)]
        pooled = REFERENCE.pool_groups(*(of.unsqueeze(0) for of in both))
        torch.testing.assert_close(found[-1:], REFERENCE.rms_norm(pooled, weight, 1e-6), rtol=1e-4, atol=1e-5)
    for ring, of in zip(rings, (kv, gates), strict=True):  # as a prompt leaves them
        kept = torch.arange(tokens - 2 * ratio, tokens)
        torch.testing.assert_close(ring[2, kept % ring.shape[1]], of[kept])


@pytest.mark.parametrize("held", [0, 5, 127, 300])
def test_a_window_and_every_entry_are_attended_to(held: int) -> None:
    heads, dim, window, ratio = 5, 160, 16, 8
    latents, entries = random(SLOTS, 400, dim), random(SLOTS, 400 // ratio, dim)
    rings = torch.zeros(SLOTS, window + 16, dim)
    slots, positions = [3, 1], [held, held + 9]
    for slot, position in zip(slots, positions, strict=True):
        for at in range(max(0, position - window), position + 1):
            rings[slot, at % rings.shape[1]] = latents[slot, at]
    q, sink = random(2, heads * dim), random(heads)
    found = ran(
        q, lambda r, x: r.attend_sparse(x, rings, sink, window, entries, None, ratio), slots, positions
    )
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        seen = torch.arange((position + 1) // ratio).unsqueeze(0)
        first = max(0, position - window + 1)
        expected = REFERENCE.attend_sparse(
            q[row].view(1, heads, dim), latents[slot, first : position + 1], sink, window, entries[slot], seen
        )
        torch.testing.assert_close(found[row], expected.flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("chooses", [False, True])
def test_latents_are_kept_and_attended_to_as_operations_say(rows: int, chooses: bool) -> None:
    """All that a layer of latent attention notes, with parts of vectors on the way."""
    heads, plain, dims, rank, capacity = 3, 24, 16, 40, 70
    dim, slots, positions = rank + dims, [2, 0, 2][:rows], [40, 3, 41][:rows]
    to_latent, from_latent = random(heads, rank, plain), random(heads, plain, rank)
    frequencies, weight = torch.linspace(0.1, 1, dims // 2).double(), random(rank)
    cache = random(SLOTS, 1, capacity, dim)
    place = KvPlace(cache.clone(), cache[..., :rank])
    place = KvPlace(place.keys, place.keys[..., :rank])
    wide = heads * (plain + dims)
    chosen = torch.tensor([[1, 5, 40, -1], [0, 2, 3, -1], [0, 40, 41, -1]])[:rows]

    picked: list[Buffer] = []

    def choose(count: int) -> None:
        program.rows(picked[0])[:count] = chosen[:count]

    def note(r: GpuRecorder, x: Buffer) -> Buffer:
        q, kv = r.linears(x, [torch.eye(wide + dim)[:wide], torch.eye(wide + dim)[wide:]])
        q, turns = r.scale(q, 1.5), r.turns(frequencies)
        made = r.batched_linear(r.part(q, heads, 0, plain), to_latent)
        turned = r.rotate(r.part(q, heads, plain, dims), turns, heads)
        latent = r.norm(r.part(kv, 1, 0, rank), weight, 1e-6)
        shared = r.rotate(r.part(kv, 1, rank, dims), turns, 1)
        queries, keys = r.join(made, turned, heads), r.join(latent, shared, 1)
        r.append(keys, None, place)
        if chooses:
            picked.append(r.buffer(4, torch.int64))
            r.hand_over(choose, [keys], [picked[0]])
        return r.batched_linear(r.attend(queries, place, chosen=picked[0] if chooses else None), from_latent)

    x = random(rows, wide + dim)
    recorder = GpuRecorder(TritonKernels(HOST), 4)
    source = recorder.input(x.shape[1])
    program = recorder.finish(source, note(recorder, source))
    if not chooses:
        assert program.launches(None) == 7  # rotations, products, two vectors kept, heads, attention, heads
    program.source[:rows] = x
    program.run(slots, positions)
    q, kv = x[:, :wide].view(rows, heads, plain + dims) * 1.5, x[:, wide:]
    turns = REFERENCE.turns(torch.tensor(positions), frequencies)
    latent = REFERENCE.rms_norm(kv[:, :rank], weight, 1e-6)
    keys = torch.cat((latent, REFERENCE.rotate(kv[:, rank:], turns)), 1)
    made = torch.einsum("hrc,thc->thr", to_latent, q[..., :plain])
    queries = torch.cat((made, REFERENCE.rotate(q[..., plain:], turns)), 2)
    cache[slots, 0, positions] = keys
    torch.testing.assert_close(place.keys, cache, rtol=1e-5, atol=1e-5)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        seen = chosen[row : row + 1] if chooses else torch.arange(position + 1).unsqueeze(0)
        found = REFERENCE.attend_chosen(queries[row : row + 1], cache[slot, 0], seen, rank)
        expected = torch.einsum("hpr,hr->hp", from_latent, found[0]).flatten()
        torch.testing.assert_close(program.result[row], expected, rtol=1e-3, atol=1e-3)
