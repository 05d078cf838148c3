"""Content of checkpoints, and resuming from them bit for bit."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lskip.callbacks import EarlyExitLoss, LayerDropout
from lskip.curricula import Rotational
from lskip.models.checkpoint import random_state, restore_random_state
from lskip.module import LayerSkipModule
from lskip.schedules import Constant
from tests.trainers import quiet_trainer


def make_trainer(folder, max_epochs, *callbacks):
    return quiet_trainer(
        folder, LayerDropout(0.5, Constant()), EarlyExitLoss(0.5, Rotational(2)), *callbacks, max_epochs=max_epochs
    )


def make_data():
    ids = torch.randint(0, 300, (3, 4, 12), generator=torch.Generator().manual_seed(2))
    # A loader without a generator of its own draws from torch's stream each time that its iterator starts, which
    # on resuming is before the stream is restored.
    return DataLoader([{"input_ids": batch} for batch in ids], batch_size=None, generator=torch.Generator())


def make_module(tiny_model, tokenizer=None):
    # attention_dropout draws from torch's own random stream
    model = tiny_model(attention_dropout=0.3)
    return LayerSkipModule(model, tokenizer, partial(torch.optim.AdamW, lr=1e-2), position_share=0.5)


@pytest.fixture
def checkpoint(tiny_model, tiny_tokenizer, tmp_path):
    """Return the path of a checkpoint after 3 steps, and the module that wrote it."""
    torch.manual_seed(0)
    module = make_module(tiny_model, tiny_tokenizer)
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt", module


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(plain(key) and plain(part) for key, part in value.items())
    if isinstance(value, list | tuple):
        return all(plain(part) for part in value)
    return value is None or type(value) in (str, int, float, bool)


def test_loads_without_unpickling_code_and_rebuilds_the_model(checkpoint, tiny_tokenizer):
    path, module = checkpoint
    loaded = torch.load(path, weights_only=True)
    packed = loaded["lskip"]
    assert plain(packed) and set(packed) == {"config", "generation_config", "tokenizer", "rows", "total_steps"}
    json.dumps(packed)
    assert json.loads(packed["tokenizer"]["tokenizer.json"]) == json.loads(tiny_tokenizer.backend_tokenizer.to_str())

    config = AutoConfig.for_model(**packed["config"])
    model = AutoModelForCausalLM.from_config(config).eval()
    weights = {key.removeprefix("model."): value for key, value in loaded["state_dict"].items()}
    model.load_state_dict(weights, strict=True)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, module.model.eval()(ids).logits)


def test_a_model_without_tokenizer_is_saved_without(tiny_model, tmp_path):
    module = make_module(tiny_model)
    module.trainer = make_trainer(tmp_path, 1)
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["lskip"]["tokenizer"] == {}


def test_the_resumed_run_ends_with_the_uninterrupted_runs_weights(checkpoint, tiny_model, tmp_path):
    path, _ = checkpoint

    torch.manual_seed(0)
    whole = make_module(tiny_model)
    make_trainer(tmp_path, 2).fit(whole, make_data())

    torch.manual_seed(99)
    torch.rand(17)
    resumed = make_module(tiny_model)
    make_trainer(tmp_path, 2).fit(resumed, make_data(), ckpt_path=path)
    for (name, ours), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_random_stream_goes_on_where_the_checkpoint_left_it(checkpoint, tiny_model, tmp_path):
    path, _ = checkpoint
    saved = torch.load(path, weights_only=True)["random_state"]
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *args):
            seen.append(torch.get_rng_state())

    torch.manual_seed(99)
    make_trainer(tmp_path, 2, Look()).fit(make_module(tiny_model), make_data(), ckpt_path=path)
    assert torch.equal(seen[0], saved["cpu"])


def test_random_state_round_trip():
    torch.manual_seed(3)
    torch.rand(5)
    state = random_state()
    first = torch.rand(8)
    restore_random_state(state)
    assert torch.equal(torch.rand(8), first)
