"""`Family` for every architecture that a `Description` can say: what is left to each is to make one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.families.base import Component, Family, ModelInfo
from engine.families.decoder.description import Description, Mla
from engine.families.decoder.forward import Decoder
from engine.families.decoder.part import cuts, description_of, outside
from engine.families.decoder.read_weights import dense_places, expert_hotness, read_weights
from engine.families.decoder.reencoded import ReencodedCheckpoint, reencoded
from engine.families.decoder.shape import checkpoint_shape, components, loaded_shape
from engine.families.decoder.stored import StoredMatrices
from engine.families.decoder.tensors import uses
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.entries import TensorSpec
from memory.checkpoint.part import PartOfCheckpoint, Span
from memory.planner.budget import MemoryBudget
from memory.planner.shape import ModelShape
from quant.errors import ConfigError, Findings, FormatError
from quant.formats.kv_names import HEAD_FORMATS, LATENT_FORMATS, TRAINED_LATENTS, KvFormat
from quant.kernels.interface import Kernels


class DecoderFamily(Family):
    """Describes, checks and loads the checkpoints of a family.

    describe_config  config.json or GGUF metadata, with the headers, to a description; raises ConfigError for
                     what the family does not compute
    rounds_latents   its releases were trained for latents and index keys in the vendor's format
    """

    def __init__(
        self, name: str, describe_config: Callable[[Checkpoint], Description], *, rounds_latents: bool = False
    ) -> None:
        self.name = name
        self._rounds_latents = rounds_latents
        self._describe_config = describe_config

    def description(self, checkpoint: Checkpoint) -> Description:
        """The description of a checkpoint. Raises ConfigError naming everything that is not computed."""
        if isinstance(checkpoint, ReencodedCheckpoint):
            return replace(self._describe_config(checkpoint.source), is_reencoded=True)
        if isinstance(checkpoint, PartOfCheckpoint):
            return description_of(self._describe_config(checkpoint.whole), checkpoint.span)
        return self._describe_config(checkpoint)

    def describe(self, checkpoint: Checkpoint) -> tuple[ModelInfo, list[Component]]:
        description = self.description(checkpoint)
        return self._info(description, checkpoint), components(description, checkpoint)

    def check(self, checkpoint: Checkpoint) -> None:
        description = self.description(checkpoint)
        findings = Findings()
        specs: dict[str, TensorSpec] = {}
        unreadable: dict[str, str] = {}
        with findings.checking():
            stored = StoredMatrices(checkpoint)
            for use in uses(description):
                try:
                    specs |= stored.specs(use)
                except FormatError as error:
                    unreadable[use.name.removesuffix(".weight")] = str(error)
            checkpoint.verify(specs, description.ignored, unreadable)
        with findings.checking():
            expert_hotness(description, checkpoint)
        findings.raise_any()

    def reencoded(self, checkpoint: Checkpoint, experts: str) -> Checkpoint:
        """The checkpoint with its routed experts in another format, by name; it is encoded when it is loaded.

        Raises ConfigError where that makes no sense, and what `check` does.
        """
        self.check(checkpoint)
        return reencoded(self.description(checkpoint), checkpoint, experts)

    def kv_formats(self, checkpoint: Checkpoint) -> tuple[KvFormat, ...]:
        layers = self.description(checkpoint).layers
        if not any(isinstance(layer.attention, Mla) for layer in layers):
            return HEAD_FORMATS
        return TRAINED_LATENTS if self._rounds_latents else LATENT_FORMATS

    def shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        return checkpoint_shape(self.description(checkpoint), checkpoint, checkpoint.name, kv_format)

    def loaded_shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        return loaded_shape(self.description(checkpoint), checkpoint, checkpoint.name, kv_format)

    def cuts(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        return cuts(self.description(checkpoint))

    def part(self, checkpoint: Checkpoint, span: Span) -> PartOfCheckpoint:
        if isinstance(checkpoint, ReencodedCheckpoint):
            raise ConfigError(
                "--experts is not for parts of a model; `loci quantize` converts the checkpoint"
            )
        return PartOfCheckpoint(checkpoint, span, outside(self.description(checkpoint), span))

    def load(self, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget) -> Decoder:
        self.check(checkpoint)
        description = self.description(checkpoint)
        places = dense_places(description, checkpoint, budget)
        if isinstance(checkpoint, ReencodedCheckpoint):
            checkpoint.prepare()  # minutes, so only what has room is encoded
        weights = read_weights(description, checkpoint, kernels, budget, places)
        info = self._info(description, checkpoint)
        return Decoder(description, info, kernels, weights, budget.kv_format)

    def _info(self, description: Description, checkpoint: Checkpoint) -> ModelInfo:
        name = checkpoint.config.get("general.name")
        return ModelInfo(
            family=self.name,
            name=name if isinstance(name, str) else checkpoint.name,
            vocab_size=description.vocab_size,
            max_context=description.max_context,
            bos_token_id=description.bos_token_id,
            eos_token_ids=description.eos_token_ids,
        )
