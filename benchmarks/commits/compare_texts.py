"""Record the texts of every way to decode on one commit, and compare them with those of another.

    PYTHONPATH=CHECKOUT python benchmarks/commits/compare_texts.py record --out texts.json
    python benchmarks/commits/compare_texts.py compare before.json after.json

A cell is a model, a way of loading it, a way of decoding and a batch: cells.py. What a commit refuses is
recorded by its sentence. `compare` says of each difference at which token it begins and what plain transformers
gives the two tokens there (reference.py): a tie within rounding, or DIFFERENT, and then it ends with 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from cells import BATCH, Load, Model, loads, settings, smollm2, tiny, write_costs
from reference import Reference

import lskip
from lskip.inference import load_generator


def record(out: Path, names: list[str], quick: bool) -> None:
    """Decode every cell of the models `names`, and write the record."""
    torch.set_num_threads(1)
    cells, begin = {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        for model in models(Path(place), names):
            for load in loads(model):
                if not quick or load.name in ("auto", "weights plain", "drafts int8_dynamic"):
                    cells |= record_load(model, load, Path(place))
                    print(f"{model.name}, {load.name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_json({"environment": environment(), **without_repeats(cells)}), encoding="utf-8")


def models(place: Path, names: list[str]) -> list[Model]:
    """Return those of `names`, the tiny ones made in `place`."""
    make = {
        "smollm2": smollm2,
        "tiny_tied": lambda: tiny(True, place / "tied"),
        "tiny_untied": lambda: tiny(False, place / "untied"),
    }
    return [make[name]() for name in names]


def record_load(model: Model, load: Load, place: Path) -> dict[str, list | str]:
    """Return cell -> its texts (lists of token ids), or the sentence that refuses it."""
    costs = place / f"{model.name} {load.name}.json"
    write_costs(costs, model, load)
    try:
        generator = load_generator(model.source, device="cpu", costs_file=str(costs), **load.arguments)
    except (ValueError, TypeError) as error:
        generator, refused = None, str(error)
    cells = {}
    for way in load.ways:
        for batch in (1, BATCH):
            name = f"{model.name} / {load.name} / {way} / batch {batch}"
            cells[name] = refused if generator is None else texts(generator, model, way, batch)
    return cells


def texts(generator, model: Model, way: str, batch: int) -> list[list[int]] | str:
    """Return the token ids of some prompts alone, or of all prompts together; or the sentence that refuses them."""
    try:
        if batch == 1:
            return [generator.generate(prompt, **settings(way, model)).token_ids for prompt in model.prompts[1:3]]
        found = dict(generator.generate_batch(model.prompts, batch_size=batch, **settings(way, model)))
        return [found[index].token_ids for index in sorted(found)]
    except ValueError as error:
        return str(error)


def without_repeats(cells: dict[str, list | str]) -> dict:
    """Return {"texts": each text once, "cells": name -> places of its texts there, or the sentence}."""
    places: dict[tuple[int, ...], int] = {}
    short = {
        name: found if isinstance(found, str) else [places.setdefault(tuple(ids), len(places)) for ids in found]
        for name, found in cells.items()
    }
    return {"texts": [list(ids) for ids in places], "cells": short}


def as_json(record: dict) -> str:
    """Return JSON with a text, or a cell, a line."""
    parts = [f'"environment": {json.dumps(record["environment"])}']
    parts.append('"texts": [\n' + ",\n".join(json.dumps(ids, separators=(",", ":")) for ids in record["texts"]) + "\n]")
    lines = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in record["cells"].items())
    parts.append('"cells": {\n' + ",\n".join(lines) + "\n}")
    return "{" + ",\n".join(parts) + "}\n"


def environment() -> dict:
    """Return the commit of the lskip that runs, and what else a text may depend on."""
    place = Path(lskip.__file__).parent
    commit = subprocess.run(["git", "-C", place, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


# Comparing.

VERDICTS = ("equal", "refused by both", "tie", "other drafts", "refused before", "refused now", "DIFFERENT")


def compare(before: Path, after: Path) -> int:
    """Print what differs; return 1 where a text is another for no tie, else 0."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    counts, verdicts = dict.fromkeys(VERDICTS, 0), {}
    for name, was in old["cells"].items():
        now = new["cells"].get(name, "the second record has no such cell")
        if isinstance(was, str) or isinstance(now, str):
            verdict, said = refusal(was, now)
        else:
            pairs = [(old["texts"][a], new["texts"][b]) for a, b in zip(was, now, strict=True)]
            verdict, said = difference(name, pairs, verdicts)
        counts[verdict] += 1
        if said:
            print(f"{verdict}: {name}: {said}")
    for name in new["cells"].keys() - old["cells"].keys():
        print(f"new: {name}")
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(counts["DIFFERENT"] > 0)


def refusal(was: list | str, now: list | str) -> tuple[str, str]:
    """Return (verdict, what to print) of a cell that at least one commit refused."""
    if isinstance(was, str) and isinstance(now, str):
        return "refused by both", "" if was == now else f"{was!r} became {now!r}"
    return ("refused now", now) if isinstance(now, str) else ("refused before", str(was))


def difference(name: str, pairs: list[tuple[list[int], list[int]]], verdicts: dict) -> tuple[str, str]:
    """Return (verdict, what to print) of a cell that both decoded; `verdicts` keeps what is known by now."""
    found = []
    for index, (old, new) in enumerate(pairs):
        if old != new:
            found.append(verdict_of(name, index, old, new, verdicts))
    if not found:
        return "equal", ""
    ties = {is_tie for is_tie, _ in found}
    verdict = "DIFFERENT" if False in ties else "other drafts" if None in ties else "tie"
    return verdict, "; ".join(said for _, said in found)


def verdict_of(name: str, index: int, old: list[int], new: list[int], verdicts: dict) -> tuple[bool | None, str]:
    """Return (whether it is a tie, in words) of a text that differs; None where nobody can say."""
    place = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    model, load, way, batch = name.split(" / ")
    alone = batch.endswith(" 1")
    prompt = index + 1 if alone else index
    if place == min(len(old), len(new)):
        return False, f"text {prompt} is cut at token {place}"
    tokens = old[place], new[place]
    key = model, load.startswith("bfloat16"), way, prompt, alone, tuple(old[:place]), tokens
    if key not in verdicts:
        verdicts[key] = Reference.of(model, bfloat16=key[1]).judge(way, prompt, alone, old[:place], *tokens)
    is_tie, said = verdicts[key]
    return is_tie, f"text {prompt} from token {place} on ({tokens[0]} became {tokens[1]}): {said}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("record", help="decode every cell with the lskip that PYTHONPATH names")
    making.add_argument("--out", type=Path, required=True, help="JSON file to write")
    making.add_argument("--models", nargs="+", default=["tiny_tied", "tiny_untied", "smollm2"])
    making.add_argument("--quick", action="store_true", help="three ways of loading only")
    comparing = commands.add_parser("compare", help="say what differs between two records")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.command == "compare":
        return compare(chosen.before, chosen.after)
    record(chosen.out, chosen.models, chosen.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
