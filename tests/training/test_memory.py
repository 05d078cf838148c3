"""Options that save memory do not change the equations; the benchmark of their savings, at tiny size."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lskip.cli import main
from lskip.module import LayerSkipModule
from tests.trainers import quiet_trainer

ROOT = Path(__file__).parents[2] / "configs"
SGD = partial(torch.optim.SGD, lr=1.0)


def random_ids(rows=4, length=12, seed=1):
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(module):
    parts = module.model.named_parameters()  # a block without rows has no gradient
    return {name: torch.zeros_like(part) if part.grad is None else part.grad.clone() for name, part in parts}


# Gradient checkpointing


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpointed_gradients_are_the_plain_ones(tiny_model, family):
    """With layer dropout's removed rows, and dropout inside attention: backward replays the same draws."""

    def run(checkpointing):
        model = tiny_model(family, attention_dropout=0.5)
        module = LayerSkipModule(model, gradient_checkpointing=checkpointing)
        module.drop_rates.write("test", [0, 0.4, 0.4, 1.0])
        module.exit_weights.write("test", [0, 0.2, 0.3, 0.5])
        rows = []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda _, states: rows.append(len(states[0])))
        torch.manual_seed(5)
        loss, _ = module.early_exit_loss({"input_ids": random_ids(6)}, 3)
        random_after = torch.rand(())
        loss.backward()
        return loss, gradients(module), rows, random_after

    plain, grads, (kept,), after = run(False)
    checkpointed, same_grads, again, same_after = run(True)
    assert 0 < kept < 6 and again == [kept, kept]  # rows were dropped; the same were left when it ran again
    assert torch.equal(plain, checkpointed) and torch.equal(after, same_after)
    for name in grads:
        torch.testing.assert_close(same_grads[name], grads[name], rtol=1e-5, atol=1e-7, msg=name)


def test_without_gradients_nothing_is_run_twice(tiny_model):
    model = tiny_model()
    module, calls = LayerSkipModule(model, gradient_checkpointing=True), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        module.early_exit_loss({"input_ids": random_ids()}, 0)
    assert calls == [1]


# Accumulation


