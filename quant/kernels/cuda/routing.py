"""Triton: the experts that a row's logits choose, by any `RoutingRule`, for a recorded step."""

from __future__ import annotations

import triton
import triton.language as tl

from quant.kernels.layers import RoutingRule

# `RoutingRule.score` by number.
SQRT_SOFTPLUS: tl.constexpr = tl.constexpr(0)
SOFTMAX: tl.constexpr = tl.constexpr(1)
SIGMOID: tl.constexpr = tl.constexpr(2)
CHOSEN_SOFTMAX: tl.constexpr = tl.constexpr(3)
SCORES = {"sqrt softplus": 0, "softmax": 1, "sigmoid": 2, "chosen softmax": 3}


def routing_constants(rule: RoutingRule) -> dict[str, int | bool]:
    """What the kernel must be compiled for."""
    groups, kept, best_of = rule.groups or (1, 1, 1)
    return {
        "TOP_K": rule.top_k, "SCORE": SCORES[rule.score], "RENORMED": rule.is_renormalised,
        "GROUPS": groups, "KEPT": kept, "BEST_OF": best_of,
    }  # fmt: skip


# Those of launches without a router.
NO_ROUTING: dict[str, int | bool] = {
    "TOP_K": 1, "SCORE": 0, "RENORMED": False, "GROUPS": 1, "KEPT": 1, "BEST_OF": 1,
}  # fmt: skip


@triton.jit
def scores_of(logit, inside, SCORE: tl.constexpr):
    """Scores of logits `[BLOCK]`."""
    if SCORE == SQRT_SOFTPLUS:
        small = tl.exp(-tl.abs(logit))
        above = 1.0 + small  # of which small * log(above) / (above - 1) is log1p(small), to the last bits
        log1p = tl.where(above == 1.0, small, small * tl.log(above) / (above - 1.0))
        return tl.sqrt(tl.maximum(logit, 0.0) + log1p)
    elif SCORE == SOFTMAX:
        logit = tl.where(inside, logit, float("-inf"))
        share = tl.exp(logit - tl.max(logit, axis=0))
        return share / tl.sum(share, axis=0)
    elif SCORE == SIGMOID:
        return 1.0 / (1.0 + tl.exp(-logit))
    else:
        return logit


@triton.jit
def best_groups(
    ranked,
    each,
    experts,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST_OF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ranked `[BLOCK]`, with -inf for experts outside of the KEPT best of GROUPS groups; a group is as good
    as the sum of its BEST_OF best."""
    group = each // (experts // GROUPS)
    value = tl.full([BLOCK], float("-inf"), tl.float32)  # of each group
    for number in tl.static_range(GROUPS):
        own = tl.where(group == number, ranked, float("-inf"))
        total = 0.0
        for _ in tl.static_range(BEST_OF):
            total += tl.max(own, axis=0)
            own = tl.where(each == tl.argmax(own, axis=0), float("-inf"), own)
        value = tl.where(each == number, total, value)
    kept = each < 0
    for _ in tl.static_range(KEPT):
        best = tl.argmax(value, axis=0)  # the first of equals
        kept = kept | (group == best)
        value = tl.where(each == best, float("-inf"), value)
    return tl.where(kept, ranked, float("-inf"))


@triton.jit
def chosen_experts(
    logit, bias, has_bias, experts, epsilon, factor,
    TOP_K: tl.constexpr, SCORE: tl.constexpr, RENORMED: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BEST_OF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of logits `[BLOCK]`: the chosen experts, int64, best first, and their weights; TOP_K of them count."""
    each = tl.arange(0, BLOCK)
    inside = each < experts
    score = scores_of(logit, inside, SCORE)
    ranked = score
    if has_bias:
        ranked = score + tl.load(bias + each, mask=inside, other=0.0)
    ranked = tl.where(inside, ranked, float("-inf"))
    if GROUPS > 1:
        ranked = best_groups(ranked, each, experts, GROUPS, KEPT, BEST_OF, BLOCK)
    chosen = tl.zeros([BLOCK], tl.float32)
    idents = tl.full([BLOCK], -1, tl.int64)
    for choice in tl.static_range(TOP_K):
        best = tl.argmax(ranked, axis=0)  # the first of equals
        weight = tl.sum(tl.where(each == best, score, 0.0), axis=0)
        chosen = tl.where(each == choice, weight, chosen)
        idents = tl.where(each == choice, best.to(tl.int64), idents)
        ranked = tl.where(each == best, float("-inf"), ranked)
    if SCORE == CHOSEN_SOFTMAX:
        held = tl.where(each < TOP_K, chosen, float("-inf"))
        share = tl.exp(held - tl.max(held, axis=0))
        chosen = share / tl.sum(share, axis=0)
    if RENORMED:
        chosen = chosen / (tl.sum(chosen, axis=0) + epsilon)
    return idents, chosen * factor
