"""A decoder's weights, read from a verified checkpoint within a memory budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from engine.families.decoder.delta_net import DeltaNetWeights, read_delta_net
from engine.families.decoder.description import (
    Attention,
    DeltaNet,
    Description,
    Experts,
    Indexer,
    Layer,
    Mixer,
    Mla,
)
from engine.families.decoder.draft_layer import COMBINE, OF_EMBEDDING, OF_HIDDEN, draft_uses
from engine.families.decoder.experts import ROLES as EXPERT_ROLES
from engine.families.decoder.experts import DecoderExpertFiles
from engine.families.decoder.shape import loaded_shape
from engine.families.decoder.stored import RowsInFile, StoredMatrices
from engine.families.decoder.tensors import bias_of, uses
from engine.families.decoder.weights import (
    AttentionWeights,
    DecoderWeights,
    IndexerWeights,
    LayerWeights,
    MlaWeights,
    MlpWeights,
    RouterWeights,
)
from engine.families.expert_store import expert_store, trace_path
from engine.families.places import HOST, DensePlaces, place
from memory.checkpoint.checkpoint import Checkpoint
from memory.experts.store import ExpertStore
from memory.experts.traces import trace_of_checkpoint
from memory.planner.budget import MemoryBudget
from memory.tiers import Tier
from quant.errors import CheckpointError
from quant.kernels.interface import ExpertBiases, Kernels, Weight

# What slots of a draft layer's experts take beyond the file's bytes: they begin at cache lines.
ALIGNED = 1.02
LEAST_BYTES = 8_000_000


def read_weights(
    description: Description,
    checkpoint: Checkpoint,
    kernels: Kernels,
    budget: MemoryBudget,
    places: DensePlaces,
) -> DecoderWeights:
    """All weights of a checkpoint that `Checkpoint.verify` has accepted.

    What every token reads is copied to its place of `dense_places`; experts get what is left of each tier.
    """
    d = description
    source = _Source.of(d, checkpoint)
    host = _Reader(source, kernels, HOST)
    by_head = _Reader(source, kernels, places.head)
    none = torch.empty(0, d.hidden)  # of another part
    head = by_head.matrix("embed" if d.is_tied else "head") if d.is_last else none
    embed: Weight | RowsInFile = head if d.is_first else none
    if d.is_first and (not d.is_tied or places.head != HOST):
        embed = host.embedding(in_memory=places.holds_embedding)
    return DecoderWeights(
        embed=embed,
        norm=by_head.norm("norm") if d.is_last else none[:, 0].to(places.head),
        head=head,
        layers=tuple(
            _Reader(source, kernels, device, n).layer(layer)
            for n, (layer, device) in enumerate(zip(d.layers, places.layers, strict=True))
        ),
        frequencies=_frequencies(d, checkpoint, host),
        experts=None
        if d.experts is None
        else expert_store(
            DecoderExpertFiles.of(d, checkpoint), trace_path(checkpoint), kernels, budget, places
        ),
        places=places,
    )


@dataclass(frozen=True)
class DraftWeights:
    """A draft layer: itself as a decoder, whose embedding and head are the model's, and what its input is
    made with: `[hidden, 2 * hidden]`, and norms of both halves."""

    decoder: DecoderWeights
    combine: Weight
    of_embedding: torch.Tensor
    of_hidden: torch.Tensor


def read_draft(
    description: Description, checkpoint: Checkpoint, kernels: Kernels, of: DecoderWeights
) -> DraftWeights:
    """The draft layer of the checkpoint that `of` was read from, in host memory, all its experts with it.

    description  `draft_description`'s. Raises CheckpointError listing what is wrong with its tensors.
    """
    d, needed = description, list(draft_uses(description))
    stored = StoredMatrices(checkpoint)
    specs = {name: spec for use in needed for name, spec in stored.specs(use).items()}
    others = {name: entry for name, entry in checkpoint.entries.items() if name in specs}
    Checkpoint(checkpoint.path, checkpoint.model_type, checkpoint.config, others, []).verify(specs)
    shapes = {use.name: use.shape for use in needed if use.part != "experts"}
    source = _Source(stored, d.names, shapes, d.norm_offset)
    reader = _Reader(source, kernels, HOST, 0)
    experts: ExpertStore | None = None
    if d.experts is not None:
        files = DecoderExpertFiles.of(d, checkpoint)
        held = sum(e.nbytes for use in needed if use.part == "experts" for e in stored.entries(use))
        experts = ExpertStore(files, kernels, Tier("dram", int(held * ALIGNED) + LEAST_BYTES, HOST))
    return DraftWeights(
        decoder=DecoderWeights(
            embed=of.embed,
            norm=reader.norm("norm"),
            head=of.head,
            layers=(reader.layer(d.layers[0]),),
            frequencies=of.frequencies,
            experts=experts,
            places=of.places,
        ),
        combine=reader.matrix(COMBINE),
        of_embedding=reader.norm(OF_EMBEDDING),
        of_hidden=reader.norm(OF_HIDDEN),
    )


def dense_places(description: Description, checkpoint: Checkpoint, budget: MemoryBudget) -> DensePlaces:
    """Where the plan places what every token reads, from headers alone; a model without routed experts stays
    in host memory. Raises BudgetError where there is too little room."""
    if description.experts is None:
        budget = replace(budget, gpus=())
    shape = loaded_shape(description, checkpoint, checkpoint.name, budget.kv_format)
    return place(shape, checkpoint.path, budget)


def expert_hotness(description: Description, checkpoint: Checkpoint) -> torch.Tensor | None:
    """Shares of uses, from the routing trace beside a checkpoint. Raises CheckpointError for another's."""
    trace = trace_path(checkpoint)
    if description.experts is None or trace is None:
        return None
    layers, experts = len(description.expert_layers), description.experts.router.experts
    return trace_of_checkpoint(trace, layers, experts)


