import subprocess
import sys

import pytest

from lskip.output_files import only_writer

HOLD = """
import sys, time
from pathlib import Path
from lskip.output_files import only_writer
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
