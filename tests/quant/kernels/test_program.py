"""A recorded step computes what its operations compute one by one, with buffers that share places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import FormatError
from quant.formats.fp8 import FP8_32, FP8_ROW
from quant.formats.mxfp4 import MXFP4
from quant.kernels.cpu import library
from quant.kernels.cpu.cache_notes import KvPlace
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.panels import native_weight
from quant.kernels.cpu.program import MOST_TOGETHER, Buffer, runs
from quant.kernels.cpu.recorder import Recorder
from quant.kernels.interface import Weight
from quant.kernels.layers import RoutingRule

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

WIDTH, ROWS = 64, 5
KERNELS = NativeKernels(threads=2) if library.library_path() is not None else None


def kernels() -> NativeKernels:
    assert KERNELS is not None
    return KERNELS


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights() -> list[Weight]:
    packed = [
        kernels().prepare(form.encode(values(n, 96, WIDTH))) for n, form in enumerate((MXFP4, FP8_32, MXFP4))
    ]
    return [*packed, values(7, 32, WIDTH), values(8, 32, WIDTH).bfloat16()]


def test_products_are_those_of_single_calls_whatever_is_multiplied_together() -> None:
    recorder, matrices, x = Recorder(kernels(), ROWS), weights(), values(1, ROWS, WIDTH)
    source = recorder.input(WIDTH)
    outs = recorder.linears(source, matrices)
    joined = outs[0]
    for out in outs[1:3]:
        joined = recorder.add(joined, out)
    dense = recorder.add(outs[3], outs[4])
    (last,) = recorder.linears(recorder.norm(joined, torch.ones(96), 1e-6), [values(9, 8, 96)])
    result = recorder.add(last, recorder.scale(last, 0.5))
    del dense

    program = recorder.finish(source, result)
    program.source[:] = x
    program.run(range(ROWS), range(ROWS))

    ys = [kernels().linear(x, matrix) for matrix in matrices[:3]]
    y = kernels().linear(kernels().rms_norm(ys[0] + ys[1] + ys[2], torch.ones(96), 1e-6), values(9, 8, 96))
    assert torch.equal(program.result, y + y * 0.5)


@settings(max_examples=60)
@given(data=st.data())
def test_buffers_hold_their_values_until_they_were_read_for_the_last_time(data: st.DataObject) -> None:
    recorder, x = Recorder(kernels(), ROWS), values(2, ROWS, WIDTH)
    source = recorder.input(WIDTH)
    known: list[tuple[Buffer, torch.Tensor]] = [(source, x)]
    for _ in range(data.draw(st.integers(1, 25))):
        (a, of_a), (b, of_b) = data.draw(st.sampled_from(known)), data.draw(st.sampled_from(known))
        kind = data.draw(st.sampled_from(("add", "scale", "gated")))
        if kind == "add":
            known.append((recorder.add(a, b), of_a + of_b))
        elif kind == "scale":
            known.append((recorder.scale(a, 0.5), of_a * 0.5))
        else:
            known.append((recorder.gated(a, b, 3.0), kernels().gated(of_a, of_b, 3.0)))
    result, expected = known[-1]

    program = recorder.finish(source, result)
    program.source[:] = x
    program.run([0] * ROWS, [0] * ROWS)

    assert torch.equal(program.result, expected)
    assert program.nbytes <= (len(known) + 1) * ROWS * WIDTH * 4 + 64


def test_a_long_chain_of_operations_takes_no_more_than_what_lives_during_a_run() -> None:
    recorder = Recorder(kernels(), ROWS)
    source = x = recorder.input(WIDTH)
    for _ in range(100):
        x = recorder.add(x, x)

    assert recorder.finish(source, x).nbytes <= (MOST_TOGETHER + 3) * ROWS * WIDTH * 4


def test_rows_have_the_same_bits_whether_threads_share_out_rows_or_matrices() -> None:
    places = [3, 900, 17, 18, 19, 20, 21]  # from six rows on, each of the two threads has three of its own
    most = len(places)
    recorder = Recorder(kernels(), most)
    source = recorder.input(WIDTH)
    x = recorder.rotate(recorder.norm(source, torch.ones(WIDTH), 1e-6), recorder.turns(torch.ones(8)), 2)
    outs = recorder.linears(x, weights())
    gated = recorder.gated(recorder.add(outs[0], outs[1]), outs[2], 3.0)
    mixed = recorder.weighted_sum(recorder.join(gated, gated, 1), recorder.part(outs[3], 1, 0, 2))
    result = recorder.join(mixed, recorder.add(outs[3], outs[4]), 1)
    program = recorder.finish(source, result)
    assert runs(program.noted) == [range(len(program.noted))]
    given = values(3, most, WIDTH)

    alone = []
    for row, place in enumerate(places):
        program.source[0] = given[row]
        program.run([0], [place])
        alone.append(program.result[0].clone())
    for rows in range(2, most + 1):
        program.source[:rows] = given[:rows]
        program.run([0] * rows, places[:rows])
        assert torch.equal(program.result[:rows], torch.stack(alone[:rows]))


@pytest.mark.parametrize("vocab", [40, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_token_of_a_block_knows_the_one_before(dtype: torch.dtype, vocab: int) -> None:
    block, rank, newest = 3, 16, [5, 0, 0, 9, 0, 0]
    base, states = values(1, 2 * block, vocab), values(2, 2 * block, 32)
    embed, head = values(3, vocab, rank).to(dtype), values(4, vocab, rank).to(dtype)
    sure = values(5, 32 + rank)
    recorder = Recorder(kernels(), 2 * block)
    source = recorder.input(vocab + 32)
    logits, of_states = recorder.part(source, 1, 0, vocab), recorder.part(source, 1, vocab, 32)
    tokens, chances = recorder.chain(logits, of_states, embed, head, sure, block)
    recorder.keep(tokens)
    recorder.keep(chances)
    program = recorder.finish(source, logits)
    program.source[:] = torch.cat((base, states), dim=1)
    program.run([0] * 6, range(6), newest)

    found = program.rows(tokens).flatten().tolist()
    for row in range(2 * block):
        said = embed[newest[row] if row % block == 0 else found[row - 1]].float()
        expected = base[row] + head.float() @ said
        assert (program.result[row] - expected).abs().max() < 1e-4
        assert found[row] == int(program.result[row].argmax())
        chance = torch.sigmoid(torch.cat((states[row], said)) @ sure)
        assert abs(float(program.rows(chances)[row]) - float(chance)) < 1e-5


def test_matrices_side_by_side_may_have_any_number_of_columns() -> None:
    cols, x = 48, values(1, 3, 96)
    matrices = [kernels().prepare(FP8_32.encode(values(n, 64, cols))) for n in range(2)]
    recorder = Recorder(kernels(), 3)
    source = recorder.input(2 * cols)
    program = recorder.finish(source, recorder.blocks(source, matrices))
    program.source[:] = x
    program.run([0] * 3, range(3))
    expected = [kernels().linear(x[:, n * cols : (n + 1) * cols], matrices[n]) for n in range(2)]
    assert torch.equal(program.result, torch.cat(expected, dim=1))


@settings(max_examples=40)
@given(data=st.data())
def test_rows_are_appended_and_attended_to_at_their_slots_and_positions(data: st.DataObject) -> None:
    heads, kv_heads, dim, slots, capacity = 4, 2, 16, 3, 20
    rows = data.draw(st.integers(1, slots))
    places = data.draw(st.permutations(range(slots)))[:rows]
    positions = data.draw(st.lists(st.integers(0, capacity - 1), min_size=rows, max_size=rows))
    held = values(3, 2, slots, kv_heads, capacity, dim)
    expected_held = held.clone()
    place = KvPlace(held[0], held[1])
    frequencies = values(4, dim // 2).abs().double()

    recorder = Recorder(kernels(), slots)
    source = recorder.input(heads * dim)
    k, v = recorder.linears(
        source, [values(5, kv_heads * dim, heads * dim), values(6, kv_heads * dim, heads * dim)]
    )
    recorder.append(recorder.rotate(k, recorder.turns(frequencies), kv_heads), v, place)
    result = recorder.attend(source, place)
    program = recorder.finish(source, result)
    x = values(data.draw(st.integers(0, 99)), rows, heads * dim)
    program.source[:rows] = x
    program.run(places, positions)

    keys = kernels().linear(x, values(5, kv_heads * dim, heads * dim)).view(rows, kv_heads, dim)
    keys = kernels().rotate(keys, kernels().turns(torch.tensor(positions), frequencies))
    new_values = kernels().linear(x, values(6, kv_heads * dim, heads * dim)).view(rows, kv_heads, dim)
    for row, (slot, position) in enumerate(zip(places, positions, strict=True)):
        expected_held[0, slot, :, position] = keys[row]
        expected_held[1, slot, :, position] = new_values[row]
        seen = expected_held[:, slot, :, : position + 1]
        q = x[row].view(1, heads, dim)
        assert torch.equal(program.result[row], kernels().attend(q, seen[0], seen[1]).flatten())
    assert torch.equal(held, expected_held)


def test_latents_are_kept_once_and_are_keys_and_in_their_first_columns_values() -> None:
    heads, latent, turned, capacity = 3, 32, 16, 20
    held = values(3, ROWS, 1, capacity, latent + turned)
    before = held.clone()
    positions = [7, 0, 19, 3, 11]
    matrices = values(5, heads, latent, 8).bfloat16()
    x = values(6, ROWS, latent + turned + heads * (8 + turned))

    recorder = Recorder(kernels(), ROWS)
    source = recorder.input(x.shape[1])
    k = recorder.part(source, 1, 0, latent + turned)
    q = recorder.part(source, 1, latent + turned, heads * (8 + turned))
    inner = recorder.batched_linear(recorder.part(q, heads, 0, 8), matrices)
    place = KvPlace(held, held[..., :latent])
    recorder.append(k, None, place)
    queries = recorder.join(inner, recorder.part(q, heads, 8, turned), heads)
    program = recorder.finish(source, recorder.attend(queries, place))
    program.source[:] = x
    program.run(range(ROWS), positions)

    new, of_heads = x[:, : latent + turned], x[:, latent + turned :].view(ROWS, heads, 8 + turned)
    mapped = kernels().batched_linear(of_heads[..., :8], matrices)
    expected = torch.cat((mapped, of_heads[..., 8:]), dim=-1)  # [rows, heads, latent + turned]
    for row, position in enumerate(positions):
        before[row, 0, position] = new[row]
        seen = before[row, :, : position + 1]
        attended = kernels().attend(expected[row : row + 1], seen, seen[..., :latent])
        assert torch.equal(program.result[row], attended.flatten())
    assert torch.equal(held, before)


def test_a_format_that_the_kernels_do_not_read_is_refused() -> None:
    recorder = Recorder(kernels(), ROWS)
    rows = FP8_ROW.encode(values(1, 32, WIDTH))
    assert native_weight(rows) is None

    with pytest.raises(FormatError, match="fp8_row32: no kernel multiplies with it"):
        recorder.linears(recorder.input(WIDTH), [rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_tokens_are_embedded_as_torch_does_it(dtype: torch.dtype, factor: float) -> None:
    table = values(3, 7, WIDTH)
    table[2, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-7, -6e-8])
    table = table.to(dtype)
    recorder = Recorder(kernels(), ROWS)
    source = recorder.embed(table, factor)
    program = recorder.finish(source, source)
    for tokens in ([2, 6, 0, 2, 5], [4]):
        program.run(range(len(tokens)), range(len(tokens)), tokens)
        expected = table[tokens].float() * factor
        assert torch.equal(program.logits(None), expected)
        assert torch.equal(program.logits(None).signbit(), expected.signbit())


def test_groups_that_overlap_are_pooled_with_what_tokens_of_the_group_before_had_for_them() -> None:
    ratio, dim, ring = 4, 24, 11
    kv, gate, ape = values(1, 3, 40, 2 * dim), values(2, 3, 40, 2 * dim), values(3, ratio, 2 * dim)
    rings = torch.zeros(3, ring, 2 * dim), torch.zeros(3, ring, 2 * dim)
    recorder = Recorder(kernels(), 3)
    source = recorder.input(4 * dim)
    recorder.ring(recorder.part(source, 1, 0, 2 * dim), rings[0])
    recorder.ring(recorder.bias(recorder.part(source, 1, 2 * dim, 2 * dim), ape), rings[1])
    program = recorder.finish(source, recorder.pool(*rings, ratio, overlaps=True))
    starts = [0, 2, 5]  # of slots that are at different places
    gates = gate + ape[torch.arange(40) % ratio]

    for step in range(30):
        positions = [max(0, step - start) for start in starts]
        for row, position in enumerate(positions):
            program.source[row] = torch.cat((kv[row, position], gate[row, position]))
        program.run(range(3), positions)
        for row, position in enumerate(positions):
            end = position + 1
            if end % ratio:
                assert not program.result[row].any()
                continue
            parts = [x[row, end - ratio : end, dim:] for x in (kv, gates)]
            if end > ratio:
                before = [x[row, end - 2 * ratio : end - ratio, :dim] for x in (kv, gates)]
                parts = [torch.cat(halves) for halves in zip(before, parts, strict=True)]
            expected = kernels().pool_groups(parts[0].unsqueeze(0), parts[1].unsqueeze(0))
            assert torch.equal(program.result[row], expected[0])


def test_a_row_attends_to_every_group_that_is_complete() -> None:
    heads, dim, window, every = 3, 32, 6, 8
    rings, entries, sink = values(1, ROWS, 9, dim), values(2, ROWS, 5, dim), values(3, heads)
    recorder = Recorder(kernels(), ROWS)
    source = recorder.input(heads * dim)
    out = recorder.attend_sparse(source, rings, sink, window, entries, None, every)
    program = recorder.finish(source, out)
    x, positions = values(4, ROWS, heads * dim), [0, 6, 7, 24, 39]
    program.source[:] = x
    program.run(range(ROWS), positions)

    for row, position in enumerate(positions):
        held = torch.arange(max(0, position + 1 - window), position + 1) % 9
        q, seen = x[row].view(1, heads, dim), torch.arange((position + 1) // every).unsqueeze(0)
        expected = kernels().attend_sparse(q, rings[row, held], sink, window, entries[row], seen)
        assert torch.equal(program.result[row], expected.flatten())


def test_experts_that_token_ids_choose_are_weighed_by_the_router() -> None:
    table = torch.randint(12, (7, 3), generator=torch.Generator().manual_seed(1))
    rule = RoutingRule(3, "sqrt softplus", is_renormalised=True, factor=1.5)
    recorder = Recorder(kernels(), ROWS)
    source = recorder.input(12)
    program = recorder.finish(source, recorder.weigh(source, recorder.by_token(table), rule))
    program.source[:] = values(1, ROWS, 12)
    tokens = [6, 0, 3, 3, 1]
    program.run(range(ROWS), range(ROWS), tokens)

    assert torch.equal(program.result, kernels().weigh(values(1, ROWS, 12), table[tokens], rule))


def test_streams_are_read_as_the_whole_mix_reads_them() -> None:
    hc, hidden, scale, base = 4, 24, values(2, 24), values(3, 24)
    fn = values(4, 24, hc * hidden)
    recorder = Recorder(kernels(), ROWS)
    source = recorder.input(hc * hidden)
    whole, _, _ = recorder.mix(source, fn, scale, base, 20, 1e-6, 1e-6)
    alone = recorder.read_mix(source, fn[:hc], scale[:hc], base[:hc], 1e-6, 1e-6)
    program = recorder.finish(source, recorder.join(whole, alone, 1))
    program.source[:] = values(1, ROWS, hc * hidden)
    program.run(range(ROWS), range(ROWS))

    assert torch.equal(program.result[:, :hc], program.result[:, hc:])
    m = kernels().linear(kernels().rms_norm(values(1, ROWS, hc * hidden), None, 1e-6), fn[:hc])
    expected = kernels().sigmoid(m * scale[:hc] + base[:hc]) + 1e-6
    assert torch.equal(program.result[:, hc:], expected)
