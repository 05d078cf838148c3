"""The prompts whose answers an exit adapter is trained on."""

import importlib
import json
import re
import sys
from importlib import resources

import pytest

from lskip.inference.prompt_file import read_prompts


@pytest.fixture
def retrofit_prompts(monkeypatch, tmp_path):
    """The program, with a standard library of one file."""
    program = importlib.import_module("benchmarks.retrofit.prompts")
    (tmp_path / "stdlib").mkdir()
    documented = "".join(f'def f{i}(x):\n    """Return the number {i} times x.\n\n    More."""\n' for i in range(200))
    (tmp_path / "stdlib" / "functions.py").write_text(documented + "def g():\n    pass\n")
    monkeypatch.setattr(program.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "stdlib")})
    return program


def test_retrofit_prompts(retrofit_prompts, tmp_path, monkeypatch):
    prompts = retrofit_prompts.make_prompts(2000)
    assert len(set(prompts)) == 2000
    assert (
        sum(prompt == "Write a Python function `f7`. It should: Return the number 7 times x." for prompt in prompts)
        == 1
    )
    assert retrofit_prompts.make_prompts(300) == prompts[:300] != retrofit_prompts.make_prompts(300, seed=1)
    for made, _ in retrofit_prompts.kinds().values():
        assert set(made()) & set(prompts)
    with pytest.raises(ValueError, match=r"number: 1000000, but there are only \d+ prompts"):
        retrofit_prompts.make_prompts(10**6)
    argv = ["--out", str(tmp_path / "new" / "out.jsonl"), "--number", "40"]
    monkeypatch.setattr(sys, "argv", ["retrofit_prompts", *argv])
    retrofit_prompts.main()
    assert [prompt.content for prompt in read_prompts(tmp_path / "new" / "out.jsonl")] == prompts[:40]


def test_a_base_model_gets_beginnings_of_texts(retrofit_prompts):
    prompts = retrofit_prompts.make_prompts(300, base_model=True)
    assert "Return the number 7 times x." in retrofit_prompts.make_prompts(600, base_model=True)
    assert len(set(prompts)) == 300 and all(0 < len(prompt.split()) <= 16 for prompt in prompts)


def test_nothing_is_trained_on_what_is_published(retrofit_prompts):
    published = [
        json.loads(line)["prompt"]
        for path in resources.files("lskip.prompts").iterdir()
        if path.name.endswith(".jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    assert len(published) >= 10
    contents = [set(re.findall(r"\w{4,}", prompt.lower())) for prompt in published]
    for prompt in (prompt for made, _ in retrofit_prompts.kinds().values() for prompt in made()):
        told = set(re.findall(r"\w{4,}", prompt.lower()))
        assert all(len(told & content) < 0.7 * len(content) for content in contents), prompt
