"""Prompts whose answers an exit adapter is trained on, without any network: what people ask an assistant for.

    python benchmarks/retrofit_prompts.py --out prompts.jsonl --number 5000

The standard library's docstrings ("Write a Python function …") and the paragraphs of its manual (explain, summarize,
rewrite), and everyday requests from templates. The subjects of lskip/prompts/chat.jsonl, on which figures are
published, are in none of them.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from itertools import permutations, product
from pathlib import Path
from pydoc_data.topics import topics

THINGS = (
    "volcano, river, bridge, library, honeybee, telescope, garden, vaccine, rainforest, submarine, battery, "
    "glacier, camera, passport, airport, museum, magnet, violin, kite, tractor, candle, compass, windmill, "
    "elevator, thermometer, umbrella, satellite, microscope, desert, coral reef, tornado, earthquake, rainbow, "
    "spider, owl, dolphin, elephant, penguin, oak tree, sunflower, mushroom, piano, drum, clock, calendar, map, "
    "mirror, pencil, zipper, key, lock, ladder, boat, steam engine, solar panel, traffic light, vacuum cleaner, "
    "microwave oven, smartphone, radio"
)
ABOUT_THINGS = (
    "Explain how {a} works or lives.|Tell me three interesting facts about {a}.|Describe {a} to a "
    "five-year-old.|What should I know about {a}?|Write a short poem about {a}.|Write a riddle whose answer is "
    "{a}.|Where did the first {thing} come from?|Why is {a} useful?|What are the parts of {a}, and what do they "
    "do?|Write an encyclopedia entry about {a}.|Give me five questions for a quiz about {a}, with answers.|Imagine "
    "you are {a}. Describe your day.|What do people often get wrong about {a}?|Write three sentences about {a} "
    "that rhyme.|How would the world look without {a}?"
)
PEOPLE = (
    "an old fisherman, a shy robot, a young baker, a forgetful wizard, a night nurse, a clever fox, a lost "
    "astronaut, a village teacher, a retired detective, a street musician, a curious child, a tired dragon, a bus "
    "driver"
)
EVENTS = (
    "finds a locked box in the attic|gets a letter from the future|must cross a frozen lake|learns to say "
    "sorry|wins a prize by mistake|loses something dear and finds something better|meets a stranger on a train|has "
    "to keep a secret|hears a strange sound every night|makes friends with a neighbour|misses the last "
    "ferry|builds a flying machine"
)
TONES = "funny, sad, mysterious, gentle, exciting"
LISTS = (
    "ways to save water at home, healthy snacks, games for a rainy afternoon, names for a small cat, things to "
    "pack for a beach holiday, good habits for students, ideas for a birthday party, books that every child should "
    "read, jobs that did not exist thirty years ago, tips for a job interview, ways to learn new words, reasons to "
    "plant a tree, inventions that changed daily life, exercises without equipment, ways to say thank you, "
    "questions to ask a doctor"
)
RECIPIENTS = "my grandmother, my landlord, a former teacher, the city council, a new colleague, my best friend, a hotel"
OCCASIONS = (
    "to say thank you for a gift|to apologize for being late|to ask for a small repair|to invite them to a "
    "dinner|to tell them about a new job|to complain politely about noise|to ask for advice|to congratulate them "
    "on an award"
)
COMPARED = (
    "tea, coffee, hot chocolate|trains, planes, cars, buses|the sun, the moon, the stars|books, films, plays|rice, "
    "pasta, potatoes|football, tennis, swimming, chess|the sea, the mountains, the city|butter, olive oil, "
    "margarine|Python, Java, C, JavaScript|lists, tuples, sets, dictionaries|wood, steel, concrete, glass|spring, "
    "summer, autumn, winter|lions, tigers, wolves, bears|email, letters, phone calls"
)
ASKS_TO_COMPARE = "Compare {} and {}.|What is the difference between {} and {}?|Which is better, {} or {}, and why?"
WISHES = (
    "sleep better, save money, speak in front of people, grow tomatoes on a balcony, learn a language, write a "
    "good essay, stop putting things off, make new friends in a new town, keep a kitchen clean, train a puppy, "
    "read more, start running, remember names, cook for eight guests, repair a dripping tap, choose a laptop, "
    "learn to draw, take better photos, study for an exam, organize a small library, bake bread, lower an "
    "electricity bill"
)
ASKS_FOR_ADVICE = (
    "How can I {}?|Give me a step-by-step plan to {}.|What are common mistakes when people try to {}?|I want to "
    "{}. What should I do first?|Write a short article for beginners: how to {}."
)
FACTS = (
    "Why is the sky blue?|What is photosynthesis?|How do vaccines protect people?|What causes the seasons?|Who "
    "wrote Hamlet, and what is it about?|What is the capital of Australia?|How far away is the moon?|What is "
    "gravity?|Why do we dream?|What is inflation in an economy?|How does a bill become a law?|What is the "
    "difference between weather and climate?|Why do leaves change colour?|What is DNA?|How do airplanes fly?|What "
    "is an atom made of?|Who was Marie Curie?|What was the Silk Road?|How big is the sun?|What is democracy?|Why "
    "is the sea salty?|How do magnets work?|What is a black hole?|What does the heart do?|How is glass made?|What "
    "is recycling good for?|What is a prime number?|What happened at the first moon landing?|How do bees make "
    "honey?|What is the largest animal?"
)
HOW = (
    "|Answer in one sentence.|Answer in detail.|Explain it to a child.|Answer with a short list.|Give an example, too."
)
ASKS_ABOUT_TEXT = "Explain: |Summarize: |Rewrite this more simply: |Give an example for this: |What does this mean? "
NAMES = "Anna, Ben, Carla, David, Emma, Farid, Grace, Hugo"
GOODS = "apples, stamps, marbles, pencils, tickets, cookies"


def articled(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def words(text: str) -> list[str]:
    return text.split(", ")


def lines(text: str) -> list[str]:
    return text.split("|")


def docstrings() -> Iterator[str]:
    """The functions of the standard library, as tasks."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                purpose = " ".join(text.split("\n\n")[0].split())
                if len(purpose) > 20:
                    yield f"Write a Python function `{node.name}`. It should: {purpose[:200]}"


