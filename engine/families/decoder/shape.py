"""A decoder's shape for the planner: bytes and numbers of its parts, what layers keep of a sequence."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

from engine.families.base import Component
from engine.families.decoder.description import (
    Attention,
    DeltaNet,
    Description,
    Experts,
    Layer,
    Mixer,
    Mla,
    Mlp,
)
from engine.families.decoder.experts import DecoderExpertFiles
from engine.families.decoder.stored import StoredMatrices, decoded_value_bytes
from engine.families.decoder.tensors import Part, Use, uses
from memory.checkpoint.checkpoint import Checkpoint
from memory.experts.slots import layouts_of
from memory.planner.launches import kv_launches, latent_launches
from memory.planner.published import KV_MARGIN, KV_VALUE_BYTES
from memory.planner.shape import KeptRows, KvShape, LayerShape, ModelShape, Weights
from memory.tiers import ALIGNMENT
from quant.errors import FormatError
from quant.formats.fp8 import Fp8
from quant.formats.int4 import Int4, Int4Offset
from quant.formats.kv import index_key_rows, latent_rows, plain_rows
from quant.formats.kv_names import KvFormat
from quant.formats.mxfp4 import Mxfp4
from quant.formats.nf4 import Nf4
from quant.formats.plain import Plain
from quant.formats.rows import row_bytes
from quant.kernels.choice import choose
from quant.kernels.cpu.panels import panel_bytes

# Columns with one scale to which recorded steps on GPUs round index queries as they read them.
WIDEST_ROUNDED = 32
# Formats of matrices that every token reads.
RECORDED_ON_GPUS = (Plain, Fp8, Mxfp4, Nf4, Int4, Int4Offset)


def checkpoint_shape(
    description: Description, checkpoint: Checkpoint, name: str, kv_format: KvFormat
) -> ModelShape:
    """The shape of a checkpoint called `name`, with its own bytes. Missing tensors count nothing."""
    stored, of_value = StoredMatrices(checkpoint), decoded_value_bytes(checkpoint.config)
    shape = shape_with(description, name, _weights_of(stored), of_value, kv_format)
    shape = replace(shape, embedding_stays=_has_rows_of_embedding(description, stored))
    if _is_multiplied_on_gpus(description, stored):
        return shape
    return replace(shape, layers=tuple(replace(layer, launches=None) for layer in shape.layers))


def loaded_shape(
    description: Description, checkpoint: Checkpoint, name: str, kv_format: KvFormat = "float32"
) -> ModelShape:
    """The same with the bytes that it takes in memory.

    Norms and biases are float32 there; what is decoded is, unless it is plain already, float32 or bfloat16;
    packed matrices are in panels.
    """
    stored, of_value = StoredMatrices(checkpoint), decoded_value_bytes(checkpoint.config)
    weights_of = _weights_of(stored)

    def in_memory(use: Use) -> Weights:
        weights = weights_of(use)
        is_plain = _is_plain(weights)
        if not use.is_matrix:
            return Weights(4 * weights.parameters, weights.parameters)
        if use.is_decoded and not is_plain:
            return Weights(of_value * weights.parameters, weights.parameters)
        if is_plain or use.part in ("experts", "embedding"):
            return weights
        rows, cols = use.shape
        form = stored.format_of(use.name, use.shape)
        nbytes = panel_bytes(weights.nbytes, form, rows, cols)
        if isinstance(form, Fp8):  # whose scales become float32
            nbytes += sum(entry.nbytes for entry in stored.entries(use) if entry.dtype == "BF16")
        return Weights(nbytes, weights.parameters)

    shape = shape_with(description, name, in_memory, of_value, kv_format)
    stored_shape = checkpoint_shape(description, checkpoint, name, kv_format)
    layers = tuple(
        replace(layer, launches=stored.launches)
        for layer, stored in zip(shape.layers, stored_shape.layers, strict=True)
    )
    slot_bytes = _slot_bytes(description, checkpoint)
    return replace(
        shape,
        layers=layers,
        slot_bytes=slot_bytes,
        stored_bytes=stored_shape.nbytes,
        embedding_stays=stored_shape.embedding_stays,
    )


def _has_rows_of_embedding(description: Description, stored: StoredMatrices) -> bool:
    try:
        return stored.has_rows(description.names["embed"], (description.vocab_size, description.hidden))
    except FormatError:  # `check` reports it
        return True


def _is_multiplied_on_gpus(description: Description, stored: StoredMatrices) -> bool:
    """Whether recorded steps on GPUs multiply with all matrices that every token reads."""
    for use in uses(description):
        is_read = use.part != "embedding" or description.is_tied
        if use.is_matrix and not use.is_decoded and is_read and use.part != "experts":
            try:
                form = stored.format_of(use.name, use.shape)
            except (FormatError, KeyError):  # `check` reports it
                continue
            if type(form) not in RECORDED_ON_GPUS:
                return False
    return True


def _slot_bytes(description: Description, checkpoint: Checkpoint) -> int:
    """Bytes of memory that hold any of the routed experts."""
    if description.experts is None:
        return 0
    files = DecoderExpertFiles.of(description, checkpoint)
    most = max(layout.nbytes for layout in layouts_of(files, choose()))
    return -(-most // ALIGNMENT) * ALIGNMENT


def shape_with(
    description: Description,
    name: str,
    weights_of: Callable[[Use], Weights],
    decoded: int,
    kv_format: KvFormat,
) -> ModelShape:
    """The shape of a decoder; `weights_of` says what a tensor weighs, `decoded` how many bytes a value has of
    what is packed there and held as plain numbers."""
    d = description
    parts: dict[tuple[Part, int | None], Weights] = defaultdict(Weights)
    more: dict[int | None, int] = defaultdict(int)
    for use in uses(d):
        weights = weights_of(use)
        parts[use.part, use.layer] += weights
        if use.is_decoded and not _is_plain(weights):
            more[use.layer] += decoded * weights.parameters - weights.nbytes
    embedding, head, tied = parts["embedding", None], parts["head", None], Weights()
    if d.is_tied:  # every token multiplies with the embedding, so it is planned as the head
        tied = embedding if d.is_first else tied
        embedding, head = Weights(), head + embedding
    is_recorded = all(
        isinstance(layer.attention, Mla)
        or (isinstance(layer.attention, Attention) and not layer.attention.has_gate)
        for layer in d.layers
    )
    layers = []
    for n, layer in enumerate(d.layers):
        experts = layer.feed_forward.router.experts if isinstance(layer.feed_forward, Experts) else 0
        all_experts = parts["experts", n]
        layers.append(
            LayerShape(
                dense=parts["dense", n] + parts["router", n],
                kv=kv_shape(layer.attention, kv_format),
                shared=parts["shared", n],
                experts=experts,
                expert=Weights(
                    -(-all_experts.nbytes // max(1, experts)), all_experts.parameters // max(1, experts)
                ),
                decoded=more[n],
                launches=launches_of(layer, kv_format, d.max_context) if is_recorded else None,
            )
        )
    return ModelShape(
        name=name,
        vocab_size=d.vocab_size,
        hidden=d.hidden,
        max_context=d.max_context,
        top_k=0 if d.experts is None else d.experts.router.top_k,
        embedding=embedding,
        head=head,
        tied=tied,
        layers=tuple(layers),
        copied_bytes=sum(_bias_bytes(layer.feed_forward, d.hidden) for layer in d.layers),
        activation_bytes=max(
            4 * (2 * d.hidden + 2 * _query_width(layer.attention) + 2 * _width(layer.feed_forward))
            for layer in d.layers
        ),
    )


def launches_of(layer: Layer, kv_format: KvFormat, context: int) -> int:
    """Kernels that a recorded step launches on a GPU for a layer, of sequences of up to `context` tokens."""
    part, attention = layer.feed_forward, layer.attention
    has_experts = isinstance(part, Experts)
    has_shared = isinstance(part, Experts) and part.shared is not None
    if not isinstance(attention, Mla):
        is_encoded = kv_format != "float32"
        return kv_launches(has_experts=has_experts, has_shared=has_shared, is_encoded=is_encoded)
    indexer = attention.own_indexer
    form = None if indexer is None else index_key_rows(kv_format, indexer.dim)
    return latent_launches(
        has_query_latent=attention.q_rank is not None,
        chooses_among=0 if indexer is None else context,
        is_encoded=form is not None,
        is_turned=form is not None and form.turned,
        is_rounded=form is not None and form.rounds_queries and form.group > WIDEST_ROUNDED,
        has_experts=has_experts,
        has_shared=has_shared,
    )


def _bias_bytes(part: Mlp | Experts, hidden: int) -> int:
    """Bytes of the biases of a layer's experts, in float32."""
    if not isinstance(part, Experts) or not part.has_biases:
        return 0
    return 4 * part.router.experts * (2 * part.width + hidden)


