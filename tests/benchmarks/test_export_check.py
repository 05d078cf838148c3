"""The check of exports at tiny size: equal programs are found equal, a wrong token is found and weighed."""

import json

import pytest
import torch

from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("process_settings")


@pytest.fixture(scope="module")
def arguments(tiny_tokenizer, tmp_path_factory):
    """Function (folder for the result) -> arguments for a model of random weights and two prompts."""
    root = tmp_path_factory.mktemp("export_check")
    make_model().save_pretrained(root / "model")
    tiny_tokenizer.save_pretrained(root / "model")
    (root / "prompts.txt").write_text("def f(x):\nimport os\n")

    def make(out) -> list[str]:
        named = {"model": root / "model", "draft": 2, "prompts": root / "prompts.txt", "out": out}
        sizes = {"max_new_tokens": 6, "threads": 1}
        return [f"--{name}={value}" for name, value in {**named, **sizes}.items()]

    return make


@pytest.fixture
def without_llama_cpp(monkeypatch):
    monkeypatch.setattr("benchmarks.export.check.find_python", lambda given: None)


def test_what_is_exported_says_the_same_everywhere(arguments, without_llama_cpp, tmp_path):
    from benchmarks.export.check import main

    assert main(arguments(tmp_path)) == 0
    result = json.loads((tmp_path / "export.json").read_text())
    ways = {"transformers", "transformers with assistant_model", "transformers with assistant_early_exit"}
    assert result["parts"]["model"]["equal"] == dict.fromkeys(ways, 2)
    assert result["parts"]["draft"]["equal"] == {"transformers": 2}
    assert result["parts"]["model"]["tokens"] == 12


def test_a_draft_of_other_weights_is_found(arguments, without_llama_cpp, tmp_path, monkeypatch):
    from benchmarks.export import check as export_check

    def spoiled(model, num_layers):
        draft = original(model, num_layers)
        with torch.no_grad():
            draft.model.layers[0].mlp.down_proj.weight.mul_(-1)
        return draft

    # lskip is asked for the model's exit, which an honest draft would be
    original = export_check.export.__globals__["first_layers"]
    monkeypatch.setitem(export_check.export.__globals__, "first_layers", spoiled)
    by_lskip = export_check.by_lskip

    def exit_of_the_model(folder, prompts, max_new_tokens):
        if folder.name != "draft":
            return by_lskip(folder, prompts, max_new_tokens)
        generator = export_check.load_generator(str(folder.parent))
        return [generator.generate(p, max_new_tokens=max_new_tokens, exit_layer=2).token_ids for p in prompts]

    monkeypatch.setattr(export_check, "by_lskip", exit_of_the_model)
    assert export_check.main(arguments(tmp_path)) == 1
    parts = json.loads((tmp_path / "export.json").read_text())["parts"]
    assert parts["model"]["parted"] == [] and len(parts["draft"]["parted"]) >= 1  # a draft changes no text


@torch.inference_mode()
def test_a_text_that_parts_is_weighed_by_the_logits_there(tiny_model):
    from benchmarks.export.check import Texts, compared

    model, prompt = tiny_model(), [5, 17, 250]
    own = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    wrong = [*own[:2], (own[2] + 1) % 300, own[3]]
    others = [Texts("longer", [[*own, 1, 2]]), Texts("shorter", [own[:3]]), Texts("wrong", [wrong])]
    part = compared(Texts("lskip", [own]), others, model, [prompt])
    assert part["tokens"] == 4 and part["equal"] == {"longer": 1, "shorter": 0, "wrong": 0}
    for row, (program, length) in zip(part["parted"], [("shorter", 3), ("wrong", 2)], strict=True):
        assert (row["program"], row["prompt"], row["token"]) == (program, 0, length)
        ordered = model(torch.tensor([prompt + own[:length]])).logits[0, -1].sort(descending=True).values
        assert row["gap"] == pytest.approx((ordered[0] - ordered[1]).item(), abs=1e-6)
