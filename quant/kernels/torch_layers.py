"""Layer operations other than products with weights, in plain torch: the judge of all others.

Torch's summation order depends on the number of rows, so a token's result may differ in its last bits between
batches. The native back end (quant/kernels/cpu/native_layers.py) gives the same bits in every batch.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from quant.formats.rows import EncodedRows, RowFormat, Rows, values_of
from quant.kernels.layers import DeltaRule, RoutingRule

# Query tokens per block: bounds the score matrices to [block, heads, window + block + selected].
QUERY_BLOCK = 64
# Values of chosen rows that are gathered at a time: 64 MB.
GATHERED_VALUES = 1 << 24


class TorchLayers:
    """`LayerOperations` in plain torch, on any device."""

    def batched_linear(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.transpose(0, 1), weights.to(x.dtype).transpose(1, 2)).transpose(0, 1).contiguous()

    def gated(
        self, gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float = 1.0, shift: float = 0.0
    ) -> torch.Tensor:
        g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
        if alpha == 1 and shift == 0:
            return F.silu(g) * u
        return g * torch.sigmoid(alpha * g) * (u + shift)

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x)

    def weighted_sum(self, parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return torch.bmm(weights.unsqueeze(1), parts).squeeze(1)

    def mix_streams(
        self, streams: torch.Tensor, y: torch.Tensor, post: torch.Tensor, combine: torch.Tensor
    ) -> torch.Tensor:
        carried = torch.bmm(combine.transpose(1, 2), streams)
        return torch.addcmul(carried, post.unsqueeze(-1), y.unsqueeze(1))

    def turns(self, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        angles = positions.to(torch.float64).unsqueeze(-1) * frequencies
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def rotate(self, x: torch.Tensor, turns: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
        tokens, pairs = turns.shape
        turned = x if in_place else x.clone(memory_format=torch.contiguous_format)
        numbers = torch.view_as_complex(turned[..., -2 * pairs :].view(*x.shape[:-1], pairs, 2))
        numbers.mul_(turns.view(tokens, *(1,) * (x.dim() - 2), pairs))
        return turned

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = _scores(logits, rule)
        ranks = scores if bias is None else scores + bias
        if rule.groups is not None:
            count, kept, best_of = rule.groups
            grouped = ranks.view(len(ranks), count, -1)
            values = grouped.topk(best_of, dim=-1).values.sum(-1)  # [tokens, groups]
            is_out = torch.ones_like(values, dtype=torch.bool).scatter_(1, _best(values, kept), False)
            ranks = grouped.masked_fill(is_out.unsqueeze(-1), -torch.inf).view(ranks.shape)
        chosen = _best(ranks, rule.top_k)
        return chosen, _weigh(scores, chosen, rule)

    def weigh(self, logits: torch.Tensor, chosen: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
        return _weigh(_scores(logits, rule), chosen, rule)

    def pool_groups(self, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return (rows * gates.softmax(dim=1)).sum(1)

    def engram_gates(
        self, streams: torch.Tensor, qk: torch.Tensor, keys: torch.Tensor, eps: float
    ) -> torch.Tensor:
        dot = (streams * qk * keys).sum(-1)
        dot = dot * torch.rsqrt(streams.square().mean(-1) + eps)
        dot = dot * torch.rsqrt(keys.square().mean(-1) + eps) * streams.shape[-1] ** -0.5
        return torch.sigmoid(dot.sign() * dot.abs().clamp(min=1e-6).sqrt())

    def encode_rows(self, x: torch.Tensor, form: RowFormat | None) -> Rows:
        return x if form is None else EncodedRows(form.encode(x), form)

    def index_scores(
        self,
        queries: torch.Tensor,
        weights: torch.Tensor,
        keys: Rows,
        visible: torch.Tensor,
        entries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # Products of all heads are kept until they are added up, and keys are copied for each token.
        each = keys.shape[0] * queries.shape[1] if entries is None else entries.shape[1] * keys.shape[1]
        most = max(1, GATHERED_VALUES // max(1, each))
        if len(queries) > most:
            starts = [slice(at, at + most) for at in range(0, len(queries), most)]
            return torch.cat([
                self.index_scores(
                    queries[at], weights[at], keys, visible[at], None if entries is None else entries[at]
                )
                for at in starts
            ])  # fmt: skip
        if isinstance(keys, EncodedRows):
            queries = keys.format.as_query(queries)
        if entries is None:
            hidden = torch.arange(keys.shape[0], device=keys.device) >= visible.unsqueeze(1)
        else:
            hidden, keys = entries < 0, keys[entries.clamp(min=0)]  # [L, n, index_dim]
        dots = queries @ values_of(keys).transpose(-2, -1)  # [L, index_heads, G]
        return torch.einsum("lh,lhg->lg", weights, dots.relu()).masked_fill(hidden, -torch.inf)

    def best_columns(self, scores: torch.Tensor, top_k: int) -> torch.Tensor:
        values, columns = scores.topk(min(top_k, scores.shape[1]), dim=-1)
        return columns.masked_fill(values == -torch.inf, -1)

    def convolve(
        self, x: torch.Tensor, weights: torch.Tensor, tail: torch.Tensor, before: int
    ) -> torch.Tensor:
        kept, tokens = len(tail), len(x)
        places = torch.arange(before - kept, before + tokens, device=x.device)
        earlier = tail[places[:kept] % kept] * (places[:kept] >= 0).unsqueeze(1)
        rows = torch.cat((earlier, x))
        out = sum((row * rows[i : i + tokens] for i, row in enumerate(weights)), torch.zeros_like(x))
        tail[places[-kept:] % kept] = rows[-kept:]
        return F.silu(out)

    def delta_rule(
        self,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        rule: DeltaRule,
        state: torch.Tensor,
        *,
        is_first: bool,
    ) -> torch.Tensor:
        heads, key_dim, value_dim = state.shape
        keys = rule.key_heads * key_dim
        q, k = (
            _of_length_one(part.view(len(x), rule.key_heads, key_dim)).repeat_interleave(
                heads // rule.key_heads, dim=1
            )
            for part in (x[:, :keys], x[:, keys : 2 * keys])
        )
        q = q * key_dim**-0.5
        v = x[:, 2 * keys :].view(len(x), heads, value_dim)
        decay, beta = (rule.rates * F.softplus(a + rule.biases)).exp(), b.sigmoid()
        if is_first:
            state.zero_()
        out = torch.empty_like(v)
        for t in range(len(x)):
            state *= decay[t].view(heads, 1, 1)
            known = (k[t].unsqueeze(1) @ state).squeeze(1)  # [heads, value_dim]
            state += k[t].unsqueeze(2) * ((v[t] - known) * beta[t].unsqueeze(1)).unsqueeze(1)
            out[t] = (q[t].unsqueeze(1) @ state).squeeze(1)
        return out.flatten(1)

    def attend(
        self,
        q: torch.Tensor,
        keys: Rows,
        values: Rows,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        length, heads, head_dim = q.shape
        kv_heads, end, _ = keys.shape
        first = 0 if window is None else max(0, end - length - window + 1)
        keys, values, end = values_of(keys[:, first:]), values_of(values[:, first:]), end - first
        most = max(1, GATHERED_VALUES // (end * heads))
        if length > most:  # of some tokens at a time: who sees what is a mask, and scores may be kept
            parts = []
            for start in range(0, length, most):
                stop = min(start + most, length)
                seen = slice(end - length + stop)
                parts.append(self.attend(q[start:stop], keys[:, seen], values[:, seen], window, sinks))
            return torch.cat(parts)
        if sinks is not None:  # a key that scores sinks_h with every query of head h, and a value of zero
            return _attend_with_sinks(q, keys, values, _visible(length, end, window, q.device), sinks)
        # Query heads that share a key-value head become extra rows of one query.
        rows = q.view(length, kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        mask = _visible(length, end, window, q.device)
        if mask is not None:
            mask = mask.repeat(heads // kv_heads, 1)
        attended = F.scaled_dot_product_attention(
            rows.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=mask
        )  # [1, kv_heads, heads / kv_heads * length, value_dim]
        attended = attended.view(kv_heads, -1, length, values.shape[-1])
        return attended.permute(2, 0, 1, 3).reshape(length, heads, -1)

    def attend_chosen(
        self, q: torch.Tensor, rows: Rows, chosen: torch.Tensor, value_dim: int
    ) -> torch.Tensor:
        block = max(1, GATHERED_VALUES // (chosen.shape[1] * rows.shape[1]))
        outs = []
        for start in range(0, len(q), block):
            queries, of_queries = q[start : start + block], chosen[start : start + block]
            keys = values_of(rows[of_queries.clamp(min=0)])  # [block, k, head_dim]
            scores = (queries * q.shape[-1] ** -0.5) @ keys.transpose(1, 2)  # [block, heads, k]
            weights = scores.masked_fill((of_queries < 0).unsqueeze(1), -torch.inf).softmax(-1)
            outs.append(weights @ keys[..., :value_dim])
        return torch.cat(outs)

    def attend_sparse(
        self,
        q: torch.Tensor,
        window_kv: Rows,
        sink: torch.Tensor,
        window: int,
        compressed: Rows | None = None,
        entries: torch.Tensor | None = None,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        before = window_kv.shape[0] - q.shape[0]
        blocks = []
        for start in range(0, q.shape[0], QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, q.shape[0])
            first = max(0, start + before - window + 1)
            keys = values_of(window_kv[first : stop + before])
            chosen: tuple[Rows, torch.Tensor] | None = None
            hidden = None
            if compressed is not None and entries is not None:
                chosen = compressed, entries[start:stop]
            if stop - start > 1:  # a single query sees all of these keys
                own = torch.arange(start, stop, device=q.device).unsqueeze(1) + before  # each query's own key
                key_index = torch.arange(first, stop + before, device=q.device)
                hidden = (key_index > own) | (key_index <= own - window)  # [block, keys]
            blocks.append(_attend_block(q[start:stop], keys, hidden, sink, chosen))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _of_length_one(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _visible(length: int, end: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which of `end` keys the last `length` tokens see, `[length, end]`; None where a single one sees all."""
    if length == 1:
        return None
    own, keys = torch.arange(end - length, end, device=device).unsqueeze(-1), torch.arange(end, device=device)
    visible = keys <= own
    return visible if window is None else visible & (keys > own - window)


