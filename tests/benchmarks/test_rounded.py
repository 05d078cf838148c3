"""The benchmark of a model in 8 bits: every way decodes, drafts change no text, perplexities are their models'."""

import copy
import json

import pytest
import torch

from lskip.inference.layers.bags import BaggedInt8
from lskip.inference.layers.layout_choice import obstacle_to
from tests.conftest import make_model

pytestmark = pytest.mark.skipif(
    obstacle_to(BaggedInt8, torch.ones(16, 16)) is not None, reason="this build has no bags of 8 bits"
)


def test_a_quick_run(tmp_path, tiny_tokenizer, capsys):
    from benchmarks.decoding.rounded import main

    make_model(vocab_size=304, max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    few = ["--max_new_tokens=8", "--limit_prompts=2", "--tokens_scored=1024", "--threads=1"]
    main([f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", *few])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    for kind in ("chat", "copying"):
        assert result[kind]["mismatches"] == {"int8 ngram": 0, "int8 auto": 0} and result[kind]["prompts"] == 2
        assert {"float32", "int8", "generate"} <= set(result[kind]["over_int8"])
        assert result[kind]["over_int8"]["int8"]["ratio"] == 1
    assert result["perplexity"]["int8"] == pytest.approx(result["perplexity"]["float32"], rel=0.1)
    assert result["perplexity"]["int8"] != result["perplexity"]["float32"]
    assert result["bytes"]["int8"] < result["bytes"]["float32, plain"] and "copying" in capsys.readouterr().out


def test_perplexity_by_hand(tiny_model):
    from benchmarks.decoding.rounded import WINDOW, perplexity

    model, ids = tiny_model(max_position_embeddings=1024), torch.randint(300, (2 * WINDOW + 10,))
    with torch.no_grad():
        rows = model(ids[: 2 * WINDOW].view(2, -1)).logits[:, :-1].log_softmax(-1)
    expected = -rows.gather(2, ids[: 2 * WINDOW].view(2, -1)[:, 1:, None]).mean()
    assert perplexity(model, ids) == pytest.approx(expected.exp().item(), rel=1e-5)
