"""DeepSeek-V4: recognises, describes, checks and loads its checkpoints."""

from __future__ import annotations

from engine.families.base import Component, Family, ModelInfo
from engine.families.deepseek_v4.config import parse_config
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.deepseek_v4.shape import checkpoint_shape, config_shape, loaded_shape
from engine.families.deepseek_v4.tensors import IGNORED, expected_tensors
from engine.families.deepseek_v4.weights import read_weights
from engine.families.streams.stored import components
from memory.checkpoint.checkpoint import Checkpoint
from memory.experts.traces import trace_of_checkpoint
from memory.planner.budget import MemoryBudget
from memory.planner.shape import ModelShape
from quant.errors import Findings
from quant.formats.kv_names import V4_FORMATS, KvFormat
from quant.kernels.interface import Kernels


class DeepseekV4Family(Family):
    """The family's entry in the registry."""

    name = "deepseek_v4"

    def describe(self, checkpoint: Checkpoint) -> tuple[ModelInfo, list[Component]]:
        config = parse_config(checkpoint)
        return config.info(self.name, checkpoint.name), components(checkpoint, IGNORED)

    def check(self, checkpoint: Checkpoint) -> None:
        config = parse_config(checkpoint)
        findings = Findings()
        with findings.checking():
            checkpoint.verify(expected_tensors(config, checkpoint), IGNORED)
        with findings.checking():
            trace_of_checkpoint(checkpoint.path, config.layers, config.n_routed_experts)
        findings.raise_any()

    def kv_formats(self, checkpoint: Checkpoint) -> tuple[KvFormat, ...]:
        return V4_FORMATS

    def shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        return checkpoint_shape(parse_config(checkpoint), checkpoint, checkpoint.name, kv_format)

    def loaded_shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        return loaded_shape(parse_config(checkpoint), checkpoint, checkpoint.name, kv_format)

    def config_shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        return config_shape(parse_config(checkpoint), checkpoint, kv_format)

    def load(self, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget) -> DeepseekV4:
        self.check(checkpoint)
        config = parse_config(checkpoint)
        weights = read_weights(config, checkpoint, kernels, budget)
        info = config.info(self.name, checkpoint.name)
        return DeepseekV4(config, info, weights, kernels, budget.kv_format)


FAMILY = DeepseekV4Family()
