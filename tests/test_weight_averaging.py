"""Lightning's EMAWeightAveraging in a run of lskip: what is saved is the average, and a run goes on with it."""

import json
import os
import signal

import pytest
import torch

from lskip.callbacks.run_checkpoint import RunCheckpoint
from lskip.cli import main
from lskip.models.pretrained import load_model

DECAY, STEPS = 0.7, 5


@pytest.fixture
def fit(tmp_path, tiny_config):
    """Return a function (run folder's name, *flags) -> (exit status, checkpoint) of 5 steps with averaged weights."""
    corpus = tmp_path / "documents.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60)))

    def run(name, *flags):
        arguments = [
            *("fit", f"--model={json.dumps(tiny_config())}", f"--run_folder={tmp_path / name}"),
            *(f"--data.source={corpus}", f"--data.cache_dir={tmp_path / 'cache'}"),
            *("--data.block_size=16", "--data.batch_size=2", "--data.max_val_blocks=4"),
            *("--early_exit_loss=EarlyExitLoss", "--lr_scheduler=null", "--optimizer.lr=0.01"),
            *("--trainer.callbacks+=EMAWeightAveraging", f"--trainer.callbacks.decay={DECAY}"),
            *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", f"--trainer.max_steps={STEPS}"),
            *flags,
        ]
        status = main(arguments)
        return status, torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)

    return run


@pytest.fixture
def after_steps(monkeypatch):
    """Return a list of functions (callback, step, module) that are called before RunCheckpoint may save."""
    watchers = []
    original = RunCheckpoint.on_train_batch_end

    def spy(self, trainer, pl_module, *rest):
        for watch in watchers:
            watch(self, trainer.global_step, pl_module)
        original(self, trainer, pl_module, *rest)

    monkeypatch.setattr(RunCheckpoint, "on_train_batch_end", spy)
    return watchers


def test_what_is_saved_and_loaded_is_the_average(fit, after_steps, tmp_path):
    seen = []
    name = "model.model.layers.1.mlp.up_proj.weight"
    after_steps.append(lambda callback, step, module: seen.append(module.state_dict()[name].clone()))
    assert fit("run")[0] == 0
    average = seen[0]
    for weights in seen[1:]:
        average = DECAY * average + (1 - DECAY) * weights
    loaded = load_model(str(tmp_path / "run"))[0].state_dict()[name.removeprefix("model.")]
    torch.testing.assert_close(loaded, average, rtol=1e-5, atol=1e-6)
    assert len(seen) == STEPS and not torch.allclose(loaded, seen[-1], atol=1e-4)


def test_an_interrupted_run_goes_on_with_its_weights_and_their_average(fit, after_steps):
    _, whole = fit("whole")

    def interrupt(callback, step, module):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    after_steps.append(interrupt)
    status, stopped = fit("parts")
    assert status != 0 and stopped["global_step"] == 2
    after_steps.clear()
    status, parts = fit("parts", "--ckpt_path=last")
    assert status == 0 and parts["global_step"] == STEPS
    for name, value in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][name], value), name
