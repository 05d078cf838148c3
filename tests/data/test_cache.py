"""Caches of documents, tokenizers and tokens: verified, rebuilt where changed, complete after kills and full disks."""

import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from lskip.data.cache import cached_folder, remove_litter
from tests.data.test_datamodule import data_maker, write_jsonl

DAMAGED = "B18 damaged caches and files"
LITTER = "B26 what kills leave"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a folder with a file and a cache of it, and the content of both."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [{"text": f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 9)} for i in range(120)]
    data = maker(folder, write_jsonl(folder / "d.jsonl", rows))()
    return folder, everything(data)


def maker(folder: Path, source: str):
    make = data_maker(folder, None)
    return lambda **more: make(source=source, vocab_size=300, **more)


@pytest.fixture
def make(whole, tmp_path):
    """Return a function (**arguments) -> TextData with an empty cache."""
    return maker(tmp_path, str(whole[0] / "d.jsonl"))


@pytest.fixture
def filled(whole, tmp_path):
    """Return the folder of that cache, as it was written."""
    return Path(shutil.copytree(whole[0] / "cache", tmp_path / "cache"))


def everything(data) -> list:
    blocks = [np.array(data.blocks(split)[:]["input_ids"]).tolist() for split in ("train", "val")]
    return [blocks, data.tokenizer.get_vocab(), data.documents("test")["text"][:]]


