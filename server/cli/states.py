"""`loci cache`: states of prompts and answers that servers have written to disk."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from server.cli.terminal import bytes_text, confirm, print_table


def cache(
    prefix_dir: Annotated[
        Path | None, typer.Option("--prefix-dir", help="Their directory. Default: ~/.cache/loci/states.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of them.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove them without asking.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the states of prompts and answers on disk (`loci serve --prefix-disk`), or remove them.

    Example: loci cache --clear
    """
    from engine.cache.state_folders import remove_states, states_folder, states_in

    folder = prefix_dir or states_folder()
    found = states_in(folder)
    total = bytes_text(sum(of.nbytes for of in found))
    if clear:
        if found and not yes:
            unasked = "nothing is removed unasked; pass --yes"
            question = f"Remove {total} of states from {folder}?"
            confirm(question, unasked=unasked, refused="nothing was removed")
        for of in found:
            remove_states(of)
        print(f"Removed {total} from {folder}")
        return
    if as_json:
        print(json.dumps([vars(of) | {"folder": str(of.folder)} for of in found], indent=1))
        return
    if not found:
        print(f"No states are in {folder}. `loci serve MODEL --prefix-disk 50GiB` keeps some there.")
        return
    rows = [
        (
            of.model,
            str(of.states),
            bytes_text(of.nbytes),
            datetime.fromtimestamp(of.used).strftime("%Y-%m-%d"),
        )
        for of in found
    ]
    print_table(["model", "states", "size", "last used"], rows, right=(1, 2))
