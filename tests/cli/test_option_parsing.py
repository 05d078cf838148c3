"""Options to values: lists in every spelling, and sentences that name field, value and what is allowed."""

import inspect
from typing import Optional, Union

import pytest
import yaml
from jsonargparse import ArgumentParser
from jsonargparse._util import import_object

from lskip.cli import commands, main
from lskip.cli.option_parsing import parse_options


@pytest.fixture
def given(monkeypatch):
    """Function command, *options -> what the command's function is called with."""
    called = []

    def call(command: str, *options: str) -> dict:
        import functools

        function = commands.command_named(command)
        stand_in = functools.wraps(function)(lambda *lists, **arguments: called.append(arguments))
        with monkeypatch.context() as patch:
            patch.setattr(commands, "command_named", lambda name: stand_in)
            assert main([command, *options]) == 0
        return called[-1]

    return call


SWEEP = ("sweep", "--task=StdlibCode", "--output=x")
LISTS = {
    "M lists 2,4": (["--num_speculations", "2,4"], "num_speculations", [2, 4]),
    "M lists [2,4]": (["--num_speculations", "[2,4]"], "num_speculations", [2, 4]),
    "words": (["--num_speculations", "2", "4"], "num_speculations", [2, 4]),
    "one": (["--num_speculations", "4"], "num_speculations", [4]),
    "one with =": (["--num_speculations=4"], "num_speculations", [4]),
    "names with commas": (["--drafts", "layers,ngram"], "drafts", ["layers", "ngram"]),
    "names as words": (["--drafts", "layers", "ngram", "--rounds", "1"], "drafts", ["layers", "ngram"]),
    "two lists": (["--exit_layers=2,3", "--num_speculations=2,4"], "exit_layers", [2, 3]),
    "null": (["--num_speculations", "null"], "num_speculations", None),
    "a text of names": (["--exits", "2", "last"], "exits", "2,last"),
    "a text of names in brackets": (["--exits", "[2, last]"], "exits", "2,last"),
}


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize(("options", "name", "value"), LISTS.values(), ids=LISTS)
def test_a_list_in_every_spelling(options, name, value, given):
    assert given(*SWEEP, *options)[name] == value


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize(
    ("words", "value"),
    [
        pytest.param(["."], ["."], id="M one text"),
        pytest.param(["a, b"], ["a, b"], id="a comma is text"),
        pytest.param(["a", "b,c"], ["a", "b,c"], id="several texts"),
        pytest.param(['["a","\\n"]'], ["a", "\n"], id="JSON"),
        pytest.param(["a"], ["a"], id="a word of the parser's own"),
        pytest.param(["#"], ["#"], id="a comment of YAML"),
        pytest.param(["\n# "], ["\n# "], id="a comment in the next line"),
        pytest.param(["\n"], ["\n"], id="a newline"),
        pytest.param(["5"], ["5"], id="what another option has too"),
        pytest.param(['["5","null","a: b","[x]"]'], ["5", "null", "a: b", "[x]"], id="texts that look like values"),
        pytest.param(["5", "true"], ["5", "true"], id="words that look like values"),
    ],
)
def test_a_list_of_texts(words, value, given):
    options = ("--prompt=a", "--max_new_tokens=5", "--stop_strings", *words)
    assert given("generate", *options)["decoding"].stop_strings == value


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize("text", ["# A title", "#", "\n# x", "a # b", "5", "2024-01-01", "[1]", "{a: b}", "a: b"])
def test_a_text_that_yaml_would_take_for_something_else(text, given):
    assert given("inspect", "--output=x", f"--text={text}")["text"] == text


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize("words", [["2", "3"], ["2,3"], ["[2,3]"], ["2, 3"]])
def test_a_list_among_the_arguments_of_a_class(words, capsys):
    chosen = ["--early_exit_loss.curriculum=ChosenExits", "--early_exit_loss.curriculum.exit_layers", *words]
    with pytest.raises(SystemExit):
        main(["fit", "--model=x", "--early_exit_loss=EarlyExitLoss", *chosen, "--print_config"])
    assert "exit_layers:\n        - 2\n        - 3\n" in capsys.readouterr().out


