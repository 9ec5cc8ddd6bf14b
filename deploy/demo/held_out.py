"""Writes `held-out.txt` beside the demonstration model: texts that it was not trained on, to measure it with.

    python deploy/demo/held_out.py [--tokens 8192]

They are those of `data.py` that are generated without any download (stories, composed documents), one behind
the other, with the marks of prompts spelled out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tokenizers

from corpus import composed, stories
from data import COMPOSED, STORIES, THINKING_SHARE, chance, generated, hold_out
from prompts import render

MODEL = Path(__file__).parent / "loci-demo"


def held_out(tokens: int) -> str:
    """So many tokens of held-out documents, the last one whole."""
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    parts = (stories.document, STORIES, "stories"), (composed.document, COMPOSED, "composed")
    documents = [named for part in parts for named in hold_out(generated(*part))[1]]
    documents.sort(key=lambda named: chance(named[0], "order"))
    found, count = [], 0
    for name, document in documents:
        found.append(render(document, thinking=chance(name, "thinking") < THINKING_SHARE))
        count += len(tokenizer.encode(found[-1], add_special_tokens=False).ids)
        if count >= tokens:
            break
    return "".join(found)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    (MODEL / "held-out.txt").write_text(held_out(parser.parse_args().tokens), encoding="utf-8")


if __name__ == "__main__":
    main()
