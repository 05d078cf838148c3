"""A fine-tuning task that needs no download: sentences said to a smart home, and their semantic parses.

The sentence templates are Home Assistant's own (PyPI package home-assistant-intents, 42 intents), read by its parser
hassil. A random walk through a template gives a sentence, its intent and its slots:

    {"prompt": "turn on the lights in the kitchen\\n",
     "completion": "[IN:HassTurnOn [SL:area kitchen ] [SL:domain light ] ]",
     "group": "<turn> on [(<all>|<the>)] <light> <in> [<the>] {area}"}

The parse has the format of TOPv2, its slots in alphabetical order. The template is the row's group: sentences of one
template stay on one side of the split, so that held-out sentences have templates that are not in training.
"""

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from random import Random

from hassil import Intents
from hassil.expression import Alternative, Expression, ListReference, Permutation, RuleReference, TextChunk
from hassil.intents import IntentData, RangeSlotList, TextSlotList
from hassil.numbers import get_rbnf_engine
from home_assistant_intents import get_intents

PACKAGES = ("home-assistant-intents", "hassil", "unicode-rbnf")  # sources of the sentences
TRIES = 4  # walks for each wanted sentence, since short templates repeat themselves
WORDS_SHARE = 0.3  # share of numbers written in words

# Names that every house has of its own. No name is in two lists or means two things.
AREAS = (
    "kitchen", "living room", "bedroom", "bathroom", "office", "garage", "hallway", "dining room", "guest room",
    "nursery", "laundry room", "pantry", "study", "attic", "porch", "patio", "library", "workshop", "den", "sunroom",
)  # fmt: skip
FLOORS = ("first", "second", "third", "ground", "top", "upper", "lower", "main")
NAMES = {
    "light": ("chandelier", "sconce", "lantern", "spotlight", "nightlight", "fairy string", "downlights", "disco ball"),
    "switch": ("coffee maker", "kettle", "space heater", "outlet", "christmas tree", "dehumidifier", "pond pump"),
    "fan": ("ceiling ventilator", "air purifier", "exhaust", "tower blower"),
    "media_player": ("tv", "soundbar", "stereo", "record player", "projector", "chromecast", "speaker", "radio"),
    "input_boolean": ("vacation mode", "guest mode", "quiet hours"),
    "climate": ("thermostat", "heat pump", "air conditioner", "radiator"),
    "cover": ("skylight", "canopy", "roller screen", "drapes", "left hatch", "sliding panel"),
    "valve": ("sprinkler", "water main", "gas line", "garden hose"),
    "lock": ("deadbolt", "front entrance", "back entrance", "safe", "mailbox", "side entrance"),
    "sensor": ("humidity sensor", "power meter", "air quality", "rain gauge", "water tank level"),
    "binary_sensor": ("driveway", "crib", "loading bay", "mouse trap", "wine cellar", "fridge hatch"),
    "person": ("alice", "bob", "carol", "david", "emma", "frank", "grace", "henry"),
    "weather": ("london", "paris", "berlin", "tokyo", "chicago", "oslo"),
    "lawn_mower": ("mowbot", "grass cutter", "husqvarna"),
    "vacuum": ("roomba", "dustbot", "robot cleaner", "roborock"),
    "todo": ("chores", "packing", "weekend", "gift", "work", "reading", "hardware store", "camping"),
    "scene": ("movie night", "romantic dinner", "party time", "sunrise", "bright morning", "relaxation"),
    "script": ("bedtime routine", "wake up sequence", "leaving routine", "welcome sequence"),
    "button": ("doorbell", "panic alarm", "restart router", "identify hub"),
    "input_button": ("feeder", "arm alarm", "reset counter"),
}  # fmt: skip
GOODS = (
    "milk", "eggs", "bread", "bananas", "olive oil", "coffee beans", "dish soap", "toothpaste", "tomatoes", "cheddar",
    "paper towels", "rice", "orange juice", "batteries", "yogurt", "spinach", "dog food", "light bulbs", "butter",
)  # fmt: skip
# Examples for lists that accept any words.
WORDS = {
    "message": ("dinner is ready", "the bus leaves in ten minutes", "come downstairs", "time for school", "good night",
                "the movie is starting", "someone is at the gate", "wash your hands", "we are leaving soon"),
    "search_query": ("bohemian rhapsody", "abbey road", "miles davis", "jazz for cooking", "the beatles", "star wars",
                     "taylor swift", "morning news", "rumours", "thriller", "nina simone", "planet earth", "mozart",
                     "serial", "hotel california", "blade runner", "rain sounds", "the crown", "daft punk"),
    "zone": ("school", "gym", "grandmas house", "airport", "beach", "train station", "university", "supermarket"),
    "timer_name": ("pizza", "pasta", "tea", "laundry", "nap", "homework", "workout", "rice cooker", "meditation"),
    "timer_command": ("lock the front entrance", "turn off the tv", "close the drapes", "start the roomba",
                      "turn on the kettle", "open the canopy", "pause the music", "turn the thermostat down"),
    "shopping_list_item": GOODS,
    "todo_list_item": (*GOODS, "water the plants", "call mom", "pay rent", "book flights", "renew passport",
                       "clean the gutters", "buy stamps", "walk the dog", "return books", "fix the bike"),
}  # fmt: skip


