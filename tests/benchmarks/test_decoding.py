"""The decoding benchmark at tiny size: that its records mean what they say (not what their times are)."""

import json
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("process_settings")
ROOT = Path(__file__).parents[2]
KEYS = {
    "model", "method", "precision", "exit_layer", "draft", "policy", "num_speculations", "batch", "tokens_per_second",
    "over_autoregressive", "over_autoregressive_quartiles", "over_generate", "acceptance_rate", "tokens_per_round",
    "share_of_ideal", "peak_mib", "mismatches", "accepted_counts",
}  # fmt: skip
OTHERS = "control,fixed_exit,self_speculative,hf_early_exit,hf_prompt_lookup,hf_assistant"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """A saved Llama, and three prompts for it."""
    from tests.conftest import make_model

    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    lines = [json.dumps({"prompt": text}) for text in ("def add(a", "for i in range", "print")]
    (path / "prompts.jsonl").write_text("\n".join(lines))
    return path


def arguments(folder, out, *more):
    needed = ["--model", str(folder), "--prompts", str(folder / "prompts.jsonl"), "--out", str(out)]
    return [*needed, "--quick", "--threads", "1", *more]


@pytest.fixture(scope="module")
def output(process_settings, folder, tmp_path_factory):
    """(what a quick run printed, the folder it wrote)."""
    from rich.console import Console

    from benchmarks.decoding.run import main

    out, printed = tmp_path_factory.mktemp("decoding") / "result", StringIO()
    with redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.decoding.run.console", Console(file=printed, width=190))
        drafts = "layers,layers_uncached,int8,ngram,int8"
        main(arguments(folder, out, "--methods", OTHERS, "--drafts", drafts, "--repeats", "1"))
    return printed.getvalue(), out


def read(out, name="decoding.json"):
    return json.loads((out / name).read_text())


def test_every_record_has_every_key(output):
    records = read(output[1])
    assert all(set(record) == KEYS for record in records)
    assert {record["method"] for record in records} == {"autoregressive", "hf_generate", *OTHERS.split(",")}
    assert all(record["tokens_per_second"] > 0 and record["tokens_per_round"] >= 1 for record in records)
    assert all(record["over_autoregressive"] > 0 and record["peak_mib"] is None for record in records)


def test_own_and_peers_texts_are_those_of_generate(output):
    for record in read(output[1]):
        if record["method"] == "fixed_exit":  # 2 layers of 4 are another model: the comparison can tell
            assert record["mismatches"] == 2
        else:
            assert record["mismatches"] == 0, record


def test_each_draft_runs_with_each_policy_that_suits_it(output):
    own = [record for record in read(output[1]) if record["method"] == "self_speculative" and record["batch"] == 1]
    assert {(record["draft"], record["policy"]) for record in own} == {
        ("layers", "fixed"), ("layers", "confidence"), ("layers", "cost_aware"),
        ("layers_uncached", "fixed"), ("layers_uncached", "confidence"), ("layers_uncached", "cost_aware"),
        ("int8", "fixed"), ("int8", "confidence"), ("int8", "cost_aware"),
        ("ngram", "fixed"), ("ngram", "cost_aware"),
    }  # fmt: skip
    drafted = next(record for record in own if record["draft"] == "layers" and record["policy"] == "fixed")
    # each text: 1 token from the prompt and 7 from rounds, each of which adds its accepted tokens and one more
    counts = {int(count): rounds for count, rounds in drafted["accepted_counts"].items()}
    assert sum((count + 1) * rounds for count, rounds in counts.items()) <= 2 * 7
    assert 0 <= drafted["acceptance_rate"] <= 1


def test_without_cached_exit_states_the_same_rounds_happen(output):
    rounds = {
        (record["draft"], record["exit_layer"]): record["accepted_counts"]
        for record in read(output[1])
        if record["method"] == "self_speculative" and record["policy"] == "fixed" and record["batch"] == 1
    }
    assert rounds["layers", 2] == rounds["layers_uncached", 2]


def test_batches_have_records_of_their_own(output):
    batched = [record for record in read(output[1]) if record["batch"] == 2]
    assert sorted(str(record["policy"]) for record in batched) == ["None", "None", "confidence", "cost_aware", "fixed"]
    assert all(record["over_generate"] is None for record in batched)
    assert next(r for r in batched if r["method"] == "autoregressive")["over_autoregressive"] == 1
    assert "batch 2: autoregressive" in output[0]


