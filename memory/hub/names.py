"""Names of models on the Hub: ORG/MODEL, with a revision and one of several GGUF files where wanted."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAIN = "main"
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>\w[\w./-]*))?"
    r"(?::(?P<part>\w[\w./+-]*))?",
    re.ASCII,
)
# What ends like this is a file that somebody expects here.
_FILES = (".gguf", ".safetensors", ".json", ".bin")


@dataclass(frozen=True)
class HubModel:
    """A model on the Hub.

    repo      ORG/MODEL
    revision  branch, tag or commit
    part      a GGUF file of the repository, or the name of its quantization; None for what there is
    """

    repo: str
    revision: str = MAIN
    part: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{self.repo}{revision}" + (f":{self.part}" if self.part else "")


def parse_hub_name(text: str) -> HubModel | None:
    """The model that `text` names, as ORG/MODEL[@REVISION][:PART]; None where it is no such name."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in text or "--" in found["repo"] or found["repo"].lower().endswith(_FILES):
        return None
    return HubModel(found["repo"], found["revision"] or MAIN, found["part"])
