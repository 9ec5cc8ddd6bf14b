"""Fact drills: short questions with right answers, each asked in several ways.

Tables of facts written down by hand, and arithmetic that is computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from corpus import pairs_in, words_in
from corpus.stories import article

Exchange = tuple[str, str]

CAPITALS = pairs_in(
    """
    France=Paris; Germany=Berlin; Italy=Rome; Spain=Madrid; Portugal=Lisbon; England=London;
    Scotland=Edinburgh; Ireland=Dublin; Norway=Oslo; Sweden=Stockholm; Finland=Helsinki; Denmark=Copenhagen;
    Iceland=Reykjavik; Poland=Warsaw; Austria=Vienna; Hungary=Budapest; Greece=Athens; Turkey=Ankara;
    Russia=Moscow; Ukraine=Kyiv; Romania=Bucharest; Bulgaria=Sofia; Serbia=Belgrade; Croatia=Zagreb;
    Slovenia=Ljubljana; Switzerland=Bern; Belgium=Brussels; the Netherlands=Amsterdam; Egypt=Cairo;
    Morocco=Rabat; Kenya=Nairobi; Ghana=Accra; Nigeria=Abuja; Ethiopia=Addis Ababa; Senegal=Dakar;
    China=Beijing; Japan=Tokyo; South Korea=Seoul; India=New Delhi; Thailand=Bangkok; Vietnam=Hanoi;
    Indonesia=Jakarta; Iran=Tehran; Iraq=Baghdad; Israel=Jerusalem; Jordan=Amman; Canada=Ottawa; the United
    States=Washington; Mexico=Mexico City; Cuba=Havana; Brazil=Brasilia; Argentina=Buenos Aires;
    Chile=Santiago; Peru=Lima; Colombia=Bogota; Australia=Canberra; New Zealand=Wellington; Czechia=Prague;
    Slovakia=Bratislava; Estonia=Tallinn; Latvia=Riga; Lithuania=Vilnius; Nepal=Kathmandu
    """
)
COLOURS = pairs_in(
    """
    the sky=blue; grass=green; snow=white; blood=red; a banana=yellow; a lemon=yellow; coal=black; the
    sea=blue; a ripe tomato=red; milk=white; a carrot=orange; an elephant=grey; a crow=black; a frog=green;
    a swan=white; the sun=yellow; a fire engine=red; chocolate=brown; a cucumber=green; salt=white; a
    strawberry=red; gold=yellow; a raven=black; a leaf in summer=green; a polar bear=white; a flamingo=pink;
    wood=brown; a mouse=grey
    """
)
OPPOSITES = pairs_in(
    """
    hot=cold; big=small; tall=short; fast=slow; old=young; day=night; up=down; left=right; open=closed;
    full=empty; light=dark; happy=sad; rich=poor; loud=quiet; wet=dry; hard=soft; near=far; early=late;
    strong=weak; good=bad; thick=thin; high=low; clean=dirty; first=last; begin=end; buy=sell; give=take;
    win=lose; summer=winter; true=false; love=hate; friend=enemy; sweet=sour; heavy=light; easy=difficult;
    inside=outside; always=never
    """
)
# animal: (sound, legs, young, what it eats, where it lives)
ANIMALS = {
    "cow": ("moos", 4, "calf", "grass", "on a farm"),
    "dog": ("barks", 4, "puppy", "meat", "with people"),
    "cat": ("meows", 4, "kitten", "mice and fish", "with people"),
    "horse": ("neighs", 4, "foal", "grass and hay", "in a stable"),
    "sheep": ("bleats", 4, "lamb", "grass", "on a farm"),
    "pig": ("grunts", 4, "piglet", "almost everything", "on a farm"),
    "hen": ("clucks", 2, "chick", "grain", "on a farm"),
    "duck": ("quacks", 2, "duckling", "water plants", "by the water"),
    "lion": ("roars", 4, "cub", "meat", "in Africa"),
    "wolf": ("howls", 4, "pup", "meat", "in the forest"),
    "frog": ("croaks", 4, "tadpole", "insects", "near ponds"),
    "owl": ("hoots", 2, "owlet", "mice", "in the forest"),
    "bee": ("buzzes", 6, "larva", "nectar", "in a hive"),
    "bear": ("growls", 4, "cub", "berries, fish and honey", "in the forest"),
    "goat": ("bleats", 4, "kid", "grass and leaves", "in the mountains"),
    "mouse": ("squeaks", 4, "pup", "seeds and cheese", "in a hole"),
    "donkey": ("brays", 4, "foal", "grass and hay", "on a farm"),
    "snake": ("hisses", 0, "snakelet", "small animals", "in many countries"),
    "spider": ("makes no sound", 8, "spiderling", "insects", "in its web"),
    "elephant": ("trumpets", 4, "calf", "leaves and grass", "in Africa and Asia"),
}
PLAIN = [
    ("How many days are there in a week?", "There are seven days in a week."),
    ("How many months are there in a year?", "There are twelve months in a year."),
    ("How many hours are there in a day?", "There are twenty-four hours in a day."),
    ("How many minutes are there in an hour?", "There are sixty minutes in an hour."),
    ("How many seconds are there in a minute?", "There are sixty seconds in a minute."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("How many legs does an insect have?", "An insect has six legs."),
    ("What is the largest planet?", "Jupiter is the largest planet of our solar system."),
    ("Which planet is closest to the sun?", "Mercury is the planet closest to the sun."),
    ("What is the largest animal?", "The blue whale is the largest animal on Earth."),
    ("What is the tallest animal?", "The giraffe is the tallest animal."),
    ("What is the fastest land animal?", "The cheetah is the fastest land animal."),
    ("What is the longest river?", "The Nile and the Amazon are the longest rivers in the world."),
    ("What is the highest mountain?", "Mount Everest is the highest mountain on Earth."),
    ("What is the largest ocean?", "The Pacific is the largest ocean."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius."),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius."),
    ("What do bees make?", "Bees make honey."),
    ("What do plants need to grow?", "Plants need light, water and air to grow."),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so the sky looks blue."),
    ("What is ice?", "Ice is frozen water."),
    ("What is bread made of?", "Bread is made of flour, water, salt and yeast."),
    ("What is cheese made of?", "Cheese is made of milk."),
    ("What is paper made of?", "Paper is made of wood."),
    ("What is glass made of?", "Glass is made of sand that was melted."),
    ("Where does the sun rise?", "The sun rises in the east."),
    ("Where does the sun set?", "The sun sets in the west."),
    ("What is the moon?", "The moon is a ball of rock that goes around the Earth."),
    ("What is the sun?", "The sun is a star. It gives us light and warmth."),
    ("What is a star?", "A star is a huge, hot ball of gas that shines."),
    ("What is the Earth?", "The Earth is the planet we live on. It goes around the sun once a year."),
    ("How many continents are there?", "There are seven continents."),
    ("How many letters are in the alphabet?", "The English alphabet has twenty-six letters."),
    ("What is rain?", "Rain is water that falls from clouds in drops."),
    ("What is snow?", "Snow is frozen water that falls from clouds in soft, white flakes."),
    ("What is a cloud?", "A cloud is made of many tiny drops of water in the air."),
    ("What is wind?", "Wind is air that moves."),
    ("What is a rainbow?", "A rainbow is sunlight that raindrops split into its colours."),
    ("What is a library?", "A library is a place where you can read and borrow books."),
    ("What is a friend?", "A friend is someone who likes you and helps you."),
    ("What is a computer?", "A computer is a machine that follows instructions to work with data."),
    ("What is a river?", "A river is a long stream of water that flows to the sea or to a lake."),
    ("What is a mountain?", "A mountain is a very high piece of land."),
    ("What is a forest?", "A forest is a large place full of trees."),
    ("What is music?", "Music is sound that is made to be beautiful or to say something."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("Who discovered gravity?", "Isaac Newton described gravity after, it is said, he saw an apple fall."),
    ("What do cows give us?", "Cows give us milk."),
    ("What do we see with?", "We see with our eyes."),
    ("What do we hear with?", "We hear with our ears."),
    ("What comes after night?", "After the night comes the day."),
    ("What are the four seasons?", "The four seasons are spring, summer, autumn and winter."),
    ("What are the colours of the rainbow?", "Red, orange, yellow, green, blue, indigo and violet."),
]
DAYS = words_in(
    """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    """
)
MONTHS = words_in(
    """
    January February March April May June July August September October November December
    """
)
NUMBERS = words_in(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty
    """
)
IRREGULAR = pairs_in(
    """
    mouse=mice; goose=geese; foot=feet; tooth=teeth; man=men; woman=women; child=children; sheep=sheep;
    fish=fish; leaf=leaves; knife=knives; wolf=wolves; box=boxes; city=cities; baby=babies; bus=buses;
    cat=cats; dog=dogs; book=books; tree=trees; house=houses; star=stars; apple=apples; friend=friends;
    story=stories; potato=potatoes
    """
)
PAST = pairs_in(
    """
    go=went; see=saw; eat=ate; run=ran; come=came; give=gave; take=took; find=found; make=made; say=said;
    write=wrote; read=read; sing=sang; swim=swam; think=thought; buy=bought; bring=brought; sleep=slept;
    walk=walked; play=played; speak=spoke; drink=drank; fly=flew; know=knew; grow=grew; fall=fell; win=won;
    lose=lost; sit=sat; stand=stood
    """
)


