"""Which part of the vendor's KV formats changes what the demonstration model says, and how near a tie.

    python -m tests.bench.kv_parts [--tokens N]

On held-out text, against float32: windows, entries and index keys alone, each in the vendor's format; entries
with wider codes, and with scales of which each is the one of some near it that errs least (which readers of
the format understand as well); and all of it. Margins are what float32 gives its first choice over the
second, in nats.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch

from engine.bench.evaluate import read_text
from engine.bench.kv_quality import logits_of
from engine.embedded import EMBEDDED, embedded_text
from engine.families.deepseek_v41.forward import DeepseekV41
from engine.families.loader import open_model
from memory.planner.budget import MemoryBudget
from quant.errors import ConfigError
from quant.formats.fp8 import E4M3_LARGEST
from quant.formats.kv import EXACT, GroupedRows, v41_rows
from quant.formats.rows import LARGEST, EncodedRows, RowFormat, Rows

WINDOW = 2048
NEAR = 0.1  # nats
FACTORS = (1.0, 0.75, 0.8125, 0.875, 0.9375, 1.0625, 1.125, 1.25)  # of the covering scale


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    asked = parser.parse_args()
    path = EMBEDDED["demo"].find()
    assert path is not None
    text = embedded_text(path)
    assert text is not None
    opened = open_model(path)
    ids = opened.tokenizer.encode(read_text(text), add_special_tokens=True)[: asked.tokens]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    model = opened.load(replace(MemoryBudget.of_this_machine(None), kv_format="float32")).model
    if not isinstance(model, DeepseekV41):
        raise ConfigError("the demonstration model is no DeepSeek-V4.1")
    exact = torch.cat(logits_of(model, windows)).log_softmax(-1)
    best = exact.topk(2).values
    margin = best[:, 0] - best[:, 1]
    near = 100 * float((margin < NEAR).float().mean())
    print(f"{len(exact):,} positions; margin below {NEAR}: {near:.2f} %")
    print("| kept in few bits | KL | equal predictions | others: margin below 0.1 | median margin |")
    print("|---|---|---|---|---|")
    for name, rows, encoder in cases(model):
        with encoded_by(model, rows, encoder):
            found = torch.cat(logits_of(model, windows)).log_softmax(-1)
        kl = float((exact.exp() * (exact - found)).sum(-1).mean())
        differs = exact.argmax(-1) != found.argmax(-1)
        of_these = margin[differs]
        near = 100 * float((of_these < NEAR).float().mean())
        equal = 100 * (1 - float(differs.float().mean()))
        print(f"| {name} | {kl:.2g} | {equal:.2f} % | {near:.0f} % | {of_these.median():.2f} |", flush=True)
    model.close()


Encoder = Callable[[torch.Tensor, RowFormat | None], Rows]


def cases(model: DeepseekV41) -> Iterator[tuple[str, GroupedRows, Encoder]]:
    """What is encoded, and how."""
    c = model.config
    plain = model.kernels.encode_rows
    vendor = v41_rows("vendor", c.head_dim, c.qk_rope_head_dim, c.index_head_dim)
    entries = vendor.entries
    assert entries is not None
    rope = c.qk_rope_head_dim
    yield "windows", replace(EXACT, window=vendor.window), plain
    yield "index keys", replace(EXACT, index_keys=vendor.index_keys), plain
    yield "entries", replace(EXACT, entries=entries), plain
    yield "entries, rotary columns bf16", replace(EXACT, entries=replace(entries, tail=rope)), plain
    yield "entries, e4m3 instead of FP4", replace(EXACT, entries=vendor.window), plain
    yield "entries, scales of the least error", replace(EXACT, entries=entries), least_error
    yield "all", vendor, plain
    yield "all, entries' scales of the least error", vendor, least_error


@contextmanager
def encoded_by(model: DeepseekV41, rows: GroupedRows, encoder: Encoder) -> Iterator[None]:
    """Caches that the model makes keep rows so."""
    shape = model.cache_shape
    model.cache_shape = replace(shape, rows=rows)
    try:
        with patch.object(model.kernels, "encode_rows", encoder):
            yield
    finally:
        model.cache_shape = shape


@dataclass(frozen=True)
class Stretched(RowFormat):
    """A format whose e4m3 scales are `factor` times the largest magnitude by the largest code."""

    factor: float = 1.0

    def _scaled(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = groups.abs().amax(-1) / LARGEST[self.code] * self.factor
        codes = wanted.clamp(max=E4M3_LARGEST).to(torch.float8_e4m3fn)
        scales = codes.float().unsqueeze(-1)
        return codes.view(torch.uint8), torch.where(scales == 0, torch.zeros_like(groups), groups / scales)


def least_error(x: torch.Tensor, form: RowFormat | None) -> Rows:
    """Rows whose e4m3 scales are those, of some around the covering one, with the least squared error."""
    if form is None:
        return x
    if form.scale != "e4m3":
        return EncodedRows(form.encode(x), form)
    found, error = form.encode(x), torch.full((*x.shape[:-1], form.groups), torch.inf)
    for factor in FACTORS:
        codes = Stretched(form.dim, form.code, form.scale, form.group, form.tail, factor=factor).encode(x)
        errors = (form.decode(codes) - x)[..., : form.coded].square().unflatten(-1, (form.groups, form.group))
        better = errors.sum(-1) < error
        error = torch.where(better, errors.sum(-1), error)
        of_codes = better.repeat_interleave(form.group // 2, dim=-1)
        at = form.code_bytes
        found[..., :at] = torch.where(of_codes, codes[..., :at], found[..., :at])
        scales = slice(at + 2 * form.tail, at + 2 * form.tail + form.groups)
        found[..., scales] = torch.where(better, codes[..., scales], found[..., scales])
    return EncodedRows(found, form)


if __name__ == "__main__":
    main()