def test_what_is_written_and_printed_besides(output):
    from benchmarks.decoding.settings import DRAFTS

    printed, out = output
    environment = read(out, "environment.json")
    assert {"date", "hardware", "threads", "torch", "transformers", "options", "distinct_3grams"} <= set(environment)
    # Which drafts go on to batches is for the clock to say: those of their records.
    batched = [record["draft"] for record in read(out) if record["batch"] == 2 and record["draft"]]
    weights = {None, *(DRAFTS[draft].draft_weights for draft in batched)}
    assert set(read(out, "costs.json")) == {"none", "own", "int8"} | {f"{each or 'none'}, batch 2" for each in weights}
    assert all((out / name).stat().st_size > 1000 for name in ("speedups.png", "batches.png"))
    assert "distinct_3grams" in printed and "hf_early_exit" in printed
    assert "differs from generate" not in printed


def test_without_llama_cpp_one_line_says_so(folder, tmp_path, monkeypatch):
    from rich.console import Console

    from benchmarks.decoding import run as decoding

    printed = StringIO()
    monkeypatch.setattr(decoding, "console", Console(file=printed, width=190))
    monkeypatch.setattr("benchmarks.decoding.options.find_python", lambda given: None)
    decoding.main(arguments(folder, tmp_path, "--methods", "llama_cpp", "--batch_sizes", "1", "--limit_prompts", "1"))
    assert printed.getvalue().count("llama_cpp is left out: it is not installed here") == 1
    assert {record["method"] for record in read(tmp_path)} == {"autoregressive", "hf_generate"}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--methods", "hf_generat"), "methods: 'hf_generat' is not one of autoregressive, "),
        (("--drafts", "layer"), "drafts: 'layer' is not one of layers, "),
        (("--drafts", "adapter"), "drafts: 'adapter' needs --exit_adapter"),
        (("--policies", "fixed,x"), "policies: 'x' is not one of fixed, "),
        (("--exit_layers", "2,4"), "exit_layers: 4 is not from 1 to 3, below the last layer"),
        (("--prompts", "none.jsonl"), "prompts: there is no file 'none.jsonl'"),
        (("--model", "none/model"), "model: "),
        (("--max_new_tokens", "127"), "max_new_tokens: 127 after a prompt of "),
        (("--llama_cpp_python", "/none/python"), "llama_cpp_python: '/none/python' is no interpreter that can"),
    ],
)
def test_bad_input_is_one_sentence(folder, tmp_path, more, sentence):
    from benchmarks.decoding.run import main

    with pytest.raises(SystemExit) as error:
        main(arguments(folder, tmp_path / "out", *more))
    message = str(error.value)
    assert message.startswith(f"benchmarks.decoding.run: {sentence}") and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_lists_of_numbers_are_checked(folder, tmp_path, capsys):
    from benchmarks.decoding.run import main

    for text in ("0", "2,x", "-1"):
        with pytest.raises(SystemExit):
            main(arguments(folder, tmp_path, f"--batch_sizes={text}"))
        assert f"'{text}' is not a list of whole numbers from 1 up" in capsys.readouterr().err


# Records from runs.


def measured_by_hand():
    """Two prompts; autoregressive, drafted, and `generate`, with times that are easy to reckon with."""
    from benchmarks.decoding.measuring import PROMPT, Measured, Run
    from benchmarks.decoding.settings import Setting

    plain, peer, prompt = (Setting(name, "float32") for name in ("autoregressive", "hf_generate", PROMPT))
    drafted = Setting("self_speculative", "float32", 2, "layers", "fixed", 2)
    measured = Measured([[[1]], [[2]]], [plain, peer, prompt, drafted])
    text, other = [5, 6, 7, 8], [5, 6, 9, 9]
    measured.runs[plain] += [Run([text], 5.0, 4, planned=lambda: 3.0), Run([text], 9.0, 4, planned=lambda: 3.0)]
    measured.runs[peer] += [Run([text], 10.0, 4), Run([text], 12.0, 4)]
    measured.runs[prompt] += [Run([[5]], 1.0, 1), Run([[5]], 1.0, 1)]
    measured.runs[drafted] += [
        Run([text], 3.0, 2, 4, 2, Counter({0: 1, 2: 1}), planned=lambda: 2.0),
        Run([other], 3.0, 3, 2, 1, Counter({1: 1}), planned=lambda: 2.0),
    ]
    return measured, drafted


