"""Texts that leave the model for good through an exit adapter, against its modules run over the whole text anew."""

import pytest
import torch

from lskip.cli import main
from lskip.inference import TextGenerator
from lskip.inference.decoding.sampling import TokenChooser
from lskip.models.decoder import Decoder
from tests.inference.drafting.test_adapter import EXIT, FAMILIES, PROMPTS, WORDS, make_adapter, make_damped

TOKENS = 12


@torch.inference_mode()
def slow_text(model, adapter, prompt, chooser=None):
    """Return TOKENS tokens, each from the modules of E blocks and the adapter over all tokens before it, uncached."""
    decoder, body, text = Decoder(model), Decoder(adapter.body), list(prompt)
    for _ in range(TOKENS):
        x = decoder.embed(torch.tensor([text]))
        inputs = decoder.block_inputs(x)
        for block in range(EXIT):
            x = decoder.block(block, x, inputs)
        x = adapter.joined(x, None)
        known = body.decode(adapter.run(x, body.block_inputs(x)))[:, -1]
        logits = torch.full((1, decoder.vocab_size), -torch.inf)
        logits[:, adapter.token_ids] = known
        if chooser is None:
            text.append(int(logits.argmax()))
        else:
            text.append(int(chooser.sample(logits, torch.empty(0, dtype=torch.long))))
            chooser.text.append(text[-1])
    return text[len(prompt) :]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize(("num_blocks", "words"), [(1, None), (2, WORDS)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_those_of_the_modules(family, num_blocks, words, batch_size):
    model = make_damped(family)
    adapter = make_adapter(model, num_blocks, joins=False, words=words)
    expected = [slow_text(model, adapter, prompt) for prompt in PROMPTS]
    assert len({tuple(text) for text in expected}) > 2
    generator = TextGenerator(model, weights="plain", exit_adapter=adapter)
    settings = {"exit_layer": EXIT, "max_new_tokens": TOKENS}
    found = dict(generator.generate_batch(PROMPTS, batch_size, **settings))
    assert [found[index].token_ids for index in range(len(PROMPTS))] == expected
    alone = TextGenerator(model, weights="plain")  # the exit's own text is another one
    assert [alone.generate(prompt, **settings).token_ids for prompt in PROMPTS] != expected


def test_sampled_texts_and_long_prompts_too():
    model = make_damped("llama", max_position_embeddings=512)
    adapter = make_adapter(model, joins=False)
    generator = TextGenerator(model, weights="plain", exit_adapter=adapter)
    prompt = [(7 * place) % 300 for place in range(300)]  # runs in two pieces
    settings = {"exit_layer": EXIT, "max_new_tokens": TOKENS, "temperature": 0.7, "seed": 4}
    chooser = TokenChooser(generator.settings(**settings), 4, (), prompt)
    assert generator.generate(prompt, **settings).token_ids == slow_text(model, adapter, prompt, chooser)


def test_other_exits_the_whole_model_and_drafts_are_as_before():
    model = make_damped()
    generator = TextGenerator(model, weights="plain", exit_adapter=make_adapter(model, joins=False))
    alone = TextGenerator(model, weights="plain")
    own = alone.generate(PROMPTS[0], max_new_tokens=TOKENS).token_ids
    first = {"exit_layer": 1, "max_new_tokens": TOKENS}
    assert generator.generate(PROMPTS[0], **first).token_ids == alone.generate(PROMPTS[0], **first).token_ids
    for settings in ({}, {"exit_layer": 4}, {"exit_layer": EXIT, "num_speculations": 3}, {"num_speculations": 3}):
        assert generator.generate(PROMPTS[0], max_new_tokens=TOKENS, **settings).token_ids == own


def test_adapters_that_join_last_states_are_refused():
    model = make_damped()
    generator = TextGenerator(model, exit_adapter=make_adapter(model))
    with pytest.raises(ValueError, match="exit_layer: 2 alone does not go with this exit_adapter, which joins"):
        generator.settings(exit_layer=EXIT)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--exit_layer=1"], "exit_layer: 1 is not 2, for which the exit_adapter was made"),
        (["--exit_layer=1", "--draft=auto"], "exit_layer: 1 is not 2, for which the exit_adapter was made"),
        (
            ["--exit_layer=2", "--exit_criterion=Margin", "--exit_criterion.threshold=0.5"],
            "exit_criterion: reads the model's own exits; leave it or the",
        ),
    ],
)
def test_an_adapter_that_is_named_is_never_left_out_in_silence(tmp_path, tiny_tokenizer, capsys, options, said):
    model = make_damped()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    make_adapter(model, joins=False).save(tmp_path / "adapter")
    (tmp_path / "prompts.txt").write_text("def f(\n")
    loading = [f"--model={tmp_path}/model", f"--exit_adapter={tmp_path}/adapter", "--max_new_tokens=3", *options]
    assert main(["generate", "--prompt=def f(", *loading]) == 2
    assert said in capsys.readouterr().err
    files = [f"--prompts={tmp_path}/prompts.txt", f"--output={tmp_path}/out.jsonl"]
    assert main(["predict", *files, *loading]) == 2
    assert said in capsys.readouterr().err