def _is_plain(weights: Weights) -> bool:
    return weights.nbytes >= 2 * weights.parameters


def kv_shape(a: Mixer, kv_format: KvFormat) -> KvShape:
    """What a layer keeps: keys and values of every token, or of the last ones where only a window is seen; or
    latents and the part of keys that turns, and index keys where it has an indexer; or a state."""
    if isinstance(a, DeltaNet):
        values = a.value_width * a.key_dim
        return KvShape(
            fixed_bytes=KV_VALUE_BYTES * (values + (a.taps - 1) * a.channels),
            fixed_flops=7 * values + 2 * a.taps * a.channels,
        )
    if isinstance(a, Mla):
        entry_bytes = row_bytes(a.row_dim, latent_rows(kv_format, a.rank, a.rope.dims))
        own = a.own_indexer
        index_key = row_bytes(own.dim, index_key_rows(kv_format, own.dim)) if own else 0
        return KvShape(
            rows=(KeptRows(1, entry_bytes), *([KeptRows(1, index_key)] if own else [])),
            seen_ratio=1,
            scan_bytes=index_key,
            scan_flops=2 * own.heads * own.dim if own else 0,
            selected=a.indexer.top_k if a.indexer else None,
            selected_bytes=entry_bytes,
            selected_flops=2 * a.heads * (a.row_dim + a.rank),
        )
    row = row_bytes(a.head_dim, plain_rows(kv_format, a.head_dim))
    entry_bytes, flops = 2 * a.kv_heads * row, 4 * a.heads * a.head_dim
    if a.window is not None:
        kept = entry_bytes * (a.window + KV_MARGIN)
        return KvShape(fixed_bytes=kept, seen_ratio=1, selected=a.window, selected_flops=flops)
    return KvShape(
        rows=(KeptRows(1, row, runs=2 * a.kv_heads),),
        seen_ratio=1,
        selected_bytes=entry_bytes,
        selected_flops=flops,
    )


