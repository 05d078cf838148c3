"""What a policy learnt, kept in the costs_file from one process to the next."""

import json

import pytest

from lskip.inference import CostAwareDraft, TextGenerator, load_generator
from lskip.inference.drafting import costs_file
from tests.conftest import make_model

PROMPT = [7, 42, 99, 3, 250, 18, 77]
DRAFTS = {"num_speculations": 4, "max_new_tokens": 40}

pytestmark = pytest.mark.usefixtures("quick_costs")


@pytest.fixture
def generator(tmp_path):
    return TextGenerator(make_model(eos_token_id=None), costs_file=str(tmp_path / "costs.json"))


def test_the_next_process_knows_what_this_one_learnt(generator, tmp_path):
    policy = CostAwareDraft()
    generator.generate(PROMPT, draft_policy=policy, **DRAFTS)
    saved = json.loads((tmp_path / "costs.json").read_text())
    assert set(saved) == {"device", "layouts", "costs", "learnt"}
    assert saved["learnt"] == json.loads(json.dumps(policy.learnt()))
    assert saved["learnt"]["drafts"]
    later = CostAwareDraft()
    generator.generate(PROMPT, draft_policy=later, **{**DRAFTS, "max_new_tokens": 2})
    assert later.learnt()["drafts"].keys() >= saved["learnt"]["drafts"].keys()


def test_what_is_learnt_is_not_written_after_every_short_text(generator, tmp_path, monkeypatch):
    now, policy, written = [100.0], CostAwareDraft(), []
    monkeypatch.setattr(costs_file.time, "monotonic", lambda: now[0])
    write = costs_file.write_json
    monkeypatch.setattr(costs_file, "write_json", lambda *given: (written.append(now[0]), write(*given)))
    for now[0] in (100.0, 100.1, 105.0, 130.0, 130.1):
        generator.generate(PROMPT, draft_policy=policy, **DRAFTS)
    assert [at for at in written if at > 100] == [130.0]
    assert json.loads((tmp_path / "costs.json").read_text())["learnt"]["drafts"]


def test_a_costs_file_of_before_is_used_and_gets_what_is_learnt(generator, tmp_path):
    generator.generate(PROMPT, draft_policy=CostAwareDraft(), **DRAFTS)
    path = tmp_path / "costs.json"
    before = json.loads(path.read_text())
    before = {"device": before["device"], "costs": before["costs"]}
    path.write_text(json.dumps(before))
    generator.generate(PROMPT, draft_policy=CostAwareDraft(), **DRAFTS)
    assert json.loads(path.read_text()).keys() == {"device", "layouts", "costs", "learnt"}


def test_what_was_learnt_is_looked_at(generator, tmp_path):
    generator.generate(PROMPT, draft_policy=CostAwareDraft(), **DRAFTS)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"learnt": {"drafts": []}}))
    with pytest.raises(
        ValueError, match=r"costs_file: .* learnt: is not a table of drafts, extra; remove it to measure"
    ):
        generator.generate(PROMPT, draft_policy=CostAwareDraft(), **DRAFTS)


def test_a_full_disk_does_not_stop_the_text(generator, monkeypatch, capsys):
    text = generator.generate(PROMPT, draft_policy=CostAwareDraft(), **DRAFTS).token_ids

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(costs_file, "write_json", full)
    assert generator.generate(PROMPT, draft_policy=CostAwareDraft(), **DRAFTS).token_ids == text
    assert "what the policy learnt is not kept" in capsys.readouterr().err


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return the folder of cached costs, which is empty, and a model beside it."""
    monkeypatch.setattr(costs_file, "CACHE", str(tmp_path / "cache"))
    make_model(eos_token_id=None).save_pretrained(tmp_path / "model")
    return tmp_path / "cache"


def decode(cache, **loading):
    generator = load_generator(str(cache.parent / "model"), device="cpu", **loading)
    return generator.generate(PROMPT, draft="auto", max_new_tokens=20).token_ids


def test_costs_are_cached_where_no_file_is_named(cache):
    texts = [decode(cache)]
    (file,) = cache.iterdir()
    saved = json.loads(file.read_text())
    assert saved["learnt"]["drafts"]
    # Costs that no machine has: they would be gone if the next process measured, and none is busier than they say.
    saved["costs"]["model"]["block"] = [1e-9 * rows for rows in saved["costs"]["model"]["rows"]]
    file.write_text(json.dumps(saved))
    texts.append(decode(cache))
    assert texts[0] == texts[1] and list(cache.iterdir()) == [file]
    assert json.loads(file.read_text())["costs"] == saved["costs"]


def test_costs_of_a_busy_machine_are_measured_again(cache):
    text = decode(cache)
    (file,) = cache.iterdir()
    saved = json.loads(file.read_text())
    saved["costs"]["model"]["block"] = [60.0 + rows for rows in saved["costs"]["model"]["rows"]]
    file.write_text(json.dumps(saved))
    assert decode(cache) == text
    again = json.loads(file.read_text())
    assert max(again["costs"]["model"]["block"]) < 60 and again["learnt"]["drafts"]


def test_another_way_to_load_a_model_has_costs_of_its_own(cache):
    for loading in ({}, {"dtype": "bfloat16"}, {"weights": "plain"}, {"batch_size": 4}, {"costs_file": None}):
        decode(cache, **loading)
    assert len(list(cache.iterdir())) == 4


def test_models_that_differ_anywhere_have_costs_of_their_own(cache):
    """Red where the head alone tells them apart: a retrained block, another width of the MLP."""
    model = make_model(eos_token_id=None)
    decode(cache)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(cache.parent / "model")
    decode(cache)
    wider = make_model(eos_token_id=None, intermediate_size=96)
    wider.lm_head.weight.data = model.lm_head.weight.data
    wider.save_pretrained(cache.parent / "model")
    decode(cache)
    assert len(list(cache.iterdir())) == 3


def test_so_have_models_that_lskip_runs_by_other_code(cache):
    """The same weights on fused blocks, and with an activation for which they go through their own modules."""
    decode(cache, draft_weights=None, costs_file="auto")
    make_model(eos_token_id=None, hidden_act="gelu").save_pretrained(cache.parent / "model")
    decode(cache, draft_weights=None, costs_file="auto")
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_is_broken_or_cannot_be_written_stops_nothing(cache, monkeypatch, capsys):
    text = decode(cache)
    (file,) = cache.iterdir()
    file.write_text("{")
    assert decode(cache) == text and json.loads(file.read_text())["costs"]
    file.unlink()
    file.mkdir()
    assert decode(cache) == text
    monkeypatch.setattr(costs_file, "CACHE", "/dev/null/costs")
    assert decode(cache) == text and not capsys.readouterr().err
