"""LoRA under an exit: what trains, and that the merged checkpoint is the model that was trained."""

import json
import math

import pytest
import torch

pytest.importorskip("peft")

from lskip.cli.main import main
from lskip.low_rank import LowRank
from lskip.models.checkpoint import merged_low_rank
from lskip.models.pretrained import load_model
from lskip.module import LayerSkipModule


def random_ids():
    return torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def test_only_factors_under_the_exit_train_and_at_first_nothing_changes(tiny_model):
    model = tiny_model()
    before = model(random_ids()).logits
    LowRank(exit_layer=2, rank=3).apply(model)
    assert torch.equal(model(random_ids()).logits, before)
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith(("model.layers.0.", "model.layers.1.")) and ".lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 2  # blocks, linear layers of each, factors
    assert trained["model.layers.1.mlp.down_proj.lora_A.default.weight"] == (3, 64)


def test_merged_by_hand():
    weights = {
        "q.base_layer.weight": torch.eye(2),
        "q.lora_A.default.weight": torch.tensor([[1.0, 2.0]]),
        "q.lora_B.default.weight": torch.tensor([[3.0], [4.0]]),
        "norm.weight": torch.ones(2),
    }
    found = merged_low_rank(weights, scale=0.5)
    assert found.keys() == {"q.weight", "norm.weight"}
    assert found["q.weight"].tolist() == [[2.5, 3.0], [2.0, 5.0]]


@pytest.fixture
def run(tmp_path, tiny_config):
    """Return a function *flags -> the folder of a run of 2 more steps with factors in 2 of 4 blocks."""
    corpus = tmp_path / "documents.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60)))
    flags = [
        f"--model={json.dumps(tiny_config())}",
        f"--data.source={corpus}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        *("--data.block_size=16", "--data.batch_size=2", "--data.max_val_blocks=4"),
        *("--low_rank=LowRank", "--low_rank.exit_layer=2", "--low_rank.rank=3", "--early_exit_loss=EarlyExitLoss"),
        *("--exit_target=SelfDistillation", "--exit_target.temperature=2.0", "--optimizer.lr=0.05"),
        *("--lr_scheduler.warmup_steps=0", "--lr_scheduler.total_steps=8"),
        *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    ]

    def fit(name, steps, *more):
        folder = tmp_path / name
        assert main(["fit", *flags, f"--run_folder={folder}", f"--trainer.max_steps={steps}", *more]) == 0
        return folder

    return fit


def test_a_run_resumes_and_loads_as_an_ordinary_model_that_says_the_same(run, tiny_config):
    whole, parts = run("whole", 4), run("parts", 2)
    run("parts", 4, "--ckpt_path=last")
    saved = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, parts)]
    assert all(torch.equal(value, saved[1]["state_dict"][name]) for name, value in saved[0]["state_dict"].items())

    model, _ = load_model(str(whole))
    module = LayerSkipModule(tiny_config(), low_rank=LowRank(exit_layer=2, rank=3))
    base = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(saved[0]["state_dict"])
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    trained = module.model.eval()(random_ids()).logits
    torch.testing.assert_close(model(random_ids()).logits, trained, rtol=1e-4, atol=1e-4)
    module.load_state_dict({**saved[0]["state_dict"], **{k: v for k, v in base.items() if ".lora_" in k}})
    assert (module.model(random_ids()).logits - trained).abs().max() > 0.01  # the factors did count


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"exit_layer": 0}, "exit_layer: 0 "),
        ({"exit_layer": 2, "rank": 0}, "rank: 0 "),
        ({"exit_layer": 2, "scale": math.inf}, "scale: inf "),
    ],
)
def test_numbers_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        LowRank(**settings)


def test_an_exit_deeper_than_the_model_is_refused(tiny_model):
    with pytest.raises(ValueError, match="exit_layer: 5"):
        LowRank(exit_layer=5).apply(tiny_model())