def cut(part: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def cut_behind_a_batch(path: Path) -> None:
    """Cut an Arrow file after half its rows; it stays readable, so that only its size shows the cut."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_stream(file).read_all()
    table = table.slice(0, len(table) // 2)
    with pa.OSFile(str(path) + ".new", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    os.replace(str(path) + ".new", path)


def garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) // 2 + 8):
        data[place] ^= 0x55
    path.write_bytes(data)


def gone(path: Path) -> None:
    path.unlink()


def into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "B18 cut at half": cut(0.5),
    "B18 cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "B18 empty": cut(0),
    "B18 garbled": garble,
    "B18 gone": gone,
    "not what it was": lambda path: path.write_text("{}"),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a folder": into_a_folder,
}
FILES = [
    "tokens/*/tokens.uint16",
    "tokens/*/written.json",
    "documents/*/documents.arrow",
    "documents/*/written.json",
    "tokenizers/*/tokenizer.json",
    "tokenizers/*/tokenizer_config.json",
]


@pytest.mark.kind(DAMAGED)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("files", FILES)
def test_a_damaged_file_is_made_anew(whole, make, filled, files, damage):
    for path in filled.glob(files):
        DAMAGES[damage](path)
    with pytest.warns(UserWarning, match=f"cache_dir: '.*{files[:6]}.*' is not as it was written .*it is made anew"):
        assert everything(make()) == whole[1]
    assert_whole(filled, make, whole[1])


def assert_whole(cache: Path, make, expected) -> None:
    """Nothing is written any more."""
    stamps = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert everything(make()) == expected
    assert stamps == {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}


@pytest.mark.kind(DAMAGED)
@pytest.mark.parametrize("folder", ["tokens", "documents", "tokenizers"])
@pytest.mark.parametrize("damage", ["B18 cut at a batch", "B18 empty folder", "a file", "one file more", "dead link"])
def test_a_damaged_folder_is_made_anew(whole, make, filled, folder, damage):
    for path in list((filled / folder).iterdir()):
        if damage == "B18 cut at a batch":
            for file in path.glob("*.arrow"):
                cut_behind_a_batch(file)
            for file in (*path.glob("tokens.*"), *path.glob("ends.*")):  # at a whole number, which its size alone shows
                os.truncate(file, file.stat().st_size // 16 * 8)
            for file in path.glob("tokenizer.json"):
                file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "Lowercase"}}))
        elif damage == "one file more":
            (path / "added_tokens.json").write_text('{"zzz": 299}')
        else:
            shutil.rmtree(path)
            if damage == "B18 empty folder":
                path.mkdir()
            elif damage == "a file":
                path.touch()
            else:
                path.symlink_to("nothing")
    with pytest.warns(UserWarning, match=f"cache_dir: '.*{folder}.*' is not as it was written"):
        assert everything(make()) == whole[1]
    assert_whole(filled, make, whole[1])


@pytest.mark.kind(DAMAGED)
def test_a_cache_of_an_earlier_version_is_made_anew(whole, make, filled):
    for path in filled.rglob("written.json"):
        path.unlink()
    with pytest.warns(UserWarning, match="is not as it was written"):
        assert everything(make()) == whole[1]


# Two at once, kills and what they leave


def writer(path: Path, seconds: float):
    """Return a process that fills a cached folder and waits in the middle of it."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()

    def write(folder: Path) -> None:
        (folder / "a").write_text("1" * 1000)
        begun.set()
        time.sleep(seconds)
        (folder / "b").write_text("2")

    process = context.Process(target=cached_folder, args=(path, write))
    process.start()
    assert begun.wait(30)
    return process


def unfinished(folder: Path) -> int:
    return sum(path.is_dir() for path in folder.glob(".unfinished-*"))


@pytest.mark.kind(LITTER, "B26")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_what_a_kill_leaves_is_removed_and_what_a_living_process_writes_stays(tmp_path):
    folder = tmp_path / "tokens"
    path = folder / ("0" * 32)
    killed, living = writer(path, 60), writer(path, 2)
    killed.kill()
    killed.join()
    assert unfinished(folder) == 2
    remove_litter(tmp_path)
    assert unfinished(folder) == 1
    # Another one, faster than the living: both end well, with one folder.
    cached_folder(path, lambda new: [(new / "a").write_text("1" * 1000), (new / "b").write_text("2")])
    living.join()
    assert living.exitcode == 0 and [each.name for each in folder.iterdir()] == [path.name]
    assert (path / "b").read_text() == "2"


@pytest.mark.kind(LITTER)
def test_litter_that_is_held_stays(tmp_path):
    folder = tmp_path / "tokens" / ".unfinished-held"
    folder.mkdir(parents=True)
    with FileLock(folder.with_suffix(".lock")):
        remove_litter(tmp_path)
        assert folder.exists()
    remove_litter(tmp_path)
    assert not folder.exists()


# Full disk, and places that cannot be written


@pytest.fixture
def small_files(monkeypatch):
    """Return a function (bytes) that limits the size of files, in place of a full disk: the tests may run as root.

    Progress bars are written elsewhere: pytest's file for what they write is limited too, and a bar that cannot write
    keeps tqdm's lock, for which processes that load batches in later tests would wait for ever.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(size: int) -> None:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.kind("B11 B27 full disks, and places that cannot be written")
@pytest.mark.parametrize(
    ("size", "done", "folder"),
    [
        pytest.param(500, lambda data: None, "documents", id="B27 documents"),
        pytest.param(500, lambda data: data.documents("val"), "tokenizers", id="B27 tokenizer"),
        pytest.param(500, lambda data: data.tokenizer, "tokens", id="B27 tokens"),
        pytest.param(5_000, lambda data: data.tokenizer, "tokens", id="in the middle of the tokens"),
        pytest.param(0, lambda data: None, "documents|cache", id="nothing at all"),
        pytest.param(0, lambda data: data.blocks("val"), "tokens", id="nothing more"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(whole, make, tmp_path, small_files, size, done, folder):
    data = make()
    done(data)
    small_files(size)
    with pytest.raises((OSError, ValueError), match=f"^cache_dir: cannot write '.*({folder})' ") as refused:
        data.setup("fit")
    small_files(resource.RLIM_INFINITY)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "cache").rglob(".unfinished-*"))
    assert everything(make()) == whole[1]


@pytest.mark.kind("B20 B40 told before anything is read")
@pytest.mark.parametrize("place", ["file", "below a file", "/proc/lskip", "nul", "too long"])
def test_a_cache_that_cannot_be_written(make, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    places = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "cache", "nul": "a\0b"}
    monkeypatch.setattr("lskip.data.json_rows.numbered_lines", None)  # nothing is read before
    with pytest.raises(ValueError, match=r"^cache_dir: "):
        make(cache_dir=str(places.get(place, "/x" + "y" * 5000 if place == "too long" else place))).setup("fit")
