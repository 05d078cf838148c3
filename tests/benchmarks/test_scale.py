"""Training by two processes ends with one process's weights: the benchmark's code on a few of its trainings."""

import json

import pytest

from benchmarks.scale import memory
from benchmarks.scale.equality import main

FEW = (
    "plain",
    "dropped blocks, accumulation",
    "unequal pairs, accumulation",
    "exit heads, a process with nothing scored",
    "exit heads and classifier, rotational",
    "LoRA, dropped blocks",
)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(tmp_path, strategy):
    """Red where ranks take a mean of their means, where a block that is skipped hangs or keeps its momentum back."""
    main([f"--out={tmp_path}", "--world_sizes=2", f"--strategies={strategy}", f"--cases={';'.join(FEW)}"])
    found = json.loads((tmp_path / "result.json").read_text())["trainings"]
    assert [each["case"] for each in found] == list(FEW)
    assert all(each["same_bits"] and each["difference"] < 1e-5 for each in found)


def test_a_plan_is_compared_with_what_a_training_takes(tmp_path):
    """A smoke test: so small a training takes more for its process than for its tensors."""
    memory.main([f"--out={tmp_path}", "--quick"])
    (row,) = json.loads((tmp_path / "result.json").read_text())["memory"]
    assert 0 < row["planned"] < row["measured"]
    assert row["parts"]["optimizer"] > row["parts"]["weights"] == pytest.approx(4 * 147_776, abs=1000)
