"""Untrusted configs that name functions and other classes in place of a class: they must not be called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

from benchmarks.bad_input.configs import base
from benchmarks.bad_input.verdict import Case, done, either, refused

# Callables that leave a file MARK in the working directory, with their arguments.
CALLED = {
    "os.system": {"command": "touch MARK"},
    "os.mkdir": {"path": "MARK"},
    "os.popen": {"cmd": "touch MARK"},
    "subprocess.Popen": {"args": ["touch", "MARK"]},
    "subprocess.check_output": {"args": ["touch", "MARK"]},
    "subprocess.getoutput": {"cmd": "touch MARK"},
    "builtins.open": {"file": "MARK", "mode": "w"},
    "builtins.exec": {"source": "open('MARK', 'w')"},
    "io.FileIO": {"file": "MARK", "mode": "w"},
    "torch.save": {"obj": 1, "f": "MARK"},
    "numpy.save": {"file": "MARK", "arr": [1]},
    "pathlib.Path.touch": {"self": "MARK"},
    "shutil.copy": {"src": "/etc/hostname", "dst": "MARK"},
    "runpy.run_path": {"path_name": "strange/evil.py"},
    "lightning.pytorch.loggers.CSVLogger": {"save_dir": "MARK"},
    "torch.utils.tensorboard.SummaryWriter": {"log_dir": "MARK"},
    "tempfile.TemporaryDirectory": {"dir": "."},
    "evil.Evil": {},
}
TRAINING = (
    *("optimizer", "lr_scheduler", "exit_target", "low_rank", "data", "layer_dropout", "layer_dropout.depth"),
    *("layer_dropout.time", "early_exit_loss", "early_exit_loss.curriculum", "trainer.accelerator", "trainer.strategy"),
    *("trainer.logger", "trainer.callbacks", "trainer.profiler", "trainer.plugins", "data.tokenizer", "model"),
    *("trainer.callbacks.0", "trainer.logger.0", "trainer.plugins.0", "trainer.max_time", "trainer.precision"),
)
INSIDE = {  # classes that are right, and arguments of theirs that are callables
    "lr_scheduler": ("torch.optim.lr_scheduler.LambdaLR", "lr_lambda"),
    "trainer.callbacks": ("lightning.pytorch.callbacks.LambdaCallback", "on_fit_start"),
    "trainer.callbacks.0": ("lightning.pytorch.callbacks.WeightAveraging", "avg_fn"),
    "trainer.profiler": ("lightning.pytorch.profilers.PyTorchProfiler", "schedule"),
}
OWNERS = {
    "layer_dropout.": "lskip.callbacks.LayerDropout",
    "early_exit_loss.": "lskip.callbacks.EarlyExitLoss",
    "data.": "lskip.data.TextData",
}
DECODING = {"generate": ("draft_policy", "exit_criterion"), "predict": ("draft_policy", "exit_criterion")}
TASKS = {"sweep": ("task",), "tune": ("task",)}


def cases(random: Random) -> Iterator[Case]:
    for field in TRAINING:
        for name in ("os.system", *random.sample(list(CALLED), 2)):
            command = random.choice(["fit", "fit", "validate", "test"])
            yield case(command, field, name, {"class_path": name, "init_args": CALLED[name]})
        name = random.choice(list(CALLED))
        yield case("fit", field, f"{name} by name", name)
    for field, (owner, argument) in INSIDE.items():
        for name in ("os.system", *random.sample(list(CALLED), 3)):
            inner = {"class_path": name, "init_args": CALLED[name]}
            yield case("fit", field, f"{argument}: {name}", {"class_path": owner, "init_args": {argument: inner}})
    for command, fields in {**DECODING, **TASKS}.items():
        for field in fields:
            for name in random.sample(list(CALLED), 4):
                yield case(command, field, name, {"class_path": name, "init_args": CALLED[name]})
    inner = {"class_path": "os.system", "init_args": {"command": "touch MARK"}}
    criterion = {"class_path": "lskip.inference.drafting.policies.CriterionDraft", "init_args": {"criterion": inner}}
    yield case("generate", "draft_policy", "os.system as a criterion", criterion)


def case(command: str, field: str, what: str, value: object) -> Case:
    config = nested(field, value)

    def prepare(here: Path) -> None:
        # evil.py lies beside the config, not where the user works, whose own classes may be named.
        (here / "strange").mkdir()
        (here / "strange" / "c.yaml").write_text(json.dumps(config))  # JSON is YAML
        (here / "strange" / "evil.py").write_text("open('MARK', 'w')\nclass Evil: pass\n")

    drafts = ("--exit_layer=2", "--num_speculations=2") if field == "draft_policy" else ()
    left = tuple(
        each for each in base(command) if not each.startswith(("--task", "--model=" if field == "model" else "--no"))
    )
    names = [part for part in field.split(".") if not part.isdigit()]
    arguments = (
        *(left if command in TASKS or field == "model" else base(command)),
        *drafts,
        "--config={here}/strange/c.yaml",
    )
    named = refused("|".join([names[-1], "criterion", "lr_lambda"]))
    # validate and test build no optimizer.
    right = (
        either(named, done()) if command in ("validate", "test") and field in ("optimizer", "lr_scheduler") else named
    )
    return Case(command, "stranger", f"{field}: {what}", arguments, right, prepare)


def nested(field: str, value: object) -> dict:
    """Return {"a": {"b": value}} for a.b, arguments of classes under init_args."""
    for start, owner in OWNERS.items():
        if field.startswith(start):
            name = field.removeprefix(start)
            return {start[:-1]: {"class_path": owner, "init_args": {name: value}}}
    head, *rest = field.split(".")
    if not rest:
        return {head: value}
    return {head: {rest[0]: [value] if rest[1:] else value}}
