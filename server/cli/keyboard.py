"""What a person types: messages, which have several lines where they are pasted, and single keys."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from server.cli.terminal import can_draw, is_terminal, write

# The lines of a paste come within this time; nobody types another line so soon.
PASTE_S = 0.05
REPEAT_S = 0.1
PROMPT, CONTINUED = "> ", "  "


def messages(commands: Collection[str] = ()) -> Iterator[str]:
    """What a person types at a prompt, until the input ends; what is pasted is one message.

    A line that is one of `commands` is a message of its own.
    """
    _prepare_editing()
    lines: list[str] = []
    is_over = False
    while not is_over:
        try:
            line = _read_line(CONTINUED if lines else PROMPT)
        except EOFError:
            is_over = True
        except KeyboardInterrupt:
            write("\n")
            raise
        else:
            is_command = line.strip() in commands
            if is_command and lines:
                yield "\n".join(lines).strip()
                lines = []
            lines.append(line)
            if not is_command and _is_waiting():
                continue
        if lines:
            yield "\n".join(lines).strip()
            lines = []
    write("\n")


def _prepare_editing() -> None:
    """Give `input` editing, a history and, where the terminal marks what is pasted, that as one line."""
    try:
        import readline
    except ImportError:  # Python was built without it
        return
    if can_draw():
        readline.parse_and_bind("set enable-bracketed-paste on")


def _read_line(prompt: str) -> str:
    if is_terminal():
        with _interrupts_repeated():
            return input(prompt)
    sys.stderr.write(prompt)  # stdout is a file's
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


@contextmanager
def _interrupts_repeated() -> Iterator[None]:
    """Ctrl-C ends the block's `input` even if it is pressed in the moment before readline listens.

    A signal that comes between the prompt and the wait for a key is only remembered, and would be dealt with
    at the next key. So it is sent again, until the block has ended.
    """
    is_over = threading.Event()
    ours, signalled = socket.socketpair()
    signalled.setblocking(False)
    reader = threading.main_thread().ident
    assert reader is not None

    def repeat() -> None:
        while ours.recv(1) and not is_over.wait(REPEAT_S):
            signal.pthread_kill(reader, signal.SIGINT)

    with ours, signalled:
        before = signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=repeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            signal.set_wakeup_fd(before)
            signalled.shutdown(socket.SHUT_RDWR)
            thread.join()


def _is_waiting() -> bool:
    """Whether the terminal has more to read, at once or in the moment after."""
    return bool(select.select([sys.stdin], [], [], PASTE_S)[0])


@contextmanager
def keys() -> Iterator[Keys]:
    """Single keys, while the block runs: they do not wait for Enter and are not shown."""
    if not sys.stdin.isatty() or os.tcgetpgrp(sys.stdin.fileno()) != os.getpgrp():  # or in the background
        yield Keys(None)
        return
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    try:
        tty.setcbreak(number)
        yield Keys(number)
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


class Keys:
    """The keyboard behind a file descriptor, or none."""

    def __init__(self, number: int | None) -> None:
        self._number = number

    def is_pressed(self, wanted: bytes, seconds: float) -> bool:
        """Wait so long, or until one of the keys `wanted` is pressed; whether one was."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._number is None:
                time.sleep(left)
            elif select.select([self._number], [], [], left)[0]:
                typed = os.read(self._number, 1024)
                if set(typed) & set(wanted):
                    return True
                if not typed:  # the terminal is gone
                    self._number = None
        return False
