"""Triton's interpreter without what it repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter


def do_not_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put its own functions into Triton's language once a kernel, not again at each call inside of one, which
    is a third of its time."""
    monkeypatch.setattr(
        interpreter, "_patch_lang", _Once(interpreter._patch_lang, interpreter._LangPatchScope)
    )


def do_not_check_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not compute every integer twice to see whether it has room: those of small models have."""
    options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


class _Once:
    """Puts functions into the modules that a function sees, where they are not there yet."""

    def __init__(self, patch: Callable[[Any], Any], nothing: Callable[[], Any]) -> None:
        self._patch, self._nothing = patch, nothing
        self._patched: set[int] = set()

    def __call__(self, function: Any) -> Any:
        seen = {
            id(value)
            for value in function.__globals__.values()
            if isinstance(value, ModuleType) and value in (tl, tl.core)
        }
        new = seen - self._patched
        if not new:
            return self._nothing()
        scope = self._patch(function)
        restore = scope.restore

        def restored() -> None:  # called for kernels only, not for what they call
            self._patched -= new
            restore()

        scope.restore = restored
        self._patched |= new
        return scope
