"""What a killed training reads, and what a corpus costs: the benchmarks' code, small."""

import argparse
import json
import os
import random
import signal
import subprocess
import time

from benchmarks.data import corpus_size, kills
from benchmarks.training import padding


def test_a_stream_goes_on_after_a_kill_by_another_number_of_processes(tmp_path):
    """Red where a process that goes on reads other rows, or where two processes read the same ones."""
    options = argparse.Namespace(out=tmp_path, kills=1)
    found = kills.killed_trainings("streamed", options, random.Random(0))
    assert found["as_undisturbed"] and found["processes"] == [1, 2]


def test_a_stream_begins_late_with_its_cache_or_without(tmp_path):
    """Red where a stream that begins late, its segment made anew or not, gives other rows."""
    found = kills.late_start(argparse.Namespace(out=tmp_path, late_step=40))
    assert found["as_undisturbed"] and all(found[name]["step"] == 45 for name in ("its cache", "an empty cache"))


def test_the_memory_and_time_of_a_corpus(tmp_path):
    corpus_size.main([f"--out={tmp_path}", "--quick"])
    (row,) = json.loads((tmp_path / "result.json").read_text())["corpora"]
    assert row["documents"] >= 500 and row["stored_bytes"] > 10**6
    assert all(10**8 < row[part]["anonymous_bytes"] < 2 * 10**9 for part in ("prepare", "train"))


def test_a_process_that_is_about_to_become_another_is_not_counted():
    """Between fork and exec a process' memory is its parent's; afterwards it is its own."""
    if (forked := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            counted = corpus_size.family(os.getpid())
        finally:
            other.kill()
            os.kill(forked, signal.SIGKILL)
            os.waitpid(forked, 0)
    assert os.getpid() in counted and other.pid in counted and forked not in counted


def test_packed_pairs_compute_less_than_pairs_as_they_come(tmp_path):
    padding.main([f"--output={tmp_path / 'result.json'}", "--quick", "--threads=1"])
    computed = {
        row["way"]: row["positions_per_token"] for row in json.loads((tmp_path / "result.json").read_text())["ways"]
    }
    assert computed["as they come"] > 1.2 > 1.1 > computed["group_by_length"] and computed["pack"] < 1.1