def capital(rng: random.Random) -> Exchange:
    country, city = rng.choice(list(CAPITALS.items()))
    name = country[0].upper() + country[1:]
    return rng.choice(
        [
            (f"What is the capital of {country}?", f"The capital of {country} is {city}."),
            (f"Which city is the capital of {country}?", f"{city} is the capital of {country}."),
            (f"Do you know the capital of {country}?", f"Yes, the capital of {country} is {city}."),
            (f"{city} is the capital of which country?", f"{city} is the capital of {country}."),
            (f"In which country is {city}?", f"{city} is in {country}. It is the capital."),
            (f"{name}: what is its capital?", f"Its capital is {city}."),
        ]
    )


def colour(rng: random.Random) -> Exchange:
    thing, shade = rng.choice(list(COLOURS.items()))
    name = thing[0].upper() + thing[1:]
    return rng.choice(
        [
            (f"What colour is {thing}?", f"{name} is {shade}."),
            (f"What is the colour of {thing}?", f"{name} is {shade}."),
            (f"Is {thing} {shade}?", f"Yes, {thing} is {shade}."),
            (f"Which colour does {thing} have?", f"{name} is {shade}."),
        ]
    )


def opposite(rng: random.Random) -> Exchange:
    word, other = rng.choice(list(OPPOSITES.items()))
    if rng.random() < 0.4:
        word, other = other, word
    return rng.choice(
        [
            (f"What is the opposite of {word}?", f"The opposite of {word} is {other}."),
            (f"Which word is the opposite of {word}?", f"{other.capitalize()} is the opposite of {word}."),
            (
                f"{word.capitalize()} is the opposite of what?",
                f"{word.capitalize()} is the opposite of {other}.",
            ),
        ]
    )


