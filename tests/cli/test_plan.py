"""`lskip plan`: the table, the JSON, and what it refuses; it reads neither weights nor data."""

import json
from pathlib import Path

import pytest

from lskip.cli import main
from lskip.cli.plan import number_of_devices, strategy_of
from tests.conftest import make_config

MODEL = f"--model={json.dumps(make_config())}"
ROOT = Path(__file__).parents[2] / "configs"
SMALL = (MODEL, "--data.source=no/such/place.jsonl", "--data.block_size=16", "--data.batch_size=2")
EXITS = ("--early_exit_loss=EarlyExitLoss", "--early_exit_loss.curriculum=Gradual")


def planned(tmp_path: Path, *options: str) -> dict:
    path = tmp_path / "plan.json"
    assert main(["plan", *SMALL, f"--output={path}", *options]) == 0
    return json.loads(path.read_text())


def test_a_run_is_planned_without_its_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = planned(
        tmp_path,
        *("--trainer.max_steps=10", "--trainer.devices=4", "--trainer.accumulate_grad_batches=3"),
        *("--layer_dropout=LayerDropout", "--layer_dropout.p_max=0.5", *EXITS, "--peak_flops=2", "--mfu=0.5"),
    )
    assert found["shape"]["tokens_per_step"] == 16 * 2 * 4 * 3 and found["tokens"] == 10 * 384
    assert found["shape"]["strategy"] == "ddp" and found["memory_bytes"]["buckets"] == 4 * found["trained_parameters"]
    flops = found["flops_per_token"]
    assert flops["total"] == pytest.approx(sum(count for part, count in flops.items() if part != "total"))
    assert found["hours"] == pytest.approx(3840 * flops["total"] / (0.5 * 2e12 * 4) / 3600)
    # Exit 1 never; of steps 0 to 9 exit 2 from 3 on, exit 3 from 2 on.
    assert found["share_of_steps_with_exit"] == pytest.approx([0.0, 0.7, 0.8, 1.0])
    said = capsys.readouterr().out
    for words in ("GB on each device", "optimizer states", "on 4 GPUs, DDP", "GFLOPs a token", "3,840 tokens", "hours"):
        assert words in said
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_without_a_number_of_steps_it_says_what_one_takes(tmp_path, capsys):
    found = planned(tmp_path, "--peak_flops=1")
    assert found["tokens"] is None and found["hours"] is None and found["seconds_a_step"] > 0
    said = capsys.readouterr().out
    assert "set trainer.max_steps" in said and "s a step" in said


def test_a_model_on_this_disk_by_its_config_alone(tmp_path, tiny_model, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    found = planned(tmp_path, f"--model={tmp_path / 'model'}")
    assert found["parameters"] == sum(part.numel() for part in tiny_model().parameters())


def test_on_a_cpu_the_gaps_of_its_malloc_are_named(tmp_path, capsys):
    """A fifth more: four trainings took 1.15 to 1.32 times what their tensors do."""
    large = f"--model={json.dumps(make_config(hidden_size=1024, intermediate_size=4096, num_attention_heads=16))}"
    memory = planned(tmp_path, large, "--trainer.accelerator=cpu")["memory_bytes"]["total"] / 1e9
    assert f"{memory:.1f} GB on each, some {1.2 * memory:.1f} with the gaps" in capsys.readouterr().out and memory > 0.3


def test_checkpointing_is_the_other_column(tmp_path):
    plain, again = (planned(tmp_path, f"--gradient_checkpointing={choice}") for choice in ("false", "true"))
    other = "memory_bytes_with_the_other_checkpointing"
    assert plain["memory_bytes"] == again[other] and again["memory_bytes"] == plain[other]
    assert plain["memory_bytes"]["total"] > again["memory_bytes"]["total"]


def test_flex_attention_needs_no_mask_of_all_pairs(tmp_path):
    """A mask of one row of 512: 512 x 512 numbers of four bytes."""
    wide = f"--model={json.dumps(make_config(max_position_embeddings=512))}"
    sizes = ("--data.block_size=512", "--data.batch_size=1", "--trainer.accelerator=gpu", "--data.documents=separate")
    dense, flex = (planned(tmp_path, wide, *sizes, f"--flex_attention={on}") for on in ("false", "true"))
    assert dense["memory_bytes"]["total"] - flex["memory_bytes"]["total"] >= 512 * 512 * 4


@pytest.mark.parametrize("callback", ["AlternatingExits", "TwoStages"])
def test_the_predecessors_recipes_are_planned(tmp_path, callback):
    options = ("--exit_heads=true", f"--trainer.callbacks+={callback}", "--trainer.max_steps=10")
    found = planned(tmp_path, *options)
    assert found["share_of_steps_with_exit"] == pytest.approx([0.5, 0.5, 0.5, 1.0 if callback[0] == "A" else 0.5])


BAD = {
    "mfu": ("--mfu=0", "mfu: 0.0 above 0 and at most 1"),
    "an mfu that is none": ("--mfu=much", "mfu: 'much' number"),
    "peak": ("--peak_flops=-1", "peak_flops: -1.0 above 0"),
    "output": ("--output=no/such/plan.json", "output: no/such"),
    "precision": ("--trainer.precision=transformer-engine", "trainer.precision: 'transformer-engine' bf16-mixed"),
    "strategy": ("--trainer.strategy=deepspeed", "trainer.strategy: 'deepspeed' auto, ddp, fsdp2"),
    "a hub name": ("--model=no_owner/no_such", "model: 'no_owner/no_such' not here and not on the hub"),
    "rows": ("--data.block_size=4096", "block_size: 4096 128"),
    "steps": ("--early_exit_loss.curriculum=Gradual", "early_exit_loss.curriculum: Gradual trainer.max_steps"),
    "devices": ("--trainer.devices=99999999", "trainer.devices: 99999999"),
    "an option": ("--outptu=x", "outptu did you mean output"),
    "the Trainer's": ("--trainer.max_steps=0", "trainer.max_steps: 0"),
}


@pytest.mark.parametrize(("option", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_planned_is_one_sentence(option, words, capsys):
    assert main(["plan", *SMALL, "--early_exit_loss=EarlyExitLoss", option]) == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("lskip plan: error: ") and sentence.count("\n") == 1
    for word in words.split():
        assert word in sentence, sentence


@pytest.mark.parametrize(("devices", "expected"), [(3, 3), ("4", 4), ("0,1", 2), ("0,", 1), ([0, 2], 2), ("auto", 1)])
def test_how_many_devices(devices, expected):
    assert number_of_devices(devices, on_gpu=False) == expected


def test_strategies_by_name():
    named = {"auto": "one device", "ddp_spawn": "ddp", "fsdp2": "fsdp2"}
    assert {name: strategy_of(name, 1) for name in named} == named
    assert strategy_of("auto", 2) == "ddp"
