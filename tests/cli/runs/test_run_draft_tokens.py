"""A run keeps the tokens of its answers beside its checkpoint, and decoding takes them from there."""

import json
from collections import Counter

from lskip.cli import main
from lskip.inference import load_generator
from lskip.models.pretrained import load_tokenizer
from tests.conftest import make_config

COMPLETIONS = ["turn on the light", "turn off the light", "turn on the fan", "open the door", "turn it up"]


def test_fit_keeps_the_tokens_of_its_answers(tmp_path, capsys):
    rows = [{"prompt": f"Say this, number {n}: ", "completion": text} for n, text in enumerate(COMPLETIONS * 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer("smollm2")
    arguments = {
        "model": json.dumps(make_config(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2)),
        "run_folder": tmp_path / "run",
        "data.source": tmp_path / "rows.jsonl",
        "data.tokenizer": "smollm2",
        "data.cache_dir": tmp_path / "cache",
        "data.block_size": 32,
        "data.batch_size": 4,
        "data.val_fraction": 0,
        "data.test_fraction": 0,
        "trainer.max_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
    }
    assert main(["fit", *(f"--{key}={value}" for key, value in arguments.items())]) == 0, capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / "checkpoints" / "draft_tokens.json").read_text())
    answers = [[*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id] for row in rows]
    counts = Counter(token for answer in answers for token in answer)
    assert kept == sorted(counts, key=lambda token: (-counts[token], token))
    head = load_generator(str(tmp_path / "run")).draft_head
    assert head.token_ids.tolist() == sorted(kept) and tokenizer.eos_token_id in kept
