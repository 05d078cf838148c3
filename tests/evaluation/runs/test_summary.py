"""What a run's files say of it: event files written by hand, and a real run."""

import json

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from lskip.cli import main
from lskip.evaluation.runs.summary import read_run

CONFIG = {"early_exit_loss": {"class_path": "lskip.callbacks.EarlyExitLoss", "init_args": {"e_scale": 0.5}}}


def write_events(folder, *validations):
    """Event files as LayerMetrics logs: (step, perplexities, agreements, layers_needed) each."""
    with SummaryWriter(folder) as writer:
        for step, perplexity, agreement, needed in validations:
            for layer, (ppl, agree) in enumerate(zip(perplexity, agreement, strict=True), start=1):
                writer.add_scalar(f"val/ppl/layer_{layer:02d}", ppl, step)
                writer.add_scalar(f"val/agreement/layer_{layer:02d}", agree, step)
            writer.add_scalar("val/layers_needed", needed, step)
            for batch in range(50):
                writer.add_scalar("train/loss", 1.0, step + batch)


FIRST = (9, [4e5] * 12, [0.0] * 12, 12.0)
LAST = (19, [float(layer) for layer in range(12, 0, -1)], [layer / 12 for layer in range(1, 13)], 7.5)


def test_the_last_validation_counts(tmp_path):
    write_events(tmp_path, FIRST, LAST)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    found = read_run(tmp_path)
    assert found.steps == 20  # Lightning numbers steps from 0
    assert found.report.perplexity == LAST[1] and found.report.layers_needed == 7.5
    assert found.report.agreement == pytest.approx(LAST[2])
    assert found.middle_layer == 6
    assert found.settings["early_exit_loss.e_scale"] == 0.5


def test_tokens_per_round_are_read_where_a_run_has_them(tmp_path):
    write_events(tmp_path, LAST)
    assert read_run(tmp_path).report.tokens_per_round == {}
    with SummaryWriter(tmp_path) as writer:
        for layer in range(1, 13):
            writer.add_scalar(f"val/tokens_per_round_4/layer_{layer:02d}", 1 + layer / 4, 19)
    assert read_run(tmp_path).report.tokens_per_round == {4: [1 + layer / 4 for layer in range(1, 13)]}


def test_layers_beyond_99_keep_their_order(tmp_path):
    perplexity = [float(layer) for layer in range(1, 121)]
    write_events(tmp_path, (0, perplexity, [0.5] * 120, 100.0))
    assert read_run(tmp_path).report.perplexity == perplexity


def test_a_validation_after_training_stands_in(tmp_path):
    write_events(tmp_path / "validate", LAST)
    found = read_run(tmp_path)
    assert found.steps == 20 and found.report.perplexity == LAST[1] and found.settings == {}
    write_events(tmp_path, FIRST)
    assert read_run(tmp_path).report.perplexity == FIRST[1]


def test_a_run_without_numbers_is_told_how_to_get_them(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("train/loss", 1.0, 0)
    with pytest.raises(ValueError, match=r"^runs: '.*' has no numbers of its layers; this makes them: lskip validate"):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="runs: there is no folder"):
        read_run(tmp_path / "nowhere")


def test_what_fit_and_validate_leave(tmp_path, tiny_config, capsys):
    documents = (json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60))
    (tmp_path / "documents.jsonl").write_text("\n".join(documents))
    run = tmp_path / "run"
    data = [f"--data.source={tmp_path / 'documents.jsonl'}", f"--data.cache_dir={tmp_path / 'cache'}"]
    data += ["--data.block_size=16", "--data.batch_size=2", "--data.max_val_blocks=4"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    train = [f"--model={json.dumps(tiny_config())}", f"--run_folder={run}", "--trainer.max_steps=2"]
    train += ["--early_exit_loss.curriculum=Gradual", "--trainer.enable_model_summary=false"]
    assert main(["fit", *train, *data, *quiet, "--trainer.limit_val_batches=0"]) == 0
    with pytest.raises(ValueError, match="has no numbers"):
        read_run(run)
    assert main(["validate", f"--model={run}", f"--run_folder={run}", *data, *quiet]) == 0
    found = read_run(run)
    assert found.settings["early_exit_loss.curriculum"] == "Gradual" and len(found.report.perplexity) == 4
    assert found.steps == found.trained == 2
    table = [set(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
    for layer, perplexity in enumerate(found.report.perplexity, start=1):
        assert any({str(layer), f"{perplexity:.4g}"} <= cells for cells in table)
    on = ["--trainer.max_steps=3", "--ckpt_path=last", "--trainer.limit_val_batches=0"]
    assert main(["fit", *train, *data, *quiet, *on]) == 0
    found = read_run(run)
    assert (found.steps, found.trained) == (2, 3)  # it was measured before it went on
