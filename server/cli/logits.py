"""`loci logits`: a model's logits for given token ids, to compare engines and formats with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import BudgetError, ConfigError, RequestError
from server.cli.arguments import ExpertsFormat, KvFormatOption, Model, can_be_written

if TYPE_CHECKING:
    import torch

    from engine.families.base import Model as LoadedModel

MAX_IDS_FILE_BYTES = 64 * 2**20


def logits(
    model: Model,
    ids_file: Annotated[Path, typer.Option(help="JSON list of token ids.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="safetensors file to write.", callback=can_be_written, show_default=False)
    ],
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward pass.")] = 512,
    experts: ExpertsFormat = None,
    kv_format: KvFormatOption = "float32",
    greedy: Annotated[int, typer.Option(min=0, help="Tokens to generate greedily after the input.")] = 0,
) -> None:
    """Write the logits of every position and a greedy continuation to a safetensors file.

    The file holds `logits` [tokens, vocabulary] float32 and, with --greedy K, `greedy_ids` [K] int64.

    Example: loci logits ./model --ids-file ids.json --out logits.safetensors --greedy 12
    """
    ids = _read_ids(ids_file)
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent}: no such directory to write to")

    from safetensors.torch import save_file

    from engine.families.loader import open_model
    from memory.planner.budget import MemoryBudget
    from memory.user_files import whole_file

    opened = open_model(model, experts=experts)
    loaded = opened.load(MemoryBudget.of_this_machine(kv_format=opened.kv_format(kv_format))).model
    _check(ids, greedy, loaded)
    tensors = _compute(loaded, ids, chunk, greedy)
    with whole_file(out) as temporary:
        save_file(tensors, temporary)
    print(f"{out}: logits of {len(ids)} tokens" + (f", {greedy} greedy ids" if greedy else ""))


def _read_ids(file: Path) -> list[int]:
    try:
        if file.stat().st_size > MAX_IDS_FILE_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_IDS_FILE_BYTES} bytes, too large for a list of ids")
        ids = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON ({error})") from None
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise ConfigError(f"{file}: expected a JSON list of token ids, such as [1, 2, 3]")
    return ids


def _check(ids: list[int], greedy: int, model: LoadedModel) -> None:
    from memory.hardware.detect import available_memory_bytes

    about = model.info
    wrong = next((i for i in ids if not 0 <= i < about.vocab_size), None)
    if wrong is not None:
        raise RequestError(f"{wrong} is not a token id; the vocabulary has ids 0 to {about.vocab_size - 1}")
    tokens = len(ids) + greedy
    if tokens > about.max_context:
        raise RequestError(f"{tokens} tokens exceed the model's context of {about.max_context}")
    needed = len(ids) * about.vocab_size * 4 + model.cache_bytes(1, tokens)
    available = available_memory_bytes()
    if needed > available:
        raise BudgetError(
            f"logits and KV cache need {needed / 1e9:.2f} GB, but only {available / 1e9:.2f} GB is "
            "available; give fewer ids"
        )


def _compute(model: LoadedModel, ids: list[int], chunk: int, greedy: int) -> dict[str, torch.Tensor]:
    import torch

    from engine.families.base import Batch

    cache = model.new_cache(1, len(ids) + greedy)
    rows = torch.empty(len(ids), model.info.vocab_size)  # [tokens, vocab]
    for start in range(0, len(ids), chunk):
        piece = ids[start : start + chunk]
        rows[start : start + len(piece)] = model.forward(
            Batch.of([(0, start, piece)], all_logits=True), cache
        )
    if not greedy:
        return {"logits": rows}
    chosen = [int(rows[-1].argmax())]
    while len(chosen) < greedy:
        position = len(ids) + len(chosen) - 1
        last = model.forward(Batch.of([(0, position, chosen[-1:])]), cache)  # [1, vocab]
        chosen.append(int(last[0].argmax()))
    return {"logits": rows, "greedy_ids": torch.tensor(chosen)}
