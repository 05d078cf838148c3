"""Prompts of typical requests to an assistant, to train an exit adapter on the answers; made without network access.

    python -m benchmarks.retrofit.prompts --out prompts.jsonl --number 5000
    python -m benchmarks.retrofit.prompts --out prompts.jsonl --number 1000 --base_model

The standard library's docstrings ("Write a Python function …") and the paragraphs of its manual (explain, summarize,
rewrite), sums, and everyday requests from the forms in prompts.yaml. The subjects of lskip/prompts/chat.jsonl,
on which figures are published, are in none of them.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, permutations, product
from pathlib import Path
from pydoc_data.topics import topics

import yaml

from benchmarks.command_line import command_parser

EVERYDAY = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ASKS_ABOUT_TEXT = (
    "Explain: ",
    "Summarize: ",
    "Rewrite this more simply: ",
    "Give an example for this: ",
    "What does this mean? ",
)
NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo")
GOODS = ("apples", "stamps", "marbles", "pencils", "tickets", "cookies")
WORDS_OF_A_BEGINNING = 16


def articled(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def everyday(kind: str) -> Iterator[str]:
    """Return the prompts of one kind in prompts.yaml."""
    parts = dict(EVERYDAY[kind])
    forms = parts.pop("forms")
    if "groups" in parts:
        pairs = chain.from_iterable(permutations(group, 2) for group in parts.pop("groups"))
        fillings = [{"first": first, "second": second} for first, second in pairs]
    else:
        fillings = [dict(zip(parts, choice, strict=True)) for choice in product(*parts.values())]
    for form, words in product(forms, fillings):
        articles = {f"a_{name}": articled(str(word)) for name, word in words.items() if word}
        yield form.format(**words, **articles).strip()


def purposes() -> Iterator[tuple[str, str]]:
    """The functions of the standard library, and what their docstrings say of each."""
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
                    yield node.name, purpose


def docstrings() -> Iterator[str]:
    """These functions, as tasks."""
    for name, purpose in purposes():
        yield f"Write a Python function `{name}`. It should: {purpose[:200]}"


def paragraphs_of_the_manual() -> list[str]:
    texts = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    texts = [text for text in texts if 80 < len(text) < 400 and re.match(r"[A-Za-z]", text) and "::=" not in text]
    return list(dict.fromkeys(texts))


def paragraphs() -> Iterator[str]:
    """The paragraphs of the language reference, with each thing that one may ask about a text."""
    for index, text in enumerate(paragraphs_of_the_manual()):
        yield ASKS_ABOUT_TEXT[index % 5] + text


def beginnings() -> Iterator[str]:
    """How paragraphs of the language reference and descriptions of functions begin: what a base model goes on with."""
    for text in chain(paragraphs_of_the_manual(), (purpose for _, purpose in purposes())):
        yield " ".join(text.split()[:WORDS_OF_A_BEGINNING])


def arithmetic() -> Iterator[str]:
    draw = random.Random(0)
    for name, good, kind in product(NAMES, GOODS, range(12)):
        a, b, c = draw.randint(12, 99), draw.randint(3, 11), draw.randint(2, 9)
        yield [
            f"{name} has {a} {good} and gives away {b}. How many are left?",
            f"{name} buys {c} bags with {b} {good} each. How many {good} is that? Show your steps.",
            f"If {b} {good} cost {b * c} dollars, what do {c + 1} {good} cost?",
            f"{name} shares {b * c} {good} among {c} friends. How many does each get?",
            f"What is {a} plus {b * c}? Explain step by step.",
            f"What is {a} times {c}?",
        ][kind % 6]


def kinds() -> dict[str, tuple[Callable[[], Iterator[str]], int]]:
    """Each kind of prompt, and how often it is taken in turn: mostly everyday requests."""
    shares = {"things": 3, "stories": 2}
    templates = {kind: (partial(everyday, kind), shares.get(kind, 1)) for kind in EVERYDAY}
    return {"docstrings": (docstrings, 3), "paragraphs": (paragraphs, 2), **templates, "arithmetic": (arithmetic, 1)}


def make_prompts(number: int, seed: int = 0, base_model: bool = False) -> list[str]:
    """So many different prompts in an order of the seed; fewer prompts are the beginning of more.

    Args:
        base_model: beginnings of texts, for a model that goes on with a text and answers nobody.

    Raises:
        ValueError: more than there are.
    """
    draw = random.Random(seed)
    stocks, turns = {}, []
    for kind, (made, share) in ({"beginnings": (beginnings, 1)} if base_model else kinds()).items():
        stocks[kind] = list(dict.fromkeys(made()))
        draw.shuffle(stocks[kind])
        turns += [kind] * share
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
    parser = command_parser("benchmarks.retrofit.prompts", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help=".jsonl file to write, one prompt a line")
    parser.add_argument("--number", type=int, default=5000, help="of prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base_model", action="store_true", help="beginnings of texts, for a model without chat")
    options = parser.parse_args()
    prompts = make_prompts(options.number, options.seed, options.base_model)
    text = "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
