"""The benchmark of the paper's route at tiny size: what it reports, against transformers, and what it refuses."""

import json
import math
import pydoc_data.topics
import shutil

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

from lskip.cli import main as lskip
from lskip.data import TextData
from lskip.models.pretrained import load_model
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("process_settings")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_tokenizer):
    """A folder with `stock`, and runs `retrofit` and `plain` of 2 steps from it, on functions of Python."""
    runs = tmp_path_factory.mktemp("runs")
    make_model(max_position_embeddings=512).save_pretrained(runs / "stock")
    tiny_tokenizer.save_pretrained(runs / "stock")
    corpus = runs / "documents.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(90)))
    for name, flags in {"plain": [], "retrofit": ["--early_exit_loss=EarlyExitLoss", "--position_share=0.5"]}.items():
        arguments = [
            *("fit", f"--model={runs / 'stock'}", f"--run_folder={runs / name}", f"--data.source={corpus}"),
            *(f"--data.cache_dir={runs / 'cache'}", "--data.block_size=16", "--data.batch_size=2"),
            *("--data.test_fraction=0.2", "--trainer.accelerator=cpu", "--trainer.max_steps=2"),
            *("--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false", *flags),
        ]
        assert lskip(arguments) == 0
    return runs


def measure(runs, out, **folders):
    from benchmarks.retrofit.paper import main

    names = {"retrofit": runs / "retrofit", "plain": runs / "plain", **folders}
    flags = [f"--{name}={path}" for name, path in names.items()]
    sizes = ["--layers", "2", "4", "--code_blocks=5", "--prose_blocks=2", f"--cache_dir={runs / 'cache'}"]
    main([*flags, f"--out={out}", *sizes])
    return json.loads((out / "retrofit.json").read_text())


def test_perplexity_and_ratio_are_what_transformers_finds(runs, tmp_path, tiny_tokenizer):
    result = measure(runs, tmp_path / "out")
    assert (result["steps"], result["tokens"], result["prose_in_training"]) == (2, 2 * 2 * 16, False)
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tiny_tokenizer(text[:9000]).input_ids[:1024]).view(2, 512)
    losses = {}
    for name, source in (("stock", "stock"), ("plain", "plain"), ("retrofit", "retrofit")):
        model, _ = load_model(str(runs / source))
        with torch.inference_mode():
            hidden = model.model(ids, output_hidden_states=True).hidden_states
            logits = [model.lm_head(part)[:, :-1].flatten(0, 1) for part in (model.model.norm(hidden[2]), hidden[-1])]
        losses[name] = [cross_entropy(part, ids[:, 1:].flatten()).item() for part in logits]
        found = result["models"][name]["prose"]
        assert found["perplexity"] == pytest.approx([math.exp(loss) for loss in losses[name]], rel=1e-3)
        agreement = (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean().item()
        assert found["agreement"] == pytest.approx([agreement, 1], abs=0.01)
    expected = math.exp(losses["retrofit"][1] - losses["plain"][1])
    assert result["last_layer_over_plain"]["prose"]["ratio"] == pytest.approx(expected, rel=1e-3)
    at_stock = math.exp(losses["retrofit"][1] - losses["stock"][1])
    assert result["last_layer_over_stock"]["prose"]["ratio"] == pytest.approx(at_stock, rel=1e-3)
    low, high = result["last_layer_over_plain"]["code"]["interval"]
    assert low < result["last_layer_over_plain"]["code"]["ratio"] < high


def test_a_part_of_the_data_is_held_out_as_the_whole_is(runs, tmp_path):
    """Half of the documents: those of them that training has not seen, and no others."""
    lines = (runs / "documents.jsonl").read_text().splitlines()
    (runs / "half.jsonl").write_text("\n".join(lines[::2]))
    whole, part = measure(runs, tmp_path / "a"), measure(runs, tmp_path / "b", code_source=runs / "half.jsonl")
    assert part["models"]["plain"]["prose"] == whole["models"]["plain"]["prose"]
    assert part["models"]["plain"]["code"] != whole["models"]["plain"]["code"]
    data = {
        "source": str(runs / "half.jsonl"),
        "test_fraction": 0.2,
        "block_size": 16,
        "cache_dir": str(runs / "cache"),
    }
    blocks = TextData(**data, tokenizer=str(runs / "stock"), max_val_blocks=5).blocks("test")[:]["input_ids"]
    model, _ = load_model(str(runs / "plain"))
    with torch.inference_mode():
        losses = [model(ids[None], labels=ids[None]).loss for ids in torch.tensor(np.stack(blocks)).long()]
    assert part["models"]["plain"]["code"]["perplexity"][-1] == pytest.approx(math.exp(sum(losses) / 5), rel=1e-3)


def test_ratio_by_hand():
    from benchmarks.retrofit.paper import ratio

    # Differences 0.1 and 0.3: mean 0.2, spread 0.1414, its mean's 0.1.
    found = ratio(torch.tensor([1.1, 2.3]), torch.tensor([1.0, 2.0]))
    assert found["ratio"] == pytest.approx(math.exp(0.2))
    assert found["interval"] == pytest.approx([math.exp(0.2 - 0.196), math.exp(0.2 + 0.196)], rel=1e-4)


def test_a_run_that_is_none_and_other_tokens_are_refused(runs, tmp_path):
    with pytest.raises(SystemExit, match="is no run of lskip fit"):
        measure(runs, tmp_path / "out", plain=runs / "stock")
    other = tmp_path / "other"
    shutil.copytree(runs / "plain", other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["data"]["init_args"]["batch_size"] = 4
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="other has other data than"):
        measure(runs, tmp_path / "out", plain=other)