def test_a_record_by_hand():
    from benchmarks.decoding.measuring import record, references

    measured, drafted = measured_by_hand()
    found = record(measured, drafted, "tiny", references(measured))
    assert found["tokens_per_second"] == pytest.approx(4 / 3)
    assert found["over_autoregressive"] == pytest.approx((5 / 3 + 9 / 3) / 2)
    # a quarter and three quarters of the way from 5 / 3 to 9 / 3
    assert found["over_autoregressive_quartiles"] == pytest.approx((6 / 3, 8 / 3))
    assert found["over_generate"] == pytest.approx((10 / 3 + 12 / 3) / 2)
    assert found["acceptance_rate"] == 3 / 6 and found["tokens_per_round"] == 8 / 5
    # without the prompts 4 / 2 and 8 / 2, where the cost model says 6 / 4
    assert found["share_of_ideal"] == pytest.approx(3 / 1.5)
    assert found["mismatches"] == 1 and found["accepted_counts"] == {"0": 1, "1": 1, "2": 1}


def test_what_a_batch_gains_by_hand():
    """Six tokens of two texts: the prompts bring one each, in a pass of their own."""
    from benchmarks.decoding.batches import batch_gains, batch_rates
    from benchmarks.decoding.measuring import PROMPT, Measured, Run
    from benchmarks.decoding.settings import Setting

    one, two = (Setting("autoregressive", "float32", batch=size) for size in (1, 2))
    prompt, prompts = (Setting(PROMPT, "", batch=size) for size in (1, 2))
    measured, texts = Measured([[[1], [2]]], [prompt, prompts, one, two]), [[5, 6, 7], [8, 9, 4]]
    measured.runs[prompt] += [Run([[5], [8]], 2.0, 2)]
    measured.runs[prompts] += [Run([[5], [8]], 3.0, 2)]
    measured.runs[one] += [Run(texts, 10.0, 6, planned=lambda: 6.0)]
    measured.runs[two] += [Run(texts, 5.0, 3, planned=lambda: 2.5)]
    rates = batch_rates(measured)
    assert rates == {one: {1: (4 / 8, 4 / 6), 2: (4 / 2, 4 / 2.5)}}
    assert list(batch_gains(measured, rates)) == [
        "batch 2: autoregressive 2.00x batch 1, prompts included; 4.00x without (cost model 2.40x)"
    ]


def test_texts_are_compared_as_far_as_they_can_be():
    from benchmarks.decoding.measuring import first_differences, references

    measured, drafted = measured_by_hand()
    assert first_differences(measured, drafted, references(measured)) == {(2,): 2}
    measured.runs[drafted] = [run._replace(compared=2) for run in measured.runs[drafted]]
    assert first_differences(measured, drafted, references(measured)) == {}
    short = measured.runs[drafted][0]._replace(texts=[[5, 6, 7]], compared=None)
    measured.runs[drafted] = [short]
    assert first_differences(measured, drafted, references(measured)) == {(1,): 3}


def test_settings_run_on_every_group_in_an_order_of_its_own():
    from benchmarks.decoding.measuring import Run, measure
    from benchmarks.decoding.settings import Setting

    calls = []

    class Named:
        def __init__(self, method):
            self.setting = Setting(method, "float32")

        def run(self, prompts, max_new_tokens):
            calls.append((self.setting.method, prompts[0][0], max_new_tokens))
            return Run([[0] * max_new_tokens], 1.0, 1)

    kept = []
    contestants = [Named(name) for name in "abc"]
    measure(contestants, [[[number]] for number in range(40)], 20, lambda measured: kept.append(len(calls)))
    assert calls[:3] == [("a", 0, 16), ("b", 0, 16), ("c", 0, 16)]  # a warm-up
    orders = Counter("".join(name for name, _, _ in calls[start : start + 3]) for start in range(3, 123, 3))
    assert set(orders) == {"abc", "acb", "bac", "bca", "cab", "cba"} and max(orders.values()) < 20
    assert [number for _, number, _ in calls[3:]] == [number for number in range(40) for _ in "abc"]
    assert kept == list(range(6, 124, 3))