def one_step(model, batches, folder, **settings):
    """Return the change of each weight by one step of gradient descent with rate 1: the gradients."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = quiet_trainer(folder, max_steps=1, **settings)
    module = LayerSkipModule(model, optimizer=SGD, lr_scheduler=None)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert trainer.global_step == 1
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def masked_batch(not_scored: list[int]):
    """Return a batch with a row for each number of tokens that are not scored at its start."""
    ids = random_ids(len(not_scored), seed=3)
    labels = ids.clone()
    for row, count in enumerate(not_scored):
        labels[row, :count] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    ("not_scored", "accumulate"),
    [
        ([0, 0, 0, 0], 4),
        ([0, 10, 4, 7], 4),  # 11, 2, 8 and 5 scored tokens
        ([12, 3, 12, 9], 4),  # the first micro-batch scores nothing
        ([0, 10, 4, 7], 6),  # an epoch's last step has fewer micro-batches than the others
    ],
)
def test_an_accumulated_step_is_the_big_batchs(tiny_model, tmp_path, not_scored, accumulate):
    big = masked_batch(not_scored)
    parts = [{name: rows[i : i + 1] for name, rows in big.items()} for i in range(len(not_scored))]
    taken = one_step(tiny_model().double(), parts, tmp_path, accumulate_grad_batches=accumulate, precision="64-true")
    model = tiny_model().double()
    logits, targets = model(big["input_ids"]).logits[:, :-1], big["labels"][:, 1:]
    cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()  # the mean over scored tokens
    for name, parameter in model.named_parameters():
        # transformers' norms round to float32; a mean of means would be wrong in the first digit.
        torch.testing.assert_close(taken[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_clipping_sees_the_gradients_of_the_whole_step(tiny_model, tmp_path):
    big = masked_batch([0, 10])
    parts = [{name: rows[i : i + 1] for name, rows in big.items()} for i in range(2)]
    taken = one_step(tiny_model(), parts, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.01)
    norm = torch.cat([change.flatten() for change in taken.values()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)


# bfloat16


def test_bf16_mixed_rounds_products_and_keeps_weights(tiny_model, tmp_path):
    batch = [{"input_ids": random_ids()}]
    exact = one_step(tiny_model(), batch, tmp_path)
    model = tiny_model()
    rounded = one_step(model, batch, tmp_path, precision="bf16-mixed")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for name in exact:
        error = (rounded[name] - exact[name]).norm() / exact[name].norm()
        assert 0 < error < 0.05, name  # bfloat16 keeps 8 bits; a wrong scale or a lost term would be far off


# 8 bits


@pytest.fixture
def fit(tmp_path, tiny_config):
    """Return a function (folder, *flags) that runs quickstart on a tiny model, with overlays."""
    corpus = tmp_path / "documents.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60)))
    # 8-bit states begin at 4096 weights; below that bitsandbytes keeps 32 bits.
    config = tiny_config(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    flags = [
        *("--config", str(ROOT / "quickstart.yaml")),
        f"--model={json.dumps(config)}",
        f"--data.source={corpus}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.block_size=16",
        "--data.batch_size=2",
        "--data.max_val_blocks=4",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=2",
        "--trainer.val_check_interval=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    return lambda folder, *more: main(["fit", *flags, f"--run_folder={folder}", *more])


def last_checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_an_8_bit_optimizer_by_its_overlay_trains_and_resumes(fit, tmp_path):
    pytest.importorskip("bitsandbytes")
    # The schedule spans 2 steps in both: the second run stops after one and goes on. Dropout's would span what runs.
    overlay = ("--config", str(ROOT / "memory" / "adamw_8bit.yaml"), "--layer_dropout=null")
    assert fit(tmp_path / "whole", *overlay) == 0
    assert fit(tmp_path / "cut", *overlay, "--trainer.max_steps=1", "--lr_scheduler.init_args.total_steps=2") == 0
    assert fit(tmp_path / "cut", *overlay, "--ckpt_path=last", "--lr_scheduler.init_args.total_steps=2") == 0
    whole, cut = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "cut")
    states = [state["__bnb_optimizer_quant_state__"] for state in whole["optimizer_states"][0]["state"].values()]
    assert {state["state1"].dtype for state in states} == {torch.uint8, torch.float32}
    groups = whole["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and groups[0]["betas"] == (0.9, 0.95)
    assert all(torch.equal(cut["state_dict"][name], weight) for name, weight in whole["state_dict"].items())


def test_the_other_overlays_are_one_setting_each(fit, tmp_path):
    overlays = [("--config", str(ROOT / "memory" / name)) for name in ("checkpointing.yaml", "bf16.yaml")]
    assert fit(tmp_path / "run", *overlays[0], *overlays[1]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["gradient_checkpointing"] is True and config["trainer"]["precision"] == "bf16-mixed"


# The benchmark


@pytest.fixture(scope="module")
def benchmark(process_settings, tmp_path_factory):
    """Return the folder of a quick run of the benchmark, its options one after another in this process."""
    from benchmarks.memory import training as training_memory
    from benchmarks.memory import training_options as memory_options

    out = tmp_path_factory.mktemp("memory") / "result"
    with pytest.MonkeyPatch.context() as patch:
        here = partial(memory_options.measure, sizes=memory_options.SIZES[True], device=torch.device("cpu"), folder=out)
        patch.setattr(training_memory, "measure", lambda name, options: here(name))
        training_memory.main(["--out", str(out), "--quick", "--threads", "1"])
    return out


@pytest.mark.usefixtures("process_settings")
def test_each_option_says_what_it_saves_and_changes(benchmark):
    result = json.loads((benchmark / "training_memory.json").read_text())
    rows = {row["option"]: row for row in result["options"]}
    plain = rows["plain"]
    assert (plain["memory_ratio"], plain["gradient_error"]) == (1, 0)
    for name, row in rows.items():
        exact = name in ("gradient checkpointing", "accumulation of 4", "8-bit AdamW")
        assert row["gradient_error"] < (1e-5 if exact else 0.03), name
        assert row["seconds"] > 0 and row["process_bytes"] > row["peak_bytes"] > 0
    for name in rows.keys() - {"plain", "bf16-mixed"}:
        assert rows[name]["memory_ratio"] < 0.9, name
    if "all of them" in rows:  # without bitsandbytes it is left out
        assert rows["all of them"]["memory_ratio"] == min(row["memory_ratio"] for row in rows.values())
    # Less than the plain model's weights, gradients and two states of AdamW is the record of none.
    weights = 512 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert plain["peak_bytes"] > 4 * 4 * weights
    assert {"date", "hardware", "threads", "torch"} <= set(result["environment"])


@pytest.mark.usefixtures("process_settings")
def test_the_table_has_a_line_for_each_option(benchmark):
    result = json.loads((benchmark / "training_memory.json").read_text())
    lines = (benchmark / "training_memory.md").read_text().splitlines()
    assert len(lines) == 2 + len(result["options"]) and len({line.count("|") for line in lines}) == 1
    assert not list(benchmark.glob("*.safetensors"))
