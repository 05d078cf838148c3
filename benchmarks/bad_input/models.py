"""Bad model folders: wrong fields in config.json or generation_config.json, broken or missing files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

from benchmarks.bad_input.checks import prints_the_answer
from benchmarks.bad_input.verdict import Case, Right, done, either, refused

NAN, BIG = float("nan"), 10**9
SAME = done(prints_the_answer())
READ_OR_NAMED = either(SAME, refused("model"))
# Values that no model has. (What a family does not read is not among them.)
CONFIG = {
    "model_type": [None, 5, [], "clip", "lama", "../../x", "\x1b[2J", "🙂", "bert"],
    "hidden_size": [0, -8, 33, 10**7, "32", None, 1.5, NAN, [32], True],
    "num_hidden_layers": [0, -1, 6, BIG, "4", None, 2.5, NAN, [4]],
    "num_attention_heads": [0, -4, 3, 5, BIG, "four", None, NAN],
    "num_key_value_heads": [0, 3, -2, BIG, "two", 1.5],
    "intermediate_size": [0, -4, 65, BIG, "64", None],
    "vocab_size": [0, -1, 299, 301, 10**10, "300", None],
    "max_position_embeddings": [0, -1, "128", NAN, [1]],
    "rms_norm_eps": [-1, NAN, "x", [1e-5]],
    "rope_parameters": [
        {"rope_type": "foo"},
        [],
        "x",
        {"rope_type": "linear"},
        {"rope_type": "default", "rope_theta": 0},
    ],
    "rope_scaling": [{"type": "nope", "factor": 2}, {"rope_type": "dynamic", "factor": "x"}, 5],
    "hidden_act": ["nope", 5, [], "__class__"],
    "attention_dropout": [2, -1, "x", NAN],
    "eos_token_id": [10**6, -4, "0", 1.5, [0, "x"], {}],
    "tie_word_embeddings": [False, "yes", 5],
    "attention_bias": [True, "x"],
    "mlp_bias": [True],
    "head_dim": [0, -8, 7, 16, "8"],
    "dtype": ["float99", 5, "os.system"],
    "quantization_config": [{"quant_method": "nope"}, {}, 5, {"quant_method": "bitsandbytes", "load_in_4bit": True}],
}
# Of these nobody can say whether they are wrong: read as nothing, or refused.
CONFIG_EITHER = {
    "auto_map": [{"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Config"}],
    "pad_token_id": [10**6, -5, "x", 1.5],
    "bos_token_id": [10**6, "x"],
    "eos_token_id": [[0, 300], [], None],
    "architectures": [5, [], ["Nope"], None],
    "transformers_version": [5, "99", []],
    "_name_or_path": ["\x1b[2J", 5, "../../.."],
    "layer_types": [["full_attention"] * 3, ["nope"] * 4, 5],
    "_attn_implementation": ["nope", 5],
    "attn_implementation": ["nope"],
    "use_cache": [False, "x"],
    "unknown_field": [1, {"a": [1]}, "x" * 100_000],
    "pretraining_tp": [0, 2],
    "num_hidden_layers": [2],
}
GENERATION = {
    "temperature": ["hot", NAN, [1], {}],
    "top_p": [NAN, "x"],
    "top_k": ["x", 1.5, []],
    "min_p": ["x"],
    "repetition_penalty": [NAN, "x"],
    "max_new_tokens": ["x", 1.5, NAN],
    "stop_strings": [5, [5], [""], {"a": 1}],
    "eos_token_id": ["x", [[0]]],
}
# Beyond what lskip goes by: whoever decodes is told, who may name another; nobody else is held up.
GENERATION_RANGE = {
    "top_p": [2, -1, 0],
    "top_k": [-7, -1],
    "min_p": [2, -1],
    "repetition_penalty": [0, -1],
}
GENERATION_EITHER = {
    "temperature": [-1],
    "max_new_tokens": [0, -1],
    "do_sample": ["x", 5],
    "max_length": [0, -1, "x"],
    "min_new_tokens": [10**6, -1, "x"],
    "eos_token_id": [10**6, -1, [0, 300]],
    "no_repeat_ngram_size": [2, "x"],
    "bad_words_ids": [[[5]], "x"],
    "num_beams": [4, 0],
    "forced_eos_token_id": [5],
    "transformers_version": [5],
    "unknown": [1],
    "cache_implementation": ["nope"],
    "watermarking_config": [{"a": 1}],
    "assistant_early_exit": [2, 99],
}
COMMANDS = {  # what loads a model, after it the model
    "generate": ("--prompt=def f(x):", "--max_new_tokens=4", "--device=cpu"),
    "export": ("--output={here}/out",),
    "inspect": ("--output={here}/out", "--data={place}/data.jsonl", "--block_size=16"),
    "sweep": (
        *("--task=LocalTask", "--task.path={place}/task.jsonl", "--task.max_new_tokens=4", "--output={here}/out"),
        *("--num_prompts=1", "--rounds=1", "--num_speculations=[2]", "--exit_layers=[1]"),
    ),
    "adapt": (
        *("--output={here}/out", "--answers=[{place}/answers.jsonl]", "--cache_dir={here}/cache", "--exit_layer=1"),
        *("--block_size=40", "--max_steps=2", "--batch_size=4", "--device=cpu"),
    ),
    "predict": ("--prompts={place}/prompts.txt", "--output={here}/out.jsonl", "--max_new_tokens=4", "--device=cpu"),
    "fit": (
        *("--run_folder={here}/out", "--data.source={place}/data.jsonl", "--data.cache_dir={here}/cache"),
        *("--data.block_size=16", "--trainer.max_steps=1", "--trainer.accelerator=cpu"),
    ),
}
Make = Callable[[Path], object]


def cases(random: Random) -> Iterator[Case]:
    yield from fields("config.json", "config field", CONFIG, refused("model"), 2, random)
    yield from fields("config.json", "config field", CONFIG_EITHER, either(done(), refused("model")), 1, random)
    yield from fields("generation_config.json", "generation field", GENERATION, refused("generation_config"), 2, random)
    told = either(done(), refused("generation_config"))
    for case in fields("generation_config.json", "generation field", GENERATION_RANGE, told, 2, random):
        decodes = case.command in ("generate", "predict", "sweep")
        yield replace(case, right=refused("generation_config")) if decodes else case
    yield from fields("generation_config.json", "generation field", GENERATION_EITHER, told, 1, random)
    yield from whole_files(random)


def fields(file: str, kind: str, table: dict, right: Right, count: int, random: Random) -> Iterator[Case]:
    """Yield one changed field of a JSON file, sometimes for another command than generate."""
    for name, values in table.items():
        for value in random.sample(values, min(count, len(values))):
            command = "generate" if random.random() < 0.6 else random.choice(list(COMMANDS))
            yield on_model(command, kind, f"{name}: {str(value)[:40]!r}", right, changing(file, name, value))


def changing(file: str, name: str, value: object) -> Make:
    def change(folder: Path) -> None:
        fields = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**fields, name: value}))

    return change


def on_model(
    command: str, kind: str, what: str, right: Right, change: Make, origin: str = "llama", name: str = "m"
) -> Case:
    """Return a case of a changed copy of a model, with a file evil.py beside it that it might name."""

    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / origin, here / "m")
        (here / "m" / "evil.py").write_text("open('MARK', 'w')\nclass Evil: pass\nclass Config: pass\n")
        change(here / "m")

    arguments = (f"--model={{here}}/{name}", *COMMANDS[command])
    return Case(command, kind, what, arguments, right, prepare, makes=("out", "out.jsonl"))


def whole_files(random: Random) -> Iterator[Case]:
    """Yield a file of the folder that is missing, cut, in another encoding or replaced."""
    broken = {
        "config.json": refused("model"),
        "generation_config.json": refused("generation_config"),
        "tokenizer.json": refused("model|tokenizer"),
        "tokenizer_config.json": refused("model|tokenizer"),
        "model.safetensors": refused("model"),
    }
    for file, right in broken.items():
        kind = f"model: {file}"
        text = b"{}" if file in ("tokenizer_config.json", "generation_config.json") else None
        contents = {
            "empty": b"",
            "a list": b"[]",
            "a text": b'"x"',
            "null": b"null",
            "noise": random.randbytes(300),
            "nested 100,000 deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
            "HTML": b"<!doctype html><html>",
            "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        }
        either_way = file in ("tokenizer_config.json", "generation_config.json")
        for what, data in contents.items():
            each = either(right, done()) if either_way and what == "5000 digits" else right
            yield on_model("generate", kind, what, each, lambda m, f=file, d=data: (m / f).write_bytes(d))
        if text is not None:
            yield on_model(
                "generate", kind, "empty object", either(done(), right), lambda m, f=file: (m / f).write_bytes(b"{}")
            )
        if file != "model.safetensors":
            encodings = {
                "utf-16": lambda data: data.decode().encode("utf-16"),
                "a mark": lambda data: b"\xef\xbb\xbf" + data,
            }
            for what, encode in encodings.items():
                each = either(right, SAME) if what == "a mark" else right
                yield on_model(
                    "generate",
                    kind,
                    what,
                    each,
                    lambda m, f=file, e=encode: (m / f).write_bytes(e((m / f).read_bytes())),
                )
        for _ in range(2):
            share = random.random()
            yield on_model("generate", kind, f"cut at {share:.3f}", right, lambda m, f=file, s=share: cut(m / f, s))
        for what, make in PLACES.items():
            gone = either_way  # as if it were not there
            each = either(right, SAME) if gone else right
            yield on_model("generate", kind, what, each, lambda m, f=file, make=make: ((m / f).unlink(), make(m / f)))


PLACES: dict[str, Make] = {
    "gone": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def flip(path: Path, share: float, header: bool = False) -> None:
    """Change one byte at the position `share` of the file, for safetensors of its header."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little") + 8 if header else len(data)
    at = int(share * size)
    data[at] ^= 1 + int(share * 1e6) % 255
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict], dict]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
