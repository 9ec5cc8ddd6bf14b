"""From a path to a model ready to chat: checkpoint, family, model, tokenizer and chat format.

`open_model` does everything except reading the weights, so that errors show before a long load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.chat.format import ChatFormat
from engine.chat.harmony import ends_of
from engine.chat.registry import chat_format_for
from engine.drafts.own import OwnDrafts, Wanted, read_own_drafts, room_for_drafts
from engine.embedded import EMBEDDED, embedded_kv_format, embedded_sampling
from engine.families.base import Component, Family, Model, ModelInfo, PromptProducts
from engine.families.registry import family_of
from engine.sampling.defaults import end_token_ids, sampling_defaults
from engine.tokenizer.tokenizer import Tokenizer
from memory.checkpoint.checkpoint import Checkpoint
from memory.checkpoint.gguf_files import is_gguf, open_gguf
from memory.checkpoint.safetensors_files import open_safetensors
from memory.planner.budget import MemoryBudget
from quant.errors import CheckpointError, ConfigError, Findings
from quant.formats.kv_names import KvChoice, KvFormat
from quant.kernels.choice import choose
from quant.kernels.interface import Products


@dataclass(frozen=True)
class Loaded:
    """A model with everything needed to serve it.

    sampling has the model's default sampling parameters, by name. prompt_products: how prompts are
    multiplied; None for exactly. own_drafts: weights for drafts that came with it, where they were wanted.
    """

    model: Model
    tokenizer: Tokenizer
    chat: ChatFormat | None
    components: list[Component]
    sampling: Mapping[str, Any]
    prompt_products: PromptProducts | None = None
    own_drafts: OwnDrafts | None = None


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a safetensors directory, or a GGUF file. Headers are read, no weights.

    The file's name does not matter; links are followed.
    """
    if path.is_dir():
        if not (path / "config.json").exists() and (meant := _model_inside(path)):
            raise CheckpointError(
                f"{path}: not a model directory, config.json is missing; did you mean {meant}?"
            )
        return open_safetensors(path)
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: a broken link to {path.readlink()}; download the model again")
    if path.suffix.lower() == ".gguf" or is_gguf(path):
        return open_gguf(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or directory; a model is a directory, a .gguf file, ORG/MODEL of the "
            f"Hugging Face Hub, or one that comes with Loci: {', '.join(EMBEDDED)}"
        )
    if (path.parent / "config.json").exists():
        raise CheckpointError(f"{path}: a part of a model; name its directory, {path.parent}")
    raise CheckpointError(f"{path}: not a model directory and not a .gguf file")


def _model_inside(path: Path) -> Path | None:
    """A model in a directory that is none: a GGUF file, or further down, as in Hugging Face's cache."""
    for pattern in ("*.gguf", "*/config.json", "snapshots/*/config.json", "snapshots/*/*.gguf"):
        for found in sorted(path.glob(pattern)):
            return found.parent if found.name == "config.json" else found
    return None


@dataclass(frozen=True)
class OpenedModel:
    """A model whose headers and small files have been checked; no weights have been read yet."""

    checkpoint: Checkpoint
    family: Family
    info: ModelInfo
    components: list[Component]
    tokenizer: Tokenizer
    chat: ChatFormat | None
    sampling: Mapping[str, Any]

    def kv_format(self, asked: KvChoice) -> KvFormat:
        """The format that its KV is kept in. Raises ConfigError for one that it cannot have."""
        default = embedded_kv_format(self.checkpoint.path) if asked == "auto" else None
        return self.family.kv_format(self.checkpoint, default or asked)

    def load(
        self, budget: MemoryBudget, prompt_products: Products = "exact", drafts: Wanted = "off"
    ) -> Loaded:
        """Read its weights, within `budget`, and those for drafts where they are wanted. Raises ConfigError
        for products that this machine has no kernels for."""
        kernels = choose([gpu.device for gpu in budget.gpus if not gpu.is_virtual])
        of_prompts = None if prompt_products == "exact" else partial(kernels.multiplying, prompt_products)
        if of_prompts is not None:
            with of_prompts():  # refused before weights are read
                pass
        of_drafts = room_for_drafts(drafts, self.family, self.checkpoint, budget.dram_bytes)
        room = max(budget.workload.draft_bytes, of_drafts)  # a plan may have counted a small model too
        budget = replace(budget, workload=replace(budget.workload, draft_bytes=room))
        model = self.family.load(self.checkpoint, kernels, budget)
        own = read_own_drafts(model, self.checkpoint, kernels, of_drafts) if of_drafts else None
        model.info = replace(model.info, eos_token_ids=self.info.eos_token_ids)
        return Loaded(model, self.tokenizer, self.chat, self.components, self.sampling, of_prompts, own)


def load(
    path: Path,
    budget: MemoryBudget | None = None,
    context: int | None = None,
    experts: str | None = None,
    drafts: Wanted = "off",
) -> Loaded:
    """Load the checkpoint directory or GGUF file at `path`, within `budget` (a share of this machine), and
    its weights for drafts where they are wanted.

    Raises ConfigError if the model does not support `context` tokens, or experts in this format.
    """
    opened = open_model(path, context, experts)
    return opened.load(budget or MemoryBudget.of_this_machine(), drafts=drafts)


def open_model(path: Path, context: int | None = None, experts: str | None = None) -> OpenedModel:
    """The checkpoint directory or GGUF file at `path`, with everything except its weights.

    experts: the format that its routed experts are encoded to when it is loaded; None leaves them as they
    are. Raises LociError for everything that loading would reject, except lack of memory. Raises ConfigError
    if the model does not support `context` tokens.
    """
    checkpoint = open_checkpoint(path)
    family = family_of(checkpoint)
    if experts is not None:
        checkpoint = family.reencoded(checkpoint, experts)
    info, components = family.describe(checkpoint)
    if context is not None and context > info.max_context:
        raise ConfigError(
            f"max_model_len is {context}, but {info.name} supports at most {info.max_context} tokens"
        )
    findings = Findings()
    with findings.checking():
        family.check(checkpoint)
    with findings.checking():
        tokenizer = Tokenizer.from_directory(path) if path.is_dir() else Tokenizer.from_gguf(checkpoint)
        chat = chat_format_for(checkpoint.model_type, checkpoint.config, tokenizer)
        info = replace(info, eos_token_ids=_end_token_ids(path, info, tokenizer))
    with findings.checking():
        sampling = sampling_defaults(path) or embedded_sampling(path)
    findings.raise_any()
    return OpenedModel(checkpoint, family, info, components, tokenizer, chat, sampling)


def _end_token_ids(path: Path, info: ModelInfo, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: those of the model's config and of `generation_config.json` together;
    the tokenizer's own where neither names one. gpt-oss' vocabulary has the ends of its format."""
    wrong = [i for i in info.eos_token_ids if not 0 <= i < info.vocab_size]
    if wrong:
        raise ConfigError(
            f"{path}: end-of-sequence ids {wrong} are not in the vocabulary, 0 to {info.vocab_size - 1}"
        )
    named = (*info.eos_token_ids, *end_token_ids(path, info.vocab_size))
    if not named and tokenizer.eos_token_id is not None:
        named = (tokenizer.eos_token_id,)
    return ends_of(tuple(dict.fromkeys(named)), tokenizer.added_tokens)
