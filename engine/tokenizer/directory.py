"""The tokenizer of a checkpoint directory, from up to four files, read as `transformers` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from quant.errors import CheckpointError

MAX_FILE_BYTES = 256 << 20
MAX_TEMPLATE_CHARS = 1 << 20
DEFAULT, FOR_TOOLS = "default", "tool_use"  # names of chat templates
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_backend(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer from `tokenizer.json`, without truncation and padding.

    If `config` names Llama's class, that class determines how spaces are marked. Raises CheckpointError
    where the file is missing or damaged.
    """
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{path}: tokenizer.json is missing; copy it from the model's source (a SentencePiece "
            "tokenizer.model alone is not supported)"
        )
    text = _read_text(file)
    try:
        if config.get("tokenizer_class") in LLAMA_CLASSES:
            text = _as_llama(text, config)
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{file}: not a tokenizer ({error}); download it again") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_config(path: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with `special_tokens_map.json` beside it where it is an old one.

    Empty where there are no such files. Raises CheckpointError for a damaged one.
    """
    config = _read_object(path / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _read_object(path / "special_tokens_map.json")
    return config


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Spellings by name: `bos_token`, `eos_token`, `pad_token` ..."""
    found = {name: _spelling(value) for name, value in config.items() if name.endswith("_token")}
    return {name: text for name, text in found.items() if text is not None}


def add_tokens_of(config: Mapping[str, Any], backend: tokenizers.Tokenizer, file: Path) -> None:
    """Add the tokens that `config` declares or names and that `tokenizer.json` lacks or defines differently.

    A named token that the vocabulary lacks is left out: the model has no row for it. Raises
    CheckpointError for a declaration that is damaged; `file` is for the message.
    """
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        raise CheckpointError(f"{file}: added_tokens_decoder is not an object; download it again")
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    tokens = [_declared_token(id_, declared[id_], file) for id_ in sorted(declared, key=_as_id(file))]
    backend.add_tokens([token for token in tokens if repr(token) not in known])

    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    special = [*named_tokens(config).values(), *(text for value in values if (text := _spelling(value)))]
    missing = [text for text in dict.fromkeys(special) if text not in added]
    backend.add_special_tokens([text for text in missing if backend.token_to_id(text) is not None])


def templates_of(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: `default`, and `tool_use` for requests with tools where there is such a one.

    They are `chat_template.jinja` and the files in `additional_chat_templates`, or else the config's
    `chat_template`: a string, or a list.
    """
    found: dict[str, Any] = {}
    source, file = path / "tokenizer_config.json", path / "chat_template.jinja"
    if file.is_file():
        found[DEFAULT] = _read_text(file)
        source, more = file, path / "additional_chat_templates" / f"{FOR_TOOLS}.jinja"
        if more.is_file():
            found[FOR_TOOLS] = _read_text(more)
    elif isinstance(stated := config.get("chat_template"), list):
        found = {str(t.get("name")): t.get("template") for t in stated if isinstance(t, dict)}
    else:
        found[DEFAULT] = stated
    kept = {name: found.get(name) for name in (DEFAULT, FOR_TOOLS)}
    return {name: bounded(text, source) for name, text in kept.items() if isinstance(text, str)}


def bounded(template: str, source: Path) -> str:
    """`template`, or a CheckpointError where it is too long to be one."""
    if len(template) > MAX_TEMPLATE_CHARS:
        raise CheckpointError(
            f"{source}: the chat template has {len(template)} characters, more than the limit of "
            f"{MAX_TEMPLATE_CHARS}"
        )
    return template


def _as_llama(text: str, config: Mapping[str, Any]) -> str:
    """`tokenizer.json` with the rules of `transformers`' LlamaTokenizer, which looks at the vocabulary alone.

    A byte-level vocabulary is left as it is: many such checkpoints name this class by mistake.
    """
    content = json.loads(text)
    model, cuts = content["model"], json.dumps([content["pre_tokenizer"], content["decoder"]])
    if model.get("type") != "BPE" or '"ByteLevel"' in cuts:
        return text
    scheme = "always" if config.get("legacy") else "first"
    if config.get("add_prefix_space") is False:
        scheme = "never"
    content["normalizer"] = None
    content["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False,
    }  # fmt: skip
    model |= {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    return json.dumps(content)


def _as_id(file: Path) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal():
            raise CheckpointError(f"{file}: added_tokens_decoder has {text!r} where a token id is expected")
        return int(text)

    return number


def _declared_token(id_: str, value: Any, file: Path) -> AddedToken:
    content = value.get("content") if isinstance(value, dict) else None
    flags = {name: value[name] for name in FLAGS if name in value} if isinstance(value, dict) else {}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise CheckpointError(f"{file}: added_tokens_decoder: token {id_} is {value!r}; download it again")
    return AddedToken(content, **flags)


def _read_text(file: Path) -> str:
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise CheckpointError(f"{file}: {size} bytes, more than the limit of {MAX_FILE_BYTES}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text ({error}); download it again") from None


def _read_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _spelling(value: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
