"""Tiny stand-ins that every test shares: random models of each family and a byte-level tokenizer.

And `--kinds FILE`: a table of the faults that tests keep away, by their mark `kind`.
"""

import json
import os
import re
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("LSKIP_TEST_CUDA", ""))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lskip.inference.layers.layout_choice import obstacle_to
from lskip.inference.layers.linear import Halved

HALVED_WORKS = obstacle_to(Halved, torch.ones(8, 8)) is None
needs_halved = pytest.mark.skipif(not HALVED_WORKS, reason="this build has no FBGEMM")

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    # Ten times the usual spread: with the default of 0.02 random blocks change next to nothing,
    # and a test that compares layers could not fail.
    "initializer_range": 0.2,
}


def make_config(family: str = "llama", **overrides) -> dict:
    sliding = {"sliding_window": None} if family == "mistral" else {}
    return {"model_type": family, **TINY, **sliding, **overrides}


def make_model(family: str = "llama", seed: int = 0, **overrides):
    torch.manual_seed(seed)
    config = make_config(family, **overrides)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="sdpa").eval()


@pytest.fixture
def tiny_config():
    """Return a function (family, **overrides) -> a transformers config as a plain dict."""
    return make_config


@pytest.fixture
def tiny_model():
    """Return a function (family, **overrides) -> a random float32 model in eval mode."""
    return make_model


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE with 300 entries, `<|endoftext|>` (id 0) at the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n"
    bpe.train_from_iterator([text] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@pytest.fixture
def answers_file(tmp_path) -> Path:
    """120 answers as `lskip predict` writes them, some of them held out."""
    reasons = ("length", "eos")
    lines = [
        {
            "prompt": f"def f{i}(a, b):",
            "text": f"return a + b\n    print(add(i, 1)) # {i}",
            "finish_reason": reasons[i % 2],
        }
        for i in range(120)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "answers.jsonl"


@pytest.fixture(autouse=True)
def costs_cache(monkeypatch, tmp_path_factory):
    """Keep what tests measure out of the user's cache; return the folder."""
    from lskip.inference.drafting import costs_file

    folder = tmp_path_factory.getbasetemp() / "costs"
    monkeypatch.setattr(costs_file, "CACHE", str(folder))
    return folder


@pytest.fixture
def quick_costs(monkeypatch):
    """Costs are measured for seconds; here nobody looks at times."""
    from lskip.inference import generator
    from lskip.inference.drafting import costs_file
    from lskip.inference.drafting.costs import measure_costs

    for module in (generator, costs_file):
        monkeypatch.setattr(module, "measure_costs", lambda *steps, **more: measure_costs(*steps, seconds=0.05, **more))


@pytest.fixture(scope="module")
def process_settings():
    """Restore what a benchmark sets for its whole process."""
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    yield
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


HANDED = re.compile(r"\b([FBHM]\d+)\b")  # the numbers of faults that were reported; all else is an input of our own


def pytest_addoption(parser) -> None:
    parser.addoption("--kinds", metavar="FILE", help="write a table of the marks `kind`: input, test, outcome")


def pytest_configure(config) -> None:
    mark = "kind(name, *handed): a kind of fault that the test keeps away, and the reported inputs that it tries"
    config.addinivalue_line("markers", mark)
    config.stash[KINDS] = {}


KINDS = pytest.StashKey[dict]()


def pytest_runtest_setup(item) -> None:
    # Of a test of many inputs each is one; its id says which report it comes from, if from any.
    for mark in item.iter_markers("kind"):
        name, *handed = mark.args
        inputs = handed or HANDED.findall(item.callspec.id if hasattr(item, "callspec") else "")
        item.user_properties.append(("kind", (name, inputs)))


def pytest_report_teststatus(report, config) -> None:
    if report.when == "call" and config.stash.get(KINDS, None) is not None:
        for name, inputs in (value for key, value in report.user_properties if key == "kind"):
            config.stash[KINDS].setdefault(name, {})[report.nodeid] = (inputs, report.outcome)


def pytest_sessionfinish(session) -> None:
    path = session.config.getoption("--kinds")
    if not path or hasattr(session.config, "workerinput"):
        return
    lines = ["| kind | handed | further | right | tests |", "|---|---|---|---|---|"]
    for name, tests in sorted(session.config.stash[KINDS].items()):
        handed = sorted({each for inputs, _ in tests.values() for each in inputs})
        further = sum(not inputs for inputs, _ in tests.values())
        right = sum(outcome == "passed" for _, outcome in tests.values())
        names = sorted({nodeid.partition("[")[0] for nodeid in tests})
        lines.append(f"| {name} | {' '.join(handed)} | {further} | {right} of {len(tests)} | {', '.join(names)} |")
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
