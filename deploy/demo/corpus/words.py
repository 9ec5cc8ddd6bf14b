"""Word lists that several generators share: everyday things, written down by hand."""

from __future__ import annotations

from corpus import phrases_in, words_in

ANIMALS = words_in(
    """
    fox bear rabbit mouse owl cat dog horse goat sheep hen duck frog turtle hedgehog squirrel wolf deer
    badger otter crow sparrow swan goose beaver mole donkey pony parrot penguin seal whale dolphin snail bee
    butterfly spider ant lion tiger elephant monkey camel giraffe zebra kangaroo koala panda
    """
)

THINGS = words_in(
    """
    lamp key map coin letter book basket bucket ladder kite drum bell clock mirror candle blanket boat
    bicycle umbrella hat scarf shoe glove stone shell feather ring rope hammer spoon teapot cup plate box
    bag ball doll flute violin pencil brush lantern compass telescope wheel cart pillow button ribbon
    """
)

PLACES = words_in(
    """
    kitchen garden library school market station harbour bridge tower barn mill forest meadow river lake
    beach cave hill village castle bakery workshop museum park attic cellar balcony hallway theatre farm
    """
)

# Where one is not "in" a place.
PREPOSITIONS = {
    **dict.fromkeys(["beach", "hill", "bridge", "balcony", "farm", "meadow", "tower"], "on"),
    **dict.fromkeys(["market", "station", "harbour", "school", "river", "lake", "mill"], "at"),
}

TOPICS = phrases_in(
    """
    bread; cheese; tea; coffee; chocolate; soup; rice; pasta; apples; honey; salt; sugar; the moon; the sun;
    stars; rain; snow; wind; clouds; rainbows; thunder; the sea; rivers; mountains; deserts; forests;
    islands; volcanoes; earthquakes; trees; flowers; grass; seeds; gardens; bees; birds; fish; cats; dogs;
    horses; dinosaurs; whales; insects; music; singing; dancing; painting; drawing; photography; films;
    books; poems; stories; libraries; schools; teachers; homework; learning; memory; sleep; dreams;
    breakfast; lunch; dinner; cooking; baking; friendship; family; kindness; patience; courage; honesty;
    laughter; games; chess; football; swimming; running; cycling; walking; hiking; camping; holidays;
    travel; trains; buses; planes; ships; bicycles; cars; bridges; houses; windows; clocks; calendars;
    money; shops; markets; maps; computers; phones; the internet; robots; software; electricity; magnets;
    light; sound; heat; ice; water; air; gravity; energy; plastic; paper; glass; iron; gold; wood; wool;
    cotton; soap; medicine; doctors; hospitals; teeth; the heart; the brain; exercise; vegetables; fruit;
    spring; summer; autumn; winter; birthdays; presents; letters; newspapers; languages; numbers;
    mathematics; history; science; art; museums; the weather; cities; villages; farms; pets; toys; jokes;
    riddles; habits; hobbies; gardening; knitting; recycling; space; planets; the Earth; oceans; penguins;
    elephants; butterflies; spiders
    """
)

ACTIVITIES = phrases_in(
    """
    learn a new language; make a cup of tea; bake bread; fall asleep faster; make new friends; save money;
    write a letter; read more books; grow tomatoes; take care of a cat; train a dog; clean a window;
    remember names; stop worrying; start running; draw a face; cook rice; boil an egg; plan a trip; keep a
    plant alive; learn to swim; write a story; tidy my room; say sorry; thank a friend; prepare for a test;
    stay healthy; drink more water; wake up early; be more patient; play chess; build a small table; sing
    better; learn the guitar; take a good photo; ride a bicycle; choose a present; make a salad; wash wool;
    fix a puncture; fold a paper boat; speak in public; use a computer; choose a book; cheer up a friend;
    get over a cold; save electricity; plant a tree; make soup; keep a diary
    """
)


def with_prepositions(text: str) -> str:
    """`text` with "on the hill" and "at the market" where it says "in the hill" and "in the market"."""
    for place, preposition in PREPOSITIONS.items():
        text = text.replace(f"in the {place}", f"{preposition} the {place}")
    return text