FIT = "fit --model=/nowhere"
# command -> words of the sentence, and those that would be another's
SENTENCES = {
    "B41 seed": (f"{FIT} --seed_everything=-1", "seed_everything: -1 from 0 to 4294967295"),
    "B41 precision": (f"{FIT} --trainer.precision=8", "trainer.precision: '8' 32 bf16-mixed bf16-true"),
    "B41 logger": (f"{FIT} --trainer.logger=foo", "trainer.logger: 'foo' CSVLogger TensorBoardLogger"),
    "B41 trainer.foo": (f"{FIT} --trainer.foo=1", "trainer.foo: there is no such option"),
    "B41 stop_strings": ('generate --prompt=x --stop_strings={"a":1}', "stop_strings: 'a' is not a list"),
    "a text is no list of numbers": ("sweep --task=StdlibCode --output=x --rounds=2 --exit_layers=a", "list of whole"),
    "numbers are no texts": ("generate --prompt=x --stop_strings=[5]", "stop_strings: '[5]' is not a list of texts"),
    "a word of the parser's own": ("generate --prompt=x --draft=a", "draft: 'a' layers ngram"),
    "B41 costs_file": ("generate --prompt=x --costs_file=.", "costs_file: '.' folder"),
    "F65 ReduceLROnPlateau": (
        f"{FIT} --lr_scheduler=ReduceLROnPlateau",
        "lr_scheduler: 'ReduceLROnPlateau' torch.optim",
    ),
    "M CSVLogger": (f"{FIT} --trainer.logger=CSVLogger", "trainer.logger.save_dir: must be given"),
    "M generat": ("generat", "did you mean generate?"),
    "M a text": ("generate Why", "'Why' --prompt"),
    "M max_new_tokens": ("tune --task=StdlibCode --max_new_tokens=3", "max_new_tokens: task.max_new_tokens"),
    "B40 weights_only": (f"{FIT} --weights_only=false", "weights_only: false"),
    "a callback's argument": (f"{FIT} --trainer.callbacks=[EarlyStopping]", "trainer.callbacks.monitor: must be given"),
    "a name beside": (f"{FIT} --trainer.max_stps=1", "did you mean trainer.max_steps?"),
    "two for one": (f"{FIT} --optimizer.betas=1", "optimizer.betas: a list of 2"),
    "beside class_path": (f"{FIT} --optimizer={{class_path:SGD,foo:1}}", "optimizer"),
    "a number for a class": (f"{FIT} --optimizer=[1]", "optimizer: '[1]' class Optimizer"),
    "a list for a class": ("generate --prompt=x --draft_policy=[1]", "draft_policy: '[1]' class DraftPolicy"),
    "a group": (f"{FIT} --checkpoint=x", "checkpoint: 'x' options and their values"),
    "a list for the model": ("fit --model=[1,2]", "model: '[1,2]' neither"),
    "an argument of the data": (f"{FIT} --block_size=32", "block_size: did you mean data.block_size?"),
    "of the optimizer": (f"{FIT} --lr=0.1", "lr: did you mean optimizer.lr?"),
    "of the schedule": (f"{FIT} --warmup_steps=3", "did you mean lr_scheduler.warmup_steps?"),
    "of a method": (f"{FIT} --p_max=0.1", "did you mean layer_dropout.p_max?"),
    "one of a list": ("sweep --task=StdlibCode --output=x --drafts=layers,layrs", "drafts: 'layrs' layers ngram"),
    "a number of a list": ("sweep --task=StdlibCode --output=x --num_speculations=2,x", "'x' is not a whole number"),
    "a list in a list": ("sweep --task=StdlibCode --output=x --exits=[[2]]", "exits: '[2]' 8,16,last"),
    "no value": ("sweep --task=StdlibCode --output", "output: a value is missing"),
    "no value of a class": (f"{FIT} --data.source", "data: a value is missing"),
    "no value of the config": ("fit --config", "config: a value is missing"),
    "a mapping cut off": ("fit --model={model_type:", "model: YAML"),
}


@pytest.mark.kind("B41 sentences that name field, value and what is allowed")
@pytest.mark.parametrize(("command", "words"), SENTENCES.values(), ids=SENTENCES)
def test_the_sentence(command, words, capsys):
    assert main(command.split()) == 2
    sentence = capsys.readouterr().err.rstrip("\n")
    assert sentence.count("\n") == 0 and len(sentence) < 300
    for word in words.split():
        assert word in sentence, sentence
    assert "Union" not in sentence and "Subtypes" not in sentence and "<class" not in sentence


# Modules of one's own that cannot be imported: in their own words.

MODULES = {
    "H2 gone": (None, "No module named 'own_gone'"),
    "a misspelled class": ("X = 1", "module 'own_misspelled' has no attribute 'Own'"),
    "syntax": ("def f(:", "invalid syntax (own_syntax.py, line 1)"),
    "another that is gone": ("\nimport not_there_at_all", "No module named 'not_there_at_all'"),
    "an error": ("\n\n1 / 0", "ZeroDivisionError: division by zero (own_error.py, line 3)"),
    "a key": ("{}['x']", "KeyError: 'x' (own_key.py, line 1)"),
    "another kind": ("class Own: pass", "is not a class of the kind"),
}


