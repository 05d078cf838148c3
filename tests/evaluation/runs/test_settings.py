"""A config as names and plain values."""

from lskip.evaluation.runs.settings import run_settings


def test_a_config_by_hand():
    config = {
        "seed_everything": 3,
        "model": {"model_type": "llama", "hidden_size": 64},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.9, 0.95]}},
        "lr_scheduler": None,
        "early_exit_loss": {
            "class_path": "lskip.callbacks.EarlyExitLoss",
            "init_args": {
                "e_scale": 0.2,
                "curriculum": {"class_path": "lskip.curricula.Rotational", "init_args": {"period": 8}},
            },
        },
        "layer_dropout": {"class_path": "lskip.callbacks.LayerDropout"},
        "run_folder": "runs/x",
        "checkpoint": {"every_n_train_steps": 50},
        "ckpt_path": None,
        "trainer": {"max_steps": 250, "precision": None, "accelerator": "cpu", "logger": None},
    }
    assert run_settings(config) == {
        "seed_everything": 3,
        "model.model_type": "llama",
        "model.hidden_size": 64,
        "optimizer": "AdamW",
        "optimizer.lr": 1e-3,
        "optimizer.betas": "0.9, 0.95",
        "early_exit_loss": "EarlyExitLoss",
        "early_exit_loss.e_scale": 0.2,
        "early_exit_loss.curriculum": "Rotational",
        "early_exit_loss.curriculum.period": 8,
        "layer_dropout": "LayerDropout",
        "trainer.max_steps": 250,
    }
    shares = {"early_exit_loss": {"class_path": "lskip.callbacks.EarlyExitLoss", "init_args": {"shares": {4: 0.3}}}}
    assert run_settings(shares) == {"early_exit_loss": "EarlyExitLoss", "early_exit_loss.shares": "4: 0.3"}
    assert run_settings({"model": "smollm2"}) == {"model": "smollm2"}
