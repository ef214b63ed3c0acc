"""Names and values that nobody has seen together: what keys, variables and secrets of probes are."""

from __future__ import annotations

from random import Random
from string import ascii_uppercase
from uuid import UUID


def _words_in(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words_in(
    """
    able acid ample azure basic bitter blank bold brave brief bright brisk broad busy calm careful cheap
    civil clean clear clever close cold cool crisp curious damp dark dear deep dense dim dizzy dry dull
    eager early easy elegant empty even exact fair faint famous fancy fast fierce fine firm flat fond
    fragile free fresh frozen full gentle glad golden grand grave great green grey handy happy hard
    hasty heavy hidden high hollow honest huge humble icy idle jolly keen kind large late lazy light
    lively lonely long loud loyal lucky mellow mild modest narrow neat noble odd pale patient plain
    polite proud quick quiet rapid rare ready rich rigid ripe rough round royal rusty salty scarce sharp
    shiny short silent silver simple slim slow small smooth soft solid sour spare steady steep stiff
    strange strict strong subtle sudden sweet swift tall tame tender thick thin tidy tiny tough vague
    vast warm weak wide wild wise witty wooden young
    """
)
_NOUNS = _words_in(
    """
    acorn anchor apple arrow autumn badge bakery banner barrel basket beacon beetle bell berry blanket
    bottle bridge bucket butter button cabin camel candle canyon carpet castle cattle cellar cherry
    circle cloud clover coast copper corner cotton cradle crater cricket crystal curtain daisy desert
    dragon drawer eagle elbow engine falcon farmer feather ferry fiddle finger flame flute forest fossil
    fountain garden garlic ginger glacier goblet grape guitar hammer harbor hazel helmet herald honey
    island ivory jacket jungle kettle kitchen ladder lantern lemon lizard magnet maple marble meadow
    mirror monkey mountain needle nephew oasis ocean olive onion orchard otter oyster palace panther
    parrot pebble pencil pepper pigeon pillow planet pocket potato prairie pumpkin puzzle rabbit ribbon
    river rocket saddle sailor salmon school shadow shovel signal sister spider spring squirrel stable
    statue summer tailor teapot temple thunder ticket tiger timber tomato tractor tulip tunnel turtle
    valley velvet village violin walnut weaver whale whistle willow window winter wizard
    """
)


def number(digits: int, random: Random) -> str:
    """A number of so many digits."""
    return str(random.randrange(10 ** (digits - 1), 10**digits))


def uuid(random: Random) -> str:
    """A UUID of version 4."""
    return str(UUID(int=random.getrandbits(128), version=4))


def words(count: int, random: Random) -> list[str]:
    """Different names such as ``quiet-lantern``; three words each where there are too few of two."""
    pairs = len(_ADJECTIVES) * len(_NOUNS)
    if count <= pairs:
        return [_pair(index) for index in random.sample(range(pairs), count)]
    chosen = random.sample(range(len(_ADJECTIVES) * pairs), count)
    return [f"{_ADJECTIVES[index // pairs]}-{_pair(index % pairs)}" for index in chosen]


def _pair(index: int) -> str:
    return f"{_ADJECTIVES[index // len(_NOUNS)]}-{_NOUNS[index % len(_NOUNS)]}"


def variables(count: int, letters: int, random: Random) -> list[str]:
    """Different names of so many capital letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choices(ascii_uppercase, k=letters))] = None
    return list(found)
