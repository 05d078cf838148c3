"""The embedded task: sentences and parses that hassil itself agrees with, split by template."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import pytest
import yaml
from hassil import recognize_all
from hassil.intents import TextSlotList
from home_assistant_intents import get_intents

from lskip.data import TextData, home_assistant
from lskip.data.home_assistant import AREAS, FLOORS, NAMES, load_intents, read_pairs
from lskip.evaluation.tasks.embedded import HomeAssistant

CONFIGS = Path(__file__).parents[2] / "configs"
PARSE = re.compile(r"\[IN:(\w+)((?: \[SL:\w+ [^\[\]]+ \])*) \]")
SLOT = re.compile(r" \[SL:(\w+) ([^\[\]]+) \]")
FRACTIONS = {"val_fraction": 0.05, "test_fraction": 0.1}  # those of configs/recipes/home_assistant.yaml


def parsed(completion: str) -> tuple[str, dict[str, str]]:
    """Return intent and slots of a completion; raise ValueError where it is none."""
    found = PARSE.fullmatch(completion)
    if found is None:
        raise ValueError(completion)
    return found[1], dict(SLOT.findall(found[2]))


@pytest.fixture(scope="module")
def rows():
    return list(read_pairs())


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_tokenizer):
    cache = str(tmp_path_factory.mktemp("cache"))
    sizes = {"block_size": 256, "batch_size": 4, "max_val_blocks": 64}
    return TextData("home_assistant", tokenizer=tiny_tokenizer, cache_dir=cache, **sizes, **FRACTIONS)


def place(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_by_hand(text: str, val: float, test: float) -> str:
    return "val" if place(text) < val else "test" if place(text) < val + test else "train"


def test_templates_decide_the_split(rows, data):
    by_hand = defaultdict(set)
    for row in rows:
        by_hand[split_by_hand(row["group"], 0.05, 0.1)].add((row["prompt"], row["completion"]))
    for split in ("train", "val", "test"):
        documents = data.documents(split)
        assert documents.column_names == ["prompt", "completion"]
        assert set(zip(documents["prompt"], documents["completion"], strict=True)) == by_hand[split]
    assert len(by_hand["train"]) >= 8000 and len(by_hand["test"]) >= 1000 and len(by_hand["val"]) >= 500
    assert len({row["prompt"] for row in rows}) == len(rows)  # no sentence has two parses, or stands on two sides
    intents = {parsed(completion)[0] for _, completion in by_hand["train"]}
    assert intents == get_intents("en")["intents"].keys()


def test_no_intent_floods(rows):
    blocks = [block for intent in get_intents("en")["intents"].values() for block in intent["data"]]
    templates = Counter(template for block in blocks for template in block["sentences"])
    for template, count in Counter(row["group"] for row in rows).items():
        assert count <= 24 * templates[template]
    assert max(Counter(parsed(row["completion"])[0] for row in rows).values()) < 0.2 * len(rows)


def test_every_completion_parses_back(rows):
    for row in rows:
        intent, slots = parsed(row["completion"])
        assert list(slots) == sorted(slots)
        assert home_assistant.written(intent, slots) == row["completion"]
        assert re.fullmatch(r"\S.*\S\n", row["prompt"]) and "  " not in row["prompt"]
        assert not set("[]{}<>|()\n") & set(row["prompt"][:-1])


def test_a_slot_is_what_was_said(rows):
    said = {row["prompt"].strip(): parsed(row["completion"])[1] for row in rows}
    down = {text: slots for text, slots in said.items() if re.match(r"decrease .*volume.*\d", text)}
    steps = {text: slots["volume_step"] for text, slots in down.items() if "volume_step" in slots}
    assert len(steps) > 10
    assert all(steps[text] == f"-{re.search(r'[0-9]+', text)[0]}" for text in steps)
    areas = [text for text, slots in said.items() if slots.get("area") and slots["area"] not in text]
    assert not areas
    in_words = [slots.values() for text, slots in said.items() if re.search(r"\bforty-two[ %-](?!point)", text)]
    assert len(in_words) > 3 and all({"42", "-42"} & set(values) for values in in_words)


def test_hassil_recognizes_its_intent_and_slots(rows):
    """All parses that its recognizer finds contain ours; it says the area of a room that it is told it stands in."""
    names = [(name, name, {"domain": domain}) for domain, entries in NAMES.items() for name in entries]
    lists = {
        "area": TextSlotList.from_strings(AREAS),
        "floor": TextSlotList.from_strings(FLOORS),
        "name": TextSlotList.from_tuples(names),
    }
    intents = load_intents()
    for row in Random(0).sample(rows, 100):
        found = recognize_all(row["prompt"].strip(), intents, slot_lists=lists, intent_context={"area": "here"})
        parses = [(result.intent.name, recognized_slots(result.entities)) for result in found]
        intent, slots = parsed(row["completion"])
        # hassil 3.12 reads a percentage in words with the sign of another list.
        assert (intent, {name: value.lstrip("-") for name, value in slots.items()}) in parses, row


def recognized_slots(entities) -> dict[str, str]:
    written = {}
    for name, entity in entities.items():
        if entity.value != "here":
            number = isinstance(entity.value, int | float)
            written[name] = f"{entity.value:g}".lstrip("-") if number else str(entity.value).strip()
    return written


def test_the_same_in_another_process():
    """Iterating over a set would give another order there."""
    read = f"import json, runpy; read_pairs = runpy.run_path({home_assistant.__file__!r})['read_pairs']"
    code = f"{read}; print(json.dumps(list(read_pairs(1))))"
    hashed = os.environ | {"PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", code], env=hashed, capture_output=True, text=True, check=True)
    here = list(read_pairs(1))
    assert json.loads(other.stdout) == here
    assert list(read_pairs(1, seed=1)) != here


def test_only_completions_are_scored(data, tiny_tokenizer):
    completions = dict(zip(*(data.documents("val")[name] for name in ("prompt", "completion")), strict=True))
    batch = next(iter(data.val_dataloader()))
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        first = next(i for i, label in enumerate(labels) if label != -100)
        count = sum(label != -100 for label in labels)
        assert labels[first : first + count] == ids[first : first + count]  # one stretch, aligned with its inputs
        prompt = tiny_tokenizer.decode(ids[:first])
        assert tiny_tokenizer.decode(ids[first : first + count]) == f"{completions[prompt]}<|endoftext|>"


def test_a_missing_package_is_named_at_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="for home_assistant, run: pip install home-assistant-intents hassil"):
        TextData("home_assistant")


def test_the_evaluation_task_gives_what_the_configs_hold_out(tmp_path):
    def documents(config: str, split: str) -> set[str]:
        named = yaml.safe_load((CONFIGS / config).read_text())["data"]
        rule = {name: named[name] for name in ("val_fraction", "test_fraction", "val_within_groups") if name in named}
        return set(TextData(named["source"], cache_dir=str(tmp_path), **rule).documents(split)["prompt"])

    quickstart, recipe = "quickstart.yaml", "recipes/home_assistant.yaml"
    asked = {
        unseen: {example.prompt for example in HomeAssistant(unseen=unseen, cache_dir=str(tmp_path)).examples()}
        for unseen in ("sentences", "templates")
    }
    assert asked == {"sentences": documents(quickstart, "val"), "templates": documents(quickstart, "test")}
    assert asked["templates"] == documents(recipe, "test")
    assert not documents(quickstart, "train") & (asked["sentences"] | asked["templates"])
    with pytest.raises(ValueError, match="unseen: 'words' is not one of templates, sentences"):
        HomeAssistant(unseen="words")


# Groups of any source


@pytest.fixture
def grouped(tmp_path, tiny_tokenizer):
    """Return a function (rows, **arguments) -> TextData; val and test a fifth each."""

    def make(rows: list[dict], **arguments) -> TextData:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sizes = {"block_size": 16, "val_fraction": 0.2, "test_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
        return TextData(str(path), tokenizer=tiny_tokenizer, **sizes, **arguments)

    return make


def texts_by_split(data: TextData) -> dict[str, list[str]]:
    return {split: data.documents(split)["text"][:] for split in ("train", "val", "test")}


@pytest.mark.parametrize("kind", [str, int])
def test_a_group_stays_on_one_side(grouped, kind):
    rows = [{"text": f"text {i} of group {i % 30}", "group": kind(i % 30)} for i in range(300)]
    found = texts_by_split(grouped(rows))
    for split, texts in found.items():
        assert set(texts) == {row["text"] for row in rows if split_by_hand(str(row["group"]), 0.2, 0.2) == split}
        # Ordered by content, so that the first few (max_val_blocks) are of many groups.
        assert texts == sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    streamed = grouped(rows, streaming=True, max_val_blocks=500)
    assert streamed.documents("val")["text"][:] == found["val"]


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_within_the_groups_of_training(grouped, streaming):
    """Test is the groups that it is without; validation is a fifth of each other group, by each text's own hash."""
    rows = [{"text": f"text {i} of group {i % 30}", "group": str(i % 30)} for i in range(600)]
    by_hand = defaultdict(set)
    for row in rows:
        tested = split_by_hand(row["group"], 0.2, 0.2) == "test"
        by_hand["test" if tested else "val" if place(row["text"]) < 0.2 else "train"].add(row["text"])
    data = grouped(rows, val_within_groups=True, streaming=streaming, max_val_blocks=500)
    for split in ("val", "test") if streaming else ("train", "val", "test"):
        assert set(data.documents(split)["text"]) == by_hand[split]
    groups = {split: {text.split()[-1] for text in texts} for split, texts in by_hand.items()}
    assert groups["val"] <= groups["train"] and not groups["test"] & groups["train"] and len(by_hand["val"]) > 50


def test_without_groups_the_split_is_the_same_within(grouped):
    rows = [{"text": f"text {i}"} for i in range(200)]
    assert texts_by_split(grouped(rows, val_within_groups=True)) == texts_by_split(grouped(rows))


def test_a_row_without_a_group_is_one_by_itself(grouped):
    rows = [{"text": f"text {i}", "group": None if i % 2 else "all the others"} for i in range(80)]
    for split, texts in texts_by_split(grouped(rows)).items():
        key = {row["text"]: row["group"] or row["text"] for row in rows}
        assert set(texts) == {text for text in key if split_by_hand(key[text], 0.2, 0.2) == split}


def test_a_copy_in_another_group_is_left_out(grouped):
    rows = [{"text": f"text {i % 40}", "group": str(i)} for i in range(80)]
    texts = [text for texts in texts_by_split(grouped(rows)).values() for text in texts]
    assert sorted(texts) == sorted({row["text"] for row in rows})
