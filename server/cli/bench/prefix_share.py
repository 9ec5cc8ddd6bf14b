"""What two replicas find of prompts in their caches, beside one server with the same traffic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from server.cli.child import serving

if TYPE_CHECKING:
    from memory.hardware.this_machine import Result

TARGET_SHARE = 0.9
REPLICAS = 2
SYSTEMS = 3  # beginnings that conversations share
CONVERSATIONS = 12
AT_ONCE = 4
TURNS = 4
ANSWER_TOKENS = 40
WORDS = (
    "the",
    "fox",
    "found",
    "a",
    "stone",
    "under",
    "an",
    "old",
    "mill",
    "while",
    "it",
    "rained",
    "all",
    "day",
)
CONTEXT = 2048
TIMEOUT_S = 300.0
FLAGS = {"--max-num-seqs": "8", "--max-model-len": f"{CONTEXT}", "--prefix-cache": "256MiB"}


@dataclass(frozen=True)
class Counted:
    """Tokens of prompts, and those of them that were found in caches."""

    prompt: int
    cached: int

    @property
    def share(self) -> float:
        """Found in caches, of all."""
        return self.cached / self.prompt


def prefix_share(model: Path, dram_budget: str | None) -> list[Result]:
    """Hold the same conversations with one server and with replicas. Raises LociError."""
    from memory.hardware.this_machine import Result

    flags = [text for flag in FLAGS.items() for text in flag]
    if dram_budget is not None:
        flags += ["--dram-budget", dram_budget]
    shares = []
    for more in ((), ("--cluster", "local", "--replicas", f"{REPLICAS}")):
        with serving(str(model), *flags, *more) as url:
            shares.append(_counted(url).share)
    one, several = shares
    share = several / one
    return [
        Result("cluster_one_server_cached", one, "of prompt tokens"),
        Result("cluster_replicas_cached", several, "of prompt tokens"),
        Result("cluster_prefix_share", share, "", TARGET_SHARE, share >= TARGET_SHARE),
    ]


def _counted(url: str) -> Counted:
    """What the conversations with the server at `url` cost."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(partial(_converse, client), range(CONVERSATIONS)))
    return Counted(sum(each.prompt for each in found), sum(each.cached for each in found))


def _converse(client: httpx.Client, number: int) -> Counted:
    """A conversation as a text that goes on: each prompt is the one before, its answer, and a question."""
    text = _words("You are told this of system", number % SYSTEMS, 160)
    prompt = cached = 0
    for turn in range(TURNS):
        text += _words(f"\nQuestion {turn} of conversation", number, 12) + "\nAnswer:"
        body = {"prompt": text, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body).raise_for_status().json()
        usage = answer["usage"]
        prompt += usage["prompt_tokens"]
        cached += usage["prompt_tokens_details"]["cached_tokens"]
        text += answer["choices"][0]["text"]
    return Counted(prompt, cached)


def _words(topic: str, number: int, count: int) -> str:
    """A text of its own for each number."""
    from random import Random

    drawn = Random(f"{topic} {number}")
    return f"{topic} {number}: " + " ".join(drawn.choice(WORDS) for _ in range(count))
