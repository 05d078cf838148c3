"""A sharded checkpoint is complete, or the one before stays, whatever ends the process and whatever the disk does."""

import errno
import os
import resource
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lskip.callbacks import RunCheckpoint
from lskip.models.checkpoint import read_checkpoint
from lskip.models.reading.shards import SavedTensor, read_all
from lskip.training import sharded_checkpoint
from lskip.training.checkpoint_file import WholeFiles, remove_leftovers
from lskip.training.fsdp2 import FSDP2
from lskip.training.sharded_checkpoint import own_rows, save_sharded, share_of, write_safetensors
from lskip.utils.finite import all_finite
from tests.models.reading.test_shards import assert_equal, into_shards
from tests.trainers import quiet_trainer

KIND = "B11 B27 full disks, and places that cannot be written"
KILLED = 9


@pytest.fixture
def mesh():
    """Function (rank, of so many): a mesh in which this process is that rank, and no other is asked for anything."""

    def begin(rank: int = 0, size: int = 1):
        torch.distributed.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
        return init_device_mesh("cpu", (size,))

    yield begin
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def checkpoint(mesh, monkeypatch):
    """Function (step): a checkpoint of this process alone, all its numbers the step's."""
    alone = mesh()
    group = SimpleNamespace(
        get_rank=lambda: 0, get_world_size=lambda: 1, all_gather_object=lambda all_, own: all_.__setitem__(0, own)
    )
    monkeypatch.setattr(sharded_checkpoint, "distributed", group)

    def make(step: int, tied: bool = False) -> dict:
        weight, other = (sharded(torch.full((5, size), float(step)), alone) for size in (3, 4))
        weights = {
            "model.a": weight,
            "model.b": weight.detach() if tied else other,
            "buffer": torch.tensor([1.0 * step]),
        }
        states = {
            "model.a": {"step": torch.tensor(float(step)), "exp_avg": sharded(torch.full((5, 3), step / 2), alone)}
        }
        optimizer = {"state": states, "param_groups": [{"params": ["model.a"], "lr": 0.1}]}
        return {"state_dict": weights, "optimizer_states": [optimizer], "global_step": step, "lskip": {"config": {}}}

    return make


def sharded(rows: torch.Tensor, mesh, shape=None) -> DTensor:
    shape = torch.Size(shape or rows.shape)
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=rows.stride())


def assert_whole(path: Path, *steps: int) -> int:
    """Assert that a checkpoint of one of these steps is there and readable, and nothing else after leftovers go."""
    saved = read_all(read_checkpoint(path, "ckpt_path", whole=True))
    step = saved["global_step"]
    assert step in steps and saved["state_dict"]["model.a"].unique().tolist() == [step]
    assert saved["optimizer_states"][0]["state"][0]["exp_avg"].unique().tolist() == [step / 2]
    remove_leftovers(path.parent)
    assert sorted(each.name for each in path.parent.iterdir()) == ["last.ckpt", saved["shards"]]
    return step


def test_what_is_saved_comes_back(checkpoint, tmp_path):
    path = tmp_path / "last.ckpt"
    save_sharded(checkpoint(3), path)
    saved = read_checkpoint(path, whole=True)
    kinds = {name: type(part) for name, part in saved["state_dict"].items()}
    assert kinds == {"model.a": SavedTensor, "model.b": SavedTensor, "buffer": torch.Tensor}
    weights = {"model.a": torch.full((5, 3), 3.0), "model.b": torch.full((5, 4), 3.0), "buffer": torch.tensor([3.0])}
    assert_equal(read_all(saved)["state_dict"], weights)
    assert_equal(
        load_file(tmp_path / saved["shards"] / "weights-00000.safetensors"),
        {k: weights[k] for k in kinds if k != "buffer"},
    )
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.full((5, 3), 1.5)}}}
    assert_equal(read_all(saved)["optimizer_states"], [{**state, "param_groups": [{"params": [0], "lr": 0.1}]}])


def test_tied_weights_are_written_once_and_come_back_as_one(checkpoint, tmp_path):
    save_sharded(checkpoint(3, tied=True), tmp_path / "last.ckpt")
    saved = read_all(read_checkpoint(tmp_path / "last.ckpt"))
    with safe_open(tmp_path / saved["shards"] / "weights-00000.safetensors", "pt") as file:
        assert list(file.keys()) == ["model.a"]
    assert saved["state_dict"]["model.a"] is saved["state_dict"]["model.b"]


