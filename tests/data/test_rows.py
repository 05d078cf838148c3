"""Rows of JSON files: no conversion of types, errors with their line; columns of other formats."""

import json

import pytest

from tests.data.test_datamodule import data_maker, texts

KIND = "K14 types that were guessed"


@pytest.fixture
def text_data(tmp_path, tiny_tokenizer):
    return data_maker(tmp_path, tiny_tokenizer)


def pairs(completion) -> list[dict]:
    return [{"prompt": f"the {i}th of January", "completion": completion(i)} for i in range(60)]


def found(data) -> set[tuple]:
    names = data.documents("val").column_names
    splits = ("val",) if data.streaming else ("train", "val", "test")
    return {tuple(row[name] for name in names) for split in splits for row in data.documents(split)}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(pairs(lambda i: f"2024-01-{i % 28 + 1:02d}"), id="F52 dates"),
        pytest.param(pairs(lambda i: f"2024-01-01T10:{i:02d}:00Z"), id="times"),
        pytest.param(pairs(lambda i: f"12:{i:02d}:00"), id="clock times"),
        pytest.param(pairs(lambda i: f"{i}"), id="numbers in quotes"),
        pytest.param(pairs(lambda i: "null" if i % 2 else "true"), id="words of JSON in quotes"),
        pytest.param(
            [{**row, "meta": None if i < 50 else {"a": "b"}} for i, row in enumerate(pairs(str))], id="F54 null"
        ),
        pytest.param(
            [{**row, "meta": [i, "x", None, {}][i % 4]} for i, row in enumerate(pairs(str))], id="mixed types"
        ),
        pytest.param(
            [{**row, f"k{i}": {"deep": [i]}} for i, row in enumerate(pairs(str))], id="other keys in each row"
        ),
        pytest.param([{"id": 0}, *pairs(str)], id="columns that appear late"),
        pytest.param([{**row, "n": 10**30} for row in pairs(str)], id="a number beyond 64 bits"),
    ],
)
def test_text_stays_text(text_data, rows, streaming):
    expected = {(row["prompt"], row["completion"]) for row in rows if "prompt" in row}
    data = text_data(rows, streaming=streaming, max_val_blocks=100)
    assert found(data) == expected if not streaming else found(data) <= expected and found(data)


@pytest.mark.kind(KIND, "F54")
def test_a_column_of_nulls_for_11_megabytes(text_data, tmp_path):
    filler = "x" * 100_000
    rows = [{"text": f"{i}", "meta": None, "filler": filler} for i in range(110)] + [
        {"text": "end", "meta": "a string"}
    ]
    data = text_data(rows, val_fraction=0.1, test_fraction=0)
    assert {text for split in ("train", "val") for text in data.documents(split)["text"]} == {r["text"] for r in rows}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("line", "words"),
    [
        pytest.param('{"text": 5}', "line 61: 'text' must be text, not int", id="number"),
        pytest.param('{"text": ["a"]}', "line 61: 'text' must be text, not list", id="list"),
        pytest.param('{"text": {"a": 1}}', "line 61: 'text' must be text, not dict", id="object"),
        pytest.param('{"text": "a"', "line 61 is not JSON .*at column", id="cut line"),
        pytest.param("{text: 'a'}", "line 61 is not JSON", id="single quotes"),
        pytest.param('"just a string"', "line 61: str is no object", id="no object"),
        pytest.param(
            '{"text": "half \\ud83d"}', r"line 61: 'text' holds half a character \(U\+D83D\)", id="half emoji"
        ),
        pytest.param('{"text": "a", "n": ' + "1" * 5000 + "}", "line 61 is not JSON that is read", id="5000 digits"),
        pytest.param('{"text": ' + "[" * 100_000, "line 61 is not JSON that is read|must be", id="nested deeply"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text_data, tmp_path, line, words, streaming):
    path = tmp_path / "wrong.jsonl"
    path.write_text("\n".join([*(json.dumps({"text": text}) for text in texts(60)), line]))
    data = text_data(source=str(path), streaming=streaming, max_val_blocks=10_000)
    with pytest.raises(ValueError, match=f"^source: .*{words}") as refused:
        data.documents("val")
    assert "\n" not in str(refused.value)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param('[{"text": "a"},\n{"text": 5}\n]', "line 2: 'text' must be text", id="number in a list"),
        pytest.param('[{"text": "a"},\n{"text" "b"}\n]', "line 2 is not JSON", id="comma for colon"),
        pytest.param('[{"text": "a"},\n{"text": "b"}\n', "ends inside its list", id="cut behind an element"),
        pytest.param('[{"text": "a"},\n{"text": "b', "line 2 is not JSON", id="cut in an element"),
        pytest.param('["a", "b"]', "line 1: str is no object", id="list of texts"),
        pytest.param('[{"text": "a"}]\n{"text": "b"}', r"line 2 is not JSON \('{' behind", id="behind a list"),
        pytest.param('{\n"text": "a"}\n]\n{"text": "b"}', r"line 3 is not JSON \('\]' behind the rows\)", id="no list"),
    ],
)
def test_what_is_wrong_in_a_list(text_data, tmp_path, text, words):
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(ValueError, match=f"^source: .*{words}"):
        text_data(source=str(tmp_path / "wrong.json")).documents("val")


