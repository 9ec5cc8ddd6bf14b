"""From a path to something that can chat: checkpoint, family, model, tokenizer and chat format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.model import Component, Model, ModelInfo
from engine.prompts import ChatFormat
from engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model with everything needed to serve it."""

    model: Model
    tokenizer: Tokenizer
    chat: ChatFormat | None
    components: list[Component]


def default_model_path() -> Path:
    """The embedded default model's file. Raises ConfigError saying how to install it."""
    raise NotImplementedError


def describe(path: Path) -> tuple[ModelInfo, list[Component]]:
    """What the checkpoint at `path` is, from config and headers alone."""
    raise NotImplementedError


def load(path: Path) -> Loaded:
    """Load the checkpoint directory or GGUF file at `path`."""
    raise NotImplementedError
