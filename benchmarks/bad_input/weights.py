"""Bad weights: missing, NaN or renamed tensors; checkpoints and adapters cut or corrupted.

What is read must be what was written, or it must be refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from benchmarks.bad_input.checks import prints_the_answer
from benchmarks.bad_input.fixtures import NEW_TOKENS, PROMPTS
from benchmarks.bad_input.models import SAME, Make, cut, edit, flip, on_model
from benchmarks.bad_input.verdict import Case, Right, done, either, refused

READ_OR_NAMED = either(SAME, refused("model"))
LAST = Path("checkpoints") / "last.ckpt"
BIG = 10**9


def cases(random: Random) -> Iterator[Case]:
    yield from tensors(random)
    yield from checkpoints(random)
    yield from adapters(random)


# Tensors of a folder.


def changing(change: Callable[[dict], dict | None]) -> Make:
    def make(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        save_file(change(weights) or weights, folder / "model.safetensors", metadata={"format": "pt"})

    return make


def tensors(random: Random) -> Iterator[Case]:
    names = ["embed_tokens", "norm", *(f"layers.{i}.{part}" for i in range(4) for part in PARTS)]
    for name in random.sample(names, 6):
        full = f"model.{name}.weight"
        yield on_model(
            "generate", "tensors", f"without {name}", refused("model"), changing(lambda w, n=full: without(w, n))
        )
    for what, prefix in {"torch.compile": "_orig_mod.", "DataParallel": "module.", "another": "transformer."}.items():
        renamed = changing(lambda w, p=prefix: {p + name: part for name, part in w.items()})
        yield on_model("generate", "tensors", f"named as by {what}", READ_OR_NAMED, renamed)
    for value in (float("nan"), float("inf"), -float("inf")):
        name = f"model.{random.choice(names)}.weight"
        for command in ("generate", "export", "inspect"):
            poisoned = changing(lambda w, n=name, v=value: w[n].view(-1)[0].fill_(v) and None)
            yield on_model(command, "tensors", f"{value} in {name}", refused("model|NaN|finite"), poisoned)
    yield on_model(
        "generate", "tensors", "whole numbers", refused("model"), changing(lambda w: {n: p.int() for n, p in w.items()})
    )
    yield on_model(
        "generate", "tensors", "one row short", refused("model"), changing(lambda w: {**w, EMBED: w[EMBED][1:].clone()})
    )
    yield on_model(
        "generate", "tensors", "transposed", refused("model"), changing(lambda w: {**w, EMBED: w[EMBED].T.contiguous()})
    )
    yield on_model("generate", "tensors", "none", refused("model"), changing(lambda w: {"x": torch.zeros(1)}))
    yield on_model(
        "generate", "tensors", "one more", READ_OR_NAMED, changing(lambda w: {**w, "model.layers.9.x": torch.zeros(1)})
    )
    yield on_model(
        "generate",
        "tensors",
        "a head of its own",
        either(done(), refused("model")),
        changing(lambda w: {**w, "lm_head.weight": torch.zeros(300, 32)}),
    )
    index = {"weight_map": {EMBED: "../../../etc/passwd"}, "metadata": {}}
    for what, content in {
        "an index out of the folder": index,
        "an index of nothing": {},
        "an index that is a list": [],
    }.items():
        yield on_model("generate", "tensors", what, refused("model"), lambda m, c=content: with_index(m, c))
    yield on_model("generate", "tensors", "a pickle that runs", refused("model"), lambda m: with_pickle(m))
    yield on_model(
        "generate",
        "tensors",
        "a peft adapter beside",
        READ_OR_NAMED,
        lambda m: (m / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/x", "peft_type": "LORA"}'),
    )
    for number in range(10):
        seed = random.random()
        yield on_model(
            "generate",
            "tensors",
            f"header flipped {number}",
            READ_OR_NAMED,
            lambda m, s=seed: flip(m / "model.safetensors", s, header=True),
        )


PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm", "post_attention_layernorm")
EMBED = "model.embed_tokens.weight"


def without(weights: dict, *names: str) -> dict:
    return {name: part for name, part in weights.items() if name not in names}


def with_index(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


class Runs:
    """An object whose pickle runs `touch MARK` when it is loaded."""

    def __reduce__(self):
        return __import__("os").system, ("touch MARK",)


def with_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({EMBED: Runs()}, folder / "pytorch_model.bin")


# Checkpoints of runs.


def checkpoints(random: Random) -> Iterator[Case]:
    for _ in range(10):
        share = random.random()
        right = either(refused("model"), done(says_as_the_run))
        yield on_model(
            "generate", "checkpoint", f"flipped at {share:.4f}", right, lambda m, s=share: flip(m / LAST, s), "run"
        )
    for _ in range(6):
        share = random.random()
        yield on_model(
            "generate",
            "checkpoint",
            f"cut at {share:.4f}",
            refused("model"),
            lambda m, s=share: cut(m / LAST, s),
            "run",
        )
    for what, change in CHANGES.items():
        right = either(refused("model"), done(says_as_the_run)) if what in EITHER else refused("model")
        command = random.choice(["generate", "generate", "export", "inspect"])
        yield on_model(
            command if what not in EITHER else "generate",
            "checkpoint",
            what,
            right,
            lambda m, c=change: rewrite(m / LAST, c),
            "run",
        )
    for what, make in {
        "a folder": lambda path: path.mkdir(),
        "empty": lambda path: path.touch(),
        "a link to nothing": lambda path: path.symlink_to("x"),
    }.items():
        yield on_model(
            "generate",
            "checkpoint",
            what,
            refused("model"),
            lambda m, make=make: ((m / LAST).unlink(), make(m / LAST)),
            "run",
        )


def says_as_the_run(seen) -> str | None:
    return prints_the_answer("trained")(seen)


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    checkpoint = torch.load(path, weights_only=True)
    changed = change(checkpoint)
    torch.save(checkpoint if changed is None else changed, path)


NORM = "model.model.norm.weight"
CHANGES: dict[str, Callable[[dict], object]] = {
    "a list": lambda c: [1],
    "no lskip": lambda c: c.pop("lskip") and None,
    "no weights": lambda c: c.pop("state_dict") and None,
    "lskip is a text": lambda c: c.update(lskip="x"),
    "no config": lambda c: c["lskip"].pop("config") and None,
    "a config of 10**9 layers": lambda c: c["lskip"]["config"].update(num_hidden_layers=BIG),
    "a config of 6 layers": lambda c: c["lskip"]["config"].update(num_hidden_layers=6),
    "hidden_size 10**7": lambda c: c["lskip"]["config"].update(hidden_size=10**7),
    "no attention heads": lambda c: c["lskip"]["config"].update(num_attention_heads=0),
    "a config of another kind": lambda c: c["lskip"]["config"].update(model_type="clip"),
    "weights without one": lambda c: c["state_dict"].pop(NORM) is None,
    "weights with a text": lambda c: c["state_dict"].update({NORM: "x"}),
    "weights of another shape": lambda c: c["state_dict"].update({NORM: torch.ones(31)}),
    "NaN in the weights": lambda c: c["state_dict"].update({NORM: torch.full((32,), float("nan"))}),
    "a tokenizer that is broken": lambda c: c["lskip"]["tokenizer"].update({"tokenizer.json": "{"}),
    "a tokenizer of numbers": lambda c: c["lskip"].update(tokenizer=5),
    "a tokenizer out of its folder": lambda c: c["lskip"]["tokenizer"].update({"../../../MARK": "x"}),
    "a tokenizer with code": lambda c: c["lskip"]["tokenizer"].update({"evil.py": "open('MARK','w')"}),
    "a generation_config of a text": lambda c: c["lskip"].update(generation_config="x"),
    "a generation_config that is hot": lambda c: c["lskip"]["generation_config"].update(
        temperature="hot", do_sample=True
    ),
    "one more weight": lambda c: c["state_dict"].update({"model.model.x": torch.ones(1)}),
    "a pickle that runs": lambda c: {"lskip": Runs(), "state_dict": {}},
}
EITHER = ("a tokenizer out of its folder", "a tokenizer with code", "one more weight")


# Exit adapters: whatever they hold, they draft, and the text stays.


def adapters(random: Random) -> Iterator[Case]:
    right = either(refused("exit_adapter"), SAME)
    for what, change in SHAPES.items():
        yield on_adapter(
            what, refused("exit_adapter") if what in REFUSED else right, lambda a, c=change: edit(a / "adapter.json", c)
        )
    for what, change in WORDS.items():
        yield on_adapter(what, right, lambda a, c=change: reweigh(a / "adapter.safetensors", c))
    for file in ("adapter.json", "adapter.safetensors"):
        for _ in range(5):
            share = random.random()
            yield on_adapter(f"{file} flipped at {share:.4f}", right, lambda a, f=file, s=share: flip(a / f, s))
            yield on_adapter(
                f"{file} cut at {share:.4f}", refused("exit_adapter"), lambda a, f=file, s=share: cut(a / f, s)
            )
        yield on_adapter(f"{file} gone", refused("exit_adapter"), lambda a, f=file: (a / f).unlink())
        yield on_adapter(
            f"{file} a folder", refused("exit_adapter"), lambda a, f=file: ((a / f).unlink(), (a / f).mkdir())
        )
        yield on_adapter(f"{file} empty", refused("exit_adapter"), lambda a, f=file: (a / f).write_bytes(b""))


def on_adapter(what: str, right: Right, change: Make) -> Case:
    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / "adapter", here / "a")
        change(here / "a")

    arguments = ("--model={place}/llama", "--exit_adapter={here}/a", "--num_speculations=2")
    more = (f"--prompt={PROMPTS[0]}", f"--max_new_tokens={NEW_TOKENS}", "--device=cpu")
    return Case("generate", "adapter", what, (*arguments, *more), right, prepare)


def reweigh(path: Path, change: Callable[[dict], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


REFUSED = (
    "exit_layer 99",
    "exit_layer 0",
    "num_blocks 10**9",
    "another model",
    "one key more",
    "no key",
    "joins a text",
    "exit_layer 4",
    "exit_layer a text",
)
SHAPES: dict[str, Callable[[dict], dict]] = {
    "exit_layer 99": lambda s: {**s, "exit_layer": 99},
    "exit_layer 4": lambda s: {**s, "exit_layer": 4},
    "exit_layer 0": lambda s: {**s, "exit_layer": 0},
    "exit_layer a text": lambda s: {**s, "exit_layer": "2"},
    "exit_layer 3": lambda s: {**s, "exit_layer": 3},
    "num_blocks 10**9": lambda s: {**s, "num_blocks": BIG},
    "joins a text": lambda s: {**s, "joins_last_state": "no"},
    "joins nothing": lambda s: {**s, "joins_last_state": False},
    "another model": lambda s: {**s, "model": {**s["model"], "head": "0" * 16}},
    "one key more": lambda s: {**s, "x": 1},
    "no key": lambda s: {},
}
WORDS: dict[str, Callable[[dict], object]] = {
    "a word beyond the vocabulary": lambda w: w["token_ids"][-1].fill_(10**6),
    "a word below 0": lambda w: w["token_ids"][0].fill_(-1),
    "words twice": lambda w: w["token_ids"].fill_(5),
    "words in another order": lambda w: w.update(token_ids=w["token_ids"].flip(0).contiguous()),
    "no words": lambda w: w.update(token_ids=w["token_ids"][:0].clone()),
    "words in two dimensions": lambda w: w.update(token_ids=w["token_ids"][None].contiguous()),
    "NaN": lambda w: w["join.weight"].fill_(float("nan")),
    "infinite": lambda w: w["join.bias"].fill_(float("inf")),
    "a weight missing": lambda w: w.pop("join.bias"),
    "a weight more": lambda w: w.update(x=torch.zeros(1)),
    "a weight of another shape": lambda w: w.update({"join.bias": torch.zeros(3)}),
}
