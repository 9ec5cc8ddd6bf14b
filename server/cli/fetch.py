"""Models that may not be here yet: what a download would bring is shown and asked before it begins."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from engine.embedded import hub_model, model_path
from quant.errors import ConfigError, LociError
from server.cli.progress import transfer
from server.cli.terminal import bytes_text, confirm

if TYPE_CHECKING:
    from engine.families.loader import OpenedModel
    from memory.hub.names import HubModel
    from memory.hub.remote import Listing
    from memory.hub.stand_in import StandIn

ASKED_BYTES = 1_000_000_000  # nobody is asked about less


def fetched(model: str | None, yes: bool, experts: str | None = None) -> Path:
    """The path of a model as the user names it; one of the Hub that is not here is downloaded.

    experts: the format that routed experts will be encoded to, for the plan.
    Downloads of gigabytes are described on stderr and asked about, unless `yes`. Raises ConfigError where
    they are not wanted, or where nobody can be asked.
    """
    from memory.hub.cache import cached_path

    hub = hub_model(model)
    if hub is None:
        return model_path(model)
    return cached_path(hub) or pulled(hub, yes, experts)[0]


def pulled(model: HubModel, yes: bool, experts: str | None = None) -> tuple[Path, bool]:
    """The path of a model in the Hub's cache, brought up to date, and whether anything had to be fetched.

    Asks as `fetched` does.
    """
    from memory.hub.cache import cached_commit, cached_path
    from memory.hub.download import check_room, download, missing_bytes
    from memory.hub.remote import look_up
    from memory.hub.stand_in import stand_in

    listing = look_up(model)
    here = cached_path(model)
    if here is not None and cached_commit(model) == listing.commit:
        return here, False
    with stand_in(listing) as standing:
        opened = _opened(model, standing, experts)
        nbytes = missing_bytes(listing, standing.files)
        check_room(listing, nbytes)
        if nbytes >= ASKED_BYTES:
            with redirect_stdout(sys.stderr):  # what `loci run` writes to stdout is the answer
                _describe(listing, standing, opened, nbytes)
                if not yes:
                    _ask(model, nbytes)
        relative = standing.path.relative_to(_snapshot_of(standing))
        files = standing.files
    print(f"Downloading {model}: {bytes_text(nbytes)}", file=sys.stderr, flush=True)
    with transfer(str(model)) as on_progress:
        return download(listing, files, on_progress) / relative, True


@contextmanager
def headers_of(model: str | None) -> Iterator[Path]:
    """The path of a model whose config and headers can be read in the block.

    Of a model of the Hub that is not here, they are fetched for as long; its weights are missing.
    """
    from memory.hub.cache import cached_path
    from memory.hub.remote import look_up
    from memory.hub.stand_in import stand_in

    hub = hub_model(model)
    found = model_path(model) if hub is None else cached_path(hub)
    if hub is None or found is not None:
        yield found or model_path(model)
        return
    with stand_in(look_up(hub)) as standing, _told_of(hub, standing):
        yield standing.path


def is_here(model: str | None) -> bool:
    """Whether all of a model is on this machine."""
    from memory.hub.cache import cached_path

    hub = hub_model(model)
    return hub is None or cached_path(hub) is not None


def _opened(model: HubModel, standing: StandIn, experts: str | None) -> OpenedModel:
    """What loading would find in config, tokenizer and headers; refuses what it would refuse."""
    from engine.families.loader import open_model

    with _told_of(model, standing):
        return open_model(standing.path, experts=experts)


@contextmanager
def _told_of(model: HubModel, standing: StandIn) -> Iterator[None]:
    """Errors about the stand-in in the block become errors about the model."""
    try:
        yield
    except LociError as error:
        folder = str(_snapshot_of(standing))
        text = str(error).replace(str(standing.path), str(model)).replace(folder, str(model))
        raise ConfigError(f"{text}\nNothing was downloaded.") from None


def _snapshot_of(standing: StandIn) -> Path:
    """The folder that stands in for the snapshot, which a GGUF file may lie deeper in."""
    return next(path for path in (standing.path, *standing.path.parents) if path.parent.name == "snapshots")


def _describe(listing: Listing, standing: StandIn, opened: OpenedModel, nbytes: int) -> None:
    from memory.hub.cache import SHORT, cache_folder
    from memory.hub.download import free_bytes

    whole = sum(standing.files.values())
    rest = "" if nbytes == whole else f" of {bytes_text(whole)}, the rest is here already"
    print(
        f"{listing.model} ({listing.commit[:SHORT]}): {len(standing.files)} files, {bytes_text(nbytes)} to "
        f"download{rest}; {bytes_text(free_bytes())} are free in {cache_folder()}\n"
    )
    _print_plan(opened)
    print()


def _print_plan(opened: OpenedModel) -> None:
    from engine.families.shapes import loaded_shape_of
    from memory.hardware.detect import detect
    from memory.hardware.this_machine import this_machine
    from memory.hub.download import existing_cache_folder
    from server.cli.plan_report import DEFAULT_BATCH, print_plan, workload_of

    try:
        shape = loaded_shape_of(opened.checkpoint)
    except LociError as error:
        print(f"What runs how fast here cannot be forecast: {error}")
        return
    machine = this_machine(detect(existing_cache_folder()))
    print_plan(shape, machine, workload_of(shape, machine, None, DEFAULT_BATCH, None))


def _ask(model: HubModel, nbytes: int) -> None:
    """Raises ConfigError unless the user agrees."""
    unasked = (
        f"{model} is not here, and downloading {bytes_text(nbytes)} is not begun unasked; pass --yes, or run "
        f"`loci pull {model}` in a terminal"
    )
    confirm(f"Download {bytes_text(nbytes)}?", unasked=unasked, refused=f"{model} was not downloaded")