def animal(rng: random.Random) -> Exchange:
    name, (sound, legs, young, food, home) = rng.choice(list(ANIMALS.items()))
    a_name = article(name)
    leg_count = f"{NUMBERS[legs]} legs" if legs else "no legs"
    subject = a_name[0].upper() + a_name[1:]
    return rng.choice(
        [
            (f"What sound does {a_name} make?", f"{subject} {sound}."),
            (f"How many legs does {a_name} have?", f"{subject} has {leg_count}."),
            (f"What is a young {name} called?", f"A young {name} is called {article(young)}."),
            (f"What does {a_name} eat?", f"{subject} eats {food}."),
            (f"Where does {a_name} live?", f"{subject} lives {home}."),
            (
                f"Tell me about {a_name}.",
                f"{subject} has {leg_count}, lives {home} and eats {food}. It {sound}.",
            ),
        ]
    )


def order(rng: random.Random) -> Exchange:
    names, kind = rng.choice(((DAYS, "day"), (MONTHS, "month")))
    i = rng.randrange(len(names))
    this, after, before = names[i], names[(i + 1) % len(names)], names[i - 1]
    return rng.choice(
        [
            (f"Which {kind} comes after {this}?", f"After {this} comes {after}."),
            (f"Which {kind} comes before {this}?", f"Before {this} comes {before}."),
            (f"What comes after {this}?", f"After {this} comes {after}."),
            (f"What {kind} is it after {this}?", f"After {this} it is {after}."),
        ]
    )


