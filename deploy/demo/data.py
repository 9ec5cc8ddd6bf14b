"""Make the corpus: fetch sources, generate, hold out, learn the vocabulary, tokenise.

    python deploy/demo/data.py

Writes `tokenizer.json`, `corpus.json` (what was used, how much) and one file of tokens per part and
split into the data directory. Seeds are fixed; running it again after `sample.py` has sampled more
adds that text and leaves the vocabulary as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from corpus import Document, chat, composed, definitions, sampled, smalltalk, stories
from paths import demo_directory
from prompts import render, train_tokenizer
from sources import fetch

HELD_OUT_SHARE = 0.03
THINKING_SHARE = 0.25  # serving asks for a thought unless told otherwise
STORIES, COMPOSED = 30_000, 48_000

Named = list[tuple[str, Document]]


def generated(make: Callable[[random.Random], Document], count: int, seed: str) -> Named:
    """`count` documents of a generator, each from a seed of its own, each text only once."""
    found: dict[str, tuple[str, Document]] = {}
    for i in range(count):
        document = make(random.Random(f"{seed}-{i}"))
        found.setdefault(json.dumps(document), (f"{seed}-{i}", document))
    return list(found.values())


def sampled_conversations(file: Path) -> Named:
    """What the teacher has said so far; none where `sample.py` has not run."""
    if not file.exists():
        return []
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    good = [r for r in records if r["turns"] and all(sampled.is_good(answer) for answer in r["turns"][1::2])]
    return [(f"sampled-{r['number']}", chat(*r["turns"])) for r in good]


def all_parts(directory: Path) -> dict[str, Named]:
    """Every part of the corpus: name -> named documents."""
    wheel, wordnet = fetch(directory / "sources")
    words = definitions.documents(wordnet, random.Random("definitions"))
    return {
        "smalltalk": list(smalltalk.conversations(wheel)),
        "stories": generated(stories.document, STORIES, "stories"),
        "composed": generated(composed.document, COMPOSED, "composed"),
        "definitions": [(f"definition-{i}", document) for i, document in enumerate(words)],
        "sampled": sampled_conversations(directory / "sampled.jsonl"),
    }


def chance(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the document's name alone."""
    digest = hashlib.sha256(f"{purpose}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


def hold_out(documents: Named) -> tuple[Named, Named]:
    """(for training, held out); a document's fate follows from its name."""
    held_out = [item for item in documents if chance(item[0], "held out") < HELD_OUT_SHARE]
    training = [item for item in documents if chance(item[0], "held out") >= HELD_OUT_SHARE]
    return training, held_out


def tokenise(tokenizer: tokenizers.Tokenizer, documents: Named) -> tuple[np.ndarray, np.ndarray]:
    """All token ids `[tokens]` uint16, and the documents' lengths `[documents]` int32."""
    texts = [
        render(document, thinking=chance(name, "thinking") < THINKING_SHARE) for name, document in documents
    ]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    lengths = np.array([len(i) for i in ids], dtype=np.int32)
    return np.array([i for document in ids for i in document], dtype=np.uint16), lengths


def save_tokens(file: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Write one part, under a temporary name until it is whole."""
    temporary = file.with_suffix(".tmp")
    save_file(
        {"tokens": torch.from_numpy(tokens.astype(np.int32)), "lengths": torch.from_numpy(lengths)}, temporary
    )
    temporary.replace(file)


def read_documents(files: Iterable[Path]) -> list[np.ndarray]:
    """Token ids of every document of some files, `[length]` int64 each."""
    documents = []
    for file in files:
        part = load_file(file)
        lengths = part["lengths"].long()
        documents += [piece.numpy().astype(np.int64) for piece in part["tokens"].split(lengths.tolist())]
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=demo_directory(), help="where data and checkpoints lie")
    parser.add_argument("--tokenizer", type=Path, help="a vocabulary to use instead of learning one")
    args = parser.parse_args()
    torch.set_num_threads(1)

    parts = {name: hold_out(documents) for name, documents in all_parts(args.dir).items()}
    tokenizer_file = args.dir / "tokenizer.json"
    if args.tokenizer:
        shutil.copyfile(args.tokenizer, tokenizer_file)
    elif not tokenizer_file.exists():
        texts = [document for part, _ in parts.values() for _, document in part]
        train_tokenizer(texts).save(str(tokenizer_file))
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))

    report: dict[str, dict[str, dict[str, int]]] = {}
    for name, (training, held_out) in parts.items():
        report[name] = {}
        for which, documents in (("train", training), ("heldout", held_out)):
            if documents:
                tokens, lengths = tokenise(tokenizer, documents)
                save_tokens(args.dir / f"{which}-{name}.safetensors", tokens, lengths)
                report[name][which] = {"documents": len(lengths), "tokens": len(tokens)}
        print(name, report[name], flush=True)
    (args.dir / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
