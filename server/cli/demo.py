"""`loci demo`: the trained demonstration model in budgets so small that its weights really move."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import LociError
from server.cli.keyboard import messages
from server.cli.terminal import bytes_text, can_draw, print_table, write

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from engine.families.base import Model
    from memory.telemetry import Snapshot
    from server.cli.local_talk import LocalTalk
    from server.cli.talk import ChatMessage

# Beside what every token reads, each GPU has room for about a tenth of the 144 experts of 54 kB and DRAM
# for a third; of 22 MB of Engram rows DRAM has next to nothing. The rest, and the embedding, is on disk
# until it is needed.
# Links as fast as sixteen lanes of PCIe 4.0: by the time that slower ones had carried one of a token's two
# experts in a layer, the CPU would have computed both.
DRAM_BUDGET = "4.8MB"
DEVICES = "virtual:2.2MB@25GB/s,virtual:2.2MB@25GB/s"
MAX_TOKENS = 160
CONTEXT = 640
QUESTIONS = (
    "Hello! How are you?",
    "What does a cow eat?",
    "Tell me a story about a fox.",
)
GPU_COLOURS = ("green", "cyan", "magenta", "blue")
SQUARES = {"dram": ("▒", "yellow"), "nvme": ("·", "dim")}
NAMES = {"dram": "DRAM", "nvme": "disk"}


def demo(
    question: Annotated[
        list[str] | None,
        typer.Argument(help="Questions to ask instead of typing them.", show_default=False),
    ] = None,
    dram_budget: Annotated[str, typer.Option(help="Host memory for weights.")] = DRAM_BUDGET,
    devices: Annotated[
        str, typer.Option(help="GPUs with their budgets; virtual ones also with a link speed.")
    ] = DEVICES,
) -> None:
    """Chat with the demonstration model while its experts and Engram rows move between tiers.

    The model would fit on any computer, so it runs with budgets as tight for it as a workstation's are for
    a frontier model. The picture shows where each expert is, the table what that costs.

    Example: loci demo "Hello! How are you?"
    """
    from pathlib import Path

    from server.cli.local_talk import LocalTalk

    talk = LocalTalk(Path("demo"), dram_budget=dram_budget, devices=devices, max_model_len=CONTEXT)
    try:
        show = _LiveShow(talk.model) if can_draw() else _PlainShow(talk.model)
        show.begin()
        history: list[ChatMessage] = []
        for line in question or _questions():
            history.append({"role": "user", "content": line})
            try:
                answer = show.answer(line, _pieces(talk, history))
            except LociError as error:  # the conversation has outgrown the context, most likely
                print(f"loci: {error}", file=sys.stderr)
                history.clear()
                continue
            history.append({"role": "assistant", "content": answer})
    finally:
        talk.close()


def _questions() -> Iterator[str]:
    """Three questions to begin with, then what a person types."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    yield from QUESTIONS
    write("\nYour turn; an empty line exits.\n")
    yield from itertools.takewhile(bool, messages())


def _pieces(talk: LocalTalk, history: list[ChatMessage]) -> Iterator[str]:
    from server.cli.talk import Sampling

    for delta in talk.reply(history, Sampling(temperature=0.0, max_tokens=MAX_TOKENS)):
        yield delta.content


@dataclass(frozen=True)
class _Since:
    """What happened between two snapshots of the telemetry."""

    before: Snapshot
    after: Snapshot

    def of(self, counter: str, label: str) -> float:
        """How far a counter with this label moved on."""
        before, after = getattr(self.before, counter), getattr(self.after, counter)
        return float(after.get(label, 0) - before.get(label, 0))

    def stalled_ms(self, link: str) -> float:
        """Time that computation waited for a link."""
        return 1e3 * (self.after.stalled_on(link) - self.before.stalled_on(link))

    @property
    def engram_stalled_ms(self) -> float:
        """Time that computation waited for Engram rows, in host memory or on their way to a GPU."""
        links = {label.rpartition(" ")[0] for label in self.after.stalled_s}
        return sum(self.stalled_ms(link) for link in links if link.startswith("engram"))


def _square(tier: str) -> tuple[str, str]:
    """What stands for an expert there, and its style."""
    kind, _, number = tier.partition(":")
    return ("█", GPU_COLOURS[int(number) % len(GPU_COLOURS)]) if kind == "vram" else SQUARES[tier]


def _name(tier: str) -> str:
    return tier.replace("vram:", "GPU ") if tier.startswith("vram:") else NAMES[tier]