def paragraphs() -> Iterator[str]:
    """The paragraphs of the language reference, with each thing that one may ask about a text."""
    texts = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    texts = [text for text in texts if 80 < len(text) < 400 and re.match(r"[A-Za-z]", text) and "::=" not in text]
    for index, text in enumerate(dict.fromkeys(texts)):
        yield lines(ASKS_ABOUT_TEXT)[index % 5] + text


def things() -> Iterator[str]:
    for form, thing in product(lines(ABOUT_THINGS), words(THINGS)):
        yield form.format(a=articled(thing), thing=thing)


def stories() -> Iterator[str]:
    for tone, hero, event in product(words(TONES), words(PEOPLE), lines(EVENTS)):
        yield f"Write {articled(tone)} short story about {hero} who {event}."


def lists() -> Iterator[str]:
    for number, subject in product((3, 5, 7, 10), words(LISTS)):
        yield f"List {number} {subject}."
        yield f"Give me {number} {subject}, with a sentence about each."


def letters() -> Iterator[str]:
    for kind, recipient, occasion in product(("a letter", "a short email"), words(RECIPIENTS), lines(OCCASIONS)):
        yield f"Write {kind} to {recipient} {occasion}."


def comparisons() -> Iterator[str]:
    for group, form in product(lines(COMPARED), lines(ASKS_TO_COMPARE)):
        for pair in permutations(words(group), 2):
            yield form.format(*pair)


def advice() -> Iterator[str]:
    for form, wish in product(lines(ASKS_FOR_ADVICE), words(WISHES)):
        yield form.format(wish)


def facts() -> Iterator[str]:
    for question, how in product(lines(FACTS), lines(HOW)):
        yield f"{question} {how}".strip()


def arithmetic() -> Iterator[str]:
    draw = random.Random(0)
    for name, good, kind in product(words(NAMES), words(GOODS), range(12)):
        a, b, c = draw.randint(12, 99), draw.randint(3, 11), draw.randint(2, 9)
        yield [
            f"{name} has {a} {good} and gives away {b}. How many are left?",
            f"{name} buys {c} bags with {b} {good} each. How many {good} is that? Show your steps.",
            f"If {b} {good} cost {b * c} dollars, what do {c + 1} {good} cost?",
            f"{name} shares {b * c} {good} among {c} friends. How many does each get?",
            f"What is {a} plus {b * c}? Explain step by step.",
            f"What is {a} times {c}?",
        ][kind % 6]


# How often each kind is taken in turn: everyday requests twice as often as programs and manuals.
KINDS = {
    docstrings: 3,
    paragraphs: 2,
    things: 3,
    stories: 2,
    lists: 1,
    letters: 1,
    comparisons: 1,
    advice: 1,
    facts: 1,
    arithmetic: 1,
}


def make_prompts(number: int, seed: int = 0) -> list[str]:
    """So many different prompts in an order of the seed; fewer prompts are the beginning of more.

    Raises:
        ValueError: more than there are.
    """
    draw = random.Random(seed)
    stocks = {}
    for kind in KINDS:
        stock = list(dict.fromkeys(kind()))
        draw.shuffle(stock)
        stocks[kind] = stock
    turns = [kind for kind, share in KINDS.items() for _ in range(share)]
    chosen: dict[str, None] = {}
    while len(chosen) < number:
        if not any(stocks.values()):
            raise ValueError(f"number: {number}, but there are only {len(chosen)} prompts")
        draw.shuffle(turns)
        for kind in turns:
            if stocks[kind]:
                chosen[stocks[kind].pop()] = None
    return list(chosen)[:number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help=".jsonl file to write, one prompt a line")
    parser.add_argument("--number", type=int, default=5000, help="of prompts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    prompts = make_prompts(options.number, options.seed)
    text = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
