"""Writes the tables in docs/ whose contents the code knows: `python -m server.docs`, or `make docs`.

A part of a page between `<!-- NAME begin -->` and `<!-- NAME end -->` is written by the function that PARTS
has under that name; a test says when a page is stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from engine.families.released import released_shape
from memory.hardware.profiles import GIB, load_profile, shipped
from quant.errors import ConfigError
from quant.formats.kv_names import KvFormat
from server.settings import SEVERAL, Settings

DOCS = Path(__file__).parents[1] / "docs"
_KINDS = {bool: "true or false", str: "text", int: "whole number", float: "number", Path: "path"}


def settings() -> str:
    """Every setting, as it is written in a file, on the command line and in the environment."""
    rows = (_setting(name, field) for name, field in Settings.model_fields.items())
    return _table(["in the file", "flag", "variable", "value", "default", ""], rows)


def _setting(name: str, field: FieldInfo) -> list[str]:
    flag = "`MODEL`" if name == "model" else f"`--{name.replace('_', '-')}`"
    default = "" if field.default in (None, ()) else f"`{field.default}`"
    kind = _kind(name, field.annotation)
    return [f"`{name}`", flag, f"`LOCI_{name.upper()}`", kind, default, field.description or ""]


def _kind(name: str, annotation: Any) -> str:
    if name in SEVERAL:
        return "one or more texts"
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    if get_origin(kinds[0]) is Literal:  # and None
        kinds = list(get_args(kinds[0]))
    elif get_origin(annotation) is not Literal:
        return _KINDS[kinds[0]]
    return ", ".join(f"`{kind}`" for kind in kinds)


def profiles() -> str:
    """The hardware profiles that come with Loci: what models may use of them, and how fast that is."""
    head = ["profile", "machine", "VRAM, GiB", "link, GB/s", "DRAM, GiB", "DRAM, GB/s", "disk, GB/s"]
    return _table(head, map(_profile, shipped()))


def _profile(name: str) -> list[str]:
    p = load_profile(name)
    vram = " + ".join(f"{gpu.memory_bytes / GIB:g}" for gpu in p.gpus) or "none"
    link = " + ".join(f"{gpu.link_bytes_per_s / 1e9:g}" for gpu in p.gpus)
    others = (p.dram_bytes / GIB, p.dram_bytes_per_s / 1e9, p.disk_bytes_per_s / 1e9)
    return [f"`{name}`", p.description, vram, link, *(f"{figure:g}" for figure in others)]


# Of each kind of cache at least one.
CONTEXT_MODELS = (
    "deepseek-v4.1-flash", "deepseek-v4-flash", "deepseek-v4-pro", "deepseek-v3.2", "deepseek-v3", "glm-5.2",
    "kimi-k2", "gpt-oss-120b", "qwen3-30b-a3b", "qwen3-235b-a22b", "qwen3.5-35b-a3b", "glm-4.5-air",
    "minimax-m2",
)  # fmt: skip
MILLION = 1 << 20


def context() -> str:
    """What a context of a million tokens takes in each format of the KV cache, and what a model can."""
    formats: tuple[KvFormat, ...] = ("vendor", "fp8", "int8", "bf16", "float32")
    head = ["model", "context", *(f"`{form}`" for form in formats)]
    return _table(head, (_context_row(name, formats) for name in CONTEXT_MODELS))


def _context_row(name: str, formats: Iterable[KvFormat]) -> list[str]:
    cells, longest = [], 0
    for form in formats:
        try:
            shape = released_shape(name, kv_format=form)
        except ConfigError:
            cells.append("")
            continue
        longest = shape.max_context
        whole, half = shape.kv_bytes(MILLION, 1), shape.kv_bytes(MILLION // 2, 1)
        cells.append(f"{(whole - half) / (MILLION // 2):,.0f} B, {whole / 1e9:,.3g} GB")
    return [f"`{name}`", f"{longest:,}", *cells]


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "settings": ("configuration.md", settings),
    "profiles": ("planner.md", profiles),
    "context": ("long-context.md", context),
}


def updated(page: str, part: str) -> str:
    """`page` with `part`, between its two marks, written anew."""
    begin, end = f"<!-- {part} begin -->", f"<!-- {part} end -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page lacks {begin} ... {end}")
    return f"{before}{begin}\n{PARTS[part][1]()}\n{end}{after}"


if __name__ == "__main__":
    for part, (name, _) in PARTS.items():
        path = DOCS / name
        path.write_text(updated(path.read_text(), part))
