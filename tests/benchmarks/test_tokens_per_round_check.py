"""The check of tokens per round, whole, at tiny size: what is computed along the answers is what decoding makes."""

import json

import pytest

from benchmarks.decoding import tokens_per_round_check as program
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("process_settings")


def test_what_is_computed_is_what_decoding_makes(tmp_path, tiny_tokenizer, capsys):
    make_model(eos_token_id=None).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    lines = ({"prompt": f"def f{n}(a, b):" * (1 + n % 3), "reference": ""} for n in range(6))
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--prompts_file", str(prompts)]
    program.main([*paths, "--max_new_tokens", "20", "--exit_layers", "2,3", "--num_speculations", "1,4"])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["answers"] == 6
    assert [(cell["exit_layer"], cell["num_speculations"]) for cell in result["cells"]] == [
        (2, 1), (3, 1), (2, 4), (3, 4),
    ]  # fmt: skip
    for cell in result["cells"]:
        assert cell["computed"] == pytest.approx(cell["decoded"]) and cell["decoded"] > 1
    assert "largest difference: 0.00%" in capsys.readouterr().out
