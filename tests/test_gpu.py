"""Tests that need a GPU, skipped where there is none. `LSKIP_TEST_CUDA=0 python -m pytest tests/test_gpu.py`.

Every check holds the GPU against the same code on the CPU, or against transformers' `generate` on the same card.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch

from lskip.cli import main
from lskip.inference import ConfidenceDraft, CostAwareDraft, TextGenerator
from lskip.inference.exit_criteria import Entropy, Margin, Saturation
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from lskip.module import LayerSkipModule
from lskip.targets import LK, Anchored, Labels, SelfDistillation
from lskip.training.flex_attention import use_flex_attention
from tests.conftest import make_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

PROMPTS = [[7, 42, 99, 3, 250, 18, 77, 42, 99, 3, 250], [5], [9, 8, 9, 8, 9, 8], [200, 11, 12], [4] * 18]
# The fused runner, with what each family adds to it; the last runs through its own modules.
FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gelu": {"family": "llama", "hidden_act": "gelu"},
}
WAYS = {
    "layers": {"exit_layer": 2, "num_speculations": 3},
    "ngram": {"draft": "ngram", "num_speculations": 4},
    "confidence": {"exit_layer": 2, "num_speculations": 5, "draft_policy": ConfidenceDraft},
    "cost_aware": {"num_speculations": 5, "draft_policy": CostAwareDraft},
}


def on_gpu(family="llama", **overrides):
    overrides = {"eos_token_id": None, **FAMILIES[family], **overrides}
    return make_model(overrides.pop("family", family), **overrides).cuda()


def settings_of(way: str) -> dict:
    settings = dict(WAYS[way])
    if "draft_policy" in settings:
        settings["draft_policy"] = settings["draft_policy"]()
    return settings


def texts_of(generator: TextGenerator, batch_size: int = 1, **settings) -> list[list[int]]:
    ended = generator.generate_batch(PROMPTS, batch_size=batch_size, max_new_tokens=24, **settings)
    return [generation.token_ids for _, generation in sorted(ended, key=lambda pair: pair[0])]


@pytest.fixture(scope="module", params=FAMILIES)
def decoded(request):
    """Return a model on the GPU, a generator of it, and the texts that `generate` writes for the prompts."""
    model = on_gpu(request.param)
    truth = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt], device="cuda")
        truth.append(model.generate(ids, max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist())
    return model, TextGenerator(model), truth


@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_text_is_that_of_generate(decoded, way, batch_size):
    _, generator, truth = decoded
    assert texts_of(generator, batch_size, **({} if way is None else settings_of(way))) == truth


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_exit_adapter_drafts(decoded, batch_size):
    model, _, truth = decoded
    generator = TextGenerator(model, exit_adapter=ExitAdapter(model, AdapterShape(exit_layer=2)))
    assert texts_of(generator, batch_size, draft="adapter", num_speculations=3) == truth


def test_rejection_sampling_repeats_itself(decoded):
    _, generator, _ = decoded
    settings = {**settings_of("layers"), "acceptance": "rejection", "temperature": 0.9, "top_p": 0.95, "seed": 3}
    assert texts_of(generator, batch_size=3, **settings) == texts_of(generator, batch_size=3, **settings)


def test_sampled_text_depends_on_neither_draft_nor_batch(decoded):
    _, generator, _ = decoded
    sampling = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 3}
    alone = texts_of(generator, **sampling)
    assert texts_of(generator, batch_size=3, **sampling, **settings_of("layers")) == alone


def test_exits_stop_where_they_do_on_the_cpu():
    model = on_gpu()
    ours, theirs = TextGenerator(model), TextGenerator(copy.deepcopy(model).cpu(), weights="plain")
    for criterion in (Entropy(0.8), Margin(0.05), Saturation(0.9)):
        settings = {"exit_criterion": criterion, "max_new_tokens": 24}
        found, expected = (each.generate(PROMPTS[0], **settings) for each in (ours, theirs))
        assert (found.token_ids, found.layers_run) == (expected.token_ids, expected.layers_run)
    assert texts_of(ours, exit_layer=2, draft=None) == texts_of(theirs, exit_layer=2, draft=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_exact_text_depends_on_neither_draft_nor_batch(dtype):
    generator = TextGenerator(on_gpu().to(dtype), bit_exact=True)
    alone = texts_of(generator)
    for batch_size in (1, 3):
        assert texts_of(generator, batch_size, **settings_of("layers")) == alone


@pytest.mark.parametrize(
    "target", [Labels(), SelfDistillation(), SelfDistillation(top_k=5), LK(), LK(None), Anchored(0.3)]
)
def test_a_training_step_is_that_of_the_cpu(target):
    """The same sequences dropped, the same positions picked, losses and gradients equal."""
    model = make_model()
    ids = torch.randint(0, 300, (6, 20), generator=torch.Generator().manual_seed(1))
    found = {}
    for device in ("cpu", "cuda"):
        module = LayerSkipModule(copy.deepcopy(model), exit_target=target, anchor_weight=0.3, position_share=0.5)
        module.drop_rates.write("test", [0.0, 0.3, 0.3, 0.5])
        module.exit_weights.write("test", [0.1, 0.2, 0.3, 0.4])
        module.to(device)
        loss, last = module.early_exit_loss({"input_ids": ids.to(device)}, micro_batch=3)
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten().cpu() for parameter in module.model.parameters()])
        found[device] = loss.item(), last.item(), gradients
    assert found["cuda"][:2] == pytest.approx(found["cpu"][:2], rel=1e-4)
    torch.testing.assert_close(found["cuda"][2], found["cpu"][2], rtol=1e-2, atol=1e-4)


def test_fit_resume_and_predict(tmp_path, tiny_config, capsys, monkeypatch):
    """The commands from end to end, in bfloat16 as on a GPU one would."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"def f{i}(a):\n    return a + {i}\n" * 8}) + "\n" for i in range(60))
    )
    (tmp_path / "model.yaml").write_text(json.dumps({"model": tiny_config("llama")}))
    fit = ["fit", "--config=model.yaml", "--data.source=texts.jsonl", "--data.vocab_size=300"]
    fit += ["--data.block_size=32", "--data.batch_size=4", "--data.cache_dir=cache", "--run_folder=run"]
    fit += ["--layer_dropout=LayerDropout", "--early_exit_loss=EarlyExitLoss", "--trainer.precision=bf16-mixed"]
    fit += ["--trainer.enable_progress_bar=false", "--checkpoint.every_n_train_steps=2"]
    assert main([*fit, "--trainer.max_steps=4"]) == main([*fit, "--trainer.max_steps=6", "--ckpt_path=last"]) == 0
    (tmp_path / "prompts.txt").write_text("def f(a):\n\nreturn\n")
    predict = ["predict", "--model=run", "--prompts=prompts.txt", "--output=answers.jsonl", "--batch_size=2"]
    assert main([*predict, "--exit_layer=2", "--num_speculations=2", "--max_new_tokens=8"]) == 0
    assert all(json.loads(line)["text"] for line in (tmp_path / "answers.jsonl").read_text().splitlines())


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_flex_attention_has_the_gradients_of_the_mask(family):
    """Documents of 1 to 150 tokens, windows, rows that skip blocks; head_dim 16, since kernels have none of 8."""
    random = torch.Generator().manual_seed(1)
    ends = torch.rand(6, 300, generator=random) < 1 / 60
    places = torch.stack([torch.tensor(_places(row)) for row in ends.tolist()]).cuda()
    ids = torch.randint(1, 300, (6, 300), generator=random).cuda()
    windows = {"sliding_window": 40} if family == "mistral" else {}
    found = []
    for flex in (False, True):
        model = make_model(family, head_dim=16, max_position_embeddings=512, **windows).cuda()
        module = LayerSkipModule(model, flex_attention=flex)
        if flex:
            use_flex_attention([model], torch.device("cuda"))
        module.drop_rates.write("test", [0.0, 0.3, 0.3, 0.5])
        module.exit_weights.write("test", [0.1, 0.2, 0.3, 0.4])
        losses = [module.early_exit_loss({"input_ids": ids, "position_ids": places}, batch)[0] for batch in range(5)]
        torch.stack(losses).sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-3 * float(found[0].abs().max()))


def _places(ends: list[bool]) -> list[int]:
    places = [0]
    for end in ends[:-1]:
        places.append(0 if end else places[-1] + 1)
    return places
