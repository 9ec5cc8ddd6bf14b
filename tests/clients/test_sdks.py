"""The scripts of docs/clients.md that need no more than this environment work, at both lengths."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.clients.run import CONTEXTS, SCRIPTS, Tools, run_client, scripted_server

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_sdks_complete_a_turn_with_a_tool_and_another(context: int) -> None:
    tools = Tools(bin=None, python=Path(sys.executable), node=None)

    with scripted_server(context) as server:
        for name in ("openai_python", "anthropic_python"):
            _, told = run_client(SCRIPTS / f"{name}.py", server.url, tools)
            assert told == "works"
