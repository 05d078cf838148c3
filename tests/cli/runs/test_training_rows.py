"""A run keeps the tokens of its answers and the form of its prompts, and decoding takes them from there."""

import json
import re
import warnings
from collections import Counter

import pytest

from lskip.cli import main
from lskip.export.to_hf import export
from lskip.inference import load_generator
from lskip.inference.text import encode_prompt
from lskip.models.pretrained import load_tokenizer
from tests.conftest import make_config

COMPLETIONS = ["turn on the light", "turn off the light", "turn on the fan", "open the door", "turn it up"]


def fitted(folder, rows, *more) -> str:
    """Return the run of one step on these rows, by a tokenizer that has a chat template."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {
        "model": json.dumps(
            make_config(vocab_size=len(load_tokenizer("smollm2")), hidden_size=16, num_hidden_layers=2)
        ),
        "run_folder": folder / "run",
        "data.source": folder / "rows.jsonl",
        "data.tokenizer": "smollm2",
        "data.cache_dir": folder / "cache",
        "data.block_size": 64,
        "data.batch_size": 4,
        "data.val_fraction": 0,
        "data.test_fraction": 0,
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    assert main(["fit", *(f"--{key}={value}" for key, value in arguments.items()), *more]) == 0
    return str(folder / "run")


def test_fit_keeps_the_tokens_of_its_answers(tmp_path):
    rows = [{"prompt": f"Say this, number {n}: ", "completion": text} for n, text in enumerate(COMPLETIONS * 4)]
    run, tokenizer = fitted(tmp_path, rows), load_tokenizer("smollm2")
    kept = json.loads((tmp_path / "run" / "checkpoints" / "draft_tokens.json").read_text())
    answers = [[*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id] for row in rows]
    counts = Counter(token for answer in answers for token in answer)
    assert kept == sorted(counts, key=lambda token: (-counts[token], token))
    head = load_generator(run).draft_head
    assert head.token_ids.tolist() == sorted(kept) and tokenizer.eos_token_id in kept


def encoded(model: str, prompt: str, chat: bool | None = None) -> list[int]:
    return encode_prompt(prompt, load_tokenizer(model), chat, 49152)


def test_prompts_take_the_form_of_training(tmp_path):
    """Pairs are trained without the chat template: decoding leaves it out too, of an export as well, if not asked."""
    rows = [{"prompt": f"Number {n} now.\n=>", "completion": text} for n, text in enumerate(COMPLETIONS * 4)]
    pairs, plain = fitted(tmp_path / "pairs", rows), load_tokenizer("smollm2")
    export(pairs, str(tmp_path / "exported"))
    for model in (pairs, str(tmp_path / "exported")):
        with warnings.catch_warnings(action="error"):
            assert encoded(model, rows[0]["prompt"]) == plain(rows[0]["prompt"])["input_ids"]
            assert encoded(model, "Hello", chat=True) == encoded("smollm2", "Hello")
        with pytest.warns(UserWarning, match=re.escape(repr(" now.\n=>"))):
            assert encoded(model, "Number 3 now") == plain("Number 3 now")["input_ids"]
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in rows
    ]
    chat = fitted(tmp_path / "chat", chats, f"--data.tokenizer={pairs}")
    assert encoded(chat, "Hello") == encoded("smollm2", "Hello")


def test_a_few_prompts_say_nothing_of_an_ending(tmp_path):
    run = fitted(tmp_path, [{"prompt": f"Number {n}", "completion": text} for n, text in enumerate(COMPLETIONS)])
    with warnings.catch_warnings(action="error"):
        encoded(run, "Hello")
