"""--config: files and names, what is no config, and what would unfold without end."""

import time
from pathlib import Path

import pytest
import yaml

from lskip.cli import main
from lskip.cli.config_files import shipped_configs

STEPS = list(zip("abcdefgh", "bcdefghi", strict=True))
BOMB = (
    "{a: &a [x,x,x,x,x,x,x,x,x]" + "".join(f", {new}: &{new} [{','.join(['*' + old] * 9)}]" for old, new in STEPS) + "}"
)
# content -> words of the sentence
BAD = {
    "B41 a list": ("[1, 2]", "config 'c.yaml' list"),
    "B41 empty": ("", "config 'c.yaml' empty"),
    "B41 binary": (b"\x00\x01\xff", "config c.yaml' UTF-8"),
    "B41 Latin-1": ("model: caf\xe9".encode("latin-1"), "config c.yaml' UTF-8"),
    "B31 python": ("model: !!python/object/apply:os.system [touch MARK]", "config 'c.yaml' line 1"),
    "B31 text": ("hello", "config 'c.yaml' str"),
    "B31 broken": ("model: [x", "config 'c.yaml' line"),
    "B32 aliases": (f"model: {BOMB}", "config 'c.yaml' aliases"),
    "aliases in a text": (f"seed: '{BOMB}'\nseed_everything: '{BOMB}'", "seed"),
    "deep": ("model: " + "[" * 5000, "config 'c.yaml' depth"),
    "itself": ("config: c.yaml", "loop c.yaml"),
    "a key twice": ("model: a\nmodel: b", "config 'c.yaml' 'model' twice"),
    "comments alone": ("# a\n", "config 'c.yaml'"),
    "no names": ("1: 2", "config 'c.yaml'"),
    "a config that is none": ("config: 5", "config: 5"),
    "a NUL": ('model: "a\\0b"', "model: NUL"),
    "a NUL deep inside": ('data: {source: ["a\\0b"]}', "data.source: NUL"),
    "a group that is empty": ("trainr: {}", "trainr"),
    "escapes": ('"\\e[2J": 1', "there is no such option"),
    "larger than is read": (None, "config c.yaml' MiB"),
}


@pytest.mark.kind("B31 B32 YAML that bombs, runs or does not parse")
@pytest.mark.parametrize("command", ["fit", "generate"])
@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD)
def test_what_is_no_config_is_one_sentence_at_once(content, words, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = Path("c.yaml")
    path.write_bytes(content if isinstance(content, bytes) else (content or "").encode())
    if content is None:
        with path.open("r+b") as file:
            file.truncate(65 * 2**20)
    began = time.perf_counter()
    assert main([command, "--config", "c.yaml"]) == 2
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1 and "\x1b" not in sentence and not Path("MARK").exists()
    for word in words.split():
        assert word in sentence, sentence
    assert time.perf_counter() - began < 20  # once with the imports


@pytest.mark.kind("B31 B32 YAML that bombs, runs or does not parse")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["fit", "--model", BOMB], "model: aliases", id="B32 in a flag"),
        pytest.param(["fit", "--config", BOMB], "config: aliases", id="B32 in the value of --config"),
        pytest.param(["fit", "--model=x", "--optimizer", BOMB], "optimizer", id="aliases for a class"),
        pytest.param(["generate", "--prompt=x", "--seed", BOMB], "seed aliases", id="aliases for a number"),
        pytest.param(["generate", "--prompt=x", "--stop_strings", BOMB], "stop_strings", id="aliases for a list"),
        pytest.param(["fit", "--config", "http://127.0.0.1:1/c.yaml"], "config: no file", id="an address"),
        pytest.param(["fit", "--config", "memory://c.yaml"], "config: no file", id="a file system of its own"),
        pytest.param(["fit", "--model=x", "--trainer", "http://127.0.0.1:1/c.yaml"], "trainer: http", id="a group's"),
        pytest.param(["fit", "--config", "."], "config: folder", id="B41 a folder"),
        pytest.param(["fit", "--config=/proc/self/mem"], "config: cannot be read", id="what cannot be read"),
        pytest.param(["fit", "--model=x", "--optimizer=/proc/self/mem"], "optimizer: class kind", id="nor a class's"),
        pytest.param(["fit", "--config", "quikstart"], "config: quickstart", id="M1 misspelled"),
    ],
)
def test_a_value_that_is_none_is_one_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    sentence = capsys.readouterr().err
    assert sentence.count(": error: ") == 1 and all(word in sentence for word in words.split()), sentence


def test_a_pipe_is_read_once(tmp_path, capsys):
    import os
    import threading

    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=["model: x\ntrainer: {max_stps: 3}\n"]).start()
    assert main(["fit", "--config", str(tmp_path / "pipe")]) == 2
    assert "did you mean trainer.max_steps?" in capsys.readouterr().err


# Those that come with lskip.


@pytest.mark.kind("M a new user's first hour", "M1")
@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml", "recipes/small"])
def test_a_config_by_its_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", name, "--print_config"])
    assert left.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    shipped = yaml.safe_load(shipped_configs()[name.removeprefix("configs/").removesuffix(".yaml")].read_text())
    assert shown["model"] == shipped["model"] and shown["run_folder"] == shipped["run_folder"]


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("model: x\ntrainer: {max_stps: 3}\n")
    assert main(["fit", "--config", "quickstart"]) == 2
    assert "max_stps" in capsys.readouterr().err


@pytest.mark.kind("M a new user's first hour", "M1")
def test_configs_are_listed_and_copied_never_over_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["configs"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert (
        {"quickstart", "curriculum/gradual", "recipes/small", "memory/bf16"} <= set(names) == shipped_configs().keys()
    )
    for place, written in (([], "quickstart.yaml"), (["mine.yaml"], "mine.yaml"), ([str(tmp_path)], None)):
        code = main(["configs", "copy", "quickstart", *place])
        assert code == (0 if written else 2)  # the last is there from the first
        if written:
            assert Path(written).read_bytes() == shipped_configs()["quickstart"].read_bytes()
    assert "exists already" in capsys.readouterr().err
    for wrong in (["copy"], ["copy", "quikstart"], ["list"], ["copy", "quickstart", "no/such/place"]):
        assert main(["configs", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
