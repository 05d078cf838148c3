"""`lskip chat`: what it answers is what `generate` makes of the same messages."""

import copy
import io

import pytest

from lskip.cli import chat as chat_command
from lskip.cli import main
from lskip.inference import load_generator
from lskip.inference.generation import TextStream
from lskip.serving.engine import Engine
from tests.serving.conftest import TEMPLATE

NGRAMS = ["--draft=ngram", "--num_speculations=4"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_tokenizer):
    from tests.conftest import make_model

    folder = tmp_path_factory.mktemp("chat") / "tiny"
    make_model("llama", max_position_embeddings=512).save_pretrained(folder)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def talk(saved, monkeypatch, capsys, quick_costs):
    """Function lines, *options -> (answers, what was told), or the exit code where it is not 0."""

    def run(*lines: str, options=(), code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", f"--model={saved}", "--max_new_tokens=12", *options]) == code
        return capsys.readouterr()

    return run


def expected(saved, *said: str, system: str | None = None, **settings) -> str:
    """What the conversation writes: an answer and a line break for each message."""
    generator = load_generator(str(saved))
    messages, written = [] if system is None else [{"role": "system", "content": system}], ""
    for text in said:
        messages.append({"role": "user", "content": text})
        answer = generator.generate(messages, max_new_tokens=12, seed=0, **settings).text
        messages.append({"role": "assistant", "content": answer})
        written += answer + "\n"
    return written


@pytest.mark.parametrize(
    "options", [[], ["--exit_layer=2", "--num_speculations=3"], ["--draft=ngram", "--num_speculations=4"]]
)
def test_each_answer_knows_what_was_said(talk, saved, options):
    out, told = talk("def add(a, b):", "", "again", options=options)
    assert out == expected(saved, "def add(a, b):", "again")
    assert told.count("12 tokens, ") == 2


def test_what_was_said_before_is_not_run_again(talk, monkeypatch):
    submitted, submit = [], Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda *given: submitted.extend(given[2]) or submit(*given))
    talk("def add(a, b):", "again", "/new", "def")
    first, second, third = (each.generation for each in submitted)
    assert second.cached_prompt_tokens >= first.prompt_tokens > third.cached_prompt_tokens


def test_commands(talk, saved):
    drafts = ["--draft=ngram", "--num_speculations=4"]
    out, told = talk(
        "a", "/draft off", "b", "/system Be brief.", "c", "/exit_layer 1", "/nothing", "/quit", "d", options=drafts
    )
    assert out == expected(saved, "a", "b") + expected(saved, "c", system="Be brief.")
    summaries = [line for line in told.splitlines() if "tokens/s" in line]
    assert ["acceptance_rate" in line for line in summaries] == [True, False, False]
    assert "/nothing: is no command; these are:" in told and "exit_layer: 1" in told


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/exit_layer 0", "exit_layer: is off, or from 1 to 4"),
        ("/exit_layer " + "9" * 5000, "exit_layer: is off, or from 1 to 4"),
        ("/\x1b[2J", "/\\x1b[2J: is no command"),
    ],
)
def test_commands_that_cannot_be_are_told(talk, line, said):
    assert said in talk(line)[1]


def test_a_system_message_of_the_command_line(talk, saved):
    assert talk("c", options=["--system=Be brief."]).out == expected(saved, "c", system="Be brief.")


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(talk, saved, monkeypatch):
    calls = []

    class Interrupted(TextStream):
        def __iter__(self):
            calls.append(self)
            for count, piece in enumerate(super().__iter__()):
                if count == 2 and len(calls) == 1:
                    raise KeyboardInterrupt
                yield piece

    monkeypatch.setattr(chat_command, "TextStream", Interrupted)
    out, _ = talk("a", "/new", "c")
    whole = expected(saved, "a")
    assert whole.startswith(out.split("\n")[0]) and out.endswith(expected(saved, "c")) and len(calls) == 2


def test_a_talk_that_grows_too_long_is_told(talk):
    _, told = talk("a", "b" * 4000, "/new", "c")
    assert "prompt: " in told and told.count("tokens/s") == 2


def test_a_model_without_a_chat_template_is_refused(talk, tmp_path, tiny_model, tiny_tokenizer):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert "has no chat template; use lskip generate" in talk("a", options=[f"--model={tmp_path}"], code=2).err