# transformers.


def test_passes_and_drafts_of_transformers_are_counted():
    """The upper blocks add nothing, so that an exit, or an assistant, below them agrees always."""
    from benchmarks.decoding.settings import Setting
    from benchmarks.decoding.transformers_peer import Assistants, Transformers
    from tests.conftest import make_model

    model = make_model()
    for layer in model.model.layers[2:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    before = model.generation_config.num_assistant_tokens
    prompts = [[5, 9, 77], [3, 4, 5, 6]]
    plain = Transformers(model, Assistants(model), Setting("hf_generate", "float32")).run(prompts, 9)
    assert (plain.rounds, plain.drafted, plain.accepted) == (18, 0, 0)
    for method in ("hf_early_exit", "hf_assistant"):
        setting = Setting(method, "float32", 2, "layers", "fixed", 2)
        run = Transformers(model, Assistants(model), setting).run(prompts, 9)
        assert run.texts == plain.texts and run.tokens == 18
        assert (run.rounds, run.drafted, run.accepted) == (6, 12, 12)  # three passes of three tokens each
    assert model.generation_config.num_assistant_tokens == before
    assert not model.model.layers[-1]._forward_pre_hooks


# llama.cpp.


FAKE_LLAMA_CPP = """
__version__ = "fake"
class Llama:
    def __init__(self, path, n_ctx, draft_model, **settings):
        print("words of llama.cpp on stdout")
        self.draft_model, self.n_ctx = draft_model, n_ctx
    def reset(self): self.tokens = 0
    def generate(self, ids, temp):
        token = ids[-1]
        while True:  # passes that bring two tokens each
            for _ in range(2):
                token += 1
                yield token
            if self.draft_model is not None: self.draft_model([])
"""


def test_llama_cpp_is_spoken_to_line_by_line(tmp_path, monkeypatch):
    from benchmarks.decoding.llama_cpp_peer import LlamaCpp, LlamaCppProcess
    from benchmarks.decoding.settings import Setting

    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text(FAKE_LLAMA_CPP)
    lookup = "class LlamaPromptLookupDecoding:\n    def __init__(self, num_pred_tokens): self.n = num_pred_tokens\n"
    lookup += "    def __call__(self, ids): return [0] * self.n\n"
    (tmp_path / "llama_cpp" / "llama_speculative.py").write_text(lookup)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = LlamaCppProcess(sys.executable, tmp_path / "log")
    try:
        assert process.version == "fake"
        run = LlamaCpp(process, tmp_path, Setting("llama_cpp", "Q8_0"), (), 10).run([[1], [10, 11]], 3)
        assert run.texts == [[2, 3, 4], [12, 13, 14]] and (run.rounds, run.drafted, run.compared) == (6, 0, 3)
        # tokens 2 3, 4 5, 6: three passes, drafted for before the second and the third
        drafted = Setting("llama_cpp", "Q8_0", None, "ngram", "fixed", 4)
        run = LlamaCpp(process, tmp_path, drafted, (5, 4), 10).run([[1]], 5)
        assert run.texts == [[2, 3, 4, 5, 6]]
        assert (run.rounds, run.drafted, run.accepted, run.compared) == (3, 8, 2, 2)
        with pytest.raises(RuntimeError, match="llama_cpp: generate: KeyError"):
            process.ask(do="generate", name="unknown", ids=[1], max_new_tokens=1)
        assert process.ask(do="version") == {"version": "fake"}  # it lives on
    finally:
        process.close()
    assert "words of llama.cpp" in (tmp_path / "log").read_text()


# Memory.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_forgets_what_was_before():
    code = """
import torch  # which forget_peak brings
from benchmarks.decoding.memory import forget_peak, peak_resident_mib
block = bytearray(b"x") * 2**27
with_block = peak_resident_mib()
del block
after = peak_resident_mib()
forget_peak()
block = bytearray(b"x") * 2**25
print(with_block, after, peak_resident_mib())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    with_block, after, forgotten = map(float, done.stdout.split())
    assert with_block > 128 and after == pytest.approx(with_block, abs=2)  # the kernel counts in batches of pages
    assert 32 < forgotten < with_block - 64
