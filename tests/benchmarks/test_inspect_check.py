"""The check of `lskip inspect` against a table that was made without lskip: it passes where it should, and can fail."""

import math

import pytest

pytestmark = pytest.mark.usefixtures("process_settings")


def test_the_numbers_of_another_program_are_found_again(tmp_path, tiny_model, tiny_tokenizer, capsys, monkeypatch):
    from benchmarks.inspection import check as inspect_check
    from benchmarks.training.layer_table import layer_table

    topics = {name: inspect_check.topics[name] for name in ("for", "while", "with")}  # all take seconds to tokenize
    monkeypatch.setattr(inspect_check, "topics", topics)
    model = tiny_model()
    for part in (model, tiny_tokenizer):
        part.save_pretrained(tmp_path / "model")
    table = layer_table(model, tiny_tokenizer, topics, num_blocks=2, block_size=32)
    (tmp_path / "table.txt").write_text(table)
    arguments = [f"--table={tmp_path / 'table.txt'}", f"--model={tmp_path / 'model'}", "--num_blocks=2"]
    assert inspect_check.main([*arguments, "--block_size=32"]) == 0
    assert "10 numbers compared, 0 differ" in capsys.readouterr().out
    (tmp_path / "table.txt").write_text(layer_table(tiny_model(seed=1), tiny_tokenizer, topics, 2, 32))
    assert inspect_check.main([*arguments, "--block_size=32"]) == 1


TABLE = """layer  1 perplexity  2.219e+09 agreement 0.06
layer  2 perplexity       14.7 agreement 1.00
mean depth after which the prediction no longer changes 26.3, at which it is first the last layer's 23.2"""
FOUND = {
    "perplexity of layer 1": 2.22e9,
    "agreement of layer 1": 0.0649,
    "perplexity of layer 2": 14.84,
    "agreement of layer 2": 1.0,
    "settled": 26.34,
    "first agreeing": 23.2,
}


WRONG = {"perplexity of layer 1": 2.25e9, "perplexity of layer 2": 14.5, "agreement of layer 1": 0.07, "settled": 27.0}


@pytest.mark.parametrize(("name", "value"), WRONG.items(), ids=WRONG)
def test_one_percent_and_the_tables_rounding_are_allowed_and_no_more(name, value):
    from benchmarks.inspection.check import differences

    assert differences(FOUND, TABLE) == []
    (line,) = differences({**FOUND, name: value}, TABLE)
    assert line.startswith(name)
    assert len(differences({**FOUND, name: math.nan}, TABLE)) == 1
