"""The comparison of tune with the sweep, whole, at tiny size; and its shares, by hand."""

import json

import pytest

from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("process_settings")


@pytest.fixture
def run(tmp_path, tiny_tokenizer, quick_costs):
    """Runs it on PythonTopics; returns the result of that task."""
    from benchmarks.decoding import tune_against_sweep as program

    make_model(eos_token_id=None).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")

    def go() -> dict:
        task = ["--tasks", "PythonTopics", "--threads", "1", "--prompt_characters", "60", "--exit_layers", "2,3"]
        program.main([*task, "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--quick"])
        return json.loads((tmp_path / "out" / "result.json").read_text())["tasks"]["PythonTopics"]

    return program, go, tmp_path / "out" / "PythonTopics" / "sweep.json"


def test_shares_are_by_the_sweeps_own_figures(run, monkeypatch):
    program, go, report = run
    ours = {"acceptance_rate": 0.5, "tokens_per_round": 2.0, "policy": "FixedDraft"}
    times = {"speedup": 3.0, "speedups": [3.0]}  # what tune saw is not what counts
    chosen = {"draft": "layers", "exit_layer": 3, "num_speculations": 1, **ours, "times": times}
    monkeypatch.setattr(program, "search", lambda *given: [chosen])
    found = go()
    cells = json.loads(report.read_text())["cells"]
    speedups = {(c["exit_layer"], c["num_speculations"]): c["times"]["speedup"] for c in cells}
    assert found["sweep"]["speedup"] == max(speedups.values()) and found["sweep"]["cells"] == 4
    assert found["tune"] == found["tune"] | {
        "cell": "layers exit_layer=3 num_speculations=1",
        "speedup": speedups[3, 1],
    }
    assert found["share_of_best"] == pytest.approx(speedups[3, 1] / max(1.0, *speedups.values()))
    assert found["share_of_time"] == pytest.approx(found["tune"]["seconds"] / found["sweep"]["seconds"])


def test_the_whole_comparison_runs(run, capsys):
    _, go, _ = run
    assert go()["tune"]["seconds"] > 0
    assert "of the best in" in capsys.readouterr().out
