"""What `loci bench context` prints, draws and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.context import ContextRun
from engine.bench.kv_quality import FormatQuality
from engine.bench.needles import PLACES, Found
from memory.hardware.this_machine import Result
from server.cli.plotting import picture
from server.cli.terminal import bytes_text, print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASE, QUARTER, MILLION = 1 << 13, 1 << 18, 1 << 20
DECODE_TARGET = 1.3
PREFILL_TARGET = 0.75
MEMORY_TARGET = 1.02
EQUAL_TARGET = 0.99
MOST_BYTES = 950  # of a token of V4.1


@dataclass(frozen=True)
class Report:
    """All that was measured. needles: by the model that was asked."""

    run: ContextRun
    qualities: Sequence[FormatQuality]
    needles: dict[str, list[Found]]


def _name(tokens: int) -> str:
    """8k, 1m: how figures call a depth."""
    for size, letter in ((1 << 20, "m"), (1 << 10, "k")):
        if tokens % size == 0:
            return f"{tokens // size}{letter}"
    return str(tokens)


def figures(report: Report, form: str, *, is_v41: bool) -> list[Result]:
    """What was promised, and what else is one number. form: of the caches whose depths were measured."""
    run = report.run
    deepest = run.depths[-1]
    # A model that can a million tokens has no room for the next ones behind them: a little less will do.
    million = deepest.tokens if MILLION - deepest.tokens < BASE else MILLION
    found = []
    if (ratio := run.decode_ratio(million, BASE)) is not None:
        found.append(Result("context_decode_ratio_1m", ratio, "ratio", DECODE_TARGET, ratio <= DECODE_TARGET))
    if (ratio := run.prefill_ratio(QUARTER, BASE)) is not None:
        met = ratio >= PREFILL_TARGET
        found.append(Result("context_prefill_ratio_256k", ratio, "ratio", PREFILL_TARGET, met))
    size = sum(run.row_bytes.values())
    has_target = is_v41 and form == "vendor"
    found.append(
        Result("context_kv_bytes_per_token", size, "B", MOST_BYTES, size <= MOST_BYTES)
        if has_target
        else Result("context_kv_bytes_per_token", size, "B")
    )
    if len(run.row_bytes) > 1:
        found += [
            Result(f"context_kv_bytes_per_token_{device.replace(':', '_')}", nbytes, "B")
            for device, nbytes in run.row_bytes.items()
        ]
    found.append(Result("context_fixed_bytes", run.fixed_bytes / 1e6, "MB"))
    for name, ratio in (("peak", run.peak_of_plan), ("growth", run.growth_of_plan)):
        if ratio is not None:
            name = f"context_memory_{name}_of_plan"
            found.append(Result(name, ratio, "ratio", MEMORY_TARGET, ratio <= MEMORY_TARGET))
    return [*found, *_of_qualities(report.qualities), *_of_needles(report.needles)]


def _of_qualities(qualities: Sequence[FormatQuality]) -> Iterator[Result]:
    for each in qualities:
        if each.form == "float32":
            continue
        for name, share in (("predictions", each.equal_predictions), ("answers", each.equal_answers)):
            if share is None:
                continue
            target = EQUAL_TARGET if each.form == "vendor" else None
            met = None if target is None else share >= target
            yield Result(f"context_equal_{name}_{each.form}", share, "ratio", target, met)
        yield Result(f"context_kl_{each.form}", each.kl, "nats")


def _of_needles(needles: dict[str, list[Found]]) -> Iterator[Result]:
    for model, found in needles.items():
        for form in dict.fromkeys(each.form for each in found):
            of_form = [each for each in found if each.form == form]
            share = sum(each.found for each in of_form) / sum(each.asked for each in of_form)
            yield Result(f"context_needles_{model}_{form}", share, "ratio")


def details(report: Report) -> list[Result]:
    """What is written besides: by depth, by format, by place of needles."""
    found = []
    for depth in report.run.depths:
        name = _name(depth.tokens)
        found.append(Result(f"context_decode_{name}", 1e3 * depth.decode_s, "ms"))
        if depth.prefill_s:
            found.append(Result(f"context_prefill_{name}", 1 / depth.prefill_s, "tokens/s"))
        found.append(Result(f"context_memory_{name}", depth.grown_bytes / 1e6, "MB"))
        found.append(Result(f"context_planned_{name}", depth.planned_bytes / 1e6, "MB"))
    for each in report.qualities:
        found += [
            Result(f"context_perplexity_{each.form}", each.perplexity, ""),
            Result(f"context_logit_error_{each.form}", each.max_logit_error, ""),
            Result(f"context_bytes_{each.form}", each.bytes_per_token, "B"),
        ]
    for model, needles in report.needles.items():
        for needle in needles:
            where = f"{_name(needle.context)}_at_{100 * needle.place:.0f}"
            share = needle.found / needle.asked
            found.append(Result(f"context_needle_{model}_{where}_{needle.form}", share, "ratio"))
    return found


def print_depths(run: ContextRun, kv_format: str) -> None:
    """A line for each depth."""
    first = run.depths[0]
    print_table(
        ["depth", "computed", "decode ms", "", "prefill tokens/s", "", "KV", "planned", "taken"],
        [
            (
                f"{depth.tokens:,}",
                f"{depth.computed:,}",
                f"{1e3 * depth.decode_s:.1f}",
                f"x {depth.decode_s / first.decode_s:.2f}",
                f"{1 / depth.prefill_s:.1f}" if depth.prefill_s else "",
                f"x {first.prefill_s / depth.prefill_s:.2f}" if depth.prefill_s and first.prefill_s else "",
                bytes_text(depth.kv_bytes),
                bytes_text(depth.planned_bytes),
                bytes_text(depth.grown_bytes),
            )
            for depth in run.depths
        ],
        right=(0, 1, 2, 3, 4, 5, 6, 7, 8),
    )
    print(f"KV in {kv_format}; prefill in chunks of {run.chunk}")
    print("planned: KV of that depth, and what does not grow; taken: also work space of steps")


def print_qualities(qualities: Sequence[FormatQuality], source: str) -> None:
    """A line for each format."""
    print(f"\nformats of KV on {source}, against float32")
    print_table(
        ["format", "B/token", "largest logit error", "KL, nats", "perplexity", "equal tokens: predicted",
         "answered", "whole answers"],
        [
            (
                each.form,
                f"{each.bytes_per_token:,.1f}",
                f"{each.max_logit_error:.2g}",
                f"{each.kl:.2g}",
                f"{each.perplexity:.4f}",
                f"{100 * each.equal_predictions:.2f} %",
                "" if each.equal_answers is None else f"{100 * each.equal_answers:.2f} %",
                "" if each.whole_answers is None else f"{100 * each.whole_answers:.1f} %",
            )
            for each in qualities
        ],
        right=(1, 2, 3, 4, 5, 6, 7),
    )  # fmt: skip
    print("predicted: behind the same text; answered: by itself, so that a first difference changes the rest")


def print_needles(model: str, found: Sequence[Found]) -> None:
    """A line for each context and format."""
    print(f"\nneedles that {model} found, by what stands before them")
    rows = []
    for context, form in dict.fromkeys((each.context, each.form) for each in found):
        at = {each.place: each for each in found if (each.context, each.form) == (context, form)}
        rows.append((f"{context:,}", form, *(f"{at[place].found}/{at[place].asked}" for place in PLACES)))
    print_table(
        ["context", "format", *(f"{100 * place:.0f} %" for place in PLACES)], rows, right=(0, *range(2, 7))
    )


def draw(report: Report, file: Path) -> None:
    """Decode time and prefill rate over depth, and the needles that were found."""
    run = report.run
    measured = [d for d in run.depths if d.prefill_s]
    panels = 1 + bool(measured) + len(report.needles)
    with picture(file, panels, figsize=(5 * panels, 3.6)) as axes:
        _draw_depths(run, axes[: 1 + bool(measured)])
        for (model, found), panel in zip(report.needles.items(), axes[1 + bool(measured) :], strict=True):
            _draw_needles(model, found, panel)


def _draw_needles(model: str, found: Sequence[Found], axes: Axes) -> None:
    """Contexts beside one another, places from the beginning (below) to the end, shares of all formats."""
    contexts = list(dict.fromkeys(each.context for each in found))
    shares = [
        [_share([n for n in found if (n.context, n.place) == (context, place)]) for context in contexts]
        for place in PLACES
    ]
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", origin="lower", aspect="auto")
    axes.set_xticks(range(len(contexts)), [_name(context) for context in contexts])
    axes.set_yticks(range(len(PLACES)), [f"{100 * place:.0f} %" for place in PLACES])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("before the needle")
    axes.set_title(f"needles found by {model}, all formats")
    axes.figure.colorbar(image, ax=axes)


def _share(found: Sequence[Found]) -> float:
    return sum(each.found for each in found) / sum(each.asked for each in found)


def _draw_depths(run: ContextRun, panels: Sequence[Axes]) -> None:
    measured, (decode, *others) = [d for d in run.depths if d.prefill_s], panels
    decode.plot([d.tokens for d in run.depths], [1e3 * d.decode_s for d in run.depths], "o-")
    decode.set_ylabel("decode, ms a token")
    for prefill in others:
        prefill.plot([d.tokens for d in measured], [1 / d.prefill_s for d in measured if d.prefill_s], "o-")
        prefill.set_ylabel("prefill, tokens/s")
    for axes in (decode, *others):
        axes.set_xscale("log", base=2)
        axes.set_xticks([d.tokens for d in run.depths], [_name(d.tokens) for d in run.depths])
        axes.set_xlabel("tokens before")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
