"""Two processes of a training, of which one is killed: the other ends too, and says which it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lskip.training.launcher import watched

folder, killed = Path(sys.argv[1]), int(sys.argv[2])

class Dies(Callback):
    def on_train_batch_start(self, trainer, *arguments):
        (folder / f"rank{trainer.global_rank}").write_text(str(os.getpid()))
        if trainer.global_step == 3 and trainer.global_rank == killed:
            os.kill(os.getpid(), signal.SIGKILL)

quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
settings = {"strategy": "ddp", "devices": 2, "accelerator": "cpu", "default_root_dir": folder}
trainer = Trainer(**quiet, **settings, max_steps=8, limit_val_batches=0, callbacks=[Dies()])
watched(trainer).fit(BoringModel())
"""


def run(folder: Path, killed: int) -> subprocess.CompletedProcess:
    command = [sys.executable, str(folder / "run.py"), str(folder), str(killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with (folder / "said").open("w+") as said:  # no pipe, which a process that is left would hold open
        done = subprocess.run(command, env=environment, stdout=said, stderr=said, timeout=120)
    return subprocess.CompletedProcess(command, done.returncode, stderr=(folder / "said").read_text())


@pytest.mark.parametrize(("killed", "code", "said"), [(0, -signal.SIGKILL, ""), (1, 1, "rank 1 was ended by SIGKILL")])
def test_one_that_is_killed_ends_the_other(tmp_path, killed, code, said):
    """Red where the other waits for ever for a part that nobody will send."""
    (tmp_path / "run.py").write_text(RUN)
    done = run(tmp_path, killed)
    assert done.returncode == code and said in done.stderr
    until = time.monotonic() + 30
    while any(Path(f"/proc/{(tmp_path / f'rank{rank}').read_text()}").exists() for rank in (0, 1)):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize(("code", "expected"), [(143, 143), (7, 1)])
def test_one_that_ends_before_they_meet_ends_the_other_as_it_was_ended(tmp_path, code, expected):
    """A scheduler asks all to end while they still import: the run's exit code says so, and a crash's does not."""
    early = f"import os\nif os.environ.get('LOCAL_RANK') == '1':\n    os._exit({code})\n"
    (tmp_path / "run.py").write_text(early + RUN)
    done = run(tmp_path, killed=0)
    assert done.returncode == expected and "the process of rank 1" in done.stderr
