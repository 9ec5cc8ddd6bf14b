"""Layer operations other than products with weights: the interface of all back ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from quant.formats.rows import RowFormat, Rows


@dataclass(frozen=True)
class RoutingRule:
    """How a router's logits choose experts, and weigh them.

    score            of all logits; `chosen softmax`: softmax over the chosen logits alone
    groups           of consecutive experts: how many there are; how many, the best ones, can be chosen from;
                     and of how many highest scores a group's value is the sum
    is_renormalised  weights are divided by their sum plus `epsilon`
    factor           that weights are multiplied by
    """

    top_k: int
    score: Literal["sqrt softplus", "softmax", "sigmoid", "chosen softmax"]
    groups: tuple[int, int, int] | None = None
    is_renormalised: bool = False
    epsilon: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class DeltaRule:
    """What a layer's gated delta rule has besides its activations; each key head serves as many value heads.

    rates, biases  of the decay, `[value_heads]` float32
    """

    key_heads: int
    rates: torch.Tensor
    biases: torch.Tensor


class LayerOperations(Protocol):
    """Operations on activations, float32; results are on the device of the first argument. Keys, values and
    entries may be encoded (quant/formats/rows.py): they are decoded as they are read."""

    def batched_linear(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`x_n @ weights_n^T` for each n: x `[tokens, n, cols]`, plain weights `[n, rows, cols]` ->
        `[tokens, n, rows]`."""
        ...

    def gated(
        self, gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float = 1.0, shift: float = 0.0
    ) -> torch.Tensor:
        """g * sigmoid(alpha * g) * (clamp(up, -limit, limit) + shift), where g = min(gate, limit)."""
        ...

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        """1 / (1 + e^-x)."""
        ...

    def weighted_sum(self, parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """sum_i weights_i * part_i: `[tokens, n, dim]` and `[tokens, n]` -> `[tokens, dim]`."""
        ...

    def mix_streams(
        self, streams: torch.Tensor, y: torch.Tensor, post: torch.Tensor, combine: torch.Tensor
    ) -> torch.Tensor:
        """post_j * y + sum_i combine[i, j] * stream_i, `[tokens, n, dim]`.

        streams `[tokens, n, dim]`, y `[tokens, dim]`, post `[tokens, n]`, combine `[tokens, n, n]`.
        """
        ...

    def turns(self, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        """e^(i * position * frequency), computed in float64: `[tokens, pairs]` complex64.

        positions `[tokens]` int64, frequencies `[pairs]` float64.
        """
        ...

    def rotate(self, x: torch.Tensor, turns: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
        """The last channels of x `[tokens, ..., dim]`, in pairs, times turns `[tokens, pairs]` complex64.

        A pair is a complex number; earlier channels are unchanged. In place: x, float32 in one run, takes the
        result, so that earlier channels are not even copied.
        """
        ...

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, rule: RoutingRule
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts that logits `[tokens, experts]` choose, and their weights, both `[tokens, top_k]`.

        Best first; of equal ones the first. The bias `[experts]` is for the choice alone.
        """
        ...

    def weigh(self, logits: torch.Tensor, chosen: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
        """The weights that logits `[tokens, experts]` give to experts which were chosen without them, both
        `[tokens, top_k]`."""
        ...

    def pool_groups(self, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Rows `[groups, n, dim]` summed over n, weighted by the softmax of gates over n: `[groups, dim]`."""
        ...

    def engram_gates(
        self, streams: torch.Tensor, qk: torch.Tensor, keys: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """How far streams agree with the keys of table rows, `[tokens, n]`, from 0 to 1.

        streams and keys `[tokens, n, dim]`, each normalised by its RMS alone; qk `[n, dim]` weighs their
        channels. The square root keeps the sign of the dot product.
        """
        ...

    def encode_rows(self, x: torch.Tensor, form: RowFormat | None) -> Rows:
        """Rows `[..., dim]` as a cache keeps them; x itself where there is no format."""
        ...

    def index_scores(
        self,
        queries: torch.Tensor,
        weights: torch.Tensor,
        keys: Rows,
        visible: torch.Tensor,
        entries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """sum_h w[t,h] * relu(q[t,h] . k[g]), `[L, G]`; -inf where a token does not see an entry.

        q are queries as the format of the keys wants them (`RowFormat.as_query`).
        queries `[L, index_heads, index_dim]`, weights `[L, index_heads]`, keys `[G, index_dim]`; visible
        `[L]`: how many of the keys, from the first. With entries `[L, n]`, -1 for none, only these: `[L, n]`.
        """
        ...

    def best_columns(self, scores: torch.Tensor, top_k: int) -> torch.Tensor:
        """Columns of the top_k best scores of each row, `[L, min(top_k, G)]`; -1 where the score is -inf."""
        ...

    def convolve(
        self, x: torch.Tensor, weights: torch.Tensor, tail: torch.Tensor, before: int
    ) -> torch.Tensor:
        """silu(sum_i weights_i * x_(t - taps + 1 + i)) of each channel, causal: `[tokens, channels]`.

        x `[tokens, channels]`, weights `[taps, channels]`; tail `[taps - 1, channels]` has the last rows of
        the `before` tokens before x, that of position p at p % (taps - 1), and then those of x.
        """
        ...

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
        """The gated delta rule (arXiv 2412.06464, equation 10) over a sequence's next tokens:
        `[tokens, value_heads * value_dim]`.

        x      `[tokens, 2 * key_heads * key_dim + value_heads * value_dim]`: all queries, keys, values
        a, b   `[tokens, value_heads]`, of the decay and of how much is written
        state  `[value_heads, key_dim, value_dim]` S, changed; is_first: zero before, whatever it holds

        For each token and value head, with q and k of its key head normed to length 1, q then divided by the
        root of key_dim: S *= e^(rate * softplus(a + bias)), S += k (sigmoid(b) * (v - S^T k))^T, o = S^T q.
        """
        ...

    def attend(
        self,
        q: torch.Tensor,
        keys: Rows,
        values: Rows,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of a sequence's last tokens, `[L, heads, head_dim]` to `[L, heads, value_dim]`.

        keys `[kv_heads, n + L, head_dim]`, values `[kv_heads, n + L, value_dim]`, which may be narrower: of
        the n tokens before, then of these; with a window a token sees that many, itself the last. sinks
        `[heads]`: the denominator of head h gains exp(sinks_h).
        """
        ...

    def attend_chosen(
        self, q: torch.Tensor, rows: Rows, chosen: torch.Tensor, value_dim: int
    ) -> torch.Tensor:
        """Attention of tokens `[L, heads, head_dim]`, each over its chosen rows: `[L, heads, value_dim]`.

        rows `[n, head_dim]` are keys for all heads, and their first `value_dim` columns the values; chosen
        `[L, k]` int64, ascending, -1 for none.
        """
        ...

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
        """Attention of `L` new tokens, `[L, heads, head_dim]`, over one latent per token for all heads.

        q          `[L, heads, head_dim]`
        window_kv  `[n + L, head_dim]`: latents of the n <= window - 1 tokens before, then of the new ones
        sink       `[heads]`: the denominator of head h gains exp(sink_h)
        compressed `[G, head_dim]` and entries `[L, k]`: compressed entries and which of them a token sees, -1
                   for none; they may be on another device, then the selected ones are fetched
        in_place   what q takes in memory may take the result
        """
        ...
