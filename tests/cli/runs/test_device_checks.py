"""How many processes train and how they share the work: what a launcher started holds, the unproven is refused."""

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from lskip.cli.entry import main
from lskip.cli.runs.device_checks import settle_devices
from lskip.cli.runs.trainer_checks import check_callbacks

TORCHRUN = {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
SRUN = {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_PROCID": "0"}


def settings(**given) -> dict:
    return {"devices": "auto", "num_nodes": 1, "strategy": "auto", "precision": None, **given}


def environment(monkeypatch, variables: dict) -> None:
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("launch", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
@pytest.mark.parametrize("given", [{}, {"devices": 2}, {"devices": "2", "num_nodes": 3}])
def test_what_a_launcher_started_trains_together(monkeypatch, launch, given):
    """Red where each of six processes would be a run of its own."""
    environment(monkeypatch, launch)
    found = settings(**given)
    settle_devices(found, False)
    assert int(found["devices"]) == 2 and found["num_nodes"] == 3


@pytest.mark.parametrize(("launch", "name"), [(TORCHRUN, "torchrun"), (SRUN, "srun")])
@pytest.mark.parametrize(
    "given", [{"devices": 1}, {"devices": [0, 1]}, {"devices": 2, "num_nodes": 2}, {"devices": -1}]
)
def test_anything_else_is_refused(monkeypatch, launch, name, given):
    environment(monkeypatch, launch)
    with pytest.raises(ValueError, match=rf"^trainer\.devices: .*{name} started 2 processes on each of 3"):
        settle_devices(settings(**given), False)


def test_alone_or_in_a_batch_script_nothing_is_set(monkeypatch):
    environment(monkeypatch, {"SLURM_NTASKS": "8"})
    found = settings()
    settle_devices(found, False)
    assert found == settings()


@pytest.mark.parametrize("launch", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
@pytest.mark.parametrize("command", ["generate", "predict", "export", "inspect", "compare"])
def test_a_command_for_one_process_is_refused_in_several(monkeypatch, capsys, launch, command):
    """Red where six processes would write over one another."""
    environment(monkeypatch, launch)
    assert main([command]) == 2
    assert "started 6 processes; this command is for one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("strategy", "instead"),
    [
        *(("fsdp", "fsdp2"), ("fsdp_cpu_offload", "fsdp2"), ("deepspeed_stage_3", "fsdp2"), ("ddp_spawn", "ddp")),
        ("ddp_notebook_find_unused_parameters_true", "ddp"),
    ],
)
def test_a_strategy_that_trains_something_else_is_refused(strategy, instead):
    with pytest.raises(ValueError, match=rf"^trainer\.strategy: '{strategy}' is not supported; take {instead}"):
        settle_devices(settings(strategy=strategy), False)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp2"])
def test_others_pass(strategy):
    settle_devices(settings(strategy=strategy, precision="bf16-mixed"), False)


def test_16_mixed_is_refused_where_no_scaler_is_proven():
    with pytest.raises(ValueError, match=r"^trainer\.precision: '16-mixed' is not supported by fsdp2"):
        settle_devices(settings(strategy="fsdp2", precision="16-mixed"), False)


def test_averages_of_weights_are_refused_where_weights_are_sharded():
    trainer = Trainer(accelerator="cpu", devices=2, strategy="fsdp2", callbacks=[EMAWeightAveraging()], logger=False)
    with pytest.raises(ValueError, match="averages of weights"):
        check_callbacks(trainer, None)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_shards_are_saved_by_fsdp2_alone(monkeypatch, strategy):
    environment(monkeypatch, {})
    settle_devices(settings(strategy="fsdp2"), saves_shards=True)
    with pytest.raises(ValueError, match=r"^checkpoint\.sharded: true is for trainer\.strategy fsdp2"):
        settle_devices(settings(strategy=strategy), saves_shards=True)
