"""`loci` in a terminal of 24 lines, as a person sees it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

from tests.server.harness import DEADLINE_S, ROOT, command, environment

ESCAPE = "\x1b"
LIVELY = {"TERM": "xterm-256color", "NO_COLOR": ""}


class Terminal:
    """A process in a pseudo-terminal, with what it has drawn since the last look."""

    def __init__(self, *arguments: str | Path, **variables: str) -> None:
        self._controller, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            command(*arguments),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            cwd=ROOT,
            env=environment(**variables),
            preexec_fn=lambda: os.login_tty(terminal),
        )
        os.close(terminal)
        self._drawn = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._controller)

    def wait_for(self, pattern: str) -> str:
        """All that was drawn since the last call, once it holds `pattern`."""
        end = time.monotonic() + DEADLINE_S
        while not re.search(pattern, self._text):
            readable, _, _ = select.select([self._controller], [], [], max(0.0, end - time.monotonic()))
            assert readable, f"not drawn: {pattern!r}; but {self._drawn!r}"
            self._drawn += os.read(self._controller, 65536)
        return self._take()

    def rest(self) -> str:
        """All that was drawn since the last call, until the process ended."""
        while True:
            try:
                read = os.read(self._controller, 65536)
            except OSError:  # the other end is closed
                return self._take()
            if not read:
                return self._take()
            self._drawn += read

    def press(self, keys: bytes) -> None:
        os.write(self._controller, keys)

    def exit_code(self) -> int:
        return self.process.wait(DEADLINE_S)

    @property
    def _text(self) -> str:
        return self._drawn.decode(errors="replace").replace("\r\n", "\n")

    def _take(self) -> str:
        drawn, self._drawn = self._text, b""
        return drawn
