"""Training by two processes ends with one process's weights: the benchmark's code on a few of its trainings."""

import json

import pytest

from benchmarks.scale import memory, resume, validation
from benchmarks.scale.equality import main
from lskip.export.to_hf import export
from lskip.inference import load_generator
from lskip.models.reading.shards import shards_of
from lskip.training.checkpoint_file import WholeFiles

FEW = (
    "plain",
    "dropped blocks, accumulation",
    "unequal pairs, accumulation",
    "exit heads, a process with nothing scored",
    "exit heads and classifier, rotational",
    "LoRA, dropped blocks",
    "documents apart",
    "half of the rows dropped, accumulation",
    "half of the rows dropped, patterns per rank",
    "bf16-mixed",
)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(tmp_path, strategy):
    """Red where ranks take a mean of their means, where a block that is skipped hangs or keeps its momentum back."""
    main([f"--out={tmp_path}", "--world_sizes=2", f"--strategies={strategy}", f"--cases={';'.join(FEW)}"])
    found = json.loads((tmp_path / "result.json").read_text())["trainings"]
    assert [each["case"] for each in found] == list(FEW)
    assert all(each["same_bits"] for each in found)
    assert all(each["difference"] < (3e-3 if each["case"] == "bf16-mixed" else 1e-5) for each in found)


def test_two_processes_validate_what_one_does(tmp_path):
    """Red where rows are read twice, left out, or where a mean of means is taken."""
    validation.main([f"--out={tmp_path}", "--world_sizes=2", "--strategies=fsdp2"])
    found = json.loads((tmp_path / "result.json").read_text())["validations"]
    assert len(found) == 4 and all(each["difference"] < 1e-5 for each in found)


def test_what_two_processes_saved_in_shards_is_gone_on_with(tmp_path):
    """Red where rows are not those of the same names, and where an export of it says something else."""
    resume.main([f"--out={tmp_path}", "--quick"])
    found = json.loads((tmp_path / "result.json").read_text())["resumed"]
    assert [each["resumed_by"] for each in found] == [[1, "auto"], [2, "fsdp2"], [2, "fsdp2, sharded"]]
    assert all(each["difference"] < 1e-5 for each in found) and found[1]["same_bits"]
    assert found[2]["drops"] == "at random" and found[2]["same_bits"]
    path = tmp_path / "saved" / "last.ckpt"
    assert len(list(shards_of(path).glob("weights-*"))) == 2
    WholeFiles().save_checkpoint(without_marks(WholeFiles().load_checkpoint(path)), tmp_path / "one.ckpt")
    texts = []
    for number, source in enumerate((path, tmp_path / "one.ckpt")):
        export(str(source), str(tmp_path / str(number)))
        for model in (source, tmp_path / str(number)):
            generator = load_generator(str(model), device="cpu")
            texts.append(generator.generate("the lamp", temperature=0.0, max_new_tokens=12).token_ids)
    assert len(texts[0]) > 0 and texts == texts[:1] * 4


def without_marks(checkpoint: dict) -> dict:
    return {name: part for name, part in checkpoint.items() if name != "shards"}


def test_a_plan_is_compared_with_what_a_training_takes(tmp_path):
    """A smoke test: so small a training takes more for its process than for its tensors."""
    memory.main([f"--out={tmp_path}", "--quick"])
    (row,) = json.loads((tmp_path / "result.json").read_text())["memory"]
    assert 0 < row["planned"] < row["measured"]
    assert row["parts"]["optimizer"] > row["parts"]["weights"] == pytest.approx(4 * 147_776, abs=1000)
