"""`lskip predict`: prompts in, answers out, in batches; interrupted, killed and resumed."""

import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lskip.cli import commands, main
from lskip.cli.predict_output import AnswerFile, put_in_order, start_output
from lskip.inference import TextGenerator
from lskip.inference import options as command_options
from lskip.inference.prompt_file import read_prompts
from lskip.models.pretrained import load_model
from tests.conftest import make_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def answers(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def without_seconds(path: Path) -> list[dict]:
    return [{**answer, "seconds": None} for answer in answers(path)]


def test_predict_writes_a_line_a_prompt(tmp_path, model_folder, tiny_tokenizer):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "new" / "answers.jsonl"
    prompts.write_text('{"prompt": "def f", "id": 7}\n\n{"prompt": "return\\u2028x"}\n')
    base = ["predict", f"--prompts={prompts}", f"--output={output}", f"--model={model_folder}", "--max_new_tokens=6"]
    assert main([*base, "--exit_layer=2", "--num_speculations=3"]) == 0
    first, second = answers(output)
    assert first["id"] == 7 and second["prompt"] == "return\u2028x"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = tiny_tokenizer("def f", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        oracle = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert first["text"] == tiny_tokenizer.decode(oracle, skip_special_tokens=True)
    assert first["tokens"] == len(oracle)
    assert 0 <= first["acceptance_rate"] <= 1 <= first["tokens_per_round"] <= 4
    assert (first["line"], second["line"]) == (1, 3)
    assert first["seconds"] > 0 and first["finish_reason"] in ("eos", "length")


def test_predict_resumes_and_overwrites_only_when_told(tmp_path, model_folder, capsys):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("one\ntwo\nthree\n")
    base = ["predict", f"--prompts={prompts}", f"--output={output}", f"--model={model_folder}", "--max_new_tokens=3"]
    assert main(base) == 0
    whole = output.read_text().splitlines(keepends=True)
    texts = [line["text"] for line in answers(output)]

    assert main(base) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--resume true" in error and "--overwrite true" in error

    # killed in the middle of the second line
    output.write_text(whole[0] + whole[1][:10])
    assert main([*base, "--resume=true"]) == 0
    assert [line["text"] for line in answers(output)] == texts
    assert output.read_text().startswith(whole[0])  # the finished line was kept, not answered again

    output.write_text('{"prompt": "other"}\n')
    assert main([*base, "--resume=true"]) == 2
    assert output.read_text() == '{"prompt": "other"}\n'
    assert main([*base, "--overwrite=true"]) == 0
    assert [line["text"] for line in answers(output)] == texts


@pytest.fixture
def thirty(tmp_path, model_folder) -> tuple[list[str], list[str]]:
    """Return 30 prompts, whose answers differ in length, and the command that answers them."""
    prompts = [f"def f{i}(x):" + " x" * (i * 7 % 30) for i in range(30)]
    # a blank line after every third: a prompt's index is not its line
    lines = [prompt + "\n" * (1 + (i % 3 == 2)) for i, prompt in enumerate(prompts)]
    (tmp_path / "prompts.txt").write_text("".join(lines))
    command = f"predict --prompts={tmp_path}/prompts.txt --model={model_folder} --batch_size=4 --max_new_tokens=90"
    return prompts, command.split()


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 1.0, "exit_layer": 2, "num_speculations": 3},
    {"temperature": 0.0, "exit_layer": 2, "num_speculations": 3, "stop_strings": ["r"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_batch_answers_as_one_prompt_after_another(tmp_path, model_folder, thirty, settings):
    prompts, command = thirty
    flags = [f"--{name}={json.dumps(value)}" for name, value in settings.items()]
    assert main([*command, "--seed=5", f"--output={tmp_path}/answers.jsonl", *flags]) == 0
    rows = answers(tmp_path / "answers.jsonl")
    generator = TextGenerator(*load_model(str(model_folder)))
    alone = [generator.generate(text, max_new_tokens=90, seed=5 + i, **settings) for i, text in enumerate(prompts)]
    assert len({each.finish_reason for each in alone}) > 1 and len({len(each.token_ids) for each in alone}) > 5
    for i, (row, prompt, expected) in enumerate(zip(rows, prompts, alone, strict=True)):
        assert row["prompt"] == prompt and row["line"] == 1 + i + i // 3 and row["seed"] == 5 + i
        assert row["text"] == expected.text and row["tokens"] == len(expected.token_ids)
        assert row["finish_reason"] == expected.finish_reason
        assert row["acceptance_rate"] == expected.acceptance_rate
        assert row["tokens_per_round"] == expected.tokens_per_round


DIES = """
import os, signal, sys
from lskip.cli import main
from lskip.inference import TextGenerator

generate_batch = TextGenerator.generate_batch


def eleven(self, *arguments, **settings):
    for number, outcome in enumerate(generate_batch(self, *arguments, **settings)):
        if number == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        yield outcome


TextGenerator.generate_batch = eleven
main(sys.argv[1:])
"""


def test_killed_and_resumed_is_as_never_killed(tmp_path, thirty):
    _, command = thirty
    command += ["--temperature=1", "--exit_layer=2", "--num_speculations=3", "--bit_exact=true"]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert main([*command, f"--output={whole}"]) == 0
    command += [f"--output={output}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(commands.__file__).parents[2])}
    died = subprocess.run([sys.executable, "-c", DIES, *command], env=environment, capture_output=True, timeout=120)
    assert died.returncode == -signal.SIGKILL
    # what was done is there, as soon as it was done: neither in order nor the first eleven
    lines = [answer["line"] for answer in answers(output)]
    assert len(lines) == 11 and lines != sorted(lines)
    assert sorted(lines) != [answer["line"] for answer in answers(whole)][:11]
    with output.open("a") as file:
        file.write('{"prompt": "def f2')  # and a kill in the middle of a line
    assert main([*command, "--resume=true"]) == 0
    assert without_seconds(output) == without_seconds(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prompts.txt", "whole.jsonl"]


def test_ctrl_c_says_what_is_done_and_how_to_go_on(tmp_path, thirty, monkeypatch, capsys):
    _, command = thirty
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert main([*command, f"--output={whole}"]) == 0
    generate_batch = TextGenerator.generate_batch

    def pressed(self, *arguments, **settings):
        outcomes = generate_batch(self, *arguments, **settings)
        yield from (next(outcomes) for _ in range(5))
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "generate_batch", pressed)
    for resume, done in (("false", 5), ("true", 10)):
        assert main([*command, f"--output={output}", f"--resume={resume}"]) == 130
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"lskip predict: interrupted, {done} of 30 prompts are done; go on with --resume true"
        assert len(answers(output)) == done
    monkeypatch.undo()
    assert main([*command, f"--output={output}", "--resume=true"]) == 0
    assert without_seconds(output) == without_seconds(whole)


def test_a_file_that_is_whole_is_put_in_order_without_a_model(tmp_path, thirty, monkeypatch):
    _, command = thirty
    output = tmp_path / "answers.jsonl"
    assert main([*command, f"--output={output}"]) == 0
    ordered = output.read_text()
    output.write_text("".join(reversed(ordered.splitlines(keepends=True))))
    monkeypatch.setattr(command_options, "load_generator", None)
    assert main([*command, f"--output={output}", "--resume=true"]) == 0
    assert output.read_text() == ordered


def test_a_prompt_is_refused_before_any_is_answered(tmp_path, thirty, capsys):
    _, command = thirty
    with (tmp_path / "prompts.txt").open("a") as file:
        file.write("x" * 200 + "\n")
    assert main([*command, f"--output={tmp_path}/answers.jsonl"]) == 2
    assert "prompts: line 41: prompt: 200 tokens leave no room" in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.fixture
def three(tmp_path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "id": 1}\n\n{"prompt": "b"}\n{"prompt": "a", "id": 2}\n')
    return tmp_path / "prompts.jsonl"


def test_answers_are_told_apart_by_line(tmp_path, three):
    output = tmp_path / "answers.jsonl"
    output.write_text('{"prompt": "a", "id": 2, "line": 4}\n{"prompt": "a", "id": 1, "line": 1}\n{"prompt"')
    assert start_output(output, read_prompts(three), overwrite=False, resume=True) == ({0, 2}, "a")
    assert output.read_text().endswith('"line": 1}\n')


FOREIGN = [
    '{"prompt": "b", "line": 2}',  # a blank line
    '{"prompt": "b", "line": 4}',  # another prompt's line
    '{"prompt": "a", "id": 3, "line": 1}',
    '{"prompt": "b"}',
    '{"prompt": "b", "line": "3"}',
    '{"prompt": "b", "line": [3]}',
    '{"prompt": "a", "id": 1, "line": 1}',  # once more
    "not JSON",
    "3",
    "",
]


@pytest.mark.parametrize("line", FOREIGN)
def test_what_answers_other_prompts_is_left_alone(tmp_path, three, line):
    output = tmp_path / "answers.jsonl"
    text = '{"prompt": "a", "id": 1, "line": 1}\n' + line + '\n{"prompt": '
    output.write_text(text)
    with pytest.raises(ValueError, match=r"^output: line 2 of '.*' is not of these prompts; resume needs the same$"):
        start_output(output, read_prompts(three), overwrite=False, resume=True)
    assert output.read_text() == text


def test_putting_in_order_keeps_the_rest_of_a_file(tmp_path):
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    real.write_text('{"line": 10, "text": "a\u2028b"}\n{"line": 9}\n')
    real.chmod(0o640)
    link.symlink_to(real)
    put_in_order(link)
    assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o640
    assert real.read_text() == '{"line": 9}\n{"line": 10, "text": "a\u2028b"}\n'
    put_in_order(Path("/dev/null"))
    assert not Path("/dev/null").is_file()


READ = "K16 a byte order mark, and how files of prompts are written"
ONE = '{"prompt": "def f"}\n'


@pytest.mark.kind(READ)
@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        pytest.param("p.txt", b"\xef\xbb\xbfdef f\n", ["def f"], id="F58 a mark"),
        pytest.param("p.jsonl", b"\xef\xbb\xbf" + ONE.encode(), ["def f"], id="F60 a mark"),
        pytest.param("p.txt", b"def f\r\nx\r\n\r\n", ["def f", "x"], id="CRLF"),
        pytest.param("p.jsonl", ONE.replace("\n", "\r\n").encode() * 2, ["def f", "def f"], id="CRLF lines of JSON"),
        pytest.param("p.ndjson", ONE.encode(), ["def f"], id="F41 ndjson"),
        pytest.param("P.JSONL", ONE.encode(), ["def f"], id="upper case"),
        pytest.param("P.TXT", ONE.encode(), [ONE.strip()], id="JSON in a text is text"),
        pytest.param("p.txt", "a\u2028b\x0bc\x85d".encode(), ["a\u2028b\x0bc\x85d"], id="rare line ends are none"),
        pytest.param("p.jsonl", b'{"prompt": "\\ud83d\\ude42\\u0000"}', ["🙂\0"], id="escapes"),
    ],
)
def test_a_file_of_prompts_is_read_as_what_it_is(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    assert [prompt.content for prompt in read_prompts(tmp_path / name)] == expected


@pytest.mark.kind(READ)
@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        pytest.param("p.txt", "def f".encode("utf-16"), r"p\.txt' is not UTF-8", id="UTF-16"),
        pytest.param(
            "p.txt", "def f".encode("utf-16-le"), r"line 1 of .*p\.txt' holds a NUL", id="UTF-16 without mark"
        ),
        pytest.param("p.jsonl", ONE.encode("utf-32-le"), "line 1 is not JSON", id="UTF-32"),
        pytest.param("p.txt", "é".encode("cp1252"), r"p\.txt' is not UTF-8", id="cp1252"),
        pytest.param("p.jsonl.gz", ONE.encode(), r"p\.jsonl\.gz' is neither", id="packed"),
        pytest.param("p.csv", ONE.encode(), r"p\.csv' is neither", id="csv"),
        pytest.param("p.txt", b"\xef\xbb\xbf\n \r\n", "holds no prompt", id="blank"),
    ],
)
def test_a_file_that_is_no_file_of_prompts_is_named(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"^prompts: .*{sentence}"):
        read_prompts(tmp_path / name)


WRITTEN = "B8 what cannot be written stops predict in the middle"


@pytest.mark.kind(WRITTEN)
@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        pytest.param('{"prompt": "b \\ud83d"}', r"prompt: holds '\\ud83d', half a character", id="F32"),
        pytest.param('{"prompt": "def g", "id": "\\ud800"}', r"id: holds '\\ud800'", id="B8"),
        pytest.param('{"prompt": "a", "x": {"y": ["\\udfff"]}}', r"x: holds '\\udfff'", id="within lists"),
        pytest.param('{"prompt": "a", "\\ud800": 1}', r"holds '\\ud800'", id="a key"),
        pytest.param('{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages: holds", id="messages"),
        pytest.param('{"messages": [{"role": "user", "content": "a"}], "tools": []}', "the key 'tools'", id="tools"),
        pytest.param('{"prompt": "a", "n": NaN}', "n: a number that is not finite", id="NaN"),
        pytest.param('{"prompt": "a", "n": 1e999}', "n: a number that is not finite", id="1e999"),
        pytest.param('{"prompt": "a", "n": ' + "9" * 5000 + "}", "not JSON that is read", id="B41 5000 digits"),
        pytest.param('{"prompt": "a", "n": ' + "[" * 10**5 + "]" * 10**5 + "}", "deeply", id="nested 100,000 deep"),
        pytest.param(
            '{"prompt": "a", "n": ' + "[" * 985 + "]" * 985 + "}", "deeply", id="nested as deep as can be read"
        ),
        pytest.param('{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice", id="a key twice"),
        pytest.param('{"prompt": "a", "m": {"x": 1, "x": 2}}', "the key 'x' is there twice", id="a key twice within"),
    ],
)
def test_a_line_that_cannot_be_carried_through_is_refused_before_any_work(tmp_path, capsys, line, sentence):
    (tmp_path / "p.jsonl").write_text(ONE + line + "\n")
    assert main(["predict", f"--prompts={tmp_path}/p.jsonl", f"--output={tmp_path}/o.jsonl", "--model=/no/model"]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"error: prompts: line 2( is |: ).*{sentence}", said), said
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(b"def f\nx\r\n", ["def f", "x"], id="M lines"),
        pytest.param(ONE.encode() * 2, ["def f", "def f"], id="lines of JSON"),
        pytest.param(b'{"other": 1}\n', ['{"other": 1}'], id="JSON that is no prompt"),
        pytest.param(b"\xef\xbb\xbfa", ["a"], id="a mark"),
    ],
)
@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input_holds_prompts(monkeypatch, name, data, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert [prompt.content for prompt in read_prompts(Path(name))] == expected


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize(("data", "word"), [(b"", "no prompt"), (b"\xff", "UTF-8"), (b'{"prompt": 5}', "line 1")])
def test_standard_input_that_holds_none(monkeypatch, data, word):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    with pytest.raises(ValueError, match=f"^prompts: .*{word}"):
        read_prompts(Path("-"))


PLACES = "B11 B27 full disks, and places that cannot be written"


@pytest.mark.kind(PLACES)
@pytest.mark.parametrize(
    ("output", "reason"),
    [
        pytest.param("prompts.txt", "is the file of the prompts", id="the prompts"),
        pytest.param("link_to_prompts", "is the file of the prompts", id="a link to the prompts"),
        pytest.param("folder", "Is a directory", id="a folder"),
        pytest.param("/dev/full", "No space left", id="a full device"),
        pytest.param("/proc/no/o.jsonl", "No such file", id="where nothing can be made"),
        pytest.param("prompts.txt/o.jsonl", "File exists", id="below a file"),
        pytest.param("link_to_itself", "symbolic links", id="a link to itself"),
    ],
)
def test_the_place_of_an_output_is_tried_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, output, reason):
    monkeypatch.setattr(command_options, "load_generator", None)
    (tmp_path / "prompts.txt").write_text("def f\n")
    (tmp_path / "folder").mkdir()
    for name, target in (("link_to_prompts", "prompts.txt"), ("link_to_itself", "link_to_itself")):
        (tmp_path / name).symlink_to(target)
    before = sorted(path.name for path in tmp_path.iterdir())
    base = ["predict", f"--prompts={tmp_path}/prompts.txt", f"--output={tmp_path / output}"]
    for flags in ([], ["--overwrite=true"]):
        assert main([*base, *flags]) == 2
        said = capsys.readouterr().err
        assert "error: output: " in said and reason in said
    assert (tmp_path / "prompts.txt").read_text() == "def f\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.kind(PLACES)
