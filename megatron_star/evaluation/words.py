"""Names and values that tasks hide: drawn by a random generator, never twice in one sample."""

import random
import string
import uuid
from collections.abc import Callable, Iterator

_ADJECTIVES = """
amber ancient arctic awake bitter blue bold brave brief bright brisk broad bronze calm careful
cheerful clever cloudy cold coral crisp curious curly dapper dark deep distant dizzy dusty eager
early eastern elegant empty fancy fierce floral foggy fond frosty gentle giant glad golden grand
green happy hasty hidden hollow honest humble hungry icy ivory jolly keen kind large late lazy
lively lonely loud lucky mellow mild misty modest muddy narrow neat noble northern olive orange pale
patient plain polite proud purple quick quiet rapid rare rough royal rusty salty shiny shy silent
silver slow smooth sober solid southern steady stormy strong sturdy sunny swift tall tender tidy
tiny
"""
_NOUNS = """
acorn anchor apple apron arrow badger barrel basket beacon beaver bell bench bicycle blanket boat
bottle bridge broom bucket button cabin camel candle canyon carpet castle cellar chimney circle
clock cloud compass copper cottage cradle crane crayon cricket curtain desert diamond donkey dragon
drum eagle engine falcon farmer feather fence fiddle forest fountain garden gate giraffe glacier
glove hammer harbor hedge helmet hill hornet island jacket jungle kettle kitten ladder lamp lantern
leopard library lizard magnet maple marble market meadow mirror mountain needle oak oasis orchard
otter oven paddle palace parrot peacock pebble pencil piano pigeon pillow pirate planet pocket
pumpkin rabbit raven ribbon river robin rocket saddle sailor salmon school shadow shovel squirrel
stable statue stone sparrow table teapot temple thimble tiger tower trumpet tulip tunnel turtle
valley velvet village violin wagon walnut whale whistle willow window winter wolf yard zebra
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
NUMBER_DIGITS = 7
CODED_WORD_LETTERS = 6


def distinct[T](draw: Callable[[], T]) -> Iterator[T]:
    """What `draw` gives, without repetitions; it must be able to give enough."""
    seen = set()
    while True:
        value = draw()
        if value not in seen:
            seen.add(value)
            yield value


def word_keys(generator: random.Random) -> Iterator[str]:
    """`brave-otter`, ...; with more adjectives in front when half of the shorter ones are used."""
    num_words = 2
    keys = distinct(lambda: "-".join(_key_words(generator, num_words)))
    for count, key in enumerate(keys, 1):
        yield key
        if 2 * count > len(ADJECTIVES) ** (num_words - 1) * len(NOUNS):
            num_words += 1


def _key_words(generator: random.Random, num_words: int) -> list[str]:
    return [generator.choice(ADJECTIVES) for _ in range(num_words - 1)] + [generator.choice(NOUNS)]


def numbers(generator: random.Random, num_digits: int = NUMBER_DIGITS) -> Iterator[str]:
    """Numbers of so many digits, the first of which is not 0."""
    return distinct(lambda: str(generator.randrange(10 ** (num_digits - 1), 10**num_digits)))


def uuids(generator: random.Random) -> Iterator[str]:
    """Random UUIDs (version 4)."""
    return distinct(lambda: str(uuid.UUID(int=generator.getrandbits(128), version=4)))


def letters(generator: random.Random, count: int, alphabet: str = string.ascii_lowercase) -> Iterator[str]:
    """Random words of so many letters."""
    return distinct(lambda: "".join(generator.choices(alphabet, k=count)))
