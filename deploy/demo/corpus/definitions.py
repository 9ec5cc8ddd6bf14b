"""Definitions: what words mean, from WordNet 3.0 (Debian package `wordnet-base`, WordNet licence).

Only senses that occur in WordNet's own tagged texts are used, which leaves out the rare ones.
"""

from __future__ import annotations

import io
import lzma
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

from corpus import Document, chat
from corpus.smalltalk import INSULT

PARTS = {"n": ("noun", "noun"), "v": ("verb", "verb"), "a": ("adj", "adjective"), "r": ("adv", "adverb")}
SYNSET_TYPES = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}
MIN_USES = 1

QUESTIONS = [
    "What does {word} mean?",
    "What is the meaning of {word}?",
    "Define {word}.",
    "What does the word {word} mean?",
    "Can you explain the word {word}?",
]
ANSWERS = [
    "{word} ({kind}): {gloss}.",
    "As {article} {kind}, {word} means: {gloss}.",
    "{word} means: {gloss}.",
]


def open_deb(file: Path) -> tarfile.TarFile:
    """The payload of a Debian package: an `ar` archive that holds `data.tar.xz`."""
    data = file.read_bytes()
    if not data.startswith(b"!<arch>\n"):
        raise SystemExit(f"{file}: not a Debian package")
    at = 8
    while at < len(data):
        name, size = data[at : at + 16].decode().strip(), int(data[at + 48 : at + 58])
        body = data[at + 60 : at + 60 + size]
        if name.startswith("data.tar"):
            if name.rstrip("/").endswith(".xz"):
                body = lzma.decompress(body)
            return tarfile.open(fileobj=io.BytesIO(body))
        at += 60 + size + size % 2
    raise SystemExit(f"{file}: holds no data.tar")


def read_dictionary(file: Path, name: str) -> list[str]:
    """The lines of one of WordNet's files."""
    with open_deb(file) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith(f"/wordnet/{name}"))
        stream = archive.extractfile(member)
        assert stream is not None
        return stream.read().decode("utf-8", "replace").splitlines()


def used_senses(file: Path) -> list[tuple[str, str, int]]:
    """(word, part of speech, which of its senses, from 0) for senses tagged at least MIN_USES times."""
    senses = []
    for line in read_dictionary(file, "cntlist.rev"):
        key, sense, uses = line.split()
        word, rest = key.split("%")
        if int(uses) >= MIN_USES and word.replace("_", "").isalpha():
            senses.append((word, SYNSET_TYPES[rest[0]], int(sense) - 1))
    return senses


def offsets(file: Path, part: str) -> dict[str, list[int]]:
    """Word -> where the synsets of its senses lie, in order."""
    found = {}
    for line in read_dictionary(file, f"index.{PARTS[part][0]}"):
        if not line.startswith(" "):
            fields = line.split()
            found[fields[0]] = [int(field) for field in fields[-int(fields[2]) :]]
    return found


def glosses(file: Path, part: str) -> dict[int, str]:
    """Offset of a synset -> its first definition, without examples."""
    found = {}
    for line in read_dictionary(file, f"data.{PARTS[part][0]}"):
        if not line.startswith(" "):
            gloss = line.partition("| ")[2].split(";")[0].strip()
            found[int(line[:8])] = gloss.split(" -- ")[0]
    return found


def documents(file: Path, rng: random.Random) -> Iterator[Document]:
    """A question and its answer for every used sense, a few to a conversation, shuffled."""
    gloss_at = {part: glosses(file, part) for part in PARTS}
    synsets = {part: offsets(file, part) for part in PARTS}
    exchanges = []
    for lemma, part, sense in used_senses(file):
        places = synsets[part].get(lemma, [])
        gloss = gloss_at[part].get(places[sense], "") if 0 <= sense < len(places) else ""
        word = lemma.replace("_", " ")
        if 8 <= len(gloss) <= 160 and gloss.isascii() and not INSULT.search(f"{word} {gloss}"):
            kind = PARTS[part][1]
            article = "an" if kind[0] == "a" else "a"
            answer = rng.choice(ANSWERS).format(word=word, kind=kind, gloss=gloss, article=article)
            exchanges.append((rng.choice(QUESTIONS).format(word=word), answer[0].upper() + answer[1:]))
    rng.shuffle(exchanges)
    while exchanges:
        take = rng.choice((1, 1, 2, 3))
        yield chat(*(text for exchange in exchanges[:take] for text in exchange))
        exchanges = exchanges[take:]
