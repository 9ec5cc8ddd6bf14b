"""docs/other-servers.md: which tests of other servers are asked of Loci, and which are not.

python -m tests.clients.others.page   # writes it
"""

from __future__ import annotations

from tests.clients.others import llama_cpp_messages, llama_cpp_security, vllm_calls
from tests.clients.others.apart import LEFT
from tests.clients.others.checks import Check
from tests.clients.others.llama_cpp import LLAMA_CPP
from tests.clients.others.vllm import VLLM
from tests.clients.others.vllm_responses import VLLM_MESSAGES
from tests.server.harness import ROOT

# Each module adds its checks to its suite.
assert all((llama_cpp_messages, llama_cpp_security, vllm_calls))
SUITES = (LLAMA_CPP, VLLM, VLLM_MESSAGES)
CHECKS: list[Check] = [check for suite in SUITES for check in suite.checks]
PAGE = ROOT / "docs" / "other-servers.md"

_HEAD = """\
# Tests of other servers

llama.cpp and vLLM test their servers with requests that could be sent to any server. Below is each such test,
and what it asks of Loci. The names are theirs; requests and expectations are written anew, in
`tests/clients/others/`, for a model with random weights, because it is the protocol that is tested.
`pytest tests/clients/test_others.py` runs them, as does continuous integration. A remark says what of a test
was left out. The tables after them list the tests that are not asked, and why.
"""


def text() -> str:
    """The page."""
    return "\n".join([_HEAD, *(line for suite in SUITES for line in _section(suite.folder))]).rstrip() + "\n"


def _section(folder: str) -> list[str]:
    files: dict[str, list[str]] = {}
    for check in CHECKS:
        if check.folder == folder:
            remark = f" ({check.note})" if check.note else ""
            files.setdefault(check.file, []).append(f"`{check.test}`{remark}")
    count = sum(map(len, files.values()))
    lines = [f"## {folder}", "", f"{count} tests pass:", "", "| file | tests that pass |", "|---|---|"]
    lines += [f"| `{file}` | {', '.join(tests)} |" for file, tests in sorted(files.items())]
    lines += ["", "Not asked:", "", "| file | tests | why |", "|---|---|---|"]
    for left in LEFT:
        if left.folder == folder:
            tests = ", ".join(f"`{name}`" for name in left.tests.split(", "))
            tests = tests if left.tests != "*" else "all others" if left.file in files else "all"
            lines.append(f"| {_code(left.file)} | {tests} | {left.why} |")
    return [*lines, ""]


def _code(file: str) -> str:
    return f"`{file}`" if file.endswith((".py", "/")) else file


if __name__ == "__main__":
    PAGE.write_text(text())
