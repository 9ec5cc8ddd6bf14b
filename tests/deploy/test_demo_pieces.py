"""The pieces of the training code that are written out by hand agree with their plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blocks import BlockAttention, IndexScores, spans_of
from experts import RoutedExperts
from kneser_ney import KneserNey
from loss import HeadLoss
from packing import lay_out
from quant.formats.fp8 import FP8_32, FP8_ROW
from quant.formats.mxfp4 import MXFP4
from quant.packed import PackedTensor
from quantise import (
    encode_fp4,
    encode_fp8_rows,
    encode_fp8_tiles,
    round_fp4,
    round_fp8_rows,
    round_fp8_tiles,
)
from schedule import Schedule, Stage


def plain_experts(x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor, limit: float) -> Tensor:
    rows = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for weight, e in zip(weights[token], ids[token], strict=True):
            gate, up = (w13[e] @ x[token]).chunk(2)
            total = total + weight * (w2[e] @ (F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)))
        rows.append(total)
    return torch.stack(rows)


def test_experts_give_the_gradients_of_their_definition() -> None:
    torch.manual_seed(1)
    x, weights = torch.randn(9, 8, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(9)])
    w13, w2 = torch.randn(5, 12, 8, requires_grad=True), torch.randn(5, 8, 6, requires_grad=True)
    leaves = (x, weights, w13, w2)
    direction = torch.randn(9, 8)
    fast = RoutedExperts.apply(x, weights, ids, w13, w2, 1.0, torch.float32)
    fast_grads = torch.autograd.grad((fast * direction).sum(), leaves)
    slow = plain_experts(x, weights, ids, w13, w2, 1.0)
    slow_grads = torch.autograd.grad((slow * direction).sum(), leaves)
    torch.testing.assert_close(fast, slow)
    for got, want in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(got, want)


def test_head_loss_is_cross_entropy_with_its_gradients() -> None:
    torch.manual_seed(2)
    states, head = torch.randn(700, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    wanted = torch.randint(0, 40, (700,))
    blocked = HeadLoss.apply(states, head, wanted, None, torch.float32)
    whole = F.cross_entropy(states @ head.t(), wanted)
    torch.testing.assert_close(blocked, whole)
    got, want = (torch.autograd.grad(loss, (states, head)) for loss in (blocked, whole))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def seen_entries(documents: Tensor, ratio: int) -> Tensor:
    """Which entries each token of a row may see, `[T, G]`."""
    tokens, entries = len(documents), len(documents) // ratio
    complete = (torch.arange(entries) + 1) * ratio <= torch.arange(tokens).unsqueeze(1) + 1
    return complete & (documents.unsqueeze(1) == documents[::ratio][:entries])


ROW = torch.tensor([0] * 70 + [1] * 30 + [2] * 60)  # three documents in five blocks of 32


def test_attention_in_blocks_is_the_plain_one_with_its_gradients() -> None:
    torch.manual_seed(3)
    window, ratio, heads = 32, 2, 3
    q, kv = torch.randn(1, 160, heads, 8, requires_grad=True), torch.randn(1, 160, 8, requires_grad=True)
    entries, sink = torch.randn(1, 80, 8, requires_grad=True), torch.randn(heads, requires_grad=True)
    selected = seen_entries(ROW, ratio) & (torch.rand(160, 80) < 0.5)
    at = torch.arange(160)
    near = (at <= at.unsqueeze(1)) & (at > at.unsqueeze(1) - window) & (ROW.unsqueeze(1) == ROW)

    scores = torch.cat((q[0] @ kv[0].t(), q[0] @ entries[0].t()), dim=-1)  # [T, heads, T + G]
    hidden = ~torch.cat((near, selected), dim=-1).unsqueeze(1)
    exponents = scores.masked_fill(hidden, -torch.inf).exp()
    weights = exponents / (exponents.sum(-1, keepdim=True) + sink.exp().view(1, heads, 1))
    slow = (weights @ torch.cat((kv[0], entries[0]))).unsqueeze(0)

    blocks = torch.cat((torch.zeros(160, window, dtype=torch.bool), near), dim=1)
    in_window = torch.stack([blocks[t, t // window * window :][: 2 * window] for t in range(160)])
    bias = [torch.zeros(mask.shape).masked_fill(~mask, -1e30).unsqueeze(0) for mask in (in_window, selected)]
    spans = spans_of(ROW.unsqueeze(0), window, ratio)
    fast, attended = BlockAttention.apply(q, kv, entries, sink, *bias, spans, torch.float32)

    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(attended[0], weights[..., 160:].sum(1).detach())
    direction = torch.randn_like(fast)
    got, want = (torch.autograd.grad((o * direction).sum(), (q, kv, entries, sink)) for o in (fast, slow))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_index_scores_in_blocks_are_the_plain_ones_with_their_gradients() -> None:
    torch.manual_seed(6)
    queries, weights = (
        torch.randn(1, 160, 3, 8, requires_grad=True),
        torch.randn(1, 160, 3, requires_grad=True),
    )
    keys = torch.randn(1, 80, 8, requires_grad=True)
    seen = seen_entries(ROW, 2)
    direction = torch.randn(1, 160, 80) * seen
    fast = IndexScores.apply(queries, weights, keys, spans_of(ROW.unsqueeze(0), 32, 2), torch.float32)
    slow = torch.einsum("bthg,bth->btg", torch.einsum("bthd,bgd->bthg", queries, keys).relu(), weights)
    torch.testing.assert_close(fast * seen, slow * seen)
    got, want = (torch.autograd.grad((s * direction).sum(), (queries, weights, keys)) for s in (fast, slow))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20])
def test_training_rounds_to_exactly_what_the_files_hold(scale: float) -> None:
    torch.manual_seed(4)
    w = torch.randn(64, 96) * scale * torch.logspace(-2, 2, 96)
    w[:32, :32] = 0
    for round_, encode, stored in (
        (round_fp8_tiles, encode_fp8_tiles, FP8_32),
        (round_fp8_rows, encode_fp8_rows, FP8_ROW),
        (round_fp4, encode_fp4, MXFP4),
    ):
        codes, scales = encode(w)
        assert torch.equal(PackedTensor(stored, (64, 96), codes, scales).decode(), round_(w)), stored.name
        assert torch.equal(round_(round_(w)), round_(w)), stored.name


def test_rows_hold_every_token_once_and_begin_documents_at_aligned_places() -> None:
    lengths = [5, 300, 17, 64, 1, 130]
    rows = lay_out(lengths, 128, 4)
    seen = [[0] * length for length in lengths]
    for row in rows:
        used = 0
        for document, start, stop in row:
            assert used % 4 == 0
            used += -(-(stop - start) // 4) * 4
            for i in range(start, stop):
                seen[document][i] += 1
        assert used <= 128
    assert all(count == 1 for document in seen for count in document)


def test_five_gram_probabilities_sum_to_one_and_prefer_what_was_seen() -> None:
    rng = np.random.default_rng(5)
    documents = [rng.integers(3, 9, size=40) for _ in range(30)] + [np.array([3, 4, 5, 6, 7, 8] * 8)] * 5
    model = KneserNey(documents, vocabulary=12)
    history = np.array([3, 4, 5, 6])
    chances = [np.exp(model.log_probabilities(np.append(history, token))[-1]) for token in range(12)]
    assert sum(chances) == pytest.approx(1.0)
    assert int(np.argmax(chances)) == 7
    assert min(chances) > 0


def test_learning_rate_warms_up_rests_and_decays() -> None:
    schedule = Schedule(1.0, 100, (Stage("a", 1000, 256, 256), Stage("b", 1000, 512, 512, decay=True)))
    assert schedule.learning_rate(0) == pytest.approx(0.01)
    assert schedule.learning_rate(500) == 1.0
    assert schedule.learning_rate(1500) == pytest.approx(0.5)
    assert schedule.learning_rate(2000) == 0.0
    assert [schedule.stage_at(t)[1].name for t in (0, 999, 1000, 5000)] == ["a", "a", "b", "b"]