@pytest.mark.parametrize("rank", range(4))
def test_each_rank_writes_its_rows_and_takes_them_back(mesh, tmp_path, rank):
    """Of 5 rows over 4 ranks the third holds one, and the fourth none."""
    rows = torch.arange(15.0).reshape(5, 3)
    held = [rows[0:2], rows[2:4], rows[4:5], rows[5:5]][rank]
    own = sharded(held, mesh(rank, 4), rows.shape)
    assert own_rows(own) == [(0, 2), (2, 4), (4, 5), (5, 5)][rank]
    entry = sharded_checkpoint._write_shares({"weights/a": own}, tmp_path)
    assert [piece[:3] for part in entry.values() for piece in part["pieces"]] == ([[rank, *own_rows(own)]] * (rank < 3))
    assert len(list(tmp_path.iterdir())) == (rank < 3)
    into_shards({"state_dict": {"a": rows}, "lskip": {"config": {}}}, tmp_path / "last.ckpt")
    for saved in (rows, read_checkpoint(tmp_path / "last.ckpt")["state_dict"]["a"]):
        assert torch.equal(share_of(saved, own).to_local(), held)
    with pytest.raises(ValueError, match=r"shape \(4, 3\), here it is \(5, 3\)"):
        share_of(rows[:4], own)


def test_what_is_not_sharded_by_rows_is_kept_whole(checkpoint, tmp_path):
    made = checkpoint(3)
    alike = DTensor.from_local(
        torch.ones(2, 3), made["state_dict"]["model.a"].device_mesh, [Replicate()], run_check=False
    )
    made["optimizer_states"][0]["state"]["model.a"]["row_var"] = alike
    save_sharded(made, tmp_path / "last.ckpt")
    state = read_all(read_checkpoint(tmp_path / "last.ckpt", whole=True))["optimizer_states"][0]["state"][0]
    assert type(state["row_var"]) is torch.Tensor and torch.equal(state["row_var"], torch.ones(2, 3))


def test_other_readers_can_read_the_files(tmp_path):
    tensors = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.arange(6.0).reshape(2, 3), "ü": torch.ones(1)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert_equal({name: found[name] for name in tensors}, tensors)


def test_shares_that_are_not_finite_are_seen(checkpoint):
    assert all_finite(checkpoint(3))
    made = checkpoint(3)
    made["state_dict"]["model.a"].to_local()[1, 1] = torch.nan
    assert not all_finite(made)


# What kills and disks do.


def kill_at(count: int, work) -> bool:
    """Call `work` in a process of its own, which ends like by kill -9 before so many changes of the disk.

    Returns whether it was killed; otherwise it had made all of them.
    """
    child = os.fork()
    if child == 0:
        left = count

        def counted(call):
            def act(*arguments, **settings):
                nonlocal left
                if left == 0:
                    os._exit(KILLED)
                left -= 1
                return call(*arguments, **settings)

            return act

        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


