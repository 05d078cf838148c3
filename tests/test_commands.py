"""`lskip generate`: what its options do, what it prints, and Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lskip
from lskip import command_options
from lskip.cli import main
from lskip.inference import Margin, TextGenerator
from lskip.inference.drafting import ConfidenceDraft
from lskip.pretrained import load_model


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
    assert f"{rates}, {expected.finish_reason}]" in counts


def test_loading_options_reach_the_generator(model_folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(command_options, "load_generator", lambda **options: asked.update(options) or 1 / 0)
    options = {"dtype": "bfloat16", "weights": "plain", "draft_weights": "int8", "device": "cpu", "bit_exact": True}
    options |= {"compiled": True, "costs_file": "costs.json", "exit_adapter": "adapter"}
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
from lskip.inference.drafting import FixedDraft


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
