"""The order of training rows: permutations, shares of each device, resuming."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lskip.data import TextData
from lskip.data.loading import ResumableSampler


def sampler(position: int = 0, rows: int = 50, batch_size: int = 3, world: int = 1, rank: int = 0, seed: int = 0):
    return ResumableSampler(range(rows), batch_size, seed, lambda: position, world, rank)


def uninterrupted(epochs: int, **arguments) -> list[list[int]]:
    """Return the batches of whole epochs, each read from its start."""
    per_epoch = sampler(**arguments).batches_per_epoch
    rows = [row for epoch in range(epochs) for row in sampler(epoch * per_epoch, **arguments)]
    return [rows[i : i + 3] for i in range(0, len(rows), 3)]


def test_each_epoch_is_a_new_permutation():
    batches = uninterrupted(3)
    epochs = [[row for batch in batches[i : i + 16] for row in batch] for i in (0, 16, 32)]
    assert len(sampler()) == 48 and all(len(set(epoch)) == 48 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and sorted(epochs[0]) != epochs[0]
    assert uninterrupted(1, seed=1) != uninterrupted(1)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("done", [0, 1, 7, 8, 16, 21])
def test_resuming_gives_the_tail_of_the_uninterrupted_order(done, world):
    for rank in range(world):
        whole = uninterrupted(4, world=world, rank=rank)
        rows = list(sampler(done, world=world, rank=rank))
        assert [rows[i : i + 3] for i in range(0, len(rows), 3)] == whole[done : done + 50 // (3 * world)]


def test_two_devices_share_each_batch_of_one_twice_as_large():
    first, second = (list(sampler(world=2, rank=rank)) for rank in (0, 1))
    together = list(ResumableSampler(range(50), 6, 0, lambda: 0))
    merged = [row for i in range(0, 24, 3) for row in first[i : i + 3] + second[i : i + 3]]
    assert merged == together and not set(first) & set(second)


def test_batches_of_like_length_hold_little_padding_and_all_rows():
    lengths = np.random.default_rng(0).integers(10, 200, 500)
    cost = {}
    for name, known in {"sorted": lengths, "not": None}.items():
        rows = np.array(list(ResumableSampler(range(500), 4, 0, lambda: 0, lengths=known)))
        assert sorted(rows) == list(range(500))
        cost[name] = lengths[rows].reshape(-1, 4).max(1).sum() * 4 / lengths.sum()
    assert cost["sorted"] < 1.08 < 1.4 < cost["not"]
    longest = lengths[rows].reshape(-1, 4).max(1)
    assert list(longest) != sorted(longest)  # short and long ones by turns


def test_resuming_among_batches_of_like_length():
    lengths = np.random.default_rng(1).integers(1, 99, 200)
    whole, rest = (list(ResumableSampler(range(200), 4, 0, lambda p=p: p, lengths=lengths)) for p in (0, 30))
    assert rest[: 20 * 4] == whole[30 * 4 :]
    first, second = (list(ResumableSampler(range(200), 2, 0, lambda: 0, 2, rank, lengths=lengths)) for rank in (0, 1))
    assert [first[i : i + 2] + second[i : i + 2] for i in range(0, 100, 2)] == [
        whole[i : i + 4] for i in range(0, 200, 4)
    ]


# Through Lightning


class Recorder(LightningModule):
    """A module that records the rows that it gets."""

    def __init__(self, fail_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at, self.seen = fail_at, []

    def training_step(self, batch):
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(batch["input_ids"].tolist())
        return self.weight.sum()

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_pairs_of_like_length_stand_in_one_batch(tmp_path, tiny_tokenizer):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n} " * (n % 12), "completion": f"yes {n}" * (1 + n % 7)} for n in range(400)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for grouped in (False, True):
        data = TextData(str(path), tiny_tokenizer, block_size=128, batch_size=8, group_by_length=grouped,
                        cache_dir=str(tmp_path / "cache"))  # fmt: skip
        batches = list(data.train_dataloader())
        pairs = sorted(tuple(i.tolist()) for batch in batches for i in trimmed(batch))
        found[grouped] = len(pairs), sum(batch["input_ids"].numel() for batch in batches), set(pairs)
    assert found[True][0] == found[False][0] == len(found[True][2]) and found[True][1] < 0.8 * found[False][1]
    with pytest.raises(ValueError, match="group_by_length: true, but with streaming"):
        TextData(str(path), streaming=True, group_by_length=True)


def trimmed(batch: dict) -> list[torch.Tensor]:
    """Return the rows of a batch of pairs up to their last scored token."""
    ends = [int((labels != -100).nonzero().max()) + 1 for labels in batch["labels"]]
    return [ids[:end] for ids, end in zip(batch["input_ids"], ends, strict=True)]


@pytest.fixture
def make_data(tmp_path, tiny_tokenizer):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i} " * (1 + i % 5)}) + "\n" for i in range(90)))

    def make(**arguments) -> TextData:
        fixed = {"source": str(path), "tokenizer": tiny_tokenizer, "cache_dir": str(tmp_path / "cache")}
        return TextData(**{**fixed, "block_size": 32, "batch_size": 3, "val_fraction": 0.2, **arguments})

    return make


def fit(folder, data, fail_at=None, ckpt_path=None, **arguments) -> list:
    """Return the batches of one call of fit, which saves every second step in `folder`."""
    module = Recorder(fail_at)
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=[
            ModelCheckpoint(folder, save_last=True, every_n_train_steps=2, save_top_k=0),
            OnExceptionCheckpoint(folder, "interrupted"),
        ],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **arguments,
    )
    try:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    except (KeyboardInterrupt, SystemExit):
        assert fail_at is not None
    return module.seen


CASES = {"whole epochs": {"max_epochs": 3}, "short epochs": {"max_epochs": 7, "limit_train_batches": 5}}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_that_broke_off_goes_on_with_the_next_batch(make_data, tmp_path, case, streaming):
    arguments = {"max_steps": 40} if streaming and case == "whole epochs" else CASES[case]
    whole = fit(tmp_path / "whole", make_data(streaming=streaming), **arguments)
    per_epoch = len(make_data().train_dataloader()) if case == "whole epochs" else 5
    assert len(whole) > 2 * per_epoch
    for fail_at in (3, per_epoch, per_epoch + 1, 2 * per_epoch + 3):
        folder = tmp_path / f"broken-{fail_at}"
        seen = fit(folder, make_data(streaming=streaming), fail_at, **arguments)
        assert seen == whole[:fail_at]
        # "last" holds an even number of batches; "interrupted" was saved inside a batch, which has to come again
        for name, done in (("last", fail_at - fail_at % 2), ("interrupted", fail_at)):
            data, checkpoint = make_data(streaming=streaming), folder / f"{name}.ckpt"
            assert fit(folder / name, data, ckpt_path=checkpoint, **arguments) == whole[done:], (fail_at, name)


def test_lightning_neither_replaces_the_sampler_nor_warns_about_resuming(make_data, tmp_path, recwarn):
    data = make_data()
    fit(tmp_path / "a", data, fail_at=3, max_epochs=1)
    fit(tmp_path / "a", make_data(), ckpt_path=tmp_path / "a" / "last.ckpt", max_epochs=1)
    assert isinstance(data.trainer.train_dataloader.sampler, ResumableSampler)
    assert not [warning for warning in recwarn if "resum" in str(warning.message)]


@pytest.mark.parametrize(
    ("device", "streaming", "asked", "workers"),
    [("cuda", False, None, 2), ("cpu", False, None, 0), ("cuda", True, None, 2), ("cuda", False, 1, 1)],
)
def test_a_gpu_gets_its_batches_from_other_processes(make_data, device, streaming, asked, workers):
    data = make_data(streaming=streaming, num_workers=asked)
    strategy = SimpleNamespace(root_device=torch.device(device))
    data.trainer = SimpleNamespace(
        strategy=strategy, distributed_sampler_kwargs=None, max_steps=1, limit_train_batches=1.0, state=None
    )
    loader = data.train_dataloader()
    assert (loader.num_workers, loader.pin_memory) == (workers, device == "cuda")
