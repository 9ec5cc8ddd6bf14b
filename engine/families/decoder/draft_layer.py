"""The draft layer of a decoder (MTP): one more layer behind the last, which tells the token after the next.

For a token whose hidden state is known, and the token behind it, it computes a layer on
`combine @ [norm(embedding of the token behind) | norm(hidden state)]`; its own norm and the model's head then
give the logits of the token after that (DeepSeek-V3's report, section 2.2). It is optional: a checkpoint
without it is whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.families.decoder.description import DeltaNet, Description, Experts, Layer, Mla
from engine.families.decoder.tensors import Use, layer_uses
from memory.checkpoint.checkpoint import Checkpoint

LAYER = re.compile(r".*layers\.\{layer\}\.")
COMBINE, OF_EMBEDDING, OF_HIDDEN = "draft_combine", "draft_embedding_norm", "draft_hidden_norm"


@dataclass(frozen=True)
class _Names:
    """How a checkpoint names the layer, what surrounds it, and its last norm."""

    layer: str
    combine: str
    of_embedding: str
    of_hidden: str
    norm: str


QWEN = _Names(
    "mtp.layers.0.", "mtp.fc.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight",
    "mtp.norm.weight",
)  # fmt: skip


def draft_description(d: Description, checkpoint: Checkpoint) -> Description | None:
    """The draft layer as a decoder of one layer; None where the checkpoint has none that is known."""
    number = len(d.layers)
    behind = f"model.layers.{number}."
    numbered = _Names(
        behind, *(f"{behind}{part}.weight" for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm"))
    )
    names = next((n for n in (numbered, QWEN) if n.combine in checkpoint.entries), None)
    if names is None or d.is_reencoded or isinstance(d.layers[-1].attention, DeltaNet):
        return None
    last = d.layers[-1]
    attention, feed_forward = last.attention, last.feed_forward
    if isinstance(attention, Mla) and attention.indexer is not None:
        attention = replace(attention, indexer=replace(attention.indexer, is_shared=False))
    if isinstance(feed_forward, Experts):  # releases have each of its experts apart
        feed_forward = replace(feed_forward, layout="each")
    return replace(
        d,
        layers=(Layer(attention, feed_forward),),
        names={
            **{role: LAYER.sub(names.layer, name) for role, name in d.names.items()},
            "norm": names.norm,
            COMBINE: names.combine,
            OF_EMBEDDING: names.of_embedding,
            OF_HIDDEN: names.of_hidden,
        },
        ignored=None,
    )


def draft_uses(d: Description) -> Iterator[Use]:
    """Every tensor of a draft layer."""
    yield from layer_uses(d, 0)
    yield Use(d.names[COMBINE], (d.hidden, 2 * d.hidden), "dense", 0)
    for role in (OF_EMBEDDING, OF_HIDDEN, "norm"):
        yield Use(d.names[role], (d.hidden,), "dense", 0, is_matrix=False)


def draft_bytes(d: Description | None, checkpoint: Checkpoint) -> int:
    """Bytes of a draft layer's tensors in the file; 0 for none."""
    if d is None:
        return 0
    beginnings = tuple({use.name.removesuffix(".weight") for use in draft_uses(d)})
    return sum(e.nbytes for name, e in checkpoint.entries.items() if name.startswith(beginnings))