@pytest.mark.parametrize("flags", [["--model=/no/model"], ["--exit_layer=9"], ["--num_speculations=2"]], ids=str)
def test_a_command_that_is_refused_leaves_nothing(tmp_path, model_folder, flags):
    (tmp_path / "prompts.txt").write_text("def f\n")
    output = f"--output={tmp_path}/new/deep/o.jsonl"
    assert main(["predict", f"--prompts={tmp_path}/prompts.txt", output, f"--model={model_folder}", *flags]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_an_output_behind_a_link_that_leads_nowhere_yet(tmp_path, model_folder):
    (tmp_path / "prompts.txt").write_text("def f\n")
    (tmp_path / "link.jsonl").symlink_to("real.jsonl")
    base = ["predict", f"--prompts={tmp_path}/prompts.txt", f"--model={model_folder}", "--max_new_tokens=2"]
    assert main([*base, f"--output={tmp_path}/link.jsonl"]) == 0
    assert (tmp_path / "link.jsonl").is_symlink() and len(answers(tmp_path / "real.jsonl")) == 1


@pytest.mark.kind("links, pipes and devices stay what they are")
def test_an_output_that_is_a_named_pipe_is_written_once(tmp_path, model_folder):
    (tmp_path / "prompts.txt").write_text("def f\nx\n")
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        got = reader.submit((tmp_path / "pipe").read_text)  # to the first end
        base = ["predict", f"--prompts={tmp_path}/prompts.txt", f"--model={model_folder}", "--max_new_tokens=2"]
        assert main([*base, f"--output={tmp_path}/pipe"]) == 0
        assert [json.loads(line)["prompt"] for line in got.result(20).splitlines()] == ["def f", "x"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_reader_that_goes_early_is_no_mistake(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with AnswerFile(tmp_path / "pipe", "w", lambda: None) as file:
        file.write({"line": 1})
        os.close(reader)
        with pytest.raises(BrokenPipeError):  # the command line then ends with 141, without a word
            file.write({"line": 2})
