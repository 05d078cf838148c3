"""Bad GGUF files: cut, corrupted, with renamed fields and tensors, with impossible numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from benchmarks.bad_input.fixtures import NEW_TOKENS, PROMPTS
from benchmarks.bad_input.models import SAME, cut, flip
from benchmarks.bad_input.verdict import Case, Right, done, either, refused


def cases(random: Random) -> Iterator[Case]:
    def of(what: str, right: Right, change: Callable[[Path], object]) -> Case:
        def prepare(here: Path) -> None:
            shutil.copy(here.parent / "model.gguf", here / "m.gguf")
            change(here / "m.gguf")

        arguments = (
            "--model={here}/m.gguf",
            f"--prompt={PROMPTS[0]}",
            f"--max_new_tokens={NEW_TOKENS}",
            "--device=cpu",
        )
        return Case("generate", "GGUF", what, arguments, right, prepare)

    yield of("good", SAME, lambda path: None)
    for _ in range(8):
        share = random.random() ** 2
        yield of(f"cut at {share:.4f}", refused("model"), lambda path, s=share: cut(path, s))
    for _ in range(10):
        share = random.random() * 0.25  # of the file: what describes it
        yield of(f"flipped at {share:.5f}", either(done(), refused("model")), lambda path, s=share: flip(path, s))
    for old, new in RENAMED.items():
        yield of(
            f"{old} named {new}",
            refused("model"),
            lambda path, o=old, n=new: path.write_bytes(path.read_bytes().replace(o.encode(), n.encode())),
        )
    yield of("empty", refused("model"), lambda path: path.write_bytes(b""))
    yield of("a text", refused("model"), lambda path: path.write_bytes(b"GGUF but not really"))
    yield of(
        "10**18 tensors",
        refused("model"),
        lambda path: path.write_bytes(path.read_bytes()[:8] + (10**18).to_bytes(8, "little") + path.read_bytes()[16:]),
    )
    yield of(
        "10**18 fields",
        refused("model"),
        lambda path: path.write_bytes(path.read_bytes()[:16] + (10**18).to_bytes(8, "little") + path.read_bytes()[24:]),
    )
    yield of(
        "version 99",
        refused("model"),
        lambda path: path.write_bytes(path.read_bytes()[:4] + (99).to_bytes(4, "little") + path.read_bytes()[8:]),
    )
    yield of("a folder", refused("model"), lambda path: (path.unlink(), path.mkdir()))


RENAMED = {
    "blk.2.ffn_up.weight": "blk.2.ffn_xx.weight",
    "blk.1.attn_q.weight": "blk.1.attn_q.biased",
    "output_norm.weight": "rope_freqs.weighty",
    "token_embd.weight": "token_embx.weight",
    "general.architecture": "general.architectura",
    "llama.block_count": "llama.block_coumt",
    "llama.embedding_length": "llama.embedding_lengtj",
    "tokenizer.ggml.tokens": "tokenizer.ggml.tokenz",
    "tokenizer.ggml.model": "tokenizer.ggml.modem",
}
