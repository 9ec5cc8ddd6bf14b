"""What layers compute, natively: what torch finds in float64, each row with the same bits in any company."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats.fp8 import FP8_ROW
from quant.kernels.cpu import library
from quant.kernels.cpu.native import NativeKernels
from quant.kernels.cpu.native_attention import fetched
from quant.kernels.layers import DeltaRule, LayerOperations, RoutingRule
from quant.kernels.torch_layers import TorchLayers
from tests.quant.kernels.kernel_cases import weight

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="the compiled kernels were not built")

TORCH = TorchLayers()
LEVELS = library.available_levels() if library.library_path() is not None else ()
# An operation on rows from `first` to `stop` of fixed random inputs.
Operation = Callable[[LayerOperations, int, int, torch.dtype], torch.Tensor]
PLAIN = RoutingRule(3, "sqrt softplus", is_renormalised=True)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rows_of(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROWS, DIM = 37, 72  # neither fills vectors


def gated(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    return k.gated(4 * rows_of(1, ROWS, DIM, dtype=dtype)[a:b], rows_of(2, ROWS, DIM, dtype=dtype)[a:b], 2.5)


def sigmoid(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    return k.sigmoid(9 * rows_of(1, ROWS, 5, dtype=dtype)[a:b])


def weighted_sum(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    return k.weighted_sum(rows_of(1, ROWS, 6, 700, dtype=dtype)[a:b], rows_of(2, ROWS, 6, dtype=dtype)[a:b])


def mix_streams(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    parts = [(ROWS, 4, DIM), (ROWS, DIM), (ROWS, 4), (ROWS, 4, 4)]
    return k.mix_streams(*(rows_of(seed, *shape, dtype=dtype)[a:b] for seed, shape in enumerate(parts)))


def rotate(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    angles = rows_of(2, ROWS, 11, dtype=dtype)[a:b]
    return k.rotate(rows_of(1, ROWS, 3, DIM, dtype=dtype)[a:b], torch.polar(torch.ones_like(angles), angles))


def turns(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    positions = torch.arange(ROWS)[a:b] * 9973
    found = k.turns(positions, torch.tensor([1.0, 0.37, 1e-3, 1e-6], dtype=torch.float64))
    return torch.view_as_real(found).to(dtype)


def routed(rule: RoutingRule, has_bias: bool = False) -> Operation:
    def operation(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
        logits, bias = 3 * rows_of(1, ROWS, 20, dtype=dtype)[a:b], rows_of(2, 20, dtype=dtype)
        found = k.route(logits, bias if has_bias else None, rule)
        return torch.cat([part.to(dtype) for part in found], dim=1)

    operation.__name__ = f"route by {rule.score}" + (" in groups" if rule.groups else "")
    return operation


def weighed(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    chosen = torch.randint(20, (ROWS, 3), generator=torch.Generator().manual_seed(3))
    return k.weigh(3 * rows_of(1, ROWS, 20, dtype=dtype)[a:b], chosen[a:b], PLAIN)


def pool_groups(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    return k.pool_groups(
        rows_of(1, ROWS, 4, DIM, dtype=dtype)[a:b], rows_of(2, ROWS, 4, DIM, dtype=dtype)[a:b]
    )


def engram_gates(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    keys = rows_of(3, ROWS, 5 * DIM, dtype=dtype)[a:b, : 4 * DIM].view(b - a, 4, DIM)
    return k.engram_gates(
        rows_of(1, ROWS, 4, DIM, dtype=dtype)[a:b], rows_of(2, 4, DIM, dtype=dtype), keys, 1e-6
    )


def index_scores(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    visible = torch.arange(1, ROWS + 1)[a:b] * 5
    return k.index_scores(
        rows_of(1, ROWS, 5, 24, dtype=dtype)[a:b],
        rows_of(2, ROWS, 5, dtype=dtype)[a:b],
        rows_of(3, 5 * ROWS, 24, dtype=dtype),
        visible,
    )


def named_scores(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    entries = torch.randint(-1, 90, (ROWS, 140), generator=torch.Generator().manual_seed(4))
    return k.index_scores(
        rows_of(1, ROWS, 5, 24, dtype=dtype)[a:b],
        rows_of(2, ROWS, 5, dtype=dtype)[a:b],
        rows_of(3, 90, 24, dtype=dtype),
        torch.full((b - a,), 90),
        entries[a:b],
    )


def attend(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    before = 300  # tokens: three blocks of keys
    keys, values = (rows_of(seed, 2, before + ROWS, 20, dtype=dtype)[:, : before + b] for seed in (2, 3))
    return k.attend(2 * rows_of(1, ROWS, 6, 20, dtype=dtype)[a:b], keys, values)


def attend_latents(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    rows = rows_of(2, 1, 300 + ROWS, 152, dtype=dtype)[:, : 300 + b]
    return k.attend(2 * rows_of(1, ROWS, 6, 152, dtype=dtype)[a:b], rows, rows[..., :100])


def attend_chosen(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    scores = rows_of(4, ROWS, 90)
    scores[:, 40:] -= 9 * torch.arange(ROWS).remainder(2).unsqueeze(1)
    chosen = scores.topk(60).indices.sort().values.masked_fill(torch.arange(60) > 50, -1)
    rows = rows_of(2, 90, 152, dtype=dtype)
    return k.attend_chosen(2 * rows_of(1, ROWS, 6, 152, dtype=dtype)[a:b], rows, chosen[a:b], 100)


def attend_narrow_values(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    keys = rows_of(2, 2, 60 + ROWS, 24, dtype=dtype)[:, : 60 + b]
    values = rows_of(3, 2, 60 + ROWS, 16, dtype=dtype)[:, : 60 + b]
    return k.attend(rows_of(1, ROWS, 4, 24, dtype=dtype)[a:b], keys, values)


def batched_linear(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    return k.batched_linear(rows_of(1, ROWS, 3, 40, dtype=dtype)[a:b], rows_of(2, 3, 22, 40))


def attend_sparse(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    window = 9
    entries = torch.randint(-1, 50, (ROWS, 150), generator=torch.Generator().manual_seed(5))
    return k.attend_sparse(
        2 * rows_of(1, ROWS, 5, 40, dtype=dtype)[a:b],
        rows_of(2, ROWS, 40, dtype=dtype)[max(0, a - window + 1) : b],
        rows_of(3, 5, dtype=dtype),
        window,
        rows_of(4, 50, 40, dtype=dtype),
        entries[a:b],
    )


def convolve(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    x, weights = rows_of(1, ROWS, DIM, dtype=dtype), rows_of(2, 4, DIM, dtype=dtype)
    tail = torch.full((3, DIM), 7.0, dtype=dtype)  # what another sequence left
    if a:
        k.convolve(x[:a], weights, tail, 0)
    return k.convolve(x[a:b], weights, tail, a)


def delta_rule(k: LayerOperations, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    key_heads, heads, key_dim, value_dim = 2, 4, 48, 80
    parts = [rows_of(seed, ROWS, heads, dtype=dtype) for seed in (1, 2)]
    x = rows_of(3, ROWS, 2 * key_heads * key_dim + heads * value_dim, dtype=dtype)
    rule = DeltaRule(key_heads, -rows_of(4, heads, dtype=dtype).exp(), rows_of(5, heads, dtype=dtype))
    state = rows_of(6, heads, key_dim, value_dim, dtype=dtype)  # what another sequence left
    found = x[:0]
    for first, stop in ((0, a), (a, b)):
        if first < stop:
            of_a, of_b = (part[first:stop] for part in parts)
            found = k.delta_rule(x[first:stop], of_a, of_b, rule, state, is_first=first == 0)
    return found


OPERATIONS = (
    convolve,
    delta_rule,
    gated,
    sigmoid,
    weighted_sum,
    mix_streams,
    rotate,
    turns,
    routed(RoutingRule(6, "sqrt softplus", is_renormalised=True, epsilon=1e-20, factor=1.5), has_bias=True),
    routed(RoutingRule(6, "softmax")),
    routed(RoutingRule(4, "softmax", is_renormalised=True, factor=2.5)),
    routed(RoutingRule(5, "sigmoid", (5, 3, 2), is_renormalised=True, epsilon=1e-20), has_bias=True),
    routed(RoutingRule(5, "softmax", (4, 2, 1), factor=16.0)),
    routed(RoutingRule(4, "chosen softmax")),
    weighed,
    pool_groups,
    engram_gates,
    index_scores,
    named_scores,
    attend,
    attend_latents,
    attend_chosen,
    attend_narrow_values,
    batched_linear,
    attend_sparse,
)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_comes_out_is_right(level: str, operation: Operation) -> None:
    exact = operation(TORCH, 0, ROWS, torch.float64)

    found = operation(NativeKernels(level=level), 0, ROWS, torch.float32)

    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
@given(
    cuts=st.sets(st.integers(1, ROWS - 1)), threads=st.integers(1, 5), level=st.sampled_from(LEVELS or ("",))
)
@settings(max_examples=20)
def test_a_row_has_the_same_bits_in_any_company(
    operation: Operation, cuts: set[int], threads: int, level: str
) -> None:
    together = operation(NativeKernels(level=level, threads=1), 0, ROWS, torch.float32)
    kernels = NativeKernels(level=level, threads=threads)
    ends = [*sorted(cuts), ROWS]

    for first, stop in zip([0, *ends], ends, strict=False):
        part = operation(kernels, first, stop, torch.float32)
        columns = part.shape[-1]  # later rows may see more entries
        assert torch.equal(part, together[first:stop, ..., :columns])


def test_what_is_computed_in_place_has_the_same_bits(level: str) -> None:
    kernels = NativeKernels(level=level)
    entries = torch.randint(-1, 50, (ROWS, 20), generator=torch.Generator().manual_seed(5))
    q, window_kv, sink, compressed = (
        rows_of(1, ROWS, 5, 40),
        rows_of(2, ROWS, 40),
        rows_of(3, 5),
        rows_of(4, 50, 40),
    )
    angles = rows_of(6, ROWS, 11)
    turns = torch.polar(torch.ones_like(angles), angles)
    turned = kernels.rotate(q, turns)
    attended = kernels.attend_sparse(turned, window_kv, sink, 4, compressed, entries)

    assert torch.equal(kernels.rotate(q, turns, in_place=True), turned)
    assert torch.equal(q, turned)
    assert torch.equal(
        kernels.attend_sparse(q, window_kv, sink, 4, compressed, entries, in_place=True), attended
    )
    assert torch.equal(q, attended)


def test_entries_that_were_fetched_from_elsewhere_give_the_same_bits() -> None:
    entries = torch.randint(-1, 50, (9, 20), generator=torch.Generator().manual_seed(5))
    q, window_kv, sink, compressed = (
        rows_of(1, 9, 5, 40),
        rows_of(2, 9, 40),
        rows_of(3, 5),
        rows_of(4, 50, 40),
    )
    kernels = NativeKernels()

    here = kernels.attend_sparse(q, window_kv, sink, 4, compressed, entries)

    there = fetched(compressed, entries)
    assert len(there[0]) < entries.numel()
    assert torch.equal(kernels.attend_sparse(q, window_kv, sink, 4, *there), here)


def test_attention_over_all_rows_is_that_over_chosen_ones_bit_for_bit() -> None:
    q, rows = rows_of(1, ROWS, 6, 152), rows_of(2, 300, 152)
    chosen = torch.arange(310).expand(ROWS, -1)
    visible = torch.arange(300 - ROWS + 1, 301).unsqueeze(1)

    found = NativeKernels().attend_chosen(q, rows, chosen.where(chosen < visible, -1), 100)

    assert torch.equal(found, NativeKernels().attend(q, rows.unsqueeze(0), rows.unsqueeze(0)[..., :100]))


def test_what_a_router_has_chosen_is_weighed_with_the_same_bits() -> None:
    logits = rows_of(1, ROWS, 20)
    chosen, weights = NativeKernels().route(logits, None, PLAIN)

    assert torch.equal(NativeKernels().weigh(logits, chosen, PLAIN), weights)


def test_of_equal_scores_the_first_columns_win() -> None:
    scores = torch.tensor([[1.0, 3, 2, 2, -torch.inf, 2], [-torch.inf, 0, -torch.inf, 0, -1, -torch.inf]])

    best = NativeKernels().best_columns(scores, 4)

    assert best.tolist() == [[1, 2, 3, 5], [1, 3, 4, -1]]


def test_nan_is_the_best_whatever_its_sign_and_zeros_are_equal() -> None:
    negative = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    scores = torch.tensor([[1.0, 0, 0.5, -0.0, 2, torch.nan], [-0.0, 0, -1, -0.0, 0, -2]])
    scores[0, 1] = negative

    best = NativeKernels().best_columns(scores, 3)

    assert best.tolist() == [[1, 4, 5], [0, 1, 3]]


def test_nothing_is_scored_or_chosen_for_no_rows() -> None:
    kernels = NativeKernels()

    assert kernels.best_columns(torch.empty(0, 40_000), 3).shape == (0, 3)
    assert kernels.best_columns(torch.empty(2, 0), 3).shape == (2, 0)
    scores = kernels.index_scores(
        torch.empty(0, 2, 32), torch.empty(0, 2), torch.empty(7, 32), torch.empty(0, dtype=torch.int64)
    )
    assert scores.shape == (0, 7)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("top_k", [1, 700, 90_000])
def test_the_best_of_a_long_row_are_found_by_any_number_of_threads(threads: int, top_k: int) -> None:
    scores = (rows_of(1, 2, 80_000) * 50).round()  # many are equal
    scores[:, ::3] = -torch.inf
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best = NativeKernels().best_columns(scores, top_k)
    finally:
        torch.set_num_threads(before)

    order = scores.sort(dim=1, descending=True, stable=True).indices[:, : min(top_k, 80_000)]
    left = order.masked_fill(scores.gather(1, order) == -torch.inf, 80_000).sort(dim=1).values
    assert torch.equal(best, left.masked_fill(left == 80_000, -1))


def test_what_is_no_number_is_above_all_scores_whatever_its_sign() -> None:
    negative = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32)
    scores = torch.tensor([[3.0, 1.0, 0.0, 2.0]])
    scores[0, 2:3] = negative

    assert negative.isnan()
    assert NativeKernels().best_columns(scores, 2).tolist() == [[0, 2]]


def test_of_no_rows_nothing_is_chosen() -> None:
    assert NativeKernels().best_columns(torch.zeros(0, 80_000), 3).shape == (0, 3)


def test_of_equal_experts_the_first_are_chosen() -> None:
    chosen, weights = NativeKernels().route(torch.zeros(2, 9), torch.zeros(9), PLAIN)

    assert chosen.tolist() == [[0, 1, 2]] * 2
    assert torch.allclose(weights, torch.full((2, 3), 1 / 3))


def test_what_is_no_number_stays_none() -> None:
    broken = torch.full((1, 1, 16), torch.nan)
    kernels = NativeKernels()

    assert kernels.attend(
        broken, torch.zeros(1, 1, 16), torch.zeros(1, 1, 16)
    ).isfinite().all() == torch.tensor(False)
    assert kernels.route(broken[0, :, :9], torch.zeros(9), PLAIN)[1].isnan().all()
    assert kernels.engram_gates(broken, torch.ones(1, 16), torch.ones(1, 1, 16), 1e-6).isnan().all()


def test_weights_without_panels_need_no_company_either() -> None:
    kernels, table, x = NativeKernels(), weight(FP8_ROW, 40, 64), rows_of(1, 9, 64)
    together = kernels.linear(x, table)

    assert torch.equal(together, torch.cat([kernels.linear(x[i : i + 1], table) for i in range(9)]))
