"""The folder of a run: made and locked for a command, and removed again if the run did not begin."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from lskip.models.pretrained import LAST_CHECKPOINT
from lskip.models.reading.shards import files_of
from lskip.training.checkpoint_file import partial_of, remove_leftovers
from lskip.utils.output_files import make_writable, only_writer

CONFIG_FILE = "config.yaml"
_LEFT_BY_LOGGER = ("events.out.tfevents.*", "hparams.yaml")


@contextmanager
def run_place(folder: Path, locked: Path) -> Iterator[None]:
    """Make `folder` and lock `locked`, the folder or a part of it, for this process and its workers.

    If the code inside fails before config.yaml is written, the folders made here are removed again.

    Raises:
        ValueError: it is not writable, or another process uses it.
    """
    first = getattr(rank_zero_only, "rank", 0) == 0
    made = [place for place in (folder, *folder.parents) if not place.exists()] if first else []
    make_writable(folder, "run_folder")
    try:
        with only_writer(locked, "run_folder") if first else nullcontext():
            if first:
                remove_leftovers(folder)
            yield
    except BaseException:
        if made and not (folder / CONFIG_FILE).exists():
            _remove(folder, made)
        raise


def _remove(folder: Path, made: list[Path]) -> None:
    for pattern in _LEFT_BY_LOGGER:
        for path in folder.glob(pattern):
            path.unlink()
    for place in made:
        if any(place.iterdir()):
            return
        place.rmdir()


class RunConfig(SaveConfigCallback):
    """A callback that writes config.yaml when training begins, or when `validate` or `test` ends.

    Written that late, the file of an earlier run survives a run that is refused.

    Args:
        folder: of the file.
        settings: parser and config, as LightningCLI passes them.
    """

    def __init__(self, *settings, folder: Path):
        super().__init__(*settings, overwrite=True)
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            path = self.folder / CONFIG_FILE
            partial = partial_of(path)
            try:
                self.parser.save(self.config, partial, skip_none=False, overwrite=True, multifile=False)
                os.replace(partial, path)
            except OSError as error:
                raise ValueError(f"run_folder: cannot write '{path}' ({error.strerror})") from error
            finally:
                partial.unlink(missing_ok=True)


def refuse_existing_run(folder: Path) -> None:
    """Raise ValueError if the folder holds the checkpoint of a run."""
    if any((folder / LAST_CHECKPOINT.parent).glob("*.ckpt")):
        raise ValueError(
            f"run_folder: '{folder}' holds a run; continue it with --ckpt_path last, or choose another --run_folder"
        )


def check_room(folder: Path, module: nn.Module, before: str | None) -> None:
    """Raise ValueError if the disk has no room for one more checkpoint.

    Args:
        folder: an existing folder on the disk.
        module: a checkpoint is at least as large as its weights.
        before: the checkpoint that the run resumes from, about as large as the next one; or None.
    """
    size = sum(part.numel() * part.element_size() for part in module.parameters())
    size = max(size, sum(path.stat().st_size for path in files_of(Path(before))) if before else 0)
    free = shutil.disk_usage(folder).free
    if free < size:
        sizes = f"takes {_mebibytes(size)} at least, and {_mebibytes(free)} are free"
        raise ValueError(f"run_folder: '{folder}' has no room for a checkpoint, which {sizes}")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
