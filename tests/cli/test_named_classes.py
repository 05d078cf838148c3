"""A config from a stranger runs nothing: in no field of any command is made what is no class of its kind."""

import re

import pytest
import yaml

from lskip.cli import main
from lskip.cli.entry import COMMANDS

# Whatever of it is called, or made, leaves a mark.
EVIL = """
from pathlib import Path
from torch.optim import Optimizer

def touch(*arguments, **more):
    Path("MARK").touch()

def made(*arguments, **more) -> Optimizer:
    touch()

class Touch:
    def __init__(self, *arguments, **more):
        touch()

    def __call__(self, *arguments, **more):
        touch()

class Meta(type):
    def __call__(cls, *arguments, **more):
        touch()

class ByMeta(metaclass=Meta):
    pass
"""
SHELL = {"command": "touch MARK"}
CODE = "open('MARK', 'w')"
# (what is named, with which arguments); evil.py is a module that the working directory has.
FRIENDS = [
    ("os.system", SHELL),
    ("posix.system", SHELL),
    ("torch.os.system", SHELL),
    ("subprocess.Popen", {"args": ["touch", "MARK"]}),
    ("subprocess.run", {"args": ["touch", "MARK"]}),
    ("builtins.eval", {"source": CODE}),
    ("builtins.exec", {"source": CODE}),
    ("functools.partial", {"func": "os.system"}),
    ("shutil.copy", {"src": "evil.py", "dst": "MARK"}),
    ("runpy.run_path", {"path_name": "evil.py"}),
    ("pty.spawn", {"argv": ["touch", "MARK"]}),
    ("timeit.timeit", {"stmt": CODE}),
    ("code.InteractiveInterpreter", {}),
    ("pathlib.Path", {}),
    ("torch.hub.load", {"repo_or_dir": "evil", "model": "x", "source": "local"}),
    ("torch.utils.cpp_extension.load_inline", {"name": "x", "cpp_sources": ""}),
    ("evil.touch", {}),
    ("evil.made", {}),
    ("evil.Touch", {}),
    ("evil.ByMeta", {}),
]
IDS = [f"B2 {path}" if path in ("os.system", "subprocess.Popen", "functools.partial") else path for path, _ in FRIENDS]
OF_CLASSES = [
    *("optimizer", "lr_scheduler", "exit_target", "low_rank", "data", "layer_dropout", "early_exit_loss"),
    *(f"trainer.{name}" for name in ("accelerator", "strategy", "logger", "callbacks", "profiler", "plugins")),
]
MODEL = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def nested(field: str, value) -> dict:
    for part in reversed(field.split(".")):
        value = {part: value}
    return value


def refused(place, capsys, command: str, config: dict, *flags: str) -> str:
    """The one sentence by which a config is refused; nothing has been run."""
    (place / "strange.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    code = main([command, "--config", "strange.yaml", *flags])
    errors = capsys.readouterr().err.rstrip("\n")
    assert code == 2, (config, code)
    assert errors.count(": error: ") == 1 and "Traceback" not in errors
    assert not (place / "MARK").exists(), config
    return errors.rpartition("\n")[2]


def options_of(command: str, capsys) -> list[str]:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    names = re.findall(r"^ +(?:ARG: +)?(?:-c|--[\w.]+)[^\n]*", capsys.readouterr().out, re.M)
    found = dict.fromkeys(name for line in names for name in re.findall(r"--([\w.]+)", line.partition("  ")[0] or line))
    return [name for name in found if not name.endswith(("help", "config"))]


@pytest.mark.kind("B2 only classes of a field's kind are made", "B2")
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("configs", "validate", "test")])
def test_no_field_of_a_command_runs_what_stands_there(command, place, capsys):
    # validate and test have fit's parser: their fields of classes are tried below.
    options = options_of(command, capsys)
    assert len(options) > (60 if command == "fit" else 0)
    for at, option in enumerate(options):
        path, arguments = FRIENDS[at % len(FRIENDS)]
        config = {} if option == "model" or command != "fit" else {"model": MODEL}
        config |= nested(option, {"class_path": path, "init_args": arguments})
        flags = ["runs"] if command == "compare" else []
        refused(place, capsys, command, config, *flags)


@pytest.mark.kind("B2 only classes of a field's kind are made")
@pytest.mark.parametrize(("path", "arguments"), FRIENDS, ids=IDS)
def test_no_friend_of_os_system_gets_in(path, arguments, place, capsys):
    spec = {"class_path": path, "init_args": arguments}
    for field in ("optimizer", "lr_scheduler", "trainer.callbacks", "data"):
        sentence = refused(place, capsys, "fit", {"model": MODEL, **nested(field, spec)})
        assert field in sentence and ("not a class of" in sentence or path in sentence), sentence
    for command, field in (("generate", "draft_policy"), ("sweep", "task")):
        assert field in refused(place, capsys, command, {field: spec})


@pytest.mark.kind("B2 only classes of a field's kind are made", "B2")
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_own_functions_and_classes_of_another_kind(command, place, capsys):
    for at, field in enumerate(OF_CLASSES):
        path = ("evil.touch", "evil.made", "evil.Touch", "evil.ByMeta")[at % 4]
        spec = {"class_path": path} if at % 3 else path
        refused(place, capsys, command, {"model": MODEL, **nested(field, [spec] if "callbacks" in field else spec)})


# A class that is allowed, with a stranger's among its arguments.
INSIDE = {
    "a rate": {
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "evil.touch"}}
    },
    "a rate of a class": {
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.LambdaLR",
            "init_args": {"lr_lambda": {"class_path": "evil.Touch"}},
        }
    },
    "a callback": nested(
        "trainer.callbacks",
        [{"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "evil.touch"}}],
    ),
    "a curriculum": nested("early_exit_loss.curriculum", {"class_path": "evil.Touch"}),
    "a schedule": nested("layer_dropout.depth", {"class_path": "evil.touch"}),
    "a strategy": nested(
        "trainer.strategy",
        {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"ddp_comm_hook": "evil.touch"}},
    ),
    "a tokenizer": nested("data", {"class_path": "TextData", "init_args": {"tokenizer": {"class_path": "evil.Touch"}}}),
    "any value": {"model": {**MODEL, "rope_scaling": {"class_path": "evil.Touch"}}},
    "a class of classes": {
        "optimizer": {
            "class_path": "torch.distributed.optim.ZeroRedundancyOptimizer",
            "init_args": {"optimizer_class": "evil.Touch"},
        }
    },
}


@pytest.mark.kind("B2 only classes of a field's kind are made")
@pytest.mark.parametrize("config", INSIDE.values(), ids=INSIDE)
def test_nothing_gets_in_by_the_arguments_of_a_class(config, place, capsys):
    refused(place, capsys, "fit", {"model": MODEL, **config})


def test_what_is_allowed_still_is(place, capsys):
    allowed = {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "lr_scheduler": "torch.optim.lr_scheduler.ConstantLR",
        "trainer": {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss"}}]},
        "data": {"class_path": "TextData", "init_args": {"source": "nowhere.txt"}},
    }
    sentence = refused(place, capsys, "fit", {"model": MODEL, **allowed})
    assert "source: no file or folder 'nowhere.txt'" in sentence


@pytest.mark.kind("B20 B40 told before anything is read")
@pytest.mark.parametrize(
    "field",
    ["run_folder", "optimizer", "position_share", "trainer.max_steps", "data.block_size", "layer_dropout.depth"],
)
def test_null_is_refused_where_it_means_nothing(field, place, capsys):
    assert f"{field}: null is not allowed" in refused(place, capsys, "fit", {"model": MODEL, **nested(field, None)})
