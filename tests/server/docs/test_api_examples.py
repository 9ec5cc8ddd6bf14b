"""What docs/api.md tells a reader to paste works when it is pasted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.harness import ROOT, TINY, LociServer

PAGE = (ROOT / "docs" / "api.md").read_text()
# Checks that a failed request fails the example, and shows nothing but what was answered.
CURL = "curl -sS --fail-with-body"


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LociServer]:
    """Serves under the name that the examples use."""
    started = LociServer(tmp_path_factory.mktemp("examples"), [TINY, "--served-model-name", "loci-demo"])
    try:
        yield started.await_ready()
    finally:
        started.kill()


def paste(
    command: list[str], text: str, server: LociServer, **variables: str
) -> subprocess.CompletedProcess[str]:
    assert "http://127.0.0.1:8000" in text
    return subprocess.run(
        [*command, text.replace("http://127.0.0.1:8000", server.url)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **variables},
    )


@pytest.mark.slow
@pytest.mark.parametrize("text", examples("bash"))
def test_a_command_is_answered(server: LociServer, text: str) -> None:
    result = paste(["bash", "-ec"], text.replace("curl", CURL), server)

    assert result.returncode == 0, result.stderr + result.stdout
    assert result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("text", examples("python"))
def test_a_program_runs(server: LociServer, text: str) -> None:
    result = paste([sys.executable, "-c"], text, server)

    assert result.returncode == 0, result.stderr


def test_there_is_an_example_for_each_interface() -> None:
    shown = "".join(examples("bash") + examples("python"))

    calls = ("/v1/chat/completions", "/v1/completions", "responses.create", "messages.stream", "/tokenize")
    assert [call for call in calls if call not in shown] == []


@pytest.mark.slow
def test_the_llm_command_works_as_described(server: LociServer, tmp_path: Path) -> None:
    (text,) = examples("yaml")
    config = text.replace("http://127.0.0.1:8000", server.url)
    (tmp_path / "extra-openai-models.yaml").write_text(config)
    # Plugins of other models may be installed beside it, which load what they need.
    variables = {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}

    def llm(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, **variables},
        )

    streamed = llm("-m", "loci", "-o", "max_tokens", "8", "Hello")
    whole = llm("-c", "--no-stream", "-o", "max_tokens", "8", "And now?")

    assert (streamed.returncode, streamed.stderr) == (0, "")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert server.metric("loci_http_requests_total", route="/v1/chat/completions", status="200") >= 2
