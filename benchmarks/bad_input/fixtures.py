"""The folder that all cases share: tiny models of three families, a run, an adapter, texts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lskip.cli import main

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}
GPT2 = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}
FAMILIES = {"llama": SIZES, "mistral": {**SIZES, "sliding_window": None}, "gpt2": GPT2}
SCRATCH = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SCRATCH |= {"num_attention_heads": 4, "vocab_size": 300}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DOCUMENTS = [f"def f{i}(x):\n    return x + {i}\n" * 4 for i in range(60)]
PROMPTS = ("def f(x):", "for i in range", "import os, sys")
NEW_TOKENS = 4


def make_place(place: Path) -> None:
    """Fill the folder `place`, with lskip's own commands for runs, exports and adapters."""
    tokenizer = byte_tokenizer()
    for family, sizes in FAMILIES.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(place / family)
        tokenizer.save_pretrained(place / family)
    shutil.copytree(place / "llama", place / "chat")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "chat")
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (place / "data.jsonl").write_text("\n".join(lines) + "\n")
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    task = [{"prompt": prompt, "reference": "pass"} for prompt in PROMPTS]
    (place / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in task))
    steps = ("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--checkpoint.every_n_train_steps=2")
    _run("fit", *fit_arguments(place, place / "run"), *steps)
    _run("fit", *fit_arguments(place, place / "scratch", json.dumps(SCRATCH)))
    shutil.rmtree(place / "scratch")  # only its tokenizer is needed, which stays in the cache
    _run("export", f"--model={place}/llama", f"--output={place}/exported", "--gguf=true")
    os.replace(place / "exported" / "model.gguf", place / "model.gguf")
    _run("export", f"--model={place}/run", f"--output={place}/trained")
    answers = [
        {"prompt": f"def f{i}(a):", "text": f"return a + {i}\n    print(add(i, 1))", "finish_reason": "length"}
        for i in range(60)
    ]
    (place / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    _run("adapt", *adapt_arguments(place), f"--output={place}/adapter")


def fit_arguments(place: Path | str, run: Path | str, model: Path | str | None = None) -> list[str]:
    """Return the arguments of a fit of two steps, which takes about a second."""
    return [
        f"--model={model or f'{place}/llama'}",
        f"--run_folder={run}",
        f"--data.source={place}/data.jsonl",
        f"--data.cache_dir={place}/cache",
        *SMALL,
    ]


SMALL = (
    "--data.block_size=16",
    "--data.batch_size=4",
    "--data.max_val_blocks=2",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


def adapt_arguments(place: Path | str) -> list[str]:
    return [
        f"--model={place}/llama",
        f"--answers=[{place}/answers.jsonl]",
        f"--cache_dir={place}/cache",
        "--exit_layer=2",
        "--vocabulary=100",
        "--block_size=40",
        "--max_steps=3",
        "--batch_size=8",
        "--warmup_steps=1",
        "--val_every=2",
        "--device=cpu",
    ]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with 300 entries; `<|endoftext|>` (id 0) ends a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n"
    bpe.train_from_iterator([text] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def _run(*arguments: str) -> None:
    if main(list(arguments)) != 0:
        raise RuntimeError(f"lskip {' '.join(arguments)} failed, so that there is nothing to try bad input on")
