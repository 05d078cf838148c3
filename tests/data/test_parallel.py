"""Two processes under DDP, as `Trainer(strategy="ddp")` starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lskip.layer_dropout import draw_dropped
from lskip.models.decoder import Decoder
from lskip.models.readout import report_layers
from tests.conftest import make_model

RUN = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

folder = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from tests.conftest import make_model
from lskip.callbacks import EarlyExitLoss, LayerDropout, LayerMetrics
from lskip.curricula import AllExits
from lskip.module import LayerSkipModule
from lskip.schedules import Linear

torch.set_num_threads(1)

class Look(Callback):
    def on_fit_start(self, trainer, module):
        self.rows, self.losses = [], []
        for layer in module.model.model.layers:
            layer.register_forward_pre_hook(self.count)

    def count(self, layer, args):
        if layer.training:
            self.rows.append(len(args[0]))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, trainer, module):
        weights = {name: value.double().sum().item() for name, value in module.model.named_parameters()}
        result = {"rows": self.rows, "losses": self.losses, "weights": weights}
        (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))

def loader(seed, rows, batch_size):
    ids = torch.randint(0, 300, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return DataLoader([{"input_ids": row} for row in ids], batch_size=batch_size)

metrics = LayerMetrics()
trainer = Trainer(
    strategy="ddp", accelerator="cpu", devices=2, max_steps=6, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0,
    callbacks=[LayerDropout(1.0, Linear()), EarlyExitLoss(0.5, AllExits()), metrics, Look()],
)
module = LayerSkipModule(make_model(), optimizer=partial(torch.optim.SGD, lr=0.1), lr_scheduler=None)
trainer.fit(module, loader(1, 24, 2), loader(2, 8, 3))
if trainer.is_global_zero:
    torch.save(module.model.state_dict(), folder / "weights.pt")
    (folder / "report.json").write_text(json.dumps(metrics.report._asdict()))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a run with a drop rate of 0, 1/3, 2/3 and 1, without find_unused_parameters."""
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "run.py").write_text(RUN)
    command = [sys.executable, str(folder / "run.py"), str(folder), str(Path(__file__).parents[2])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_rank_draws_the_same_and_calls_no_block_without_rows(run):
    first, second = (json.loads((run / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert len(first["losses"]) == 6 and first["losses"] != second["losses"]  # different data
    rates = (0, 1 / 3, 2 / 3, 1)
    kept = [2 - int(draw_dropped(0, step, block, 2, rates[block]).sum()) for step in range(6) for block in range(4)]
    assert kept[0::4] == [2] * 6 and kept[3::4] == [0] * 6 and {1, 2} <= set(kept[1::4] + kept[2::4])
    assert first["rows"] == second["rows"] == [rows for rows in kept if rows]
    assert first["weights"] == second["weights"]


def test_the_layer_report_is_that_of_one_process(run):
    model = make_model()
    model.load_state_dict(torch.load(run / "weights.pt", weights_only=True))
    ids = torch.randint(0, 300, (8, 12), generator=torch.Generator().manual_seed(2))
    expected = report_layers(Decoder(model), [ids])
    report = json.loads((run / "report.json").read_text())
    assert report["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert report["agreement"] == pytest.approx(expected.agreement)
    assert report["layers_needed"] == pytest.approx(expected.layers_needed)
    assert report["tokens_per_round"]["4"] == pytest.approx(expected.tokens_per_round[4])
