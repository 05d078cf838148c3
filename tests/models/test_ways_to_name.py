"""Every way to load a model gives the one that was saved: ties, dtype, buffers, settings, exits, tokenizer, memory."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lskip.cli import main
from lskip.export.to_hf import export, first_layers
from lskip.inference import load_generator
from lskip.inference.layers import lm_head as screened_head
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from lskip.models.exit_heads import load_trained_exits
from lskip.models.pretrained import load_model
from tests.conftest import TINY, make_model
from tests.export.test_to_hf import save

K19 = "K19 a checkpoint read back is not the model that was saved"
RUNS = {
    "plain": (),
    "averaged": ("--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.5"),
    "low_rank": ("--low_rank=LowRank", "--low_rank.exit_layer=2", "--low_rank.rank=2"),
    "exits": ("--exit_heads=true", "--learned_exit=true"),
    "checkpointed": ("--gradient_checkpointing=true",),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """Return a folder with a model that samples, in `base`, and runs of 2 steps each from it, by RUNS."""
    folder = tmp_path_factory.mktemp("ways")
    model = make_model(rope_theta=5e3)
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=7)
    model.save_pretrained(folder / "base")
    tiny_tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tiny_tokenizer.save_pretrained(folder / "base")
    tiny_tokenizer.chat_template = None
    texts = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(texts))
    return folder


@pytest.fixture(scope="module")
def ran(place):
    """Return a function: name of a run -> its folder, trained once."""

    def fit(name):
        if not (place / name).exists():
            flags = [
                *("fit", f"--model={place / 'base'}", f"--run_folder={place / name}", "--data.block_size=16"),
                *(f"--data.source={place / 'data.jsonl'}", f"--data.cache_dir={place / 'cache'}"),
                *("--data.batch_size=2", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"),
                *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"),
            ]
            assert main([*flags, *RUNS[name]]) == 0
        return place / name

    return fit


def same(one, other) -> None:
    """Return everything in which two loaded models could differ."""
    (model, tokenizer), (again, other_tokenizer) = one, other
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert again.lm_head.weight is again.model.embed_tokens.weight
    parameters, others = dict(model.named_parameters()), dict(again.named_parameters())
    assert parameters.keys() == others.keys()
    assert all(torch.equal(part, others[name]) for name, part in parameters.items())
    assert [part.dtype for part in parameters.values()] == [part.dtype for part in others.values()]
    buffers, more = dict(model.named_buffers()), dict(again.named_buffers())
    assert buffers.keys() == more.keys() and all(torch.equal(part, more[name]) for name, part in buffers.items())
    assert all(buffers[name].dtype == more[name].dtype for name in buffers)
    settings, others = model.generation_config.to_dict(), again.generation_config.to_dict()
    assert settings == others and settings["temperature"] == 0.7 and settings["top_k"] == 7
    config, others = model.config.to_dict(), again.config.to_dict()
    assert {**config, "_name_or_path": "", "architectures": ""} == {**others, "_name_or_path": "", "architectures": ""}
    assert model.config._attn_implementation == again.config._attn_implementation == "sdpa"
    assert not model.training and not again.training
    text = "def f(x):\n    return 12  <|endoftext|> é"
    assert tokenizer(text)["input_ids"] == other_tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == other_tokenizer.chat_template is not None
    assert tokenizer.special_tokens_map == other_tokenizer.special_tokens_map
    assert type(tokenizer) is type(other_tokenizer)


@pytest.mark.kind(K19)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", list(RUNS), ids=["F67 run", "averaged weights", "LoRA merged", "exits", "checkpointed"]
)
def test_a_run_and_its_export_are_the_same(place, ran, name, dtype):
    run, folder = ran(name), place / f"{name}-{dtype}"
    export(str(run), str(folder), dtype=dtype)
    kind = getattr(torch, dtype)
    same(load_model(str(run), kind), load_model(str(folder), kind))
    same(load_model(str(run / "checkpoints" / "last.ckpt"), kind), load_model(str(folder), kind))
    assert "lm_head.weight" not in keys_of(folder / "model.safetensors")
    exits = [load_trained_exits(str(source), Decoder(load_model(str(source), kind)[0])) for source in (run, folder)]
    assert (exits[0] is None) == (exits[1] is None) == (name != "exits")
    if exits[0] is not None:
        pairs = zip(exits[0].state_dict().values(), exits[1].state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def keys_of(path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.mark.kind(K19)
@pytest.mark.parametrize("draft_weights", [None, "int8"])
def test_a_run_decodes_with_what_its_export_decodes_with(place, ran, monkeypatch, draft_weights):
    monkeypatch.setattr(screened_head, "FEWEST_NUMBERS", 0)
    folder = place / f"decodes-{draft_weights}"
    export(str(ran("plain")), str(folder))
    one, other = (load_generator(str(source), draft_weights=draft_weights) for source in (ran("plain"), folder))
    assert one.memory() == other.memory()
    for part, again in ((one.runner, other.runner), (one.draft_runner, other.draft_runner)):
        assert type(part) is type(again)
        assert type(getattr(part, "head", None)) is type(getattr(again, "head", None))
        assert type(getattr(part, "screen", None)) is type(getattr(again, "screen", None))
    if draft_weights is not None and screened_head.keeps_bounds(torch.randn(300, 32)):
        assert isinstance(one.draft_runner.head, screened_head.ScreenedHead)


@pytest.mark.kind(K19, "M12")
def test_an_export_and_its_draft_hold_one_head(place, ran, tmp_path):
    export(str(ran("plain")), str(tmp_path / "out"), draft=2)
    for folder in (tmp_path / "out", tmp_path / "out" / "draft"):
        assert "lm_head.weight" not in keys_of(folder / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.kind(K19)
def test_what_is_made_of_a_model_is_tied_too(place, ran):
    model, _ = load_model(str(ran("plain")))
    draft = first_layers(model, 2)
    assert draft.lm_head.weight is draft.model.embed_tokens.weight
    body = ExitAdapter(model, AdapterShape(2)).body
    assert body.lm_head.weight is body.model.embed_tokens.weight


@pytest.mark.kind(K19)
def test_a_gguf_file_is_tied_and_so_is_its_run(tmp_path):
    pytest.importorskip("gguf")
    from lskip.export.to_gguf import write_gguf

    write_gguf(make_model(), tmp_path / "a.gguf")
    model, tokenizer = load_model(str(tmp_path / "a.gguf"))
    assert tokenizer is None and model.lm_head.weight is model.model.embed_tokens.weight
    again, _ = load_model(str(save(tmp_path / "a.ckpt", model, None)))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), again.buffers(), strict=True))


@pytest.mark.kind(K19)
@pytest.mark.parametrize("way", ["checkpoint", "folder"])
def test_a_head_that_was_trained_apart_stays_so(tmp_path, tiny_model, way):
    """Older runs that began with another run trained the two tensors apart: tying them now would change the model."""
    model = tiny_model(tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    path = tmp_path / way
    if way == "checkpoint":
        path = save(tmp_path / "a.ckpt", model, None)
    else:
        model.config.tie_word_embeddings = False
        model.save_pretrained(path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    ids = torch.tensor([[5, 17, 250, 3]])
    loaded, _ = load_model(str(path))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    again, _ = load_model(str(save(tmp_path / "again.ckpt", loaded, None)))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_tiny_model_of_these_tests_is_tied():
    assert TINY["tie_word_embeddings"]
