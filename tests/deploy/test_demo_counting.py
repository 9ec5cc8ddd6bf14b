"""What is counted: Engram rows say what an n-gram adds to the expectation of the next token; soft targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from advice import CONTEXT, Advice, Advisor, advisors_for, context_keys
from counting import fit, news_of, next_token_codes
from kneser_ney import KneserNey
from loss import HeadLoss
from tables import FOLDS

VOCABULARY = 40
RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(4, VOCABULARY, 60) for _ in range(50)]


def test_news_of_all_suffixes_add_up_to_the_expected_code() -> None:
    codes = torch.eye(VOCABULARY)
    model = KneserNey(DOCUMENTS, VOCABULARY, 3)
    orders = model.orders[::-1]
    news = news_of(orders, codes)
    context = orders[2].contexts[7]
    first, second = int(context >> 12), int(context & 4095)

    expected = codes.mean(0)
    for length, key in ((0, 0), (1, second), (2, context)):
        expected = expected + news[length][int(np.searchsorted(orders[length].contexts, key))]

    for token in (5, 17, 30):
        document = np.array([3, first, second, token])
        wanted = np.exp(model.log_probabilities(document)[3])
        assert float(expected[token]) == pytest.approx(wanted, rel=1e-4)


def test_contexts_that_always_go_on_alike_have_more_news_than_others() -> None:
    documents = [np.array([5, 6, int(x), 7, 8, 9]) for x in RNG.integers(10, 40, 200)]
    orders = KneserNey(documents, VOCABULARY, 2).orders[::-1]
    news = news_of(orders, torch.eye(VOCABULARY))[1].norm(dim=1)
    certain, vague = np.searchsorted(orders[1].contexts, [7, 6])
    assert float(news[certain]) > 2 * float(news[vague])


def test_codes_have_length_one_and_tokens_that_follow_the_same_words_are_near() -> None:
    pairs = np.stack((RNG.integers(20, 22, 400), RNG.integers(25, 27, 400)), 1)
    documents = [np.array([5, x, 9, 11, y, 30]) for x, y in pairs]
    codes = next_token_codes(documents, VOCABULARY, 8)
    torch.testing.assert_close(codes[[20, 21, 25, 26]].norm(dim=1), torch.ones(4), rtol=1e-3, atol=0)
    assert float(codes[20] @ codes[21]) > 0.9
    assert float(codes[20] @ codes[25]) < 0.5


def test_rows_add_up_to_the_news_where_there_is_room() -> None:
    torch.manual_seed(0)
    rows = torch.stack((torch.randint(0, 50, (30,)), torch.randint(50, 100, (30,))), 1)
    news, uses = torch.randn(30, 4), torch.full((30,), 1000.0)
    x = fit(rows, news, uses, 100)
    summed = x[rows[:, 0]] + x[rows[:, 1]]
    assert float((summed - news).square().mean() / news.square().mean()) < 0.1


def test_frequent_contexts_win_collisions() -> None:
    rows = torch.zeros(2, 1, dtype=torch.int64)
    news = torch.tensor([[1.0], [-1.0]])
    x = fit(rows, news, torch.tensor([99.0, 1.0]), 1)
    assert float(x) == pytest.approx(0.98, abs=0.02)


def test_an_advisor_gives_the_whole_distribution_of_its_model() -> None:
    model = KneserNey(DOCUMENTS, VOCABULARY, CONTEXT + 1)
    document = np.concatenate((DOCUMENTS[0][:20], [3, 1, 3], DOCUMENTS[1][:20]))  # with contexts never seen
    ids = torch.from_numpy(document).unsqueeze(0)

    expected = Advisor(model).distributions(context_keys(ids, torch.zeros_like(ids))[0])

    torch.testing.assert_close(expected.sum(1), torch.ones(len(document)))
    following = expected[:-1].gather(1, ids[0, 1:, None]).squeeze(1).log()
    wanted = torch.from_numpy(model.log_probabilities(document)[1:]).float()
    torch.testing.assert_close(following, wanted, rtol=1e-4, atol=1e-5)


def test_documents_in_a_row_do_not_see_each_other_in_context_keys() -> None:
    ids, documents = torch.tensor([[7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1]])
    keys = context_keys(ids, documents)
    alone = context_keys(ids[:, 2:], documents[:, 2:])
    assert torch.equal(keys[:, 2:], alone)


def test_no_text_is_advised_by_what_was_counted_in_it() -> None:
    marked = [np.array([5, 6, 7, 8, 30 + fold]) for fold in range(FOLDS)]
    advisors = advisors_for(marked, list(range(FOLDS)), VOCABULARY)
    ids = torch.tensor([[6, 7, 8]])
    keys = context_keys(ids, torch.zeros_like(ids))[0, -1:]
    for fold, advisor in enumerate(advisors):
        own, others = (
            advisor.distributions(keys)[0][30 + fold],
            advisor.distributions(keys)[0][30 : 30 + FOLDS],
        )
        assert float(own) == float(others.min()) < float(others.max())


def test_advised_loss_and_gradients_are_those_of_soft_targets() -> None:
    torch.manual_seed(0)
    advisors = advisors_for(DOCUMENTS, [i % FOLDS for i in range(len(DOCUMENTS))], VOCABULARY)
    ids = torch.from_numpy(DOCUMENTS[0]).unsqueeze(0)
    contexts = context_keys(ids, torch.zeros_like(ids))[0]
    share = torch.tensor([0.0, 0.4]).repeat(30)
    advice = Advice(advisors, share, torch.arange(60) % FOLDS, contexts)
    states = torch.randn(60, 8, requires_grad=True)
    head = torch.randn(VOCABULARY, 8, requires_grad=True)
    wanted = torch.randint(0, VOCABULARY, (60,))

    loss = HeadLoss.apply(states, head, wanted, advice, torch.float32)
    got = torch.autograd.grad(loss, (states, head))

    expected = torch.stack([advisors[i % FOLDS].distributions(contexts[i : i + 1])[0] for i in range(60)])
    target = (1 - share[:, None]) * torch.nn.functional.one_hot(wanted, VOCABULARY) + share[
        :, None
    ] * expected
    plain = torch.nn.functional.cross_entropy(states @ head.t(), target)
    torch.testing.assert_close(loss, plain)
    for a, b in zip(got, torch.autograd.grad(plain, (states, head)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
