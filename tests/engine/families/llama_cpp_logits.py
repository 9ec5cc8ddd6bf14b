"""llama.cpp's log-probabilities of the tokens after prompts, computed in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]


def next_log_probabilities(model: Path, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of each token after each prompt, with keys and values kept in float32."""
    command = [sys.executable, "-m", __spec__.name, str(model), json.dumps(prompts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(model: str, prompts: list[list[int]]) -> None:
    """Print the probabilities as JSON."""
    from xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type

    params = CommonParams()
    params.model.path = model
    params.port = 0
    params.n_parallel, params.n_ctx = 1, 256
    params.cpuparams.n_threads = 1
    params.cache_ram_mib = params.verbosity = 0
    params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = Server(params)
    found = []
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": 1, "n_probs": 1 << 20, "ignore_eos": True, "temperature": 0}
        answer = server.handle_completions(request)
        (token,) = answer["choices"][0]["logprobs"]["content"]
        by_id = {item["id"]: item["logprob"] for item in token["top_logprobs"]}
        found.append([by_id[number] for number in range(len(by_id))])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
