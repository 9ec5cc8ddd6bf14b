"""A model that follows a script: asked to read a file it calls a tool that can, then says what it read.

Everything else is real: SmolLM2's tokenizer and chat template, the engine, caches, grammars, the server. So a
client meets what it would meet with a good model, at any context length.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine.chat.taught_calls import RESULT
from engine.families.base import Batch, Component, Family, KvCache, Model, ModelInfo, Trace
from engine.families.loader import OpenedModel, open_model
from engine.tokenizer.tokenizer import Tokenizer
from memory.checkpoint.checkpoint import Checkpoint
from memory.planner.budget import MemoryBudget
from memory.planner.shape import KeptRows, KvShape, ModelShape
from quant.formats.kv_names import KvFormat
from quant.kernels.interface import Kernels
from server.cli.main import main as command

MAX_CONTEXT = 1 << 18
ASK = re.compile(r"Read the file (/\S*note\.txt)")  # answered with a call
ASK_AGAIN = "Which word was it"
WORD = re.compile(r"word-[0-9a-f]{8}")
PATHS = (
    "file_path",
    "path",
    "absolute_path",
    "filePath",
    "filepath",
    "target_file",
    "filename",
    "file",
    "files",
)
COMMANDS = ("cmd", "command", "script", "commands")
READERS = ("read_file", "read", "readfile", "view", "view_file", "file_read", "open_file", "read_files")


def answer_to(prompt: str) -> str:
    """What the script answers to a rendered prompt."""
    questions = list(ASK.finditer(prompt))
    if not questions:
        return "Reading a note"  # agents ask for titles and summaries, too
    asked, told, again = questions[-1].start(), prompt.rfind(RESULT), prompt.rfind(ASK_AGAIN)
    words = WORD.findall(prompt)
    if again > max(asked, told):
        return f"It was {words[-1]}." if words else "I have not seen a word."
    if told > asked:
        return f"The file says {words[-1]}." if words else "The tool did not say."
    tools = _tools_in(prompt)
    if not tools and words:  # some clients put the file beside the question
        return f"The file says {words[-1]}."
    called = _call(tools, questions[-1].group(1))
    if called is None:
        return "I have no tool that reads files."
    name, arguments = called
    call = json.dumps({"name": name, "arguments": arguments})
    return f"I will look.\n<tool_call>\n{call}\n</tool_call>"


def _tools_in(prompt: str) -> list[dict[str, Any]]:
    found = re.search(r"<tools>\n(\{.*?)\n</tools>", prompt, re.DOTALL)
    return [json.loads(line) for line in found.group(1).split("\n")] if found else []


def _call(tools: Iterable[dict[str, Any]], path: str) -> tuple[str, dict[str, Any]] | None:
    """The call of the tool that reads the file at `path`: one made for it, else a shell."""
    listed = list(tools)

    def properties(tool: dict[str, Any]) -> dict[str, Any]:
        return dict(tool.get("parameters", {}).get("properties") or {})

    def named(tool: dict[str, Any]) -> str:
        return str(tool["name"]).rpartition("__")[2].lower()

    for keys, names in ((PATHS, READERS), (COMMANDS, ()), (PATHS, ())):
        for tool in listed:
            key = next((key for key in keys if key in properties(tool)), None)
            if key is not None and (not names or named(tool) in names):
                value = path if keys is PATHS else f"cat {path}"
                return tool["name"], _arguments(tool["parameters"], key, value)
    return None


def _arguments(schema: dict[str, Any], key: str, value: str) -> dict[str, Any]:
    properties = schema["properties"]
    wanted = [name for name in properties if name == key or name in schema.get("required", ())]
    return {
        name: _shaped(properties[name], value) if name == key else _filled(properties[name])
        for name in wanted
    }


def _shaped(schema: dict[str, Any], value: str) -> Any:
    """`value` as the schema wants it: some shells take a list."""
    if schema.get("type") != "array":
        return value
    members = schema.get("items", {}).get("properties")
    if members:
        return [{next((key for key in PATHS if key in members), "path"): value}]
    return value.split() if value.startswith("cat ") else [value]


def _filled(schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) else kind
    plain: dict[str, Any] = {"boolean": False, "integer": 1, "number": 1, "array": [], "object": {}}
    return plain.get(str(kind), "read a note")


class TokenCache(KvCache):
    """Holds the token ids themselves, `[slots, capacity]`."""

    def __init__(self, slots: int, capacity: int) -> None:
        super().__init__(slots, capacity, margin=16)
        self.ids = torch.zeros(slots, capacity, 1, dtype=torch.int64)

    def appended(self, slot: int) -> tuple[tuple[int, torch.Tensor], ...]:
        return ((1, self.ids[slot]),)

    def recent(self, slot: int, length: int) -> tuple[torch.Tensor, ...]:
        return ()

    def bytes_at(self, tokens: int) -> int:
        return self.slots * tokens * self.ids.itemsize


class ScriptedModel(Model):
    """Writes `answer_to` the prompt, token by token."""

    def __init__(self, info: ModelInfo, tokenizer: Tokenizer) -> None:
        self.info = info
        self._tokenizer = tokenizer
        self._opening = tokenizer.added_tokens["<|im_start|>"]
        self._heading = len(tokenizer.encode("assistant\n")) + 1
        self._answers: dict[tuple[int, ...], list[int]] = {}

    def new_cache(self, slots: int, capacity: int) -> KvCache:
        return TokenCache(slots, capacity)

    def cache_bytes(self, slots: int, capacity: int) -> int:
        return slots * capacity * 8

    def _step(self, batch: Batch, cache: KvCache, trace: Trace | None) -> torch.Tensor:
        assert isinstance(cache, TokenCache)
        rows = batch.logit_rows.tolist()
        logits = torch.zeros(len(rows), self.info.vocab_size)
        done = 0
        for segment in batch.segments:
            ids = batch.token_ids[done : done + segment.length]
            cache.ids[segment.slot, segment.start : segment.start + segment.length, 0] = ids
            for row, at in enumerate(rows):
                if done <= at < done + segment.length:
                    history = cache.ids[segment.slot, : segment.start + at - done + 1, 0]
                    logits[row, self._next(history)] = 100.0
            done += segment.length
        return logits

    def _next(self, history: torch.Tensor) -> int:
        """The token behind `history`, `[tokens]`."""
        end = self.info.eos_token_ids[0]
        openings = (history == self._opening).nonzero()
        begun = int(openings[-1]) + self._heading if len(openings) else len(history)
        if begun > len(history) or not len(openings):
            return end
        prompt = tuple(history[:begun].tolist())
        if prompt not in self._answers:
            text = answer_to(self._tokenizer.decode(prompt))
            self._answers[prompt] = self._tokenizer.encode(text)
        answer, at = self._answers[prompt], len(history) - begun
        return answer[at] if at < len(answer) else end


class ScriptedFamily(Family):
    """Stands for the family of a checkpoint whose tokenizer and template are used."""

    name = "scripted"

    def __init__(self, opened: OpenedModel) -> None:
        self._opened = opened

    def describe(self, checkpoint: Checkpoint) -> tuple[ModelInfo, list[Component]]:
        return self._opened.info, []

    def check(self, checkpoint: Checkpoint) -> None:
        pass

    def shape(self, checkpoint: Checkpoint, kv_format: KvFormat = "float32") -> ModelShape:
        real = self._opened.family.shape(checkpoint, kv_format)
        layer = replace(real.layers[0], kv=KvShape(rows=(KeptRows(1, 8),), seen_ratio=1))
        return replace(real, max_context=MAX_CONTEXT, layers=(layer,))

    def load(self, checkpoint: Checkpoint, kernels: Kernels, budget: MemoryBudget) -> Model:
        return ScriptedModel(self._opened.info, self._opened.tokenizer)


def scripted(opened: OpenedModel) -> OpenedModel:
    """`opened` with a script in place of its weights, and room for any prompt."""
    roomy = replace(opened, info=replace(opened.info, max_context=MAX_CONTEXT))
    return replace(roomy, family=ScriptedFamily(roomy))


def main(arguments: Sequence[str]) -> None:
    """`loci serve` with these further arguments, and the script for a model."""

    def opened(path: Path, context: int | None = None, experts: str | None = None) -> OpenedModel:
        return scripted(open_model(path))

    with (
        mock.patch("server.serving.service.open_model", opened),
        mock.patch.object(sys, "argv", ["loci", "serve", "smollm2", *arguments]),
    ):
        command()


if __name__ == "__main__":
    main(sys.argv[1:])