@pytest.mark.kind("H2 own classes from the working directory")
@pytest.mark.parametrize(("case", "source", "words"), [(case, *value) for case, value in MODULES.items()], ids=MODULES)
def test_what_is_wrong_with_an_own_module_is_said(case, source, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = f"own_{case.split()[-1]}" if "class" not in case else "own_misspelled"
    if source is not None:
        (tmp_path / f"{module}.py").write_text(source)
    for command in (
        f"fit --model=x --exit_target={module}.Own",
        f"fit --model=x --early_exit_loss=EarlyExitLoss --early_exit_loss.curriculum={module}.Own",
        f"validate --model=x --data={module}.Own",
        f"fit --model=x --trainer.callbacks=[{module}.Own]",
        f"generate --prompt=x --draft_policy={module}.Own",
        f"sweep --output=x --task={module}.Own",
    ):
        assert main(command.split()) == 2
        sentence = capsys.readouterr().err
        assert f"{module}.Own" in sentence and words in sentence and sentence.count("\n") == 1, sentence


OWN_DATA = """
from lskip.data import TextData


class OwnData(TextData):
    def __init__(self, source: str = "stdlib", batch_size: int = 3, block_size: int = 7, seed: int = 0):
        super().__init__(source, batch_size=batch_size, block_size=block_size, seed=seed)
"""
# options -> an argument and its value in the place of the default class's
SGD, ADAM = "--optimizer=torch.optim.SGD", "--optimizer=torch.optim.Adam"
OTHER_CLASSES = {
    "decay of SGD": ([SGD], "optimizer", {"weight_decay": 0.0, "lr": 3e-4}),
    "decay of Adam": ([ADAM, "--optimizer.lr=1"], "optimizer", {"weight_decay": 0.0, "lr": 1}),
    "from a config": (["--config=other.yaml"], "optimizer", {"weight_decay": 0.0, "lr": 0.5}),
    "from a config by a flag": (["--config=all.yaml", SGD], "optimizer", {"weight_decay": 0.0}),
    "set before": (["--optimizer.weight_decay=0.01", ADAM], "optimizer", {"weight_decay": 0.01}),
    "set to another": (["--optimizer.weight_decay=1", ADAM], "optimizer", {"weight_decay": 1}),
    "own data": (["--data=own_data_of_tests.OwnData"], "data", {"batch_size": 3, "block_size": 7}),
    "own data, in part": (
        ["--data=own_data_of_tests.OwnData", "--data.batch_size=5"], "data", {"batch_size": 5, "block_size": 7}
    ),
    "own data, set before": (
        ["--data.batch_size=16", "--data=own_data_of_tests.OwnData"], "data", {"batch_size": 16, "block_size": 7}
    ),
}  # fmt: skip


@pytest.mark.kind("H2 own classes from the working directory")
@pytest.mark.parametrize(("options", "field", "expected"), OTHER_CLASSES.values(), ids=list(OTHER_CLASSES))
def test_a_class_in_the_place_of_another_has_its_own_defaults(options, field, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_data_of_tests.py").write_text(OWN_DATA)
    (tmp_path / "other.yaml").write_text("optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.5}}")
    every = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "weight_decay": 0.01}}
    (tmp_path / "all.yaml").write_text(yaml.dump({"optimizer": every}))  # as a run's config.yaml says it
    with pytest.raises(SystemExit):
        main(["fit", "--model=x", *options, "--print_config"])
    arguments = yaml.safe_load(capsys.readouterr().out)[field]["init_args"]
    assert {name: arguments[name] for name in expected} == expected


OPTIMIZERS = ["torch.optim.SGD", "torch.optim.RMSprop", "torch.optim.Adam", "transformers.Adafactor"]


def printed(capsys, *options: str) -> dict:
    """What --print_config says."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--model=smollm2", *options, "--print_config"])
    assert not ended.value.code
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.kind("own: defaults of one class in another")
@pytest.mark.parametrize("path", OPTIMIZERS)
def test_another_optimizer_has_its_own_defaults(path, capsys):
    """AdamW's weight decay of 0.01 and its eps were in every optimizer whose arguments have these names."""
    arguments = printed(capsys, f"--optimizer={path}")["optimizer"]["init_args"]
    own = inspect.signature(import_object(path)).parameters
    rate = 3e-4 if own["lr"].default else None  # lskip's, where one is needed
    expected = {name: argument.default for name, argument in own.items() if name != "params"} | {"lr": rate}
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()} == {
        name: expected[name] for name in arguments
    }


def test_what_is_said_of_one_optimizer_stays_in_another(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(
        "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.5, betas: [0, 0.2]}}"
    )
    options = [f"--config={tmp_path}/a.yaml", "--optimizer=torch.optim.Adam"]
    arguments = printed(capsys, *options)["optimizer"]["init_args"]
    assert (arguments["lr"], arguments["betas"], arguments["weight_decay"]) == (0.5, [0, 0.2], 0)


def test_a_default_that_is_an_enum_is_written_as_its_text(capsys):
    """Timer's `interval`: a run died where it wrote its config.yaml."""
    spec = "[{class_path: lightning.pytorch.callbacks.Timer, init_args: {duration: '00:00:05:00'}}]"
    (timer,) = printed(capsys, f"--trainer.callbacks={spec}")["trainer"]["callbacks"]
    assert timer["init_args"]["interval"] == "step"


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize(("text", "value"), [("2", 2), ("1", 1), ("1.0", 1.0), ("0.5", 0.5), ("null", None)])
def test_a_whole_number_is_one_whoever_first_wrote_the_type(text, value):
    """Of Optional[Union[…]] Python keeps the one that was written first, with its order: 1 is one batch, 1.0 is all."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--limit", type=Optional[Union[float, int]], default=None)  # noqa: UP007, UP045
    found = parse_options(parser, [f"--limit={text}"], parser, {}).limit
    assert found == value and type(found) is type(value)
