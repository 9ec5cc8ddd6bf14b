"""DeepSeek-V4: recognises, describes, checks and loads its checkpoints."""

from __future__ import annotations

from engine.families.base import Component, Family, ModelInfo
from engine.families.deepseek_v4.config import parse_config
from engine.families.deepseek_v4.forward import DeepseekV4
from engine.families.deepseek_v4.shape import checkpoint_shape, config_shape
from engine.families.deepseek_v4.tensors import IGNORED, expected_tensors
from engine.families.deepseek_v4.weights import read_weights
from engine.families.streams.stored import components
from memory.checkpoint.checkpoint import Checkpoint
from memory.experts.traces import trace_of_checkpoint
from memory.planner.budget import MemoryBudget
from memory.planner.shape import ModelShape
from quant.errors import Findings
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

    def shape(self, checkpoint: Checkpoint) -> ModelShape:
        return checkpoint_shape(parse_config(checkpoint), checkpoint, checkpoint.name)

    def config_shape(self, checkpoint: Checkpoint) -> ModelShape:
        return config_shape(parse_config(checkpoint), checkpoint)

    def load(self, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget) -> DeepseekV4:
        self.check(checkpoint)
        config = parse_config(checkpoint)
        weights = read_weights(config, checkpoint, kernels, budget)
        return DeepseekV4(config, config.info(self.name, checkpoint.name), weights, kernels)


FAMILY = DeepseekV4Family()
