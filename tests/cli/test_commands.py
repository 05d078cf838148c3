"""`lskip generate`: what its options do, what it prints, and Ctrl-C."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lskip
from lskip.cli import main
from lskip.inference import Margin, TextGenerator
from lskip.inference import options as command_options
from lskip.inference.drafting.policies import ConfidenceDraft
from lskip.models.pretrained import load_model
from lskip.utils.untrusted import printable
from tests.conftest import make_model


@pytest.fixture
def model_folder(tmp_path, tiny_model, tiny_tokenizer) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


PROMPT = "def f def f"  # with something for n-grams to find
OPTIONS = {
    "--min_p=0.1": {"min_p": 0.1},
    "--repetition_penalty=1.5": {"repetition_penalty": 1.5},
    '--stop_strings=["a","t"]': {"stop_strings": ["a", "t"]},
    "--acceptance=rejection": {"acceptance": "rejection"},
    "--num_speculations=1": {"num_speculations": 1},
    "--draft=ngram": {"draft": "ngram"},
    "--draft_policy=ConfidenceDraft --draft_policy.threshold=0.9": {"draft_policy": ConfidenceDraft(0.9)},
}


@pytest.mark.parametrize(("flags", "settings"), OPTIONS.items(), ids=OPTIONS)
def test_a_decoding_option_does_what_its_setting_does(model_folder, capsys, flags, settings):
    generator = TextGenerator(*load_model(str(model_folder)))
    base = {"max_new_tokens": 40, "temperature": 0.5, "seed": 4, "exit_layer": 2, "num_speculations": 4}
    unchanged, expected = (generator.generate(PROMPT, **{**base, **more}) for more in ({}, settings))
    assert (unchanged.text, unchanged.acceptance_rate) != (expected.text, expected.acceptance_rate)
    arguments = [f"--{name}={value}" for name, value in base.items()]
    assert main(["generate", f"--prompt={PROMPT}", f"--model={model_folder}", *arguments, *flags.split()]) == 0
    text, counts = capsys.readouterr()
    assert text == expected.text + "\n"
    rates = f"acceptance_rate {expected.acceptance_rate:.2f}, tokens_per_round {expected.tokens_per_round:.2f}"
    drafts = [each.draft for each in expected.history if each.drafted]
    drafted = f"drafted by {drafts[0]} in {len(drafts)} round{'s' * (len(drafts) > 1)}"
    assert set(drafts) == {drafts[0]} and f"{rates}, {drafted}, {expected.finish_reason}]" in counts


def test_loading_options_reach_the_generator(model_folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(command_options, "load_generator", lambda **options: asked.update(options) or 1 / 0)
    options = {"dtype": "bfloat16", "weights": "plain", "draft_weights": "int8", "device": "cpu", "bit_exact": True}
    options |= {"costs_file": "costs.json", "exit_adapter": "adapter", "draft_tokens": "tokens.json"}
    flags = [f"--{name}={str(value).lower()}" for name, value in options.items()]
    with pytest.raises(ZeroDivisionError):
        main(["generate", "--prompt=x", f"--model={model_folder}", *flags])
    assert asked == {"model": str(model_folder), **options, "batch_size": 1}


def test_an_exit_criterion_is_chosen_by_name(model_folder, capsys):
    arguments = ["generate", f"--prompt={PROMPT}", f"--model={model_folder}", "--max_new_tokens=20"]
    assert main([*arguments, "--exit_criterion=Margin", "--exit_criterion.threshold=0.2"]) == 0
    text, counts = capsys.readouterr()
    expected = TextGenerator(*load_model(str(model_folder))).generate(
        PROMPT, max_new_tokens=20, exit_criterion=Margin(0.2)
    )
    assert text == expected.text + "\n"
    assert f"mean exit layer {expected.mean_exit_layer:.1f}" in counts
    assert main([*arguments, "--exit_criterion=Margins"]) != 0
    refusal = capsys.readouterr().err  # other tests may have made criteria of their own
    assert re.search("exit_criterion: 'Margins' is not one of Entropy, .*Margin, .*Saturation", refusal)


OWN_POLICY = """
from lskip.inference.drafting.policies import FixedDraft


class OwnPolicy(FixedDraft):
    def __init__(self, share: float = 0.5):
        self.share, self.rounds = share, 0

    def learn(self, plan, drafted, accepted, seconds=None):
        self.rounds += 1

    def summary(self):
        return {"share": self.share, "rounds": {str(self.drafts[0]): self.rounds}}
