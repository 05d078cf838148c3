"""Texts in turns, round by round: that all are the same texts, that turns are fair, and a record by hand."""

import json
from types import SimpleNamespace

import pytest

from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("process_settings")


@pytest.fixture
def arguments(tmp_path, tiny_tokenizer, quick_costs):
    make_model(eos_token_id=None).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in ("def add(a", "for i in range", "print")))
    needed = ["--model", str(tmp_path / "model"), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    return [*needed, "--threads", "1", "--max_new_tokens", "30", "--repeats", "2"]


def test_every_draft_and_batch_has_a_record(arguments, tmp_path, capsys):
    from benchmarks.decoding.policy_overhead import main

    main([*arguments, "--drafts", "layers,int8,ngram", "--exit_layers", "1,3", "--batch_sizes", "1,2"])
    records = json.loads((tmp_path / "out" / "overhead.json").read_text())
    drafts = [("layers", 1), ("layers", 3), ("int8", None), ("ngram", None)]
    expected = [
        ("autoregressive", None, None),
        ("control", None, None),
        *(("self_speculative", *each) for each in drafts),
    ]
    assert [(each["method"], each["draft"], each["exit_layer"]) for each in records] == 2 * expected
    assert [each["batch"] for each in records] == 6 * [1] + 6 * [2]
    # 3 prompts, with a fourth to fill the second pair, twice
    assert {(each["batch"], each["tokens"]) for each in records} == {(1, 2 * 3 * 30), (2, 2 * 4 * 30)}
    assert all(each["mismatches"] == 0 and each["over_autoregressive"] > 0 for each in records)
    assert all(each["drafted"] == 0 for each in records if each["method"] != "self_speculative")
    assert (tmp_path / "out" / "environment.json").exists() and "standard_error" in capsys.readouterr().out


def test_who_has_the_fewest_tokens_is_next(monkeypatch):
    from benchmarks.decoding import policy_overhead
    from benchmarks.decoding.settings import Setting

    tokens = {}

    class Steady:
        """Adds its own number of tokens a round, until it has 60."""

        def __init__(self, contestant, prompts, max_new_tokens):
            self.name, self.step = contestant.setting.method, contestant.step
            tokens[self.name] = 1

        tokens = property(lambda self: tokens[self.name])
        batch = property(lambda self: SimpleNamespace(busy=tokens[self.name] < 60))

        def round(self):
            assert tokens[self.name] == min(count for count in tokens.values() if count < 60)
            tokens[self.name] += self.step

        def outcome(self):
            return tokens[self.name]

    def contestant(method, step):
        return SimpleNamespace(setting=Setting(method, "float32"), step=step, run=lambda *given: None)

    contestants = [contestant("autoregressive", 1), contestant("control", 1), contestant("self_speculative", 7)]
    monkeypatch.setattr(policy_overhead, "UnderWay", Steady)
    monkeypatch.setattr(policy_overhead, "gain", lambda base, runs: {"tokens": runs})
    found = policy_overhead.compare(contestants, [[1]], 1, SimpleNamespace(repeats=2, max_new_tokens=60))
    assert [each["tokens"] for each in found] == [[60, 60], [60, 60], [64, 64]]


def test_a_gain_by_hand():
    from benchmarks.decoding.measuring import Run
    from benchmarks.decoding.policy_overhead import gain

    base = [Run([[1, 2, 3]], 2.0, 2), Run([[4, 5, 6]], 8.0, 2)]
    runs = [Run([[1, 2, 3]], 1.0, 2), Run([[4, 5, 7]], 1.0, 1, drafted=3)]
    found = gain(base, runs)
    assert found["over_autoregressive"] == pytest.approx(4.0)  # of 2 and 8
    # logarithms ln 2 and 3 ln 2 are ln 2 from their mean: sqrt(2) ln 2 / sqrt(2)
    assert found["standard_error"] == pytest.approx(0.6931, abs=1e-4)
    assert (found["rounds"], found["drafted"], found["tokens"], found["mismatches"]) == (3, 3, 6, 1)
    assert gain(base[:1], runs[:1])["standard_error"] is None


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--drafts", "layer"), "drafts: 'layer' is not one of layers, "),
        (("--drafts", "adapter"), "drafts: 'adapter' is not one of "),
        (("--drafts", "layers"), "exit_layers: 'layers' needs one at least"),
        (("--drafts", "layers", "--exit_layers", "9"), "exit_layer: 9 "),
        (("--prompts", "none.jsonl"), "prompts: there is no file 'none.jsonl'"),
    ],
)
def test_bad_input_is_one_sentence(arguments, tmp_path, more, sentence):
    from benchmarks.decoding.policy_overhead import main

    with pytest.raises(SystemExit) as error:
        main([*arguments, *more])
    assert str(error.value).startswith(f"benchmarks.decoding.policy_overhead: {sentence}")
    assert not (tmp_path / "out").exists()
