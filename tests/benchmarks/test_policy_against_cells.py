"""The policy against cells: that every cell runs, that all write the same texts, and the ratio by hand."""

import json

import pytest

from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("process_settings")


@pytest.fixture
def arguments(tmp_path, tiny_tokenizer, quick_costs):
    make_model(eos_token_id=None).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def add(a\nfor i in range\nprint\nreturn a")
    needed = ["--model", str(tmp_path / "model"), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    return [*needed, "--threads", "1", "--max_new_tokens", "12", "--tokens", "30"]


def test_all_cells_run_and_no_text_differs(arguments, tmp_path, capsys):
    from benchmarks.decoding.policy_against_cells import main

    main([*arguments, "--exit_layers", "1,3", "--num_speculations", "2", "--batch_sizes", "1,2"])
    batches = json.loads((tmp_path / "out" / "result.json").read_text())["batches"]
    assert [found["batch"] for found in batches] == [1, 2]
    for found in batches:
        copies = {"weights 1 d=2", "weights 3 d=2", "weights 4 d=2"} if found["draft_weights"] else set()
        assert set(found["cells"]) == {"none", "layers 1 d=2", "layers 3 d=2"} | copies
        assert found["best"] in found["cells"] and found["cells"]["none"] == 1
        assert found["mismatches"] == 0 and found["tokens"] >= 30 and found["over_none"]["ratio"] > 0
    assert "policy over best" in capsys.readouterr().out


def test_never_worse_decodes_no_cell(arguments, tmp_path):
    from benchmarks.decoding.policy_against_cells import main

    main([*arguments, "--never_worse", "--draft_weights", "none"])
    (found,) = json.loads((tmp_path / "out" / "result.json").read_text())["batches"]
    assert set(found["cells"]) == {"none"} and found["over_best"] == found["over_none"]


def test_the_ratio_is_of_all_seconds():
    from benchmarks.decoding.policy_against_cells import ratio

    found = ratio({"policy": [1.0, 1.0, 2.0], "none": [2.0, 3.0, 3.0]}, "none")
    assert found["ratio"] == 2.0 and 1.5 <= found["low"] <= 2.0 <= found["high"] <= 3.0


def test_prompts_that_make_no_two_batches_are_refused(arguments):
    from benchmarks.decoding.policy_against_cells import main

    with pytest.raises(SystemExit, match="4 prompts do not make two batches of 3"):
        main([*arguments, "--batch_sizes", "3"])
