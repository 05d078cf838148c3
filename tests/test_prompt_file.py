"""`lskip predict`: prompts in, answers out, in batches; interrupted, killed and resumed."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM

from lskip import command_options, commands
from lskip.answer_file import put_in_order, start_output
from lskip.cli import main
from lskip.inference import TextGenerator
from lskip.pretrained import load_model
from lskip.prompt_file import read_prompts


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
    """30 prompts, whose answers end after different numbers of tokens, and the command that answers them."""
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
    environment = {**os.environ, "PYTHONPATH": str(Path(commands.__file__).parent.parent)}
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