@pytest.mark.kind(KIND)
def test_rows_without_the_column_are_counted(text_data):
    rows = [{"text": text} for text in texts(60)] + [{"body": "x"}, {"text": None}, {"text": ""}]
    with pytest.warns(UserWarning, match="2 rows have no 'text' and are left out, such as line 61"):
        assert sum(len(text_data(rows).documents(split)) for split in ("train", "val", "test")) == 60


@pytest.mark.kind(KIND)
def test_a_group_in_some_rows_only(text_data):
    rows = [{"text": text, **({"group": i % 5} if i % 2 else {})} for i, text in enumerate(texts(120))]
    split = {text: name for name in ("train", "val", "test") for text in text_data(rows).documents(name)["text"]}
    for group in range(5):
        assert len({split[row["text"]] for row in rows if row.get("group") == group}) == 1


# Columns of other formats

SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "hey"},
    {"from": "gpt", "value": "yo"},
]


@pytest.mark.kind("M11 data that a new user has")
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        pytest.param(
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2"
            "\n\n### Response:",
            id="M11 Alpaca",
        ),
        pytest.param(
            {"instruction": "Sing {a}.", "input": "", "output": "3"},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nSing {a}.\n\n### Response:",
            id="M11 Alpaca without input",
        ),
        pytest.param(
            {"instruction": "Go", "output": "3"},
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nGo\n\n### Response:",
            id="no column for input",
        ),
    ],
)
def test_alpaca(text_data, row, prompt):
    data = text_data([{**row, "output": f"{i}"} for i in range(60)])
    assert {row["prompt"] for row in data.documents("train")} == {prompt}
    assert set(data.documents("train")["completion"]) <= {f"{i}" for i in range(60)}


@pytest.mark.kind("M11 data that a new user has")
@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(SHAREGPT, id="M11 ShareGPT"),
        pytest.param(
            [{**SHAREGPT[0]}, {"from": "user", "value": "hey"}, {"from": "assistant", "value": "yo"}], id="names"
        ),
        pytest.param([{"role": "system", "content": "Be brief."}, *SHAREGPT[1:]], id="both ways in one"),
        pytest.param([{**turn, "weight": None} for turn in SHAREGPT], id="more keys"),
    ],
)
def test_sharegpt(text_data, turns):
    rows = [{"conversations": [*turns, {"from": "human", "value": f"{i}"}]} for i in range(60)]
    expected = [("system", "Be brief."), ("user", "hey"), ("assistant", "yo")]
    for text in text_data(rows).documents("train")["messages"]:
        assert [(message["role"], message["content"]) for message in json.loads(text)][:3] == expected


@pytest.mark.kind("M11 data that a new user has")
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_system_prompt_in_a_column_of_its_own(text_data, column):
    for own in ([], [{"role": "system", "content": "Be kind."}]):
        turns = [*own, {"role": "user", "content": "hey"}, {"role": "assistant", "content": "yo"}]
        rows = [{column: [*turns, {"role": "user", "content": f"{i}"}], "system": "Be brief."} for i in range(60)]
        for text in text_data(rows).documents("train")["messages"]:
            said = [message["content"] for message in json.loads(text)]
            assert said[:3] == [own[0]["content"] if own else "Be brief.", "hey", "yo"]


@pytest.mark.kind("M11 data that a new user has")
@pytest.mark.parametrize("content", [{}, {"content": None}], ids=["left out", "null"])
def test_a_call_of_a_tool_as_openai_writes_it(text_data, content):
    call = {"role": "assistant", **content, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, call]} for i in range(60)]
    for text in text_data(rows).documents("train")["messages"]:
        assert json.loads(text)[1] == {**call, "content": ""}


@pytest.mark.kind("M11 data that a new user has")
@pytest.mark.parametrize(
    ("row", "words"),
    [
        pytest.param({"content": "a"}, "--data.text_column content", id="M11 content"),
        pytest.param({"content": "a", "id": 1}, "--data.text_column content", id="M11 content among others"),
        pytest.param({"body": "a"}, "--data.text_column body", id="one lone column"),
        pytest.param({"instruction": "a"}, "has the columns .*instruction", id="Alpaca without output"),
        pytest.param(
            {"conversations": [{"from": "alien", "value": "a"}]}, "line 1: 'alien' .* human", id="unknown role"
        ),
        pytest.param(
            {"messages": [{"role": "assistant", "content": "a", "weight": 0}]},
            "line 1: 'weight' 0 .* not read",
            id="weight",
        ),
        pytest.param(
            {"conversations": [{"from": "gpt", "value": "a", "loss": False}]}, "line 1: 'loss' False", id="loss"
        ),
        pytest.param({"conversations": "a"}, "line 1: 'messages' must be a list", id="no list"),
        pytest.param({"conversations": [{"from": "gpt"}]}, "line 1: 'messages' must be a list", id="no value"),
        pytest.param({"instruction": 5, "output": "a"}, "line 1: 'instruction' must be text, not int", id="no text"),
        pytest.param({"messages": [{"role": "user", "content": "a"}], "tools": 5}, "line 1: 'tools' must", id="tools"),
    ],
)
def test_columns_that_are_refused(text_data, row, words):
    with pytest.raises(ValueError, match=f"^source: .*{words}"):
        text_data([row] * 2).documents("val")