"""


def test_a_draft_policy_of_your_own_and_what_it_learnt(tmp_path, monkeypatch, model_folder, capsys):
    (tmp_path / "own_policy.py").write_text(OWN_POLICY)
    monkeypatch.syspath_prepend(tmp_path)
    policy = ["--draft_policy=own_policy.OwnPolicy", "--draft_policy.share=0.25"]
    command = ["generate", "--prompt=def f", f"--model={model_folder}", "--max_new_tokens=4"]
    assert main([*command, "--exit_layer=2", "--num_speculations=2", *policy]) == 0
    assert re.search(r"^\[OwnPolicy: share 0.25, rounds \(layers 2 [123]\)\]$", capsys.readouterr().err, re.M)


def start_python(*arguments: str, folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(lskip.__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-m", "lskip", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        # a shell's background job would ignore Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_keeps_the_text_so_far(tmp_path, tiny_model, tiny_tokenizer):
    tiny_model(max_position_embeddings=100_000, eos_token_id=None).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    process = start_python("generate", "--prompt=def", "--model=.", "--max_new_tokens=90000", folder=tmp_path)
    begun = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    *_, summary, last = errors.decode().splitlines()
    assert last == "lskip generate: interrupted"
    tokens = int(re.fullmatch(r"\[(\d+) tokens, [\d.]+ tokens/s\]", summary)[1])
    expected = TextGenerator(*load_model(str(tmp_path))).generate("def", max_new_tokens=tokens).text
    text = (begun + output).decode()
    # a character whose last bytes had not come yet is left out, and so may be the round that was under way
    assert text.endswith("\n") and expected.startswith(text[:-1]) and len(expected) - len(text[:-1]) < 12


@pytest.fixture(scope="module")
def talker(tmp_path_factory, tiny_tokenizer) -> Path:
    """Its sampled text holds control characters."""
    folder = tmp_path_factory.mktemp("talker")
    make_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


ESCAPES = "B34 names and words of strangers"
SAYS = ["--max_new_tokens=60", "--temperature=1"]


@pytest.mark.kind(ESCAPES)
@pytest.mark.parametrize("seed", [pytest.param(0, id="B34"), 1, 2, 3])
def test_a_terminal_is_shown_what_a_file_is_given(talker, capsys, monkeypatch, seed):
    command = ["generate", "--prompt=def f", f"--model={talker}", *SAYS, f"--seed={seed}"]
    assert main(command) == 0
    raw = capsys.readouterr().out
    assert (
        raw
        == TextGenerator(*load_model(str(talker))).generate("def f", max_new_tokens=60, temperature=1.0, seed=seed).text
        + "\n"
    )
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", raw)
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown) and shown == printable(raw)


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize("data", [b"def f", b"def f\n", b"def f\r\n", b"\xef\xbb\xbfdef f\n"])
def test_a_prompt_from_standard_input(talker, capsys, monkeypatch, data):
    command = [f"--model={talker}", "--max_new_tokens=9"]
    assert main(["generate", "--prompt=def f", *command]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["generate", "--prompt=-", *command]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize(
    ("data", "words"), [(b"", "prompt: is empty"), (b"\n", "prompt: is empty"), (b"caf\xe9", "prompt: .* not UTF-8")]
)
def test_standard_input_without_a_prompt(talker, capsys, monkeypatch, data, words):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["generate", "--prompt=-", f"--model={talker}"]) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.kind("M a new user's first hour")
@pytest.mark.parametrize("drafts", [{}, {"exit_layer": 2, "num_speculations": 3}], ids=["plain", "drafted"])
def test_an_answer_as_json(talker, capsys, drafts):
    flags = [f"--{name}={value}" for name, value in drafts.items()]
    assert main(["generate", "--prompt=def f", f"--model={talker}", *SAYS, *flags, "--json=true"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = TextGenerator(*load_model(str(talker))).generate("def f", max_new_tokens=60, temperature=1.0, seed=0)
    assert (said["prompt"], said["text"], said["tokens"]) == ("def f", expected.text, len(expected.token_ids))
    assert (said["seed"], said["finish_reason"]) == (0, expected.finish_reason)
    assert (said["acceptance_rate"] is None) == (not drafts) and said["seconds"] > 0


LATE = "M a new user's first hour"


@pytest.mark.kind(LATE)
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        pytest.param("--exit_layer=99", "exit_layer: 99 is not a whole number from 1 to 4", id="exit_layer 99"),
        pytest.param("--num_speculations=3", "num_speculations: 3 needs an exit_layer from 1 to 3", id="no draft"),
        pytest.param("--num_speculations=3 --draft=weights", "draft: 'weights' needs draft_weights", id="no weights"),
        pytest.param("--exit_layer=4 --num_speculations=3", "num_speculations: 3 needs an exit_layer", id="last layer"),
        pytest.param("--temperature=1e-40", "temperature: 1e-40 is not a number 0, or from", id="beyond float32"),
        pytest.param("--seed=18446744073709551616", "seed: .* is not below", id="seed"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_loaded(talker, capsys, monkeypatch, flags, sentence):
    monkeypatch.setattr(command_options, "load_generator", None)
    assert main(["generate", "--prompt=x", f"--model={talker}", *flags.split()]) == 2
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.kind("B45 small tracebacks")
@pytest.mark.parametrize(
    "device", [pytest.param("meta", id="B45 meta"), "abacus", "", "cuda:99", "xla", "lazy", "cpu:x"]
)
def test_a_device_that_is_none(talker, capsys, device):
    assert main(["generate", "--prompt=x", f"--model={talker}", f"--device={device}"]) == 2
    assert f"device: '{device}' cannot be used here" in capsys.readouterr().err
