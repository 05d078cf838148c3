"""Ends of a training by two processes: the benchmark's code on one of its faults."""

import json

from benchmarks.scale import ends


def test_a_signal_to_one_process_ends_both_and_loses_nothing(tmp_path):
    """Red where the other process waits for ever, and where the saved step is not the last that was done."""
    ends.main([f"--out={tmp_path}", "--faults=SIGTERM to rank 1, validation"])
    (asked,) = json.loads((tmp_path / "result.json").read_text())["faults"]
    assert asked["exit_code"] == 143 and asked["done"] == asked["saved"] > 0
    assert asked["all_ended"] and asked["seconds"] < 60 and asked["resumed_alike"]
