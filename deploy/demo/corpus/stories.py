"""Stories over a world that is kept track of, with questions whose answers can be checked.

A world is people in places who take, carry, drop and give things. Telling it changes the world;
the answers to questions are read off the world's state, so they are always right.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from corpus import Document, chat, prose, words, words_in

PEOPLE = {
    "she": words_in(
        """
    Anna Maria Lucy Nora Emma Clara Rosa Ida Mia Lena Sara Ella Zoe Ruth Alice June Vera Dora
    """
    ),
    "he": words_in(
        """
    Tom Ben Paul Max Leo Sam Hugo Felix Omar Ivan Jack Peter Karl Noah Adam Theo Finn Oscar
    """
    ),
}
OBJECT_OF = {"she": "her", "he": "him"}
POSSESSIVE = {"she": "her", "he": "his"}

GO = [
    "{who} went to the {place}.",
    "{who} walked to the {place}.",
    "Then {who} ran to the {place}.",
    "{who} moved to the {place}.",
    "After that, {who} came to the {place}.",
]
TAKE = [
    "{who} picked up the {thing}.",
    "{who} took the {thing}.",
    "There {who} found the {thing} and took it.",
    "{who} put the {thing} into {possessive} bag.",
]
DROP = ["{who} put down the {thing}.", "{who} left the {thing} there.", "{who} dropped the {thing}."]
GIVE = [
    "{who} gave the {thing} to {other}.",
    "{who} handed {other} the {thing}.",
    "{other} asked for the {thing}, and {who} gave it to {object}.",
]


@dataclass
class World:
    """Who is where, and where each thing is: in a place or with a person."""

    rng: random.Random
    gender: dict[str, str]
    places: list[str]
    at: dict[str, str]
    things: dict[str, str]  # thing -> place or person
    visited: dict[str, list[str]] = field(default_factory=dict)  # thing -> places, in order
    told: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, rng: random.Random, people: int, things: int) -> World:
        gender: dict[str, str] = {}
        while len(gender) < people:
            pronoun = rng.choice(("she", "he"))
            gender[rng.choice(PEOPLE[pronoun])] = pronoun
        places = rng.sample(words.PLACES, rng.randint(3, 5))
        at = {person: rng.choice(places) for person in gender}
        where = {thing: rng.choice(places) for thing in rng.sample(words.THINGS, things)}
        world = cls(rng, gender, places, at, where)
        world.visited = {thing: [place] for thing, place in where.items()}
        for person, place in at.items():
            world.tell(["{who} was in the {place}."], who=person, place=place)
        for thing, place in where.items():
            world.tell(
                ["The {thing} was in the {place}.", "There was a {thing} in the {place}."],
                thing=thing,
                place=place,
            )
        return world

    def tell(self, patterns: list[str], **names: str) -> None:
        self.told.append(self.rng.choice(patterns).format(**names))

    def carried_by(self, person: str) -> list[str]:
        return [thing for thing, holder in self.things.items() if holder == person]

    def place_of(self, thing: str) -> str:
        holder = self.things[thing]
        return self.at.get(holder, holder)

    def _arrive(self, thing: str) -> None:
        place = self.place_of(thing)
        if self.visited[thing][-1] != place:
            self.visited[thing].append(place)

    def step(self) -> None:
        """Something happens: of all that can, one thing."""
        rng = self.rng
        person = rng.choice(list(self.at))
        here, bag = self.at[person], self.carried_by(person)
        lying = [thing for thing, holder in self.things.items() if holder == here]
        company = [other for other, place in self.at.items() if place == here and other != person]
        events = (
            ["go"]
            + ["take"] * (2 * bool(lying))
            + ["drop"] * bool(bag)
            + ["give"] * (2 * bool(bag and company))
        )
        event = rng.choice(events)
        if event == "go":
            place = rng.choice([p for p in self.places if p != here])
            self.at[person] = place
            self.tell(GO, who=person, place=place)
            for thing in bag:
                self._arrive(thing)
        elif event == "take":
            thing = rng.choice(lying)
            self.things[thing] = person
            self.tell(TAKE, who=person, thing=thing, possessive=POSSESSIVE[self.gender[person]])
        elif event == "drop":
            thing = rng.choice(bag)
            self.things[thing] = here
            self.tell(DROP, who=person, thing=thing)
        else:
            thing, other = rng.choice(bag), rng.choice(company)
            self.things[thing] = other
            self.tell(GIVE, who=person, thing=thing, other=other, object=OBJECT_OF[self.gender[other]])

    def question(self) -> tuple[str, str]:
        """A question about the state of the world, and its answer."""
        rng = self.rng
        person, thing = rng.choice(list(self.at)), rng.choice(list(self.things))
        pronoun = self.gender[person]
        kind = rng.choice(
            ("who is where", "where is it", "who has it", "what has who", "is who there", "before")
        )
        if kind == "who is where":
            return f"Where is {person}?", f"{person} is in the {self.at[person]}."
        if kind == "where is it":
            holder = self.things[thing]
            if holder in self.at:
                return (
                    f"Where is the {thing}?",
                    f"{holder} has the {thing}, so it is in the {self.at[holder]}.",
                )
            return f"Where is the {thing}?", f"The {thing} is in the {holder}."
        if kind == "who has it":
            holder = self.things[thing]
            answer = (
                f"{holder} has the {thing}."
                if holder in self.at
                else f"Nobody. The {thing} is in the {holder}."
            )
            return f"Who has the {thing}?", answer
        if kind == "what has who":
            bag = self.carried_by(person)
            listed = " and ".join(f"the {thing}" for thing in bag) if bag else "nothing"
            return f"What does {person} have?", f"{person} has {listed}."
        if kind == "is who there":
            place = rng.choice(self.places)
            if self.at[person] == place:
                return f"Is {person} in the {place}?", f"Yes, {pronoun} is in the {place}."
            return f"Is {person} in the {place}?", f"No, {pronoun} is in the {self.at[person]}."
        places = self.visited[thing]
        if len(places) < 2:
            return f"Has the {thing} been moved?", f"No, the {thing} is still in the {places[0]}."
        return (
            f"Where was the {thing} before it was in the {places[-1]}?",
            f"Before that, it was in the {places[-2]}.",
        )


def world_story(rng: random.Random) -> Document:
    """A story told by the user, then questions about it, one by one."""
    world = World.begin(rng, people=rng.randint(1, 3), things=rng.randint(1, 3))
    for _ in range(rng.randint(2, 7)):
        world.step()
    story = " ".join(world.told)
    exchanges: list[str] = []
    asked = set()
    for _ in range(rng.randint(1, 4)):
        question, answer = world.question()
        if question not in asked:
            asked.add(question)
            exchanges += [question, answer]
    opening = rng.choice(["", "Listen: ", "Here is a story. ", "Read this. "])
    exchanges[0] = f"{opening}{story} {exchanges[0]}"
    return chat(*exchanges)


TRAITS = words_in(
    """
    small old young clever shy brave lazy hungry kind curious tired happy lonely careful cheerful
    """
)
WEATHER = [
    "It was a cold morning.",
    "The sun was shining.",
    "It had rained all night.",
    "The wind was strong.",
    "It was late in the evening.",
    "Snow lay on the ground.",
    "It was the first day of spring.",
    "The moon was bright.",
]
WANTS = [
    (
        "wanted to find a {thing}",
        "looked for it in the {place}",
        "At last the {animal} found the {thing} under a stone.",
    ),
    (
        "had lost a {thing}",
        "went back to the {place} to look for it",
        "There lay the {thing}, just where it had been left.",
    ),
    ("wanted to cross the river", "built a small boat", "Soon the {animal} was on the other side."),
    (
        "was afraid of the dark",
        "lit a {thing} and sat by the {place}",
        "After a while the dark did not seem so bad.",
    ),
    (
        "was looking for a friend",
        "walked to the {place}",
        "There sat {a_other}, who was looking for a friend too.",
    ),
    ("was very hungry", "asked everybody in the {place} for food", "In the end {a_other} shared some bread."),
    (
        "wanted to learn to sing",
        "practised every day in the {place}",
        "After a month everybody came to listen.",
    ),
    (
        "found a {thing} on the road",
        "asked whose it was",
        "It belonged to {a_other}, who was very glad to have it back.",
    ),
    ("wanted to see the sea", "followed the river for three days", "And there it was, blue and wide."),
    (
        "could not sleep",
        "counted the stars above the {place}",
        "Before the hundredth star the {animal} was asleep.",
    ),
]
HELP = [
    '{A_other} came along and asked, "Can I help you?" "Yes, please," said the {animal}.',
    'On the way the {animal} met {a_other}. "Do not give up," said the {other}.',
    '"That is not easy," said {a_other}, "but we can do it together."',
    "{A_other} laughed at first, but then helped.",
]
ENDINGS = [
    "From that day on they were friends.",
    "The {animal} went home happy.",
    "And that was the best day of the year.",
    '"Thank you," said the {animal}.',
    "The {animal} never forgot that day.",
    "That night the {animal} slept very well.",
]
ASK_STORY = [
    "Tell me a story about {a_animal}.",
    "Please tell me a short story.",
    "Can you tell me a story about {a_animal} and {a_other}?",
    "Tell me a bedtime story.",
    "I would like to hear a story about {a_animal}.",
    "Write a short story about {a_animal}.",
]


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def tale(rng: random.Random) -> tuple[str, str]:
    """A request for a story, and a small story of an animal with a wish."""
    animal, other = rng.sample(words.ANIMALS, 2)
    a_other = article(f"{rng.choice(TRAITS)} {other}")
    names = {
        "animal": animal,
        "other": other,
        "a_animal": article(animal),
        "a_other": a_other,
        "A_other": a_other[0].upper() + a_other[1:],
        "thing": rng.choice(words.THINGS),
        "place": rng.choice(words.PLACES),
    }
    want, attempt, success = rng.choice(WANTS)
    trait = rng.choice(TRAITS)
    sentences = [
        f"Once there was {article(trait)} {animal} who lived near the {rng.choice(words.PLACES)}.",
        rng.choice(WEATHER),
        f"The {animal} {want}.",
        f"So the {animal} {attempt}.",
        *([rng.choice(HELP)] if rng.random() < 0.6 else []),
        success,
        rng.choice(ENDINGS),
    ]
    request = rng.choice(ASK_STORY)
    if "a_animal" in request and "a_other" in request:
        names["a_other"] = article(other)
        story = " ".join(sentences).format(**{**names, "a_other": a_other})
    else:
        story = " ".join(sentences).format(**names)
    return request.format(**names), words.with_prepositions(story)


def document(rng: random.Random) -> Document:
    """One document of any kind that this module makes."""
    kind = rng.random()
    if kind < 0.65:
        return [(role, words.with_prepositions(text)) for role, text in world_story(rng)]
    request, story = tale(rng)
    return chat(request, story) if kind < 0.9 else prose(story)
