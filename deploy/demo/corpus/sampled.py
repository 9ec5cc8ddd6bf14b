"""Prompts for the teacher, SmolLM2-135M-Instruct, and the filter for what it answers.

The texts themselves come from `sample.py`, which runs for as long as one lets it.
"""

from __future__ import annotations

import random

from corpus import words

QUESTIONS = [
    "What is special about {topic}?",
    "Tell me something about {topic}.",
    "Tell me about {topic} in two sentences.",
    "Explain {topic} to a child.",
    "Why do people like {topic}?",
    "Give me one interesting fact about {topic}.",
    "What should I know about {topic}?",
    "Do you like {topic}?",
    "How do I {activity}?",
    "Give me three short tips: how can I {activity}?",
    "I want to {activity}. Where do I start?",
    "What is the difference between {topic} and {other}?",
    "Write two sentences about {topic} and {other}.",
]
STORIES = [
    "Write a very short story about a {animal} and a {thing}. Use easy words.",
    "Tell me a short story that happens in a {place}.",
    "Write a short story about a {animal} who finds a {thing} in the {place}.",
    "Write four sentences about a {animal} who is looking for a {thing}.",
    "Tell me a bedtime story about a {animal}.",
    "Write a short poem about {topic}.",
]
CHAT = [
    "Hi! I am thinking about {topic} today.",
    "Hello, how are you? I just came back from the {place}.",
    "I had a bad day. Can you cheer me up?",
    "I love {topic}. What about you?",
    "I am bored. What could I do with a {thing}?",
    "Good morning! What can you help me with?",
    "My {animal} does not want to eat. What could I do?",
    "I lost my {thing} in the {place}. What should I do?",
]
FOLLOW_UPS = [
    "Can you say that in one sentence?",
    "Thank you! Anything else I should know?",
    "Why is that?",
    "Can you give me an example?",
    "That is interesting. Tell me more.",
]


def prompt(number: int) -> list[str]:
    """The user's turns of conversation `number`: one, or two where a follow-up is asked."""
    rng = random.Random(number)
    pattern = rng.choice(rng.choices([QUESTIONS, STORIES, CHAT], weights=[5, 3, 2])[0])
    topic, other = rng.sample(words.TOPICS, 2)
    first = pattern.format(
        topic=topic,
        other=other,
        activity=rng.choice(words.ACTIVITIES),
        animal=rng.choice(words.ANIMALS),
        thing=rng.choice(words.THINGS),
        place=rng.choice(words.PLACES),
    )
    return [first, rng.choice(FOLLOW_UPS)] if rng.random() < 0.2 else [first]


MIN_CHARS, MAX_CHARS = 20, 900
UNWANTED = ("http", "www.", "```", "SmolLM", "Hugging Face", "language model", "as an AI")


def is_good(answer: str) -> bool:
    """True for an answer worth learning from: of a readable length, plain, and not repeating itself."""
    if not MIN_CHARS <= len(answer) <= MAX_CHARS or any(word in answer for word in UNWANTED):
        return False
    tokens = answer.lower().split()
    fourgrams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return len(set(fourgrams)) >= 0.85 * len(fourgrams)


def cut_to_sentences(answer: str, was_cut: bool) -> str:
    """`answer` without its last, unfinished sentence where the token limit cut it."""
    answer = answer.strip()
    if not was_cut:
        return answer
    end = max(answer.rfind(mark) for mark in (".", "!", "?"))
    return answer[: end + 1]
