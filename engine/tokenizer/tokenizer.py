"""Text to token ids and back, over the `tokenizers` library.

What users write in a chat never becomes a control token (`<|im_start|>`, `<think>` ...) by spelling it:
prompts mark them by position. All else is encoded as `transformers` does, added tokens that are
plain text (runs of spaces, words) among it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from engine.tokenizer.directory import (
    DEFAULT,
    FOR_TOOLS,
    add_tokens_of,
    bounded,
    named_tokens,
    read_backend,
    read_config,
    templates_of,
)
from engine.tokenizer.gguf import adds_bos, backend_from_gguf
from engine.tokenizer.prompt import BYTE_TOKEN, PromptEncoder, encode_text, without_added_tokens
from memory.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError, ConfigError

# A long text takes a while to encode. Who can use its first tokens before that gets those of so many
# characters; the last of them may turn out to be others.
OnBeginning = Callable[[list[int]], None]
LONG_TEXT, BEGINNING = 1 << 16, 1 << 14
MARKUP = re.compile(r"(?s)(?=.*[^\w\s\u2581]).{3,}")  # not a word, not a run of spaces, not a comma


class Tokenizer:
    """A tokenizer with what the engine needs.

    backend         the library's own object
    bos_token_id    beginning of sequence; `add_bos` says whether plain prompts (completions) start with it;
                    chat templates write it themselves
    eos_token_id    the tokenizer's own end of sequence; a checkpoint's config may name more
    chat_template   Jinja source, where the checkpoint brings one
    tool_template   the one for requests with tools, where it brings one of its own for them
    size            number of ids; a model's vocabulary may be padded beyond it
    special_tokens  named spellings for the template: `bos_token`, `eos_token`, `pad_token` ...
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        add_bos: bool,
        chat_template: str | None = None,
        tool_template: str | None = None,
        eos_token_id: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.add_bos = add_bos
        self.chat_template = chat_template
        self.tool_template = tool_template
        self.special_tokens = dict(special_tokens or {})
        self.size = max(backend.get_vocab().values(), default=-1) + 1
        self._prefix = _prefix(backend, bos_token_id, add_bos)
        self._literal = without_added_tokens(backend)
        self._prompts: dict[str | None, PromptEncoder] = {}  # by template
        self._bytes: dict[int, bytes] = {}  # of tokens that were asked for

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Read a checkpoint directory's `tokenizer.json`, `tokenizer_config.json`,
        `special_tokens_map.json` and `chat_template.jinja`.

        Only the first must be there. Raises CheckpointError for a file that is missing or
        damaged, ConfigError for a setting that contradicts the vocabulary.
        """
        config = read_config(path)
        backend = read_backend(path, config)
        config_file = path / "tokenizer_config.json"
        add_tokens_of(config, backend, config_file)
        special_tokens = named_tokens(config)
        bos_token_id = _id_of(backend, special_tokens.get("bos_token"), config_file)
        templates = templates_of(path, config)
        return cls(
            backend,
            bos_token_id=bos_token_id,
            add_bos=_adds_bos(backend, config, bos_token_id),
            chat_template=templates.get(DEFAULT),
            tool_template=templates.get(FOR_TOOLS),
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
        keys = {DEFAULT: "tokenizer.chat_template", FOR_TOOLS: f"tokenizer.chat_template.{FOR_TOOLS}"}
        templates = {
            name: bounded(text, checkpoint.path)
            for name, key in keys.items()
            if isinstance(text := metadata.get(key), str)
        }
        return cls(
            backend,
            bos_token_id=bos,
            add_bos=adds_bos(metadata, checkpoint.path),
            chat_template=templates.get(DEFAULT),
            tool_template=templates.get(FOR_TOOLS),
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

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The added tokens that are flagged as special: no part of a text told without them."""
        return frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special)

    def control_tokens(self, template: str | None = None) -> dict[str, int]:
        """Spelling -> id of the added tokens that users must not be able to write.

        These are the special ones, and of the others those that look like markup, where `template` writes
        them or there is none. The rest (runs of spaces, words) are text.
        """
        special = {t.content for t in self.backend.get_added_tokens_decoder().values() if t.special}
        special |= set(self.special_tokens.values())
        return {
            token: i
            for token, i in self.added_tokens.items()
            if token in special or (MARKUP.fullmatch(token) and (template is None or token in template))
        }

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = False,
        parse_special: bool = True,
        on_beginning: OnBeginning | None = None,
    ) -> list[int]:
        """Token ids of `text`; with `parse_special` the spelling of an added token becomes that token.

        `add_special_tokens` puts in front what the model's texts begin with, where `add_bos` says so and
        the text does not begin with it. `on_beginning` hears how a long text begins. Raises RequestError for
        text that is not valid Unicode.
        """
        if on_beginning is not None and len(text) > LONG_TEXT:
            on_beginning(self.encode(text[:BEGINNING], add_special_tokens=add_special_tokens))
        if not parse_special:
            spell = self._prompt_encoder(None).spelled_out
            return [small for i in encode_text(self._literal, text) for small in spell(i)]
        ids = encode_text(self.backend, text)
        return self.front_of(ids) + ids if add_special_tokens else ids

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of `text` as it stands inside another: added tokens are not looked for, and no space is
        put in front."""
        spell = self._prompt_encoder(None).spelled_out
        return [small for i in encode_text(self._inside, text) for small in spell(i)]

    @cached_property
    def _inside(self) -> tokenizers.Tokenizer:
        return without_added_tokens(self.backend, starts_text=False)

    def front_of(self, ids: list[int]) -> list[int]:
        """What is to be put in front of a text's `ids`: nothing where it spells its beginning itself."""
        return [] if ids[: len(self._prefix)] == self._prefix else self._prefix

    def encode_prompt(
        self,
        text: str,
        special_ranges: Iterable[tuple[int, int]],
        template: str | None = None,
        on_beginning: OnBeginning | None = None,
    ) -> list[int]:
        """Token ids of a rendered prompt whose control tokens (those of `template`) are known by their place.

        `special_ranges` are ascending, disjoint `[start, end)` offsets into `text`. What lies there
        becomes the token of that spelling (or stays text where the vocabulary has no such token);
        elsewhere spelling one makes none. `on_beginning` hears how a long prompt begins.
        """
        ranges, encoder = list(special_ranges), self._prompt_encoder(template)
        if on_beginning is not None and len(text) > LONG_TEXT:
            on_beginning(encoder.encode(text[:BEGINNING], [at for at in ranges if at[1] <= BEGINNING]))
        return encoder.encode(text, ranges)

    def _prompt_encoder(self, template: str | None) -> PromptEncoder:
        encoder = self._prompts.get(template)
        if encoder is None:
            encoder = self._prompts[template] = PromptEncoder(self.backend, self.control_tokens(template))
        return encoder

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that do not complete a character become U+FFFD, unknown ids nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, perhaps a partial character; empty for an unknown id."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spelled(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """The text of one token; where its bytes are a part of a character, they are listed instead:
        `bytes:\\xe2\\x82`, as OpenAI writes them."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _spelled(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token in self.added_tokens:
            return token.encode()
        if self._is_byte_level:
            known = all(c in BYTE_OF_CHARACTER for c in token)
            return bytes(BYTE_OF_CHARACTER[c] for c in token) if known else token.encode()
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


def _id_of(backend: tokenizers.Tokenizer, spelling: str | None, file: Path) -> int | None:
    if spelling is None:
        return None
    token_id = backend.token_to_id(spelling)
    if token_id is None:
        raise ConfigError(f"{file}: {spelling!r} is not in tokenizer.json; the files do not match")
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


def _prefix(backend: tokenizers.Tokenizer, bos_token_id: int | None, add_bos: bool) -> list[int]:
    """What the tokenizer's own post-processor puts in front of a text, with BOS only if `add_bos`."""
    encoded = backend.encode("a", add_special_tokens=True)
    is_text = [sequence is not None for sequence in encoded.sequence_ids]
    front: list[int] = encoded.ids[: is_text.index(True)] if True in is_text else []
    if not add_bos or bos_token_id is None:
        return [i for i in front if i != bos_token_id]
    return front if bos_token_id in front else [bos_token_id, *front]
