"""The train-step benchmark at tiny size: that its figures are there and mean what they say (not what they are)."""

import json

import pytest
import torch

pytestmark = pytest.mark.usefixtures("process_settings")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def output(process_settings, tmp_path_factory):
    """(what the quick run printed, what it wrote)."""
    from contextlib import redirect_stdout
    from io import StringIO

    from benchmarks.training.train_step import main

    path, printed, threads = tmp_path_factory.mktemp("bench") / "result.json", StringIO(), torch.get_num_threads()
    with redirect_stdout(printed):
        main(["--quick", "--output", str(path), "--threads", "1"])
    torch.set_num_threads(threads)
    return printed.getvalue(), json.loads(path.read_text())


def test_a_result_says_where_and_with_what_it_was_measured(output):
    _, result = output
    assert {"date", "hardware", "threads", "torch", "transformers", "lskip"} <= set(result["environment"])
    assert result["sizes"]["layers"] == 12 and result["sizes"]["p_max"] == 0.5


def test_every_kind_of_step_has_time_and_memory_against_the_plain_one(output):
    steps = {row.pop("step"): row for row in output[1]["steps"]}
    assert list(steps) == [
        "plain", "dropout", "exits", "exits and dropout", "exits, sampled", "exits, plain loop",
    ]  # fmt: skip
    assert steps["plain"]["time_ratio"] == steps["plain"]["memory_ratio"] == 1
    assert all(value > 0 for row in steps.values() for value in row.values())
    peaks = {name: row["peak_bytes"] for name, row in steps.items()}
    assert peaks["dropout"] < peaks["plain"] < peaks["exits, sampled"] < peaks["exits"]
    assert peaks["dropout"] < peaks["exits and dropout"] < peaks["exits"]


def test_what_dropout_and_exits_should_cost(output):
    dropout, exits = output[1]["dropout"], output[1]["exits"]
    assert 0.3 < dropout["mean_rate"] < 0.7
    assert dropout["target_ratio"] == pytest.approx(1 - 0.8 * dropout["mean_rate"])
    # Worked by hand: 12 blocks of 4 x 32 x 32 + 3 x 32 x 64 weights on 256 tokens, attention over 16 keys (half of
    # them visible); the head on 240 scored rows, 32 x 512 weights. Forward and backward: 3 products of 2 operations.
    blocks = 6 * 256 * 12 * (4 * 32 * 32 + 3 * 32 * 64) + 3 * 12 * 2 * 256 * 16 * 32
    head = 6 * 240 * 32 * 512
    assert exits["extra_exits"] == 3
    assert exits["gigaflops_of_plain_step"] == pytest.approx((blocks + head) / 1e9)
    assert exits["gigaflops_of_extra_heads"] == pytest.approx(3 * head / 1e9)
    assert exits["ratio_by_flops"] == pytest.approx(1 + 3 * head / (blocks + head))
    assert exits["measured_over_predicted"] == pytest.approx(exits["time_ratio"] / exits["ratio_by_flops"])


def test_memory_by_vocabulary(output):
    first, second = output[1]["exit_loss_memory"]
    assert (first["vocabulary"], second["vocabulary"]) == (512, 1024)
    assert second["all_logits_bytes"] == 4 * 256 * 1024 * 4
    # the plain loop keeps the log-probabilities of all exits until backward
    assert first["all_logits_bytes"] < first["plain_loop_bytes"] < second["plain_loop_bytes"]
    assert 0 < first["head_loss_bytes"] <= second["head_loss_bytes"]


def test_the_printed_tables_name_the_steps_and_the_targets(output):
    printed, _ = output
    for words in ("exits and dropout", "exits, sampled", "target 0.80 r", "target 1.15", "vocabulary"):
        assert words in printed


def test_peak_memory_of_a_known_case():
    from benchmarks.memory.peak import peak_bytes

    kept = []

    def work():
        first = torch.empty(1000, 1000)  # 4 MB
        second = torch.empty(2000, 1000)  # 8 MB: 12 in all
        del first
        kept.append(torch.empty(1000, 500))  # 10
        del second

    assert peak_bytes(work, CPU) == 12_000_000
    # what was there before does not count, whether it stays or goes
    assert peak_bytes(lambda: kept.append(torch.empty(250, 1000)), CPU) == 1_000_000
    assert peak_bytes(kept.clear, CPU) == 0


def test_large_vocabularies_are_left_out_of_the_plain_loop():
    from benchmarks.memory.exit_loss import measure_exit_loss

    row = measure_exit_loss(vocabulary=64, hidden=8, exits=2, rows=16, device=CPU, plain_loop_bytes=2 * 16 * 64 * 4 - 1)
    assert row["plain_loop_bytes"] is None and row["head_loss_bytes"] > 0


def test_rounds_are_paired_and_interleaved():
    from benchmarks.training.train_step import paired_ratio, time_rounds

    calls = []
    works = {name: lambda round_, name=name: calls.append((name, round_)) for name in ("a", "b", "c")}
    seconds = time_rounds(works, 3, CPU)
    assert all(len(times) == 3 and min(times) > 0 for times in seconds.values())
    assert [sorted(name for name, _ in calls[start : start + 3]) for start in (0, 3, 6, 9)] == [["a", "b", "c"]] * 4
    assert len({calls[start][0] for start in (3, 6, 9)}) == 3  # no work is always the first
    assert [number for _, number in calls] == [0] * 6 + [1] * 3 + [2] * 3
    # the median of 3, 2 and 4, not the ratio of the medians
    assert paired_ratio({"x": [3.0, 4.0, 4.0], "base": [1.0, 2.0, 1.0]}, "x", "base") == 3.0


def test_what_separate_documents_cost(tmp_path):
    """A smoke test: both kinds of step run on the same tokens, at each length."""
    from benchmarks.training.documents import main

    main(["--quick", f"--output={tmp_path / 'result.json'}", "--threads=1"])
    rows = json.loads((tmp_path / "result.json").read_text())["steps"]
    assert [(row["length"], row["rows"]) for row in rows] == [(256, 2), (512, 1)]
    assert all(row["documents"] > row["rows"] and row["time_ratio"]["separate"] > 0 for row in rows)
