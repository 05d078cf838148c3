import os
import subprocess
import sys

import pytest

from lskip.utils.output_files import only_writer, write_bytes

HOLD = """
import sys, time
from pathlib import Path
from lskip.utils.output_files import only_writer
with only_writer(Path(sys.argv[1]), "output"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes tmp_path/out."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path, holder):
    refused = pytest.raises(ValueError, match=r"output: '.*/out' is being written by another process")
    with refused, only_writer(tmp_path / "out", "output"):
        pass
    with only_writer(tmp_path / "another", "output"):
        pass
    holder.kill()  # -9: nobody tidies up
    holder.wait()
    with only_writer(tmp_path / "out", "output"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_has_no_lock(tmp_path):
    with only_writer(tmp_path / "..", "output"), only_writer(type(tmp_path)("/dev/null"), "output"):
        pass


@pytest.mark.kind("links, pipes and devices stay what they are")
@pytest.mark.parametrize("kind", ["link", "pipe", "link to a pipe"])
def test_what_is_no_plain_file_stays_what_it_is(tmp_path, kind):
    place = tmp_path / "out"
    if kind == "link":
        (tmp_path / "file").write_text("before")
        place.symlink_to(tmp_path / "file")
    else:
        os.mkfifo(tmp_path / "pipe")
        place = tmp_path / "pipe"
        if kind == "link to a pipe":
            place = tmp_path / "out"
            place.symlink_to(tmp_path / "pipe")
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_bytes(place, b"after")
    if kind == "link":
        assert place.is_symlink() and (tmp_path / "file").read_bytes() == b"after"
    else:
        assert os.read(reader, 100) == b"after"
        assert (tmp_path / "pipe").is_fifo() and place.is_symlink() == (kind != "pipe")
        os.close(reader)


@pytest.mark.kind("B41 a path that is none")
def test_the_longest_names_that_a_disk_takes_are_written_and_locked(tmp_path):
    """What stands beside a file while it is written has a name no longer than that."""
    paths = [tmp_path / ("é" * 120 + name) for name in ("a" * 14, "b" * 14)]  # 254 bytes each
    with only_writer(paths[0], "output"), only_writer(paths[1], "output"):
        for path in paths:
            write_bytes(path, path.name.encode())
    assert sorted(tmp_path.iterdir()) == paths
    assert [path.read_bytes() for path in paths] == [path.name.encode() for path in paths]
