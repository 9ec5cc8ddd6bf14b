"""Text to token ids and back, over the `tokenizers` library.

Two encoders share one vocabulary: one knows the added tokens (`<|im_start|>`, `<think>` ...), the
other takes every text literally. What users write goes through the second, so that spelling a
special token never becomes that token; prompts say by place which tokens are special.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from engine.tokenizer.gguf import backend_from_gguf
from memory.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError, ConfigError, RequestError

MAX_FILE_BYTES = 256 << 20
MAX_TEMPLATE_CHARS = 1 << 20

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A tokenizer and what the engine needs of it.

    backend         the library's own object
    bos_token_id    beginning of sequence; `add_bos` says whether plain prompts (completions) start with it
    eos_token_id    the tokenizer's own end of sequence; a checkpoint's config may name more
    chat_template   Jinja source, where the checkpoint brings one
    size            ids that exist lie below this; a model's vocabulary may be padded beyond it
    special_tokens  named spellings for the template: `bos_token`, `eos_token`, `pad_token` ...
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        add_bos: bool,
        chat_template: str | None = None,
        eos_token_id: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.add_bos = add_bos
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.size = max(backend.get_vocab().values(), default=-1) + 1
        self._literal = _without_added_tokens(backend)
        self._bytes: dict[int, bytes] = {}  # of tokens that were asked for

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a checkpoint directory.

        Only `tokenizer.json` must be there. Raises CheckpointError for a file that is missing or
        damaged, ConfigError for a setting that contradicts the vocabulary.
        """
        file = path / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(
                f"{path}: there is no tokenizer.json; copy it from where the model comes from "
                "(a SentencePiece tokenizer.model alone is not read)"
            )
        text = _read_text(file)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            raise CheckpointError(f"{file}: not a tokenizer ({error}); download it again") from None
        backend.no_truncation()
        backend.no_padding()

        config_file = path / "tokenizer_config.json"
        config = _read_object(config_file) if config_file.is_file() else {}
        special = {name: _spelling(config[name]) for name in config if name.endswith("_token")}
        special_tokens = {name: text for name, text in special.items() if text is not None}
        bos_token_id = _id_of(backend, special_tokens.get("bos_token"), config_file)
        return cls(
            backend,
            bos_token_id=bos_token_id,
            add_bos=_adds_bos(backend, config, bos_token_id),
            chat_template=_template_of(path, config),
            eos_token_id=_id_of(backend, special_tokens.get("eos_token"), config_file),
            special_tokens=special_tokens,
        )

    @classmethod
    def from_gguf(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata.

        Raises ConfigError naming a kind of tokenizer that is not supported, CheckpointError where
        the metadata is incomplete or contradicts itself.
        """
        metadata = checkpoint.config
        backend = backend_from_gguf(metadata, checkpoint.path)
        bos, eos = _special_id(checkpoint, "bos"), _special_id(checkpoint, "eos")
        named = {"bos_token": bos, "eos_token": eos, "unk_token": _special_id(checkpoint, "unknown")}
        template = metadata.get("tokenizer.chat_template")
        return cls(
            backend,
            bos_token_id=bos,
            add_bos=metadata.get("tokenizer.ggml.add_bos_token") is True,
            chat_template=_bounded(template, checkpoint.path) if isinstance(template, str) else None,
            eos_token_id=eos,
            special_tokens={
                name: backend.decode([i], skip_special_tokens=False)
                for name, i in named.items()
                if i is not None
            },
        )

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """Spelling -> id of the tokens that stand outside ordinary text: special ones and other markers."""
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items()}

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`; with `parse_special` the spelling of a special token becomes that token.

        `add_special_tokens` puts the beginning-of-sequence token in front where `add_bos` says so.
        Raises RequestError for text that is not valid Unicode.
        """
        ids = _encode(self.backend if parse_special else self._literal, text)
        if add_special_tokens and self.add_bos and self.bos_token_id is not None:
            return [self.bos_token_id, *ids]
        return ids

    def encode_prompt(self, text: str, special_ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Token ids of a rendered prompt whose special tokens are known by their place.

        `special_ranges` are ascending, disjoint `[start, end)` offsets into `text`. What lies there
        becomes the token of that spelling (or stays text where the vocabulary has no such token);
        everything else is taken literally.
        """
        ids: list[int] = []
        done = 0
        for start, end in special_ranges:
            token_id = self.added_tokens.get(text[start:end])
            if token_id is None:
                continue
            ids += _encode(self._literal, text[done:start])
            ids.append(token_id)
            done = end
        return ids + _encode(self._literal, text[done:])

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that do not complete a character become U+FFFD, unknown ids nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, perhaps a part of a character; none for an unknown id."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spelled(token_id)
        return known

    def _spelled(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token in self.added_tokens:
            return token.encode()
        if self._is_byte_level:
            return bytes(BYTE_OF_CHARACTER[c] for c in token if c in BYTE_OF_CHARACTER)
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes([int(match.group(1), 16)])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self.backend.to_str())["decoder"] or {}
        return any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]) if part)


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 stands for itself; the other bytes, in order, are U+0100, U+0101 ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _without_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """An encoder over the same vocabulary (shared, not copied) that knows no added tokens."""
    literal = tokenizers.Tokenizer(backend.model)
    if backend.normalizer is not None:
        literal.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        literal.pre_tokenizer = backend.pre_tokenizer
    return literal


def _encode(encoder: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not valid Unicode: a lone surrogate stands at character {error.start}"
        ) from None
    # Of the library's calls those for batches alone release the interpreter lock; a megabyte takes a second.
    ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _read_text(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"{file}: {size} bytes, more than the {MAX_FILE_BYTES} such a file may have")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text ({error}); download it again") from None


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _spelling(value: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _id_of(backend: tokenizers.Tokenizer, spelling: str | None, file: Path) -> int | None:
    if spelling is None:
        return None
    token_id = backend.token_to_id(spelling)
    if token_id is None:
        raise ConfigError(f"{file}: {spelling!r} is not in tokenizer.json; the files do not belong together")
    return token_id


def _special_id(checkpoint: Checkpoint, name: str) -> int | None:
    token_id = checkpoint.config.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        return None
    vocabulary = len(checkpoint.config["tokenizer.ggml.tokens"])
    if not isinstance(token_id, int) or not 0 <= token_id < vocabulary:
        raise CheckpointError(
            f"{checkpoint.path}: the {name} token id is {token_id!r}, expected 0 to {vocabulary - 1}"
        )
    return token_id


def _adds_bos(backend: tokenizers.Tokenizer, config: Mapping[str, Any], bos_token_id: int | None) -> bool:
    """`add_bos_token` where the config says it, else what the tokenizer's own post-processor does."""
    if isinstance(config.get("add_bos_token"), bool):
        return bool(config["add_bos_token"])
    return bos_token_id is not None and bos_token_id in backend.encode("", add_special_tokens=True).ids


def _template_of(path: Path, config: Mapping[str, Any]) -> str | None:
    """`chat_template.jinja`, or the config's `chat_template`: a string, or a list with a `default`."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return _bounded(_read_text(file), file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return _bounded(template, path / "tokenizer_config.json") if isinstance(template, str) else None


def _bounded(template: str, source: Path) -> str:
    if len(template) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(f"{source}: the chat template has {len(template)} characters, refused")
    return template
