"""The commands of `loci`, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from engine.distribution import DISTRIBUTION, version_of
from server.cli.bench.group import bench
from server.cli.chat import chat, run
from server.cli.demo import demo
from server.cli.doctor import doctor
from server.cli.economics import economics
from server.cli.info import info
from server.cli.logits import logits
from server.cli.plan import plan
from server.cli.profile import profile
from server.cli.pull import list_models, pull, rm
from server.cli.quantize import quantize
from server.cli.serve import serve
from server.cli.states import cache
from server.cli.synth import synth
from server.cli.top import top

app = typer.Typer(
    name="loci",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # the lines of a docstring's paragraph are one paragraph
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(chat)
app.command()(run)
app.command()(demo)
app.command()(pull)
app.command("list")(list_models)
app.command()(rm)
app.command()(cache)
app.command()(info)
app.command()(logits)
app.command()(plan)
app.command()(economics)
app.command()(quantize)
app.command()(profile)
app.command()(synth)
app.command()(top)
app.command()(doctor)
app.add_typer(bench)


def _print_version(is_asked: bool) -> None:
    if not is_asked:
        return
    version = version_of(DISTRIBUTION)
    print(f"loci {version}" if version else "loci, run from its source without being installed")
    raise typer.Exit


@app.callback()
def _loci(
    is_version_asked: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """A local inference server for frontier mixture-of-experts models."""
