"""A drafter of a user's own: one file, and every way to decode knows it."""

import json
import sys

import pytest
import torch

from lskip.cli import main
from lskip.inference import CostAwareDraft, TextGenerator
from lskip.inference.drafting.drafter import Drafter
from lskip.inference.drafting.registry import DRAFTERS, register_drafter
from tests.conftest import make_model

# All that its author writes.
LAST_TOKEN = """
from lskip.inference import Drafter, register_drafter
from lskip.inference.drafting.round import Drafted


@register_drafter
class LastToken(Drafter):
    kind = "last_token"

    def propose(self, draft, count, chooser, goes_on):
        return Drafted(self.slots.pending[:, None].expand(-1, count))
"""
PROMPTS = [[5, 9, 5, 9, 5], [7, 7, 7], [200, 3, 80, 3]]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Return the author's folder; the registry is restored afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_drafts.py").write_text(LAST_TOKEN)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("aaaa", "hello")))
    (tmp_path / "task.jsonl").write_text('{"prompt": "aaa", "reference": "b"}\n{"prompt": "hi", "reference": "c"}\n')
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    before = dict(DRAFTERS)
    yield tmp_path
    DRAFTERS.clear()
    DRAFTERS.update(before)
    sys.modules.pop("own_drafts", None)


@pytest.fixture
def imported(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    import own_drafts

    return own_drafts


@pytest.fixture
def model_folder(folder, tiny_tokenizer):
    model = make_model(eos_token_id=None, seed=4)
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_those_without_drafts(imported, temperature, batch_size):
    generator = TextGenerator(make_model(eos_token_id=None, seed=4))
    settings = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    alone = dict(generator.generate_batch(PROMPTS, batch_size, **settings))
    drafted = dict(generator.generate_batch(PROMPTS, batch_size, **settings, draft="last_token", num_speculations=3))
    assert {i: text.token_ids for i, text in drafted.items()} == {i: text.token_ids for i, text in alone.items()}
    assert sum(text.drafted for text in drafted.values()) > 0


def test_what_it_drafts_is_accepted_where_it_is_right(imported):
    model = make_model(eos_token_id=None)
    with torch.no_grad():  # the next token is always 9
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(32, 300)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[9] = 1.0
    answer = TextGenerator(model).generate([9], max_new_tokens=11, draft="last_token", num_speculations=4)
    assert answer.token_ids == [9] * 11 and answer.acceptance_rate == 1.0
    assert answer.rounds == 3  # the prefill, then 2 rounds of 4 drafts and the model's own token


def test_a_policy_that_chooses_among_all_drafts_tries_it(imported, quick_costs):
    generator, policy = TextGenerator(make_model(eos_token_id=None, seed=4)), CostAwareDraft(budget=1.0)
    settings = {"max_new_tokens": 60, "num_speculations": 2, "draft_policy": policy}
    drafted = generator.generate(PROMPTS[0], **settings)
    assert drafted.token_ids == generator.generate(PROMPTS[0], max_new_tokens=60).token_ids
    assert "last_token" in policy.summary()


def test_predict_and_generate_name_it_by_its_import_path(folder, model_folder, capsys):
    command = ["predict", "--prompts=prompts.jsonl", f"--model={model_folder}", "--max_new_tokens=6"]
    assert main([*command, "--output=alone.jsonl"]) == 0
    own = ["--draft=own_drafts.LastToken", "--num_speculations=2"]
    assert main([*command, "--output=drafted.jsonl", *own]) == 0
    alone, drafted = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("alone", "drafted")
    )
    assert [row["text"] for row in drafted] == [row["text"] for row in alone]
    assert all(row["acceptance_rate"] is not None for row in drafted)
    assert main(["generate", "--prompt=aaaa", f"--model={model_folder}", "--max_new_tokens=6", *own]) == 0
    assert capsys.readouterr().out.strip() == drafted[0]["text"].strip()


