"""Allowed values of every option of fit, validate and test, and cases of bad values."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from benchmarks.bad_input.checks import trained
from benchmarks.bad_input.data_options import DATA
from benchmarks.bad_input.fixtures import fit_arguments
from benchmarks.bad_input.options import odd_files
from benchmarks.bad_input.values import (
    a_class,
    anything,
    choice,
    file_to_read,
    flag,
    place_to_write,
    real,
    text,
    whole,
)
from benchmarks.bad_input.verdict import Case, done, refused

# Shares of the batches or numbers of them; Lightning takes 1.0 for all and 1 for one.
BATCHES = real(0, null=True, good=(1, 1.0, 2))
TRAINER = {
    "accelerator": choice("auto", "cpu", good=("cpu",)),
    "strategy": choice("auto", good=("auto",)),
    "devices": whole(1, good=(1, "auto")),
    "num_nodes": whole(1, good=(1,)),
    "precision": choice("32-true", "bf16-mixed", good=("32-true", "bf16-mixed", "32")),
    "logger": flag(null=True, good=("true", "null")),
    "callbacks": a_class(good=("[]", "null")),
    "fast_dev_run": whole(0, good=("true", "2", "false")),
    "max_epochs": whole(-1, null=True, good=(1, "null")),
    "min_epochs": whole(0, null=True, good=("null",)),
    "max_steps": whole(-1, also=(("range", "0"), ("range", "-2")), good=(2,)),
    "min_steps": whole(0, null=True, good=("null",)),
    "max_time": text(good=("00:01:00:00", "null")),
    "limit_train_batches": BATCHES,
    "limit_val_batches": BATCHES,
    "limit_test_batches": BATCHES,
    "limit_predict_batches": real(0, null=True),
    "overfit_batches": real(0, good=(0, 2)),
    "val_check_interval": real(0, null=True, low_too=False, good=(1, "null")),
    "check_val_every_n_epoch": whole(1, null=True, good=(1,)),
    "num_sanity_val_steps": whole(-1, null=True, good=(-1, 0, 2)),
    "log_every_n_steps": whole(0, null=True, good=(0, 1, 10**9)),
    "enable_checkpointing": flag(null=True),
    "enable_progress_bar": flag(null=True, good=("false",)),
    "enable_model_summary": flag(null=True, good=("true", "null")),
    "accumulate_grad_batches": whole(1, good=(1,)),
    "gradient_clip_val": real(0, null=True, good=(1, 0.5, "null", ".inf"), infinite=True),
    "gradient_clip_algorithm": choice("norm", "value", null=True, good=("null",)),
    "deterministic": flag(null=True, good=("true", "warn")),
    "benchmark": flag(null=True, good=("true",)),
    "inference_mode": flag(good=("false",)),
    "use_distributed_sampler": flag(good=("false",)),
    "profiler": choice("simple", null=True, good=("simple", "null")),
    "detect_anomaly": flag(good=("true",)),
    "barebones": flag(),
    "plugins": a_class(good=("null",)),
    "sync_batchnorm": flag(good=("false",)),
    "reload_dataloaders_every_n_epochs": whole(0, good=(0, 1)),
    "default_root_dir": anything(good=("null",)),
    "enable_autolog_hparams": flag(good=("false",)),
    "model_registry": anything(good=("null",)),
}
MODULE = {
    "seed_everything": whole(0, 2**32 - 1, good=(0, 2**32 - 1, "true")),
    "model": file_to_read(good=("{place}/run", "{place}/gpt2", "{place}/model.gguf")),
    "optimizer": a_class(good=("SGD", "torch.optim.Adagrad")),
    "optimizer.lr": real(0, good=(0.1,), also=(("huge", "1e30"),)),
    "optimizer.weight_decay": real(0, good=(0, 0.1)),
    "optimizer.betas": choice("[0.9, 0.99]", good=("[0.9, 0.99]", "[0, 0]")),
    "optimizer.eps": real(0, good=("1e-12",)),
    "optimizer.amsgrad": flag(good=("true",)),
    "lr_scheduler": a_class(good=("null",)),
    "lr_scheduler.warmup_steps": whole(0, good=(0,)),
    "lr_scheduler.final": real(0, 1, good=(0, 1)),
    "lr_scheduler.total_steps": whole(1, null=True, good=(1, "null")),
    "lr_scheduler.stages": whole(1, good=(1,)),
    "position_share": real(0, 1, low_too=False, good=(1, 0.01)),
    "exit_target": a_class(good=("Labels", "SelfDistillation", "LK")),
    "exit_target.temperature": real(0, low_too=False, good=(1,)),
    "anchor_weight": real(0, null=True, good=(0, 1)),
    "low_rank": a_class(good=("null",)),
    "low_rank.rank": whole(1, good=(1, 8)),
    "low_rank.scale": real(0, low_too=False, good=(1,)),
    "low_rank.exit_layer": whole(1, 3, good=(1, 3)),
    "exit_heads": flag(good=("true",)),
    "learned_exit": flag(good=("true",)),
    "not_finite": choice("stop", "skip", good=("skip",)),
    "gradient_checkpointing": flag(good=("true",)),
    "flex_attention": flag(good=("true",)),
    "peak_flops": real(0, low_too=False, null=True, good=(1, "null")),
    "data": a_class(),
    "layer_dropout": a_class(good=("LayerDropout", "null")),
    "layer_dropout.p_max": real(0, 1, good=(0, 1)),
    "layer_dropout.depth": a_class(good=("Linear", "Alternating")),
    "layer_dropout.time": a_class(good=("Linear", "Falling")),
    "layer_dropout.scale_kept": flag(good=("true",)),
    "layer_dropout.masks": choice("shared", "per_rank", good=("per_rank",)),
    "early_exit_loss": a_class(good=("EarlyExitLoss", "null")),
    "early_exit_loss.e_scale": real(0, null=True, good=(0, 1)),
    "early_exit_loss.shares.2": real(0, 1, low_too=False, high_too=False, good=(0.3,)),
    "early_exit_loss.curriculum": a_class(good=("Gradual", "null")),
    "early_exit_loss.curriculum.period": whole(1, good=(1,)),
    "checkpoint.every_n_train_steps": whole(1, good=(1, 10**9)),
    "checkpoint.sharded": flag(good=("false",)),
    "run_folder": place_to_write(),
    "ckpt_path": file_to_read(good=("null",)),
    "weights_only": flag(null=True),
    "verbose": flag(),
}
OPTIONS = {**MODULE, **{f"data.{k}": v for k, v in DATA.items()}, **{f"trainer.{k}": v for k, v in TRAINER.items()}}
EXTRA = {
    "lr_scheduler.": ("--lr_scheduler=WarmupCosine",),
    "exit_target.": ("--exit_target=SelfDistillation",),
    "low_rank.": ("--low_rank=LowRank", "--low_rank.exit_layer=2"),
    "layer_dropout.": ("--layer_dropout=LayerDropout",),
    "early_exit_loss.curriculum.": ("--early_exit_loss.curriculum=Rotational",),
    "early_exit_loss.": ("--early_exit_loss=EarlyExitLoss",),
    "trainer.accumulate_grad_batches": (),
}
# What validate and test go by; the others are there so that they take the config.yaml of a run.
READ_LATER = (
    *("seed_everything", "model", "run_folder", *(f"data.{name}" for name in DATA), "data", "layer_dropout"),
    *(f"trainer.{name}" for name in ("accelerator", "strategy", "devices", "precision", "logger", "callbacks")),
    *(
        f"trainer.{name}"
        for name in ("limit_val_batches", "limit_test_batches", "profiler", "plugins", "inference_mode")
    ),
    *(f"trainer.{name}" for name in ("fast_dev_run", "deterministic", "num_nodes", "default_root_dir")),
)
# Of plan, beside those of fit; and what of those it goes by.
PLAN = {"mfu": real(0, 1, low_too=False, good=(1, 0.01)), "output": place_to_write()}
PLANNED = (
    *("model", "optimizer", "optimizer.betas", "position_share", "exit_target", "anchor_weight", "low_rank"),
    *(
        "gradient_checkpointing",
        "flex_attention",
        "peak_flops",
        "layer_dropout.p_max",
        "early_exit_loss.curriculum",
        "data",
    ),
    *("data", "data.block_size", "data.batch_size", "trainer.accelerator", "trainer.strategy", "trainer.devices"),
    *("trainer.num_nodes", "trainer.precision", "trainer.max_steps", "trainer.accumulate_grad_batches"),
)
ONLY_OTHERS = {"verbose"}
CHANGES_STEPS = {"trainer.fast_dev_run", "trainer.max_epochs"}


def cases(random: Random) -> Iterator[Case]:
    """Yield random bad values of every option, and for fit the good values."""
    for option, domain in OPTIONS.items():
        if option in ONLY_OTHERS:
            continue
        for kind, value in random.sample(domain.bad, min(2, len(domain.bad))):
            yield bad_value("fit", option, kind, value)
        if domain.good:
            yield good_value(option, random.choice(domain.good))
    for option, domain in {**PLAN, **{name: OPTIONS[name] for name in PLANNED}}.items():
        for kind, value in random.sample(domain.bad, min(1, len(domain.bad))):
            yield bad_value("plan", option, kind, value)
    for option, domain in PLAN.items():
        for value in domain.good:
            yield Case("plan", "legal", f"{option}={value!r}", arguments("plan", option, value), done(), odd_files)
    for command in ("validate", "test"):
        for option in READ_LATER:
            for kind, value in random.sample(OPTIONS[option].bad, min(1, len(OPTIONS[option].bad))):
                yield bad_value(command, option, kind, value)


def bad_value(command: str, option: str, kind: str, value: str) -> Case:
    what = f"{option}={value[:60]!r}"
    return Case(command, kind, what, arguments(command, option, value), refused(option.rpartition(".")[2]), odd_files)


def good_value(option: str, value: str) -> Case:
    right = done() if option in CHANGES_STEPS else done(trained(2))
    return Case("fit", "legal", f"{option}={value!r}", arguments("fit", option, value), right, odd_files)


def arguments(command: str, option: str, value: str) -> tuple[str, ...]:
    base = fit_arguments("{place}", "{here}/out", "{place}/llama" if command in ("fit", "plan") else "{place}/run")
    extra = next((more for start, more in EXTRA.items() if option.startswith(start)), ())
    return (*base, *extra, f"--{option}={value}")
