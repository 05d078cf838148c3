"""Bad input: one clear sentence that names the field and the value, an exit code that is not 0, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lskip.cli import main
from tests.conftest import make_config, make_model

MODEL = json.dumps(make_config())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with everything bad in it, and enough good to get as far as the bad."""
    folder = tmp_path_factory.mktemp("bad")
    texts = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60)]
    (folder / "good.jsonl").write_text("\n".join(texts))
    (folder / "empty.txt").write_text("")
    (folder / "prompts.txt").write_text("def f\n")
    (folder / "long.txt").write_text("def f\n" + "x = 1 + y " * 60 + "\n")
    (folder / "not_json.jsonl").write_text('{"prompt": "a"}\n{prompt: b}\n')
    (folder / "no_prompt.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    (folder / "number.jsonl").write_text('{"prompt": 5}\n')
    (folder / "messages.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    (folder / "taken.jsonl").write_text('{"prompt": "a", "text": "b"}\n')
    (folder / "line.jsonl").write_text('{"prompt": "a", "line": 4}\n')
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "answers.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "broken.ckpt").write_bytes(b"PK\x03\x04 not really")
    (folder / "broken.yaml").write_text("model: [llama\n")
    (folder / "typo.yaml").write_text("model: smollm2\ntrainer: {max_stps: 3}\n")
    make_model().save_pretrained(folder / "model")
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "checkpoints" / "last.ckpt").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def tokenizer(place, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(place / "model")


FIT = "fit --model={model} --data.source={place}/good.jsonl --data.cache_dir={place}/cache --run_folder={place}/new"
SMALL = "--data.block_size=16 --trainer.accelerator=cpu --trainer.max_steps=2 --trainer.enable_progress_bar=false"
CHOSEN = "--early_exit_loss.curriculum=ChosenExits"
ASK = "--model={place}/model --max_new_tokens=2"
POLICY = f"generate --prompt=x {ASK} --exit_layer=2 --num_speculations=2 --draft_policy"
PREDICT = f"predict --output={{place}}/out.jsonl {ASK} --prompts={{place}}"

# command -> words that the sentence must hold: the field and the value, or what is allowed
BAD = [
    ("fitt", "'fitt' fit validate test predict generate export"),
    ("fit", "model must be given"),
    ("fit --modle=x", "modle did you mean model"),
    ("fit stray", "'stray'"),
    ("fit --config={place}/missing.yaml", "config missing.yaml"),
    ("fit --config={place}/broken.yaml", "config line 2"),
    ("fit --config={place}/typo.yaml", "trainer.max_stps did you mean trainer.max_steps"),
    ("fit --model={place}/missing.gguf", "model: missing.gguf"),
    ("fit --model={place}/nothing", "model: nothing"),
    ("fit --model={place}/empty.txt", "model: empty.txt smollm2"),
    ("fit --model=no_owner/no_such", "model: no_owner/no_such smollm2"),
    ('fit --model={{"model_type":"lama"}}', "model.model_type 'lama' llama"),
    ('fit --model={{"model_type":"gptj"}} --data.vocab_size=300', "model: 'gptj' llama"),
    ('fit --model={{"model_type":"llama","hidden_sise":8}}', "model.hidden_sise did you mean 'hidden_size'"),
    (f"{FIT} --early_exit_loss.curriculum=Rotatonal", "early_exit_loss.curriculum 'Rotatonal' AllExits, Gradual"),
    (f"{FIT} --early_exit_loss.curriculum=Rotational --early_exit_loss.curriculum.period=0", "error: period: 0"),
    (f"{FIT} --early_exit_loss.curriculum=Rotational --early_exit_loss.curriculum.period=x", "period 'x' whole number"),
    (f"{FIT} --early_exit_loss.e_scale=-1", "error: e_scale: -1"),
    (f"{FIT} --early_exit_loss.e_scale=1 --early_exit_loss.shares.2=0.3", "shares: 0.3 e_scale: 1.0 null"),
    (f"{FIT} --early_exit_loss.shares.2=1.5", "shares: exit layer 2: 1.5 below 1"),
    (f"{FIT} {SMALL} --early_exit_loss.shares.9=0.5", "shares: exit layer 9 below the last layer, 4"),
    (f"{FIT} --early_exit_loss.shares={{{{2:0.3}}}}", "early_exit_loss a space follows each colon"),
    (f"{FIT} --early_exit_loss.shares.a=0.3", "early_exit_loss.shares: the key 'a' is not a whole number"),
    (
        f"{FIT} {SMALL} --early_exit_loss.shares.2=0.5 --early_exit_loss.curriculum=LastExit",
        "shares: exit layer 2 is on at no step LastExit",
    ),
    (f"{FIT} --early_exit_loss=Nothing", "early_exit_loss: 'Nothing' EarlyExitLoss"),
    (f"{FIT} --layer_dropout.p_max=1.5", "error: p_max: 1.5"),
    (f"{FIT} --layer_dropout.p_mx=1", "layer_dropout.p_mx p_max, depth, time"),
    (f"{FIT} --layer_dropout.depth=Square", "layer_dropout.depth 'Square' Alternating, Constant"),
    (f"{FIT} --layer_dropout.time=Falling --layer_dropout.time.plateau=2", "plateau: 2 from 0 to 1"),
    (f"{FIT} --layer_dropout.time=Alternating", "time: Alternating is a schedule for depth, not for time"),
    (f"{FIT} --layer_dropout.depth=Falling", "depth: Falling is a schedule for time, not for depth"),
    (f"{FIT} --optimizer=AdamX", "optimizer: 'AdamX' Adam"),
    (f"{FIT} --optimizer.lr=fast", "optimizer.lr: 'fast' number"),
    (f"{FIT} --position_share=0", "position_share: 0"),
    (f"{FIT} --position_share=half", "position_share: 'half' number"),
    (f"{FIT} {SMALL} --checkpoint.every_n_train_steps=0", "every_n_train_steps: 0"),
    (f"{FIT} {SMALL} --checkpoint.sharded=true", "checkpoint.sharded: true trainer.strategy fsdp2"),
    (f"{FIT} {SMALL} --checkpoint.sharded=true --trainer.strategy=ddp", "checkpoint.sharded: true fsdp2"),
    (f"{FIT} --trainer.max_steps=many", "trainer.max_steps: 'many' whole number"),
    (f"{FIT} --trainer.max_steps=0", "trainer.max_steps: 0 from 1 up"),
    (f"{FIT} --trainer.limit_train_batches=0", "trainer.limit_train_batches: 0 from 1 up"),
    (f"{FIT} --not_finite=maybe", "not_finite: 'maybe' stop, skip"),
    (f"{FIT} {SMALL} --optimizer.lr=-1", "optimizer.lr: -1.0 from 0 up"),
    (f"{FIT} {SMALL} --lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "lr_scheduler: ReduceLROnPlateau"),
    (f"{FIT} {SMALL} {CHOSEN} --early_exit_loss.curriculum.exit_layers=[99]", "exit_layers: 99 from 2 to 3"),
    (f"{FIT} {SMALL} --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val_loss", "'val_loss' val/loss"),
    (f"{FIT} {SMALL} --trainer.accelerator=abacus", "abacus"),
    (f"{FIT} --data.block_size=1", "error: block_size: 1"),
    (f"{FIT} --data.block_sise=16", "data.block_sise there is no such option"),
    (f"{FIT} --data=Texts", "data: 'Texts' TextData"),
    (f"{FIT} {SMALL} --data.source={{place}}/missing.txt", "source missing.txt"),
    (f"{FIT} {SMALL} --data.source={{place}}/empty.txt", "source empty.txt"),
    (f"{FIT} {SMALL} --data.block_size=256 --data.val_fraction=0.5", "block_size: 256 128"),
    (f"{FIT} --run_folder={{place}}/run", "run_folder /run --ckpt_path last"),
    (f"{FIT} --run_folder={{place}}/run --ckpt_path=last", "ckpt_path last.ckpt not a readable checkpoint"),
    (f"{FIT} --ckpt_path=last", "ckpt_path 'last' /new/checkpoints/last.ckpt"),
    (f"{FIT} --ckpt_path={{place}}/foreign.ckpt", "ckpt_path foreign.ckpt lskip"),
    (f"{FIT} --run_folder={{place}}/good.jsonl/run", "run_folder good.jsonl/run"),
    (f"{FIT} --run_folder=/proc/lskip", "run_folder /proc/lskip"),
    ("generate", "prompt must be given"),
    (f"generate --promt=x {ASK}", "promt did you mean prompt"),
    ("generate --prompt=x --model={place}/broken.ckpt", "model: broken.ckpt not a readable checkpoint"),
    ("generate --prompt= --model=smollm2", "prompt: empty"),
    (f"generate --prompt=x {ASK} --exit_layer=0", "exit_layer: 0"),
    (f"generate --prompt=x {ASK} --exit_layer=5", "exit_layer: 5 4"),
    (f"generate --prompt=x {ASK} --exit_layer=two", "exit_layer: 'two' whole number"),
    (f"generate --prompt=x {ASK} --num_speculations=3", "num_speculations: 3 exit_layer"),
    (f"generate --prompt=x {ASK} --max_new_tokens=0", "max_new_tokens: 0"),
    (f"generate --prompt=x {ASK} --temperature=-1", "temperature: -1"),
    (f"generate --prompt=x {ASK} --top_p=1.5", "top_p: 1.5"),
    (f"generate --prompt=x {ASK} --min_p=2", "min_p: 2.0"),
    (f"generate --prompt=x {ASK} --min_p=few", "min_p: 'few' number"),
    (f"generate --prompt=x {ASK} --repetition_penalty=0", "repetition_penalty: 0.0 above 0"),
    (f"generate --prompt=x {ASK} --stop_strings={{{{a:1}}}}", "stop_strings: list"),
    (f'generate --prompt=x {ASK} --stop_strings=["a",5]', "stop_strings: ['a', 5] texts"),
    (f'generate --prompt=x {ASK} --stop_strings=["a",""]', "stop_strings: ['a', ''] texts none empty"),
    (f"generate --prompt=x {ASK} --acceptance=all", "acceptance: 'all' shared_noise, rejection"),
    (f"generate --prompt=x {ASK} --draft=words", "draft: 'words' layers, weights, ngram"),
    (f"generate --prompt=x {ASK} --draft=ngram", "num_speculations: 0 draft"),
    (f"generate --prompt=x {ASK} --draft=weights --num_speculations=2", "draft: 'weights' draft_weights"),
    (f"generate --prompt=x {ASK} --draft_policy=FixedDraft", "num_speculations: 0 draft_policy"),
    (f"{POLICY}=Fixed", "draft_policy: 'Fixed' ConfidenceDraft, CostAwareDraft, FixedDraft"),
    (f"{POLICY}=CostAwareDraft --draft_policy.budget=2", "error: budget: 2.0 from 0 to 1"),
    (f"{POLICY}=CostAwareDraft --draft_policy.budget=some", "draft_policy.budget: 'some' number"),
    (f"{POLICY}=CostAwareDraft --draft_policy.bugdet=0", "draft_policy.bugdet CostAwareDraft budget"),
    (f"generate --prompt=x {ASK} --seed=-1", "seed: -1"),
    (f"generate --prompt=x {ASK} --num_speculations=-1", "num_speculations: -1"),
    (f"generate --prompt=x {ASK} --bit_exact=mostly", "bit_exact: 'mostly' true or false"),
    (f"generate --prompt=x {ASK} --draft_weights=int2", "draft_weights: 'int2' int8, int4"),
    (f"generate --prompt=x {ASK} --draft_weights=int8_dynamic", "draft_weights: 'int8_dynamic' int8, int4"),
    (f"generate --prompt=x {ASK} --dtype=int3", "dtype: 'int3' float32, bfloat16"),
    (f"generate --prompt=x {ASK} --weights=heavy", "weights: 'heavy' packed"),
    (f"generate --prompt=x {ASK} --weights=transposed", "weights: 'transposed' auto, plain, packed, halved, int8"),
    (f"generate --prompt=x {ASK} --compiled=true", "compiled"),
    (f"generate --prompt=x {ASK} --device=abacus", "device: 'abacus'"),
    (f"{PREDICT}/missing.txt", "prompts missing.txt"),
    (f"{PREDICT}/run", "prompts .txt .jsonl"),
    (f"{PREDICT}/empty.txt", "prompts empty.txt no prompt"),
    (f"{PREDICT}/latin.txt", "prompts latin.txt UTF-8"),
    (f"{PREDICT}/not_json.jsonl", "prompts line 2 JSON"),
    (f"{PREDICT}/no_prompt.jsonl", "prompts line 2 'prompt'"),
    (f"{PREDICT}/number.jsonl", "prompts line 1 5"),
    (f"{PREDICT}/messages.jsonl", "prompts line 1 messages role content"),
    (f"{PREDICT}/taken.jsonl", "prompts line 1 'text'"),
    (f"{PREDICT}/long.txt", "prompts line 2 128"),
    (f"{PREDICT}/prompts.txt --output={{place}}/answers.jsonl", "output answers.jsonl --resume --overwrite"),
    (f"{PREDICT}/prompts.txt --output={{place}}/answers.jsonl --resume=true", "output line 1 answers.jsonl"),
    (f"{PREDICT}/prompts.txt --output={{place}}/run", "output /run"),
    (f"{PREDICT}/prompts.txt --output=/proc/lskip/out.jsonl", "output /proc/lskip"),
    (f"{PREDICT}/prompts.txt --batch_size=0", "batch_size: 0 from 1 up"),
    (f"{PREDICT}/prompts.txt --batch_size=all", "batch_size: 'all' whole number"),
    (f"{PREDICT}/prompts.txt --overwrite=true --resume=true", "overwrite: resume: exclude"),
    (f"{PREDICT}/line.jsonl", "prompts line 1 'line'"),
    (f"{PREDICT}/prompts.txt --overwrite=maybe", "overwrite: 'maybe' true or false"),
    ("export --model={place}/model --output={place}/run", "output /run"),
    ("export --model={place}/model --output={place}/good.jsonl/x", "output good.jsonl/x"),
    ("export --model={place}/run --output={place}/exported", "model: last.ckpt"),
]


@pytest.mark.usefixtures("tokenizer")
@pytest.mark.parametrize(("command", "words"), BAD, ids=[command for command, _ in BAD])
def test_one_sentence(place, capsys, command, words):
    arguments = [argument.format(place=place, model=MODEL) for argument in command.split()]
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    # progress bars and Lightning's "Seed set" may stand above it; the sentence is the last line and one line
    sentence = errors.rstrip("\n").rpartition("\n")[2]
    assert sentence.startswith("lskip") and ": error: " in sentence
    assert len(sentence.replace(str(place), "")) < 300
    for word in words.split():
        assert word in sentence, sentence
    assert "Traceback" not in output + errors and "usage:" not in output + errors
    assert errors.count(": error: ") == 1


def test_nothing_was_left_behind(place, capsys):
    """A refused predict, export or fit leaves no output for the next one to stumble over."""
    test_one_sentence(place, capsys, f"{PREDICT}/not_json.jsonl", "line 2")
    assert not (place / "out.jsonl").exists()
    assert not (place / "exported").exists() and not list(place.glob(".*partial"))
    assert not (place / "new" / "checkpoints").exists()


def test_the_real_process_and_the_way_to_a_traceback(place):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "lskip", "fit", "--model=smollm2", "--layer_dropout.p_max=much"]

    def run(**more: str):
        everything = {**environment, **more}
        return subprocess.run(command, cwd=place, env=everything, capture_output=True, text=True, timeout=120)

    plain = run()
    assert plain.returncode == 2 and plain.stdout == ""
    assert plain.stderr == "lskip fit: error: layer_dropout.p_max: 'much' is not a number\n"
    full = run(LSKIP_TRACEBACK="1")
    assert full.returncode != 0 and "Traceback" in full.stderr