def content_key() -> str:
    """Return a cache key of `read_pairs`: a hash of the packages' versions and of this file."""
    parts = (*map(version, PACKAGES), Path(__file__).read_bytes())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_pairs(per_template: int = 24, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield rows {"prompt", "completion", "group"}, a function of the arguments and the packages' versions.

    Each sentence occurs once, with the first template that gives it.

    Args:
        per_template: the most sentences of a template, so that no intent dominates.
    """
    intents, seen = load_intents(), set()
    for name, intent in intents.intents.items():
        for data in intent.data:
            for sentence in data.sentences:
                found = walks(sentence.text, sentence.expression, data, intents, per_template, seed)
                for text, slots in found.items():
                    if text not in seen:
                        seen.add(text)
                        yield {"prompt": f"{text}\n", "completion": written(name, slots), "group": sentence.text}


def load_intents() -> Intents:
    return Intents.from_dict(get_intents("en"))


def walks(
    template: str, expression: Expression, data: IntentData, intents: Intents, count: int, seed: int
) -> dict[str, dict[str, str]]:
    """Return up to `count` different sentences of a template, each with its slots."""
    random, found = Random(f"{seed} {data.requires_context} {template}"), {}
    for _ in range(TRIES * count):
        walk = Walk(random, intents, data)
        sentence = " ".join(walk.say(expression).split())
        if sentence:
            found.setdefault(sentence, walk.slots)
        if len(found) == count:
            break
    return found


def written(intent: str, slots: dict[str, str]) -> str:
    """Return a parse as text, `[IN:intent [SL:slot value ] ]`, with slots in alphabetical order."""
    return " ".join([f"[IN:{intent}", *(f"[SL:{slot} {value} ]" for slot, value in sorted(slots.items())), "]"])


class Walk:
    """A random walk through a template.

    Attributes:
        slots: those chosen so far, and those that the template fixes.
    """

    def __init__(self, random: Random, intents: Intents, data: IntentData):
        self.random, self.intents = random, intents
        self.domains = data.requires_context.get("domain", ())
        self.slots = {slot: str(value) for slot, value in data.slots.items()}

    def say(self, expression: Expression) -> str:
        """Return random words of an expression, with superfluous spaces."""
        if isinstance(expression, TextChunk):
            return expression.original_text
        if isinstance(expression, RuleReference):
            return self.say(self.intents.expansion_rules[expression.rule_name].expression)
        if isinstance(expression, ListReference):
            words, self.slots[expression.slot_name] = self.choose(expression)
            return words
        if isinstance(expression, Alternative):
            return self.say(self.random.choice(expression.items))
        items = list(expression.items)
        if isinstance(expression, Permutation):
            self.random.shuffle(items)
        return "".join(map(self.say, items))

    def choose(self, reference: ListReference) -> tuple[str, str]:
        """Return the words and the slot value of a random entry of a list."""
        entries = self.intents.slot_lists.get(reference.list_name)
        if isinstance(entries, RangeSlotList):
            return self.number(entries)
        if isinstance(entries, TextSlotList):
            value = self.random.choice(entries.values)
            return self.say(value.text_in), str(value.value_out)
        words = self.random.choice(house_words(reference.list_name, self.domains))
        return words, words

    def number(self, numbers: RangeSlotList) -> tuple[str, str]:
        """Return the words, or digits, and the slot value of a random number."""
        number = self.random.choice(list(numbers.get_numbers()))
        in_words = self.random.random() < WORDS_SHARE
        words = get_rbnf_engine("en").format_number(number).text if in_words else f"{number:g}"
        return words, f"{number * (numbers.multiplier or 1):g}"


def house_words(list_name: str, domains: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Return the entries of a list that depends on the house, or that accepts any words."""
    if list_name == "name":
        return tuple(name for domain in domains for name in NAMES[domain])
    return {"area": AREAS, "floor": FLOORS, **WORDS}[list_name]