class _Story:
    """What is told about a model: at the beginning, and after each answer."""

    def __init__(self, model: Model) -> None:
        self.model = model
        telemetry = model.telemetry
        assert telemetry is not None
        self.telemetry = telemetry
        self.tiers = (*sorted(model.tier_bytes, key="dram".__eq__), "nvme")  # the fastest first

    def opening(self) -> str:
        """What the budgets are."""
        tiers = self.model.expert_tiers()
        experts = sum(map(len, tiers))
        on_disk = sum(layer.count("nvme") for layer in tiers)
        held = ", ".join(f"{_name(tier)} {bytes_text(n)}" for tier, n in self.model.tier_bytes.items())
        return (
            f"{experts} experts in {len(tiers)} layers. Memory in use: {held}. {on_disk} experts and most "
            "Engram rows stay on disk until a token needs them."
        )

    def table(self, since: _Since) -> list[tuple[str, ...]]:
        """A row for each tier: experts in it, uses served, experts that left, bytes moved, time waited."""
        flat = [tier for layer in self.model.expert_tiers() for tier in layer]
        uses = sum(since.of("hits", tier) for tier in self.tiers) or 1.0
        return [
            (
                _name(tier),
                str(flat.count(tier)),
                f"{since.of('hits', tier) / uses:.0%}",
                f"{since.of('evictions', tier):.0f}" if tier != "nvme" else "",
                bytes_text(int(since.of("moved_bytes", tier))) if tier != "dram" else "",
                f"{since.stalled_ms(tier):.1f} ms" if tier != "dram" else "",
            )
            for tier in self.tiers
        ]

    def engram(self, since: _Since) -> str:
        """What became of the n-gram rows that were asked for."""
        asked, unique, cached, read = (
            since.of("rows", label) for label in ("asked", "unique", "cached", "read")
        )
        return (
            f"Engram rows: {asked:,.0f} requested, {unique:,.0f} distinct, {cached:,.0f} in memory, "
            f"{read:,.0f} read from disk; waited {since.engram_stalled_ms:.1f} ms."
        )


HEADERS = ("tier", "experts", "uses served", "had to leave", "over its link", "waited for it")


class _PlainShow:
    """For pipes: answers, then figures."""

    def __init__(self, model: Model) -> None:
        self._story = _Story(model)

    def begin(self) -> None:
        """Say what is shown."""
        write(self._story.opening() + "\n")

    def answer(self, question: str, pieces: Iterator[str]) -> str:
        """Write an answer as it comes, and what it took."""
        before = self._story.telemetry.snapshot()
        write(f"\n> {question}\n")
        answer = ""
        for piece in pieces:
            write(piece)
            answer += piece
        since = _Since(before, self._story.telemetry.snapshot())
        write("\n\n")
        print_table(HEADERS, self._story.table(since), right=(1, 2, 3, 4, 5))
        write(self._story.engram(since) + "\n")
        return answer


class _LiveShow:
    """For terminals: the answer grows above a picture of where each expert is."""

    def __init__(self, model: Model) -> None:
        from rich.console import Console

        self._story = _Story(model)
        self._console = Console(highlight=False)

    def begin(self) -> None:
        """Say what is shown."""
        self._console.print(self._story.opening(), markup=False)

    def answer(self, question: str, pieces: Iterator[str]) -> str:
        """Draw while the answer comes; the last picture stays."""
        from rich.live import Live

        before = self._story.telemetry.snapshot()
        answer = ""
        with Live(console=self._console, refresh_per_second=12, vertical_overflow="visible") as live:
            for piece in pieces:
                answer += piece
                since = _Since(before, self._story.telemetry.snapshot())
                live.update(self._picture(question, answer, since))
        return answer

    def _picture(self, question: str, answer: str, since: _Since) -> RenderableType:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        from server.cli.terminal import printable

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for header in HEADERS:
            table.add_column(header, justify="left" if header == "tier" else "right")
        for tier, row in zip(self._story.tiers, self._story.table(since), strict=True):
            square, style = _square(tier)
            table.add_row(Text(f"{square} {row[0]}", style), *row[1:])
        return Group(
            Text(f"\n> {question}", "bold"),
            Text(printable(answer)),
            Text(""),
            *self._map(),
            table,
            Text(self._story.engram(since), "dim"),
        )

    def _map(self) -> list[Text]:
        """A line for each layer, a square for each expert."""
        from rich.text import Text

        lines = []
        for number, layer in enumerate(self._story.model.expert_tiers()):
            line = Text()
            line.append(f"layer {number}  ", "dim")
            for tier in layer:
                square, style = _square(tier)
                line.append(square + " ", style)
            lines.append(line)
        return lines