def _attend_with_sinks(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Attention of q `[L, heads, head_dim]` with a learned logit for each head in the denominator."""
    length, heads, head_dim = q.shape
    kv_heads = keys.shape[0]
    rows = q.view(length, kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [kv_heads, shared, L, head_dim]
    scores = rows @ keys.transpose(1, 2).unsqueeze(1) * head_dim**-0.5  # [kv_heads, shared, L, end]
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    column = sinks.view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat((column, scores), dim=-1).softmax(-1)[..., 1:]
    return (weights @ values.unsqueeze(1)).permute(2, 0, 1, 3).reshape(length, heads, -1)


def _scores(logits: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    """Of all experts."""
    if rule.score == "sqrt softplus":
        return F.softplus(logits).sqrt()
    if rule.score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if rule.score == "sigmoid" else logits


def _weigh(scores: torch.Tensor, chosen: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    """Weights of the chosen experts, from all scores."""
    weights = scores.gather(1, chosen)
    if rule.score == "chosen softmax":
        weights = weights.softmax(-1)
    if rule.is_renormalised:
        weights = weights / (weights.sum(-1, keepdim=True) + rule.epsilon)
    return weights * rule.factor


def _best(values: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of the largest values of each row, falling; the first of equal ones."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _attend_block(
    q: torch.Tensor,
    keys: torch.Tensor,
    hidden: torch.Tensor | None,
    sink: torch.Tensor,
    chosen: tuple[Rows, torch.Tensor] | None,
) -> torch.Tensor:
    """One block of queries `[block, heads, head_dim]` over `[keys, head_dim]` and gathered entries.

    hidden `[block, keys]`: mask of keys that a query must not see; None for no mask.
    """
    block, heads, head_dim = q.shape
    q = q * head_dim**-0.5
    scores = q @ keys.t()  # [block, heads, keys]
    if hidden is not None:
        scores = scores.masked_fill(hidden.unsqueeze(1), -torch.inf)
    parts = [sink.view(1, heads, 1).expand(block, heads, 1), scores]
    if chosen is not None:
        compressed, entries = chosen
        found = compressed[entries.clamp(min=0).to(compressed.device)].to(q.device)
        latents = values_of(found)  # [block, k, head_dim]
        selected = (q @ latents.transpose(1, 2)).masked_fill((entries < 0).unsqueeze(1), -torch.inf)
        parts.append(selected)
    weights = torch.cat(parts, dim=-1).softmax(-1)
    seen = 1 + keys.shape[0]
    out = weights[..., 1:seen] @ keys
    if chosen is not None:
        out = out + weights[..., seen:] @ latents
    return out
