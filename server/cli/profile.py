"""`loci profile`: learn which experts are hot, and keep it beside the model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from quant.errors import ConfigError
from server.cli.arguments import Model

MAX_TEXT_BYTES = 64 * 2**20


def profile(
    model: Model,
    text: Annotated[
        Path, typer.Argument(help="UTF-8 text like what the model will be used for.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write. Default: routing.safetensors beside the model.", show_default=False
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=16, help="Read at most this many tokens of the text.")] = 20_000,
) -> None:
    """Record which experts the model's routers choose on a text.

    With the record beside it, the model's hot experts are placed first when it is loaded again.

    Example: loci profile ./DeepSeek-V4.1-Flash my-notes.txt
    """
    try:
        if text.stat().st_size > MAX_TEXT_BYTES:
            raise ConfigError(f"{text}: larger than {MAX_TEXT_BYTES} bytes; a smaller sample is enough")
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text}: cannot be read as text ({error})") from None

    from engine.families.loader import load
    from engine.record_routing import record_routing
    from memory.experts.traces import FILE_NAME

    target = out or model / FILE_NAME
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent}: no such directory to write to; name another with --out")
    loaded = load(model)
    ids = loaded.tokenizer.encode(content, parse_special=False)[:tokens]
    if not ids:
        raise ConfigError(f"{text}: holds no text")
    with Progress(disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("tokens", total=len(ids))
        trace = record_routing(loaded.model, ids, lambda done: bar.advance(task, done))
    loaded.model.close()
    trace.save(target)
    print(f"{target}: routing of {len(ids)} tokens through {trace.layers} layers")
