"""The fuzz of bad input, shortly: what it tries is right, and it sees what is planted. And memory is looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> dict:
    """Of 30 cases and of what is planted, forked from a process that has started no threads yet."""
    folder = tmp_path_factory.mktemp("bad_input")
    command = [sys.executable, "-m", "benchmarks.bad_input.run", "--out", folder / "out.json", "--folder", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    more = ["--limit", "30", "--only", "generate", "--seed", "4"]
    ran = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=300)
    assert (folder / "out.json").is_file(), ran.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.kind("bad input of every kind: the seeded fuzz")
def test_bad_input_is_refused_by_name_or_has_its_effect(record):
    assert record["cases"] == 30
    assert [(case["case"], case["wrong"]) for case in record["wrong"]] == []
    assert sum(record["commands"]["generate"].values()) == 30


@pytest.mark.kind("bad input of every kind: the seeded fuzz")
def test_the_fuzz_sees_what_is_planted(record):
    """A KeyError in lskip with its traceback, a hang, a crash, other texts, a file that is left behind …"""
    assert record["planted"]["missed"] == {}
    assert record["planted"]["seen"] >= 19


@pytest.mark.usefixtures("process_settings")
@pytest.mark.parametrize("what", ["predict", "train"])
def test_memory_is_looked_at_as_it_goes(tmp_path, tiny_tokenizer, what):
    from benchmarks.memory.steady import main

    make_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    few = ["--count=30", "--every=10"] if what == "predict" else ["--count=50", "--every=10"]
    more = [f"--model={tmp_path / 'model'}", "--drafts=ngram", "--max_new_tokens=4", f"--out={tmp_path / 'out.json'}"]
    main([f"--what={what}", *few, *more])
    found = json.loads((tmp_path / "out.json").read_text())
    looks = [int(done) for done in found["mebibytes"]]
    assert looks[-1] == 30 if what == "predict" else looks == [10, 20, 30, 40, 50]
    assert found["ratio"] == pytest.approx(found["most_after"] / found["after_first"])
