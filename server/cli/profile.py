"""`loci profile`: learn which experts are hot, and keep it beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quant.errors import CheckpointError, ConfigError
from server.cli.arguments import Model
from server.cli.progress import progress

MAX_TEXT_BYTES = 64 * 2**20


def profile(
    model: Model,
    text: Annotated[Path, typer.Argument(help="UTF-8 text similar to the intended use.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write. Default: routing.safetensors next to the model; required for models that "
            "come with Loci.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Read at most this many tokens of the text.")] = 20_000,
) -> None:
    """Record which experts the model's routers choose on a text.

    With the trace next to it, the model's hottest experts are placed first when it is loaded again. A longer
    trace is not overwritten.

    Example: loci profile ./DeepSeek-V4.1-Flash my-notes.txt
    """
    try:
        if text.stat().st_size > MAX_TEXT_BYTES:
            raise ConfigError(f"{text}: larger than {MAX_TEXT_BYTES} bytes; a smaller sample is enough")
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text}: cannot be read as text ({error})") from None

    from engine.families.loader import open_model
    from engine.record_routing import record_routing
    from memory.planner.budget import MemoryBudget
    from memory.user_files import check_writable

    target = out or _beside(model)
    check_writable(target)
    recorded = _tokens_recorded(target)
    opened = open_model(model)
    ids = opened.tokenizer.encode(content, parse_special=False)[:tokens]
    if not ids:
        raise ConfigError(f"{text}: contains no text")
    if len(ids) < recorded:
        raise ConfigError(
            f"{target}: already holds a trace of {recorded} tokens, longer than this one of {len(ids)}; "
            "give more text, name another file with --out, or delete it"
        )
    loaded = opened.load(MemoryBudget.of_this_machine()).model
    with progress("tokens") as on_progress:
        trace = record_routing(loaded, ids, lambda done: on_progress(done, len(ids)))
    loaded.close()
    trace.save(target)
    replaced = f", in place of one of {recorded}" if recorded else ""
    print(f"{target}: routing of {len(ids)} tokens through {trace.layers} layers{replaced}")


def _beside(model: Path) -> Path:
    """The file beside a model that it is loaded with."""
    from engine.embedded import embedded_name
    from memory.experts.traces import FILE_NAME

    if embedded_name(model) is not None:
        raise ConfigError(f"{model}: comes with Loci and is not modified; name a file to write with --out")
    if not model.is_dir():
        raise ConfigError(f"{model}: not a model directory to write to; name a file with --out")
    return model / FILE_NAME


def _tokens_recorded(target: Path) -> int:
    """How many tokens the record that lies at `target` holds; 0 where nothing does.

    Raises ConfigError where something else does.
    """
    from memory.experts.traces import RoutingTrace

    if not target.exists():
        return 0
    try:
        return RoutingTrace.load(target).tokens
    except CheckpointError as error:
        raise ConfigError(f"{error}; it is not overwritten: name another file with --out") from None