def arithmetic(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    kind = rng.choice("+-*")
    if kind == "+":
        asked, words_, result = f"{a} + {b}", f"{NUMBERS[a]} plus {NUMBERS[b]}", a + b
    elif kind == "-":
        a, b = max(a, b), min(a, b)
        asked, words_, result = f"{a} - {b}", f"{NUMBERS[a]} minus {NUMBERS[b]}", a - b
    else:
        asked, words_, result = f"{a} times {b}", f"{NUMBERS[a]} times {NUMBERS[b]}", a * b
    return rng.choice(
        [
            (f"What is {asked}?", f"{asked} is {result}."),
            (f"What is {words_}?", f"{words_.capitalize()} is {result}."),
            (f"How much is {asked}?", f"{asked} is {result}."),
            (f"{asked} = ?", f"{asked} = {result}."),
        ]
    )


def counting(rng: random.Random) -> Exchange:
    first = rng.randint(0, 10)
    last = first + rng.randint(3, 8)
    numbers = ", ".join(str(n) for n in range(first, last + 1))
    return rng.choice(
        [f"Count from {first} to {last}.", f"Can you count from {first} to {last}?"]
    ), numbers + "."


def comparison(rng: random.Random) -> Exchange:
    a, b = rng.sample(range(100), 2)
    word, answer = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    return f"Which number is {word}, {a} or {b}?", f"{answer} is {word}."


def grammar(rng: random.Random) -> Exchange:
    if rng.random() < 0.5:
        one, many = rng.choice(list(IRREGULAR.items()))
        return rng.choice(
            [
                (f"What is the plural of {one}?", f"The plural of {one} is {many}."),
                (f"One {one}, two ...?", f"One {one}, two {many}."),
            ]
        )
    now, then = rng.choice(list(PAST.items()))
    return rng.choice(
        [
            (f"What is the past tense of {now}?", f"The past tense of {now} is {then}."),
            (f"Today I {now}, yesterday I ...?", f"Yesterday I {then}."),
        ]
    )


def spelling(rng: random.Random) -> Exchange:
    word = rng.choice([*ANIMALS, *OPPOSITES, *IRREGULAR, *PAST])
    letters = "-".join(word.upper())
    return rng.choice(
        [f"How do you spell {word}?", f"Spell the word {word}."]
    ), f"{word.capitalize()} is spelled {letters}."


def plain(rng: random.Random) -> Exchange:
    question, answer = rng.choice(PLAIN)
    if rng.random() < 0.3:
        question = rng.choice(["Can you tell me: {}", "I have a question. {}", "Tell me, {}"]).format(
            question[0].lower() + question[1:] if not question.startswith("Who") else question
        )
    return question, answer


KINDS: list[tuple[Callable[[random.Random], Exchange], float]] = [
    (capital, 3),
    (colour, 1.5),
    (opposite, 1.5),
    (animal, 2.5),
    (order, 1),
    (arithmetic, 3),
    (counting, 0.7),
    (comparison, 1),
    (grammar, 1.2),
    (spelling, 0.7),
    (plain, 4),
]


def exchange(rng: random.Random) -> Exchange:
    """A question and its answer, of any kind."""
    kind = rng.choices([kind for kind, _ in KINDS], weights=[weight for _, weight in KINDS])[0]
    return kind(rng)
