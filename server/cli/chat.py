"""`loci chat` and `loci run`: talk to a model in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import ConfigError, LociError
from server.cli.arguments import Devices, DramBudget, ExpertsFormat, NamedModel, OptionalNamedModel, Yes
from server.cli.keyboard import messages
from server.cli.terminal import is_terminal, write

if TYPE_CHECKING:
    from engine.chat.output_parser import MessageDelta
    from server.cli.talk import ChatMessage, Sampling, Talk

RESET, QUIT = "/reset", "/quit"
_HELP = f"{RESET} clears the conversation, {QUIT} exits."

Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 always picks the most likely token. Default: the model's own, otherwise 1.",
        show_default=False,
    ),
]
MaxTokens = Annotated[int | None, typer.Option(help="Maximum tokens per answer.", show_default=False)]
Seed = Annotated[
    int | None, typer.Option(help="Random seed; the same seed gives the same answer.", show_default=False)
]


def chat(
    model: OptionalNamedModel = None,
    url: Annotated[
        str | None,
        typer.Option(help="Chat with a model on this server instead of loading one.", show_default=False),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LOCI_API_KEY", help="API key for --url.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default=False)] = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    experts: ExpertsFormat = None,
    devices: Devices = None,
    dram_budget: DramBudget = None,
    yes: Yes = False,
) -> None:
    """Chat with a model; answers appear as they are generated.

    /reset clears the conversation, /quit exits. Pasted text is one message; piped input is one message per
    line.

    Example: loci chat --url http://127.0.0.1:8000
    """
    if url is not None and (model, experts, devices, dram_budget) != (None,) * 4:
        raise typer.BadParameter("give --url or a model, not both")
    from server.cli.talk import RemoteTalk, Sampling

    talk: Talk
    if url is not None:
        talk = RemoteTalk(url, api_key)
    else:
        from server.cli.fetch import fetched
        from server.cli.local_talk import LocalTalk

        talk = LocalTalk(
            fetched(model, yes, experts), experts=experts, devices=devices, dram_budget=dram_budget
        )
    try:
        _converse(talk, Sampling(temperature, max_tokens, seed), system)
    finally:
        talk.close()


def run(
    model: NamedModel,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Prompt. Omitted or -: read from stdin.", show_default=False),
    ] = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    experts: ExpertsFormat = None,
    devices: Devices = None,
    dram_budget: DramBudget = None,
    yes: Yes = False,
) -> None:
    """Write one answer to stdout. A model without a chat template continues the prompt.

    Example: loci run ./model "Name three rivers." --temperature 0

    or: loci run ./model < question.txt
    """
    prompt = _prompt(prompt)
    from server.cli.fetch import fetched
    from server.cli.local_talk import LocalTalk
    from server.cli.talk import Sampling

    talk = LocalTalk(fetched(model, yes, experts), experts=experts, devices=devices, dram_budget=dram_budget)
    sampling = Sampling(temperature, max_tokens, seed)
    try:
        if talk.can_chat:
            for delta in talk.reply([{"role": "user", "content": prompt}], sampling):
                write(delta.content)
        else:
            for text in talk.continue_text(prompt, sampling):
                write(text)
        write("\n")
    finally:
        talk.close()


def _prompt(given: str | None) -> str:
    """What to ask: as given, or what comes through a pipe."""
    if given is None and sys.stdin.isatty():
        raise typer.BadParameter('give a prompt, as in: loci run MODEL "Hello", or pipe one in')
    try:
        prompt = sys.stdin.read() if given in (None, "-") else str(given)
        prompt.encode()  # fails for bytes that were no text
    except UnicodeError:
        raise ConfigError("the prompt is not UTF-8 text") from None
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    return prompt


def _converse(talk: Talk, sampling: Sampling, system: str | None) -> None:
    is_interactive = sys.stdin.isatty()
    beginning: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
    history = list(beginning)
    if is_interactive:
        write(f"Chatting with {talk.name}. {_HELP}\n")
    for line in _lines(is_interactive):
        if line == QUIT:
            return
        if line == RESET:
            history = list(beginning)
        elif line.startswith("/") and "\n" not in line:
            print(f"{line}: no such command. {_HELP}", file=sys.stderr)
        elif line:
            question: ChatMessage = {"role": "user", "content": line}
            try:
                answer = _show(talk.reply([*history, question], sampling))
            except LociError as error:
                if not is_interactive:
                    raise
                print(f"loci: {error}", file=sys.stderr)
            else:
                history += [question, {"role": "assistant", "content": answer}]


def _show(deltas: Iterator[MessageDelta]) -> str:
    """Write an answer as it comes and return its content; Ctrl-C ends the answer, not the chat."""
    content = ""
    try:
        for delta in deltas:
            if delta.reasoning and is_terminal():
                write(delta.reasoning, dim=True)
            if delta.content:
                write(delta.content)
                content += delta.content
    except KeyboardInterrupt:
        if not is_terminal():
            raise
    write("\n")
    return content


def _lines(is_interactive: bool) -> Iterator[str]:
    if is_interactive:
        yield from messages((RESET, QUIT))
    else:
        yield from (line.strip() for line in sys.stdin)