KINDS: dict[Part, tuple[str, str]] = {
    "embedding": ("embedding", "embedding"),
    "head": ("head", "head"),
    "router": ("router", "router"),
    "shared": ("shared experts", "shared_experts"),
    "dense": ("attention and feed-forward", "dense"),
}


def components(description: Description, checkpoint: Checkpoint) -> list[Component]:
    """The model's parts with their bytes, from headers alone."""
    stored = StoredMatrices(checkpoint)
    weights_of = _weights_of(stored)
    found: dict[tuple[str, str], Weights] = defaultdict(Weights)
    formats: dict[tuple[str, str], set[str]] = defaultdict(set)
    for use in uses(description):
        if use.part == "experts":
            key = f"routed experts, layer {use.layer}", "routed_experts"
        else:  # the last norm is of no use to name formats by
            key = KINDS["dense" if use.part == "head" and not use.is_matrix else use.part]
        found[key] += weights_of(use)
        if use.is_matrix:
            formats[key].add(_format_name(stored, use))
        else:
            formats[key] |= {entry.dtype.lower() for entry in stored.entries(use)}
    return [
        Component(name, kind, "+".join(sorted(formats[name, kind])), weights.nbytes, weights.parameters)
        for (name, kind), weights in found.items()
    ]


def _query_width(a: Mixer) -> int:
    """Values of a token's queries as they meet what is kept."""
    if isinstance(a, DeltaNet):
        return a.channels
    return a.heads * (a.row_dim if isinstance(a, Mla) else a.head_dim)


def _width(feed_forward: Mlp | Experts) -> int:
    """Values of a token between the matrices of a feed-forward network."""
    if isinstance(feed_forward, Mlp):
        return feed_forward.width
    shared = feed_forward.shared.width if feed_forward.shared else 0
    return max(shared, feed_forward.width * feed_forward.router.top_k)


def _weights_of(stored: StoredMatrices) -> Callable[[Use], Weights]:
    def weights_of(use: Use) -> Weights:
        try:
            entries = stored.entries(use)
        except FormatError:  # `check` reports it
            return Weights()
        return Weights(sum(entry.nbytes for entry in entries), math.prod(use.shape) if entries else 0)

    return weights_of


def _format_name(stored: StoredMatrices, use: Use) -> str:
    try:
        return stored.format_of(use.name, use.shape).name
    except (FormatError, KeyError):
        return "?"
