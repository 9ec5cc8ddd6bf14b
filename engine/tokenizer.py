"""Text to token ids and back, over the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers


class Tokenizer:
    """A tokenizer and what the engine needs of it.

    `backend` is the library's own object; `add_bos` says whether plain prompts (completions) start
    with the beginning-of-sequence token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token_id: int | None,
        add_bos: bool,
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.add_bos = add_bos
        self.chat_template = chat_template

    @classmethod
    def from_directory(cls, path: Path) -> Tokenizer:
        """Read `tokenizer.json` and `tokenizer_config.json` of a checkpoint directory."""
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of `text`; with `parse_special` the spelling of a special token becomes that token."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`."""
        raise NotImplementedError
