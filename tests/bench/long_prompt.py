"""A prompt of 32768 tokens beside four running streams: the demonstration model with a longer context.

Run: python tests/bench/long_prompt.py [TOKENS] [options of `loci bench serve`, such as --json FILE].

The server sends every token by itself, so that gaps are the times between tokens. What to look at is
`itl_ms_p99_during_long_prompt` and `long_prompt_itl_p99_ratio`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODEL = Path(__file__).parents[2] / "deploy" / "demo" / "loci-demo"


def with_context(folder: Path, tokens: int) -> Path:
    """The demonstration model in `folder`, with a context of `tokens`; its weights are links."""
    for file in MODEL.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((MODEL / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = tokens
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main(arguments: list[str]) -> int:
    """Run `loci bench serve` with the long prompt; its exit status."""
    tokens, *options = arguments or ["32768"]
    with tempfile.TemporaryDirectory() as folder:
        model = with_context(Path(folder), int(tokens) + 2)
        command = [sys.executable, "-m", "server", "bench", "serve", str(model), "--long-prompt", tokens]
        one_by_one = {**os.environ, "LOCI_STREAM_INTERVAL_MS": "0"}
        return subprocess.call([*command, "--streams", "1", "--rounds", "1", *options], env=one_by_one)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
