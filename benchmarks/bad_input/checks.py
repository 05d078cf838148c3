"""Checks of a command's effect, independent of lskip: transformers' greedy text, the content of files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.bad_input.fixtures import NEW_TOKENS, PROMPTS
from benchmarks.bad_input.verdict import Check, Seen


@cache
def texts(folder: Path, prompts: tuple[str, ...], new_tokens: int = NEW_TOKENS) -> list[str]:
    """Return transformers' greedy continuation of each prompt, by the model and tokenizer in a folder."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        if tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        settings = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        after = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
        found.append(tokenizer.decode(after, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return found


def prints_the_answer(model: str = "llama", prompt: str = PROMPTS[0], new_tokens: int = NEW_TOKENS) -> Check:
    """Check that `generate` printed transformers' text; `model` is a folder of the fixtures."""

    def check(seen: Seen) -> str | None:
        expected = texts(seen.here.parent / model, (prompt,), new_tokens)[0] + "\n"
        return None if seen.out in (expected, written_out(expected)) else f"printed {seen.out!r}, not {expected!r}"

    return check


def written_out(text: str) -> str:
    r"""Return `text` with control characters other than newline and tab escaped as \x1b and so on."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def rows_of(path: Path) -> list[dict]:
    """Return the rows of a JSON Lines file; ValueError for a cut line or invalid JSON."""

    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    data = path.read_bytes()
    if not data.endswith(b"\n"):
        raise ValueError("the last line is cut")
    return [json.loads(line, parse_constant=refuse) for line in data.decode("utf-8").split("\n")[:-1]]


def answers(
    expected: Sequence[dict] | Callable[[Path], Sequence[dict]], model: str | None = "llama", file: str = "out.jsonl"
) -> Check:
    """Check that `file` has a line with the fields of each expected row, in order, and transformers' texts.

    Args:
        expected: fields of each row, "line" among them; or a function of the case's folder.
        model: model of the texts, a folder of the fixtures; None: texts are not compared.
    """

    def check(seen: Seen) -> str | None:
        wanted = expected(seen.here) if callable(expected) else expected
        try:
            rows = rows_of(seen.here / file)
        except (OSError, ValueError) as error:
            return f"{file}: {error}"
        if len(rows) != len(wanted):
            return f"{len(rows)} lines for {len(wanted)} prompts"
        for row, fields in zip(rows, wanted, strict=True):
            for key, value in fields.items():
                if row.get(key) != value:
                    return f"{key}: {row.get(key)!r}, not {value!r}"
        prompts = [fields["prompt"] for fields in wanted if "prompt" in fields]
        if model is not None and len(prompts) == len(wanted):
            said = texts(seen.here.parent / model, tuple(prompts))
            return next(
                (f"text {a['text']!r}, not {b!r}" for a, b in zip(rows, said, strict=True) if a["text"] != b), None
            )
        return None

    return check


def numbered(prompts: Sequence[str], first: int = 1) -> list[dict]:
    """Return the expected rows for a .txt file without blank lines."""
    return [{"prompt": prompt, "line": line} for line, prompt in enumerate(prompts, first)]


def holds(*files: str, folder: str = "out") -> Check:
    """Check that these files exist and are not empty."""

    def check(seen: Seen) -> str | None:
        for name in files:
            path = seen.here / folder / name
            if not path.is_file() or not path.stat().st_size:
                return f"there is no {folder}/{name}"
        return None

    return check


def json_holds(file: str, test: Callable[[dict], object]) -> Check:
    """Check the content of a JSON file by `test`."""

    def check(seen: Seen) -> str | None:
        try:
            content = json.loads((seen.here / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{file}: {error}"
        return None if test(content) else f"{file} holds {str(content)[:200]}"

    return check


def both(*checks: Check) -> Check:
    return lambda seen: next((wrong for check in checks if (wrong := check(seen)) is not None), None)


def trained(steps: int, folder: str = "out") -> Check:
    """Check for a checkpoint of so many steps with finite weights."""

    def check(seen: Seen) -> str | None:
        path = seen.here / folder / "checkpoints" / "last.ckpt"
        if not path.is_file():
            return f"there is no {path.relative_to(seen.here)}"
        checkpoint = torch.load(path, weights_only=True)
        if checkpoint["global_step"] != steps:
            return f"step {checkpoint['global_step']}, not {steps}"
        bad = [name for name, part in checkpoint["state_dict"].items() if not part.isfinite().all()]
        return f"{bad[0]} is not finite" if bad else None

    return check
