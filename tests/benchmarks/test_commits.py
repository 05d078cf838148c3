"""The benchmarks that compare two commits, on tiny models: texts that are recorded and compared, speeds in turns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "fixtures" / "before_0_1" / "run"


@pytest.fixture(scope="module")
def program():
    """The program as a module, found as `python benchmarks/commits/compare_texts.py` finds its parts."""
    folder, threads = str(ROOT / "benchmarks" / "commits"), torch.get_num_threads()
    sys.path.insert(0, folder)
    import compare_texts as program

    yield program
    sys.path.remove(folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def record(program, tmp_path_factory):
    """What a quick record of a tiny model holds."""
    path = tmp_path_factory.mktemp("record") / "record.json"
    program.main(["record", "--out", str(path), "--models", "tiny_untied", "--quick"])
    return json.loads(path.read_text())


@pytest.fixture
def compare(program, record, tmp_path, capsys):
    """Function (cell, change of its texts) -> exit status, what is printed: the record against a changed one."""

    def call(name=None, change=None) -> tuple[int, str]:
        new = json.loads(json.dumps(record))
        if name is not None:
            texts = [list(record["texts"][place]) for place in record["cells"][name]]
            found = change(texts)
            if not isinstance(found, str):
                new["texts"] += found
                found = list(range(len(record["texts"]), len(new["texts"])))
            new["cells"][name] = found
        paths = tmp_path / "old.json", tmp_path / "new.json"
        for path, content in zip(paths, (record, new), strict=True):
            path.write_text(json.dumps(content))
        return program.main(["compare", *map(str, paths)]), capsys.readouterr().out

    return call


def test_a_record_holds_every_cell(record):
    cells = record["cells"]
    assert {"commit", "torch", "kernels"} <= set(record["environment"])
    greedy = "tiny_untied / auto / autoregressive / batch 4"
    assert len(cells[greedy]) == 4 and all(len(record["texts"][place]) > 5 for place in cells[greedy])
    assert cells[greedy] == cells[greedy.replace("auto /", "weights plain /")]
    assert cells[greedy] != cells[greedy.replace("autoregressive", "exit")]
    assert len(cells) > 40


def test_the_same_texts_are_equal(compare, record):
    status, said = compare()
    refused = sum(isinstance(found, str) for found in record["cells"].values())
    assert status == 0 and f"{len(record['cells']) - refused} equal" in said


def another(texts: list[list[int]]) -> list[list[int]]:
    texts[1][3] = (texts[1][3] + 1) % 300
    return texts


def cut(texts: list[list[int]]) -> list[list[int]]:
    return [texts[0][:-1], *texts[1:]]


@pytest.mark.parametrize(
    ("way", "change", "words"),
    [
        ("autoregressive", another, "text 1 from token 3 on"),
        ("exit", another, "margin"),
        ("layers FixedDraft, sampled", another, "rounding"),
        ("Margin", another, "no reference"),
        ("autoregressive", cut, "is cut"),
    ],
)
def test_another_token_is_no_tie(compare, way, change, words):
    status, said = compare(f"tiny_untied / auto / {way} / batch 4", change)
    assert status == 1 and words in said and "1 DIFFERENT" in said


def test_rejection_sampling_may_differ(compare):
    status, said = compare("tiny_untied / auto / layers rejection, sampled / batch 4", another)
    assert status == 0 and "other drafts: tiny_untied / auto / layers rejection" in said


def test_a_refusal_is_listed(compare):
    status, said = compare("tiny_untied / weights plain / exit / batch 1", lambda texts: "weights: there is no 'plain'")
    assert status == 0 and "refused now: tiny_untied / weights plain / exit / batch 1: weights: there is no" in said


def test_tokens_are_the_reference_s_own(program, record):
    """Independent of lskip: the argmax of transformers' logits, with the seed's noise where it is sampled."""
    for way in ("autoregressive", "exit", "layers FixedDraft, sampled", "exit, sampled"):
        for prompt, place in enumerate(record["cells"][f"tiny_untied / auto / {way} / batch 4"]):
            text = record["texts"][place]
            reference = program.Reference.of("tiny_untied", bfloat16=False)
            for length in (0, 1, len(text) // 2, len(text) - 1):
                is_tie, said = reference.judge(way, prompt, False, text[:length], text[length], text[length])
                assert is_tie, (way, prompt, length, said)


def test_two_checkouts_take_turns(tmp_path):
    command = [sys.executable, "benchmarks/commits/compare_speed.py", "--before", ".", "--after", "."]
    command += ["--model", str(RUN), "--tokens", "4", "--repeats", "2", "--threads", "1", "--only", "autoregressive"]
    command += ["--out", str(tmp_path / "speed.json")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads((tmp_path / "speed.json").read_text())
    (record,) = found["records"]
    assert record["case"] == "autoregressive" and record["turns"] == record["equal_texts"] == 2
    assert set(record["median"]) == {"before", "after", "control"} and min(record["median"].values()) > 0
    low, high = record["after"]["middle_half"]
    assert low <= record["after"]["ratio"] <= high