@pytest.mark.parametrize("command", ["sweep", "tune"])
def test_sweep_and_tune_measure_it(folder, model_folder, command, quick_costs):
    arguments = [command, f"--model={model_folder}", "--task=LocalTask", "--task.path=task.jsonl"]
    arguments += ["--task.max_new_tokens=8", "--drafts=own_drafts.LastToken,ngram", "--num_speculations=2"]
    output = ["--output=swept", "--policies=FixedDraft"] if command == "sweep" else []
    assert main([*arguments, *output, "--num_prompts=2", "--rounds=1"]) == 0
    if command == "sweep":
        cells = json.loads((folder / "swept" / "sweep.json").read_text())["cells"]
        assert [(cell["draft"], cell["exit_layer"], cell["mismatches"]) for cell in cells] == [
            ("last_token", None, 0),
            ("ngram", None, 0),
        ]


def test_a_task_tuned_with_it_leaves_the_others_readable(folder, model_folder, capsys):
    found = {"exit_layer": None, "num_speculations": 2, "draft": "last_token", "draft_weights": None}
    found |= {"exit_adapter": None, "device": "cpu"}
    other = {**found, "draft": "ngram"}
    (model_folder / "tuned.json").write_text(json.dumps({"mine": found, "other": other}))
    command = ["generate", "--prompt=aaaa", f"--model={model_folder}", "--max_new_tokens=4", "--device=cpu"]
    assert main([*command, "--task=other"]) == 0
    assert main([*command, "--task=mine"]) == 2
    assert "task: 'mine' was tuned with draft 'last_token', which is not known" in capsys.readouterr().err
    assert main([*command, "--task=mine", "--draft=own_drafts.LastToken"]) == 0


@pytest.mark.parametrize(
    ("ids", "counts"),
    [
        (torch.zeros(1, 5, dtype=torch.long), None),  # more than were asked for
        (torch.zeros(1, 0, dtype=torch.long), None),
        (torch.zeros(2, 2, dtype=torch.long), None),
        (torch.zeros(2, dtype=torch.long), None),
        (torch.zeros(1, 2), None),
        (torch.zeros(1, 2, dtype=torch.long), [2, 2]),
    ],
)
def test_what_it_proposes_is_looked_at(imported, monkeypatch, ids, counts):
    monkeypatch.setattr(imported.LastToken, "propose", lambda *_: imported.Drafted(ids, counts=counts))
    with pytest.raises(ValueError, match="draft: 'last_token' proposed"):
        TextGenerator(make_model()).generate([5, 9], max_new_tokens=8, draft="last_token", num_speculations=3)


@pytest.mark.parametrize(
    "attributes", [{"kind": ""}, {"kind": "int8"}, {"kind": "a.b"}, {}, {"kind": "x", "needs": "a"}]
)
def test_a_drafter_that_could_not_be_named_is_refused(attributes):
    with pytest.raises(ValueError, match=r"^(kind|needs): "):
        register_drafter(type("Mine", (Drafter,), {"propose": lambda *_: None, **attributes}))
    with pytest.raises(ValueError, match="Mine has no method `propose`"):
        register_drafter(type("Mine", (Drafter,), {"kind": "mine"}))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_drafts.Missing", "draft: 'own_drafts.Missing' cannot be imported"),
        ("no_such_module.LastToken", "draft: 'no_such_module.LastToken' cannot be imported"),
        ("broken.Drafts", "draft: 'broken.Drafts' cannot be imported (ZeroDivisionError: division by zero)"),
        ("leaves.Drafts", "draft: 'leaves.Drafts' cannot be imported (SystemExit: 3)"),
        (".", "draft: '.' cannot be imported"),
        ("own_drafts.Drafted", "draft: 'own_drafts.Drafted' is not a class of the kind Drafter"),
        ("last_tokn", "draft: 'last_tokn' is not one of auto, adapter, weights, layers, ngram"),
    ],
)
def test_a_name_that_is_none_is_told_before_a_model_is_loaded(folder, capsys, name, said):
    assert main(["generate", "--prompt=a", "--model=nowhere", f"--draft={name}", "--num_speculations=2"]) == 2
    assert said in capsys.readouterr().err


def test_two_drafters_of_one_name_are_refused(imported):
    class Other(Drafter):
        kind = "last_token"

        def propose(self, draft, count, chooser, goes_on):
            return None

    with pytest.raises(ValueError, match=r"kind: 'last_token' is taken by own_drafts\.LastToken"):
        register_drafter(Other)
    assert register_drafter(imported.LastToken) is imported.LastToken  # once more is nothing
