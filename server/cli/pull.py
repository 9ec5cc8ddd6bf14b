"""`loci pull`, `loci list`, `loci rm`: the models of the Hub that are on this machine."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated

import typer

from memory.hub.names import HubModel, parse_hub_name
from quant.errors import ConfigError
from server.cli.arguments import HubName, Yes
from server.cli.terminal import bytes_text, confirm, print_table


def pull(model: HubName, yes: Yes = False) -> None:
    """Download a model of the Hugging Face Hub, or bring it up to date.

    Only what Loci reads is fetched: one format of the weights (safetensors, or the GGUF file that was named),
    configuration, tokenizer and chat template. Downloads of a gigabyte or more are described and asked about
    first. They can be interrupted: files that are finished stay.

    Example: loci pull Qwen/Qwen3-30B-A3B
    """
    from server.cli.fetch import pulled

    hub = _parsed(model)
    path, is_new = pulled(hub, yes)
    print(f"{hub} is {'here now' if is_new else 'up to date'}: {path}\nServe it: loci serve {hub}")


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models of the Hugging Face Hub that are on this machine, whoever downloaded them.

    Example: loci list
    """
    from engine.families.registry import FAMILIES
    from memory.hub.cache import cache_folder, cached_models

    found = cached_models()
    if as_json:
        print(json.dumps([vars(model) | {"runs": model.model_type in FAMILIES} for model in found], indent=1))
        return
    if not found:
        print(f"No models are in {cache_folder()}. `loci pull ORG/MODEL` downloads one.")
        return
    rows = [
        (
            model.name,
            bytes_text(model.nbytes),
            model.revision,
            datetime.fromtimestamp(model.last_used).strftime("%Y-%m-%d"),
            model.model_type or "unknown",
            ("yes" if model.model_type in FAMILIES else "no") if model.is_whole else "incomplete",
        )
        for model in found
    ]
    print_table(["model", "size", "revision", "last used", "type", "runs"], rows, right=(1,))


def rm(
    model: HubName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it without asking.")] = False,
) -> None:
    """Remove a model of the Hugging Face Hub from this machine.

    ORG/MODEL is all that is here of it, ORG/MODEL@REVISION one revision, ORG/MODEL:FILE one GGUF file. Files
    that other revisions share are kept. Experts that --experts encoded go with the last file they came from.

    Example: loci rm Qwen/Qwen3-30B-A3B
    """
    from memory.hub.cache import cache_folder, removal, repo_folder

    hub = _parsed(model)
    planned = removal(hub)
    what = f"{hub}, {bytes_text(planned.expected_freed_size)}, from {cache_folder()}"
    if not yes:
        unasked = f"{hub} is not removed unasked; pass --yes"
        confirm(f"Remove {what}?", unasked=unasked, refused=f"{hub} was not removed")
    planned.execute()
    print(f"Removed {what}")
    from memory.convert.experts import remove_orphans

    if freed := remove_orphans(repo_folder(hub)):
        print(f"Removed its experts in other formats too, {bytes_text(freed)}")


def _parsed(text: str) -> HubModel:
    found = parse_hub_name(text)
    if found is None:
        raise ConfigError(
            f"{text}: not the name of a model on the Hub, which is ORG/MODEL, ORG/MODEL@REVISION or "
            "ORG/MODEL:QUANTIZATION"
        )
    return found