@pytest.mark.kind("B26 what kills leave")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(checkpoint, tmp_path):
    path = tmp_path / "run" / "last.ckpt"
    save_sharded(checkpoint(1), path)
    step, seen, count = 1, [], 0
    while kill_at(count, partial(save_sharded, checkpoint(2 + count), path)):
        found = assert_whole(path, step, 2 + count)
        seen.append(found != step)
        step, count = found, count + 1
    assert_whole(path, 2 + count)
    # Before the pointer moves, the old one; afterwards the new one: folder, files and their names, then the pointer.
    assert seen[:7] == [False] * 7 and any(seen) and count >= 10
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.kind("B26 what kills leave")
def test_a_kill_of_the_first_leaves_nothing_that_stays(checkpoint, tmp_path):
    for count in range(1, 7):
        path = tmp_path / str(count) / "last.ckpt"
        assert kill_at(count, partial(save_sharded, checkpoint(2), path))
        remove_leftovers(path.parent)
        assert list(path.parent.iterdir()) == []


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EROFS])
def test_whatever_the_disk_says_the_one_before_stays(checkpoint, tmp_path, monkeypatch, call, kind):
    path = tmp_path / "last.ckpt"
    save_sharded(checkpoint(1), path)

    def refuse(*arguments, **settings):
        raise OSError(kind, os.strerror(kind))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(ValueError, match=rf"cannot write '.*last.ckpt' \({os.strerror(kind)}\); the one before"):
            save_sharded(checkpoint(2), path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_whole(path, 1)


@pytest.mark.kind(KIND)
def test_a_disk_that_takes_no_more(checkpoint, tmp_path):
    path = tmp_path / "last.ckpt"
    save_sharded(checkpoint(1), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot write '.*last.ckpt' \(File too large\); the one before"):
            save_sharded(checkpoint(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_whole(path, 1)


def test_a_file_that_is_not_seen_from_the_first_rank(checkpoint, tmp_path, monkeypatch):
    """As where each node has a folder of its own under the same name."""
    path, write = tmp_path / "last.ckpt", sharded_checkpoint._write_shares
    save_sharded(checkpoint(1), path)

    def elsewhere(shares, folder):
        said = write(shares, folder)
        (folder / "weights-00000.safetensors").unlink()
        return said

    with monkeypatch.context() as patched:
        patched.setattr(sharded_checkpoint, "_write_shares", elsewhere)
        with pytest.raises(ValueError, match=r"^checkpoint: '.*weights-00000.safetensors' is missing"):
            save_sharded(checkpoint(2), path)
    assert_whole(path, 1)


def test_the_step_of_the_one_before_may_be_saved_again(checkpoint, tmp_path):
    path = tmp_path / "last.ckpt"
    for _ in range(2):
        save_sharded(checkpoint(4), path)
        assert_whole(path, 4)


def test_one_file_takes_the_place_of_shards(checkpoint, tmp_path):
    path = tmp_path / "last.ckpt"
    save_sharded(checkpoint(4), path)
    WholeFiles().save_checkpoint({"weights": torch.ones(1)}, path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_of_the_small_file_keeps_its_shards(checkpoint, tmp_path):
    path = tmp_path / "last.ckpt"
    save_sharded(checkpoint(1), path)
    shutil.copy(path, tmp_path / "best.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"x")
    for step in (2, 3):
        save_sharded(checkpoint(step), path)
    saved = [read_all(read_checkpoint(each))["state_dict"]["model.a"] for each in (path, tmp_path / "best.ckpt")]
    assert [part.unique().tolist() for part in saved] == [[3.0], [1.0]]
    assert len(list(tmp_path.glob("*.shards-*"))) == 2


def test_a_checkpoint_is_removed_with_its_shards(checkpoint, tmp_path):
    path = tmp_path / "last.ckpt"
    save_sharded(checkpoint(4), path)
    WholeFiles().remove_checkpoint(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.kind("B26 what kills leave")
def test_only_what_lskip_left_is_removed(checkpoint, tmp_path):
    path = tmp_path / "last.ckpt"
    save_sharded(checkpoint(4), path)
    kept = {"mine", "last.ckpt", "last.ckpt.shards-4", "last.ckpt.shards-x", "last.ckpt.shards-5", "last.ckpt.shards-6"}
    for name in kept - {"last.ckpt"}:
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "last.ckpt.shards-5" / "notes.txt").write_text("somebody's own")
    (tmp_path / "last.ckpt.shards-6").rmdir()
    (tmp_path / "last.ckpt.shards-6").symlink_to(tmp_path / "mine")
    (tmp_path / "last.ckpt.shards-7").mkdir()
    (tmp_path / "last.ckpt.shards-7" / "weights-00000.safetensors").write_text("half")
    remove_leftovers(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == kept
    path.write_bytes(b"damaged")  # then it is not known which folder it needs
    remove_leftovers(tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == kept


# Who asks for it.


def test_without_fsdp2_it_is_refused(tmp_path):
    callback = RunCheckpoint(tmp_path, sharded=True)
    trainer = quiet_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.sharded: true is for trainer.strategy fsdp2"):
        callback.setup(trainer, None, "fit")
    with pytest.raises(ValueError, match="sharded: 'yes' is not true or false"):
        RunCheckpoint(tmp_path, sharded="yes")


def test_with_fsdp2_the_strategy_is_told(tmp_path):
    for asked in (False, True):
        trainer = Trainer(accelerator="cpu", devices=1, strategy=FSDP2(), logger=False, enable_checkpointing=False)
        RunCheckpoint(tmp_path, sharded=asked).setup(trainer, None, "fit")
        assert trainer.strategy.saves_shards == asked
