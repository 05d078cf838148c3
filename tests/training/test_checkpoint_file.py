"""Checkpoints are complete, or the previous one stays, whatever the disk does; no partial files remain."""

import errno
import os
import resource
import tempfile

import pytest
import torch

from lskip.training.checkpoint_file import WholeFiles, remove_leftovers

KIND = "B11 B27 full disks, and places that cannot be written"


def write(path, value: float, size: int = 100_000) -> None:
    WholeFiles().save_checkpoint({"weights": torch.full((size,), value), "step": int(value)}, path)


@pytest.fixture
def no_file_above_64_kib():
    """Limit the size of files, so that writing fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "last.ckpt", 1.0)
    return tmp_path / "last.ckpt"


def assert_as_before(path) -> None:
    assert torch.load(path, weights_only=True)["weights"].unique().tolist() == [1.0]
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_replaces_the_one_before(path):
    write(path, 2.0)
    assert torch.load(path, weights_only=True)["step"] == 2 and list(path.parent.iterdir()) == [path]


@pytest.mark.kind(KIND, "B27")
def test_a_disk_that_takes_no_more(path, no_file_above_64_kib):
    with pytest.raises(ValueError, match=r"checkpoint: cannot write '.*last.ckpt' \(File too large\); the one before"):
        write(path, 2.0)
    assert_as_before(path)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        ("fsync", errno.ENOSPC, "No space left on device"),
        ("fsync", errno.EIO, "Input/output error"),
        ("fsync", errno.EDQUOT, "quota exceeded"),
        ("replace", errno.EROFS, "Read-only file system"),
    ],
    ids=["full", "broken", "quota", "read-only"],
)
def test_whatever_the_disk_says(path, monkeypatch, call, kind, said):
    def refuse(*arguments):
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(ValueError, match=said):
        write(path, 2.0)
    monkeypatch.undo()
    assert_as_before(path)


@pytest.mark.kind(KIND)
def test_where_there_was_none_none_is_spoken_of(tmp_path, no_file_above_64_kib):
    with pytest.raises(ValueError, match=r"too large.$"):
        write(tmp_path / "last.ckpt", 2.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.kind("B26 what kills leave", "B26")
def test_nothing_is_written_elsewhere(tmp_path, monkeypatch):
    """After a kill while saving, the partial file is beside the checkpoint and nowhere else."""
    other, run = tmp_path / "tmp", tmp_path / "run"
    other.mkdir(), run.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    seen = []

    def killed(descriptor):
        seen.append((list(other.iterdir()), [path.name for path in run.iterdir()]))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write(run / "last.ckpt", 1.0)
    assert seen == [([], [".last.ckpt.partial"])] and not list(run.iterdir())


@pytest.mark.kind("B26 what kills leave")
@pytest.mark.parametrize("name", [".last.ckpt.partial", ".config.yaml.partial"])
def test_what_a_killed_run_left_goes(path, name):
    (path.parent / name).write_bytes(b"half")
    (path.parent / "mine.partial").write_bytes(b"somebody's own")
    remove_leftovers(path.parent)
    assert {each.name for each in path.parent.iterdir()} == {"last.ckpt", "mine.partial"}