def _frequencies(d: Description, checkpoint: Checkpoint, reader: _Reader) -> torch.Tensor:
    frequencies = d.rope.frequencies
    if not d.has_rope_factors:
        return frequencies
    factors = reader.floats("rope_factors")
    if not bool(((factors > 0) & factors.isfinite()).all()):
        raise CheckpointError(
            f"{checkpoint.path}: {d.names['rope_factors']} has values that are not positive and finite; "
            "download it again"
        )
    return frequencies / factors.double()


@dataclass(frozen=True)
class _Source:
    """Where weights are read from: a checkpoint, names by role, shapes by name."""

    stored: StoredMatrices
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    norm_offset: float

    @classmethod
    def of(cls, description: Description, checkpoint: Checkpoint) -> _Source:
        shapes = {use.name: use.shape for use in uses(description) if use.part != "experts"}
        return cls(StoredMatrices(checkpoint), description.names, shapes, description.norm_offset)


class _Reader:
    """Weights of one layer, or of what is outside of the layers, on a device."""

    def __init__(self, source: _Source, kernels: Kernels, device: torch.device, layer: int = -1) -> None:
        self._source = source
        self._stored = source.stored
        self._kernels = kernels.on(device)
        self._device = device
        self._layer = layer

    def layer(self, layer: Layer) -> LayerWeights:
        attention, feed_forward = layer.attention, layer.feed_forward
        return LayerWeights(
            attn_norm=self.norm("attn_norm"),
            attention=self._mixer(attention),
            ffn_norm=self.norm("ffn_norm"),
            feed_forward=self._router(feed_forward) if isinstance(feed_forward, Experts) else self._mlp(""),
        )

    def matrix(self, role: str, order: torch.Tensor | None = None) -> Weight:
        """A matrix in the kernels' layout; `order` has the numbers of its rows, where not all in order."""
        (matrix,) = self.matrices(role, order)
        return matrix

    def matrices(self, role: str, *orders: torch.Tensor | None) -> list[Weight]:
        """Matrices in the kernels' layout that are one in the file, which is read once: as `matrix`, of each
        order."""
        stored = self.stored_matrix(role)
        return [self._kernels.prepare(self._to_device(_in_order(stored, order))) for order in orders]

    def stored_matrix(self, role: str) -> Weight:
        """A matrix as the file has it, in host memory."""
        return self._stored.read(*self._named(role))

    def embedding(self, *, in_memory: bool) -> Weight | RowsInFile:
        """The embedding in host memory, or in its file."""
        return self.stored_matrix("embed") if in_memory else self._stored.in_file(*self._named("embed"))

    def floats(self, role: str, *, is_bias: bool = False) -> torch.Tensor:
        """A norm or a bias, float32."""
        name = self._name(role)
        return self._stored.read_floats(bias_of(name) if is_bias else name).to(self._device)

    def norm(self, role: str) -> torch.Tensor:
        """A norm's weights, float32."""
        return self.floats(role) + self._source.norm_offset

    def _mixer(self, mixer: Mixer) -> AttentionWeights | MlaWeights | DeltaNetWeights:
        if isinstance(mixer, DeltaNet):
            return read_delta_net(self, mixer)
        return self._mla(mixer) if isinstance(mixer, Mla) else self._attention(mixer)

    def _attention(self, a: Attention) -> AttentionWeights:
        q_order, k_order = (a.rope.row_order(heads, a.head_dim) for heads in (a.heads, a.kv_heads))
        of_norms = a.rope.row_order(1, a.head_dim) if a.qk_norm == "head" else None
        if a.has_gate:  # [heads, 2, head_dim]: queries, gates
            gate_rows = _rows_of_gates(a)
            q_rows = gate_rows - a.head_dim
            q, gate = self.matrices("q", q_rows if q_order is None else q_rows[q_order], gate_rows)
        else:
            q, gate = self.matrix("q", q_order), None
        has_norms, has_biases = a.qk_norm != "none", a.has_qkv_bias
        return AttentionWeights(
            q=q,
            k=self.matrix("k", k_order),
            v=self.matrix("v"),
            o=self.matrix("o"),
            q_bias=_floats_in_order(self.floats("q", is_bias=True), q_order) if has_biases else None,
            k_bias=_floats_in_order(self.floats("k", is_bias=True), k_order) if has_biases else None,
            v_bias=self.floats("v", is_bias=True) if has_biases else None,
            o_bias=self.floats("o", is_bias=True) if a.has_out_bias else None,
            q_norm=_floats_in_order(self.norm("q_norm"), _first(of_norms, q_order)) if has_norms else None,
            k_norm=_floats_in_order(self.norm("k_norm"), _first(of_norms, k_order)) if has_norms else None,
            sinks=self.floats("sinks") if a.has_sinks else None,
            gate=gate,
        )

    def _mla(self, a: Mla) -> MlaWeights:
        has_latent = a.q_rank is not None
        if a.is_split:
            to_latent, from_latent = self._plain("k_b"), self._plain("v_b")
        else:
            both = self._plain("kv_b").view(a.heads, a.plain_dim + a.value_dim, a.rank)
            to_latent, from_latent = both[:, : a.plain_dim].transpose(1, 2), both[:, a.plain_dim :]
        return MlaWeights(
            q_a=self.matrix("q_a") if has_latent else None,
            q_a_norm=self.floats("q_a_norm") if has_latent else None,
            q=self.matrix("q_b" if has_latent else "q"),
            kv_a=self.matrix("kv_a"),
            kv_a_norm=self.floats("kv_a_norm"),
            to_latent=to_latent.contiguous().to(self._device),
            from_latent=from_latent.contiguous().to(self._device),
            o=self.matrix("o"),
            indexer=None if a.own_indexer is None else self._indexer(a.own_indexer),
        )

    def _indexer(self, a: Indexer) -> IndexerWeights:
        q_order, k_order = (a.rope.row_order(heads, a.dim) for heads in (a.heads, 1))
        return IndexerWeights(
            q=self.matrix("index_q", q_order),
            k=self.matrix("index_k", k_order),
            k_norm=_floats_in_order(self.floats("index_k_norm"), k_order),
            k_bias=_floats_in_order(self.floats("index_k_norm", is_bias=True), k_order),
            weights=self.matrix("index_weights"),
        )

    def _plain(self, role: str) -> torch.Tensor:
        """A matrix or a stack of them in host memory, as plain numbers."""
        name = self._name(role)
        return self._stored.read_plain(name, self._source.shapes[name])

    def _mlp(self, prefix: str) -> MlpWeights:
        gate, up, down = (self.matrix(f"{prefix}{part}") for part in ("gate", "up", "down"))
        return MlpWeights(gate, up, down)

    def _router(self, experts: Experts) -> RouterWeights:
        router = experts.router
        return RouterWeights(
            matrix=self.matrix("router"),
            bias=self.floats("router", is_bias=True) if router.has_bias else None,
            choice_bias=self.floats("choice_bias") if router.has_choice_bias else None,
            expert_biases=self._expert_biases(experts) if experts.has_biases else None,
            shared=None if experts.shared is None else self._mlp("shared_"),
            shared_share=self.matrix("shared_share") if experts.has_shared_gate else None,
        )

    def _expert_biases(self, experts: Experts) -> ExpertBiases:
        """Biases of all the layer's experts; each tier takes of them what it computes with."""
        if experts.layout == "stacked":
            gate, up, down = (self.floats(role, is_bias=True) for role in EXPERT_ROLES)
            return ExpertBiases(gate, up, down)
        assert experts.layout == "interleaved"
        both, down = (self.floats(role, is_bias=True) for role in ("experts_up", "experts_down"))
        return ExpertBiases(both[:, 0::2].contiguous(), both[:, 1::2].contiguous(), down)

    def _name(self, role: str) -> str:
        return self._source.names[role].format(layer=self._layer)

    def _named(self, role: str) -> tuple[str, tuple[int, int]]:
        """A matrix's name and shape."""
        name = self._name(role)
        rows, cols = self._source.shapes[name]
        return name, (rows, cols)

    def _to_device(self, weight: Weight) -> Weight:
        return weight.to(self._device) if isinstance(weight, torch.Tensor) else weight


def _rows_of_gates(a: Attention) -> torch.Tensor:
    """The rows of gates in a projection that has them behind each head's queries."""
    return (
        torch.arange(a.heads).unsqueeze(1) * 2 * a.head_dim + torch.arange(a.head_dim, 2 * a.head_dim)
    ).flatten()


def _first(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    return other if one is None else one


def _floats_in_order(values: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return values if order is None else values[order.to(values.device)]


def _in_order(weight: Weight, order: torch.Tensor | None) -> Weight:
    """A matrix with its rows in another order, or some of them."""
    if order is None:
        return weight
    return weight[order] if isinstance(weight, torch.Tensor) else weight.reordered(order)
