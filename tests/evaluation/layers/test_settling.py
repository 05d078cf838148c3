"""Where predictions settle: by hand, and each layer's top tokens against transformers."""

import pytest
import torch

from lskip.evaluation.layers.settling import Settling, read_settling, spellings
from lskip.models.decoder import Decoder


def settling(predictions, input_ids):
    """Of top-1 predictions [L, N]."""
    ids = torch.tensor(predictions)[..., None]
    return Settling(torch.tensor(input_ids), ids, torch.ones(ids.shape), torch.zeros(ids.shape[:2]))


def test_what_is_settled_returns_and_loses_by_hand():
    #  settles at once; had it, left it, came back; right at layer 2, then lost; lost and come back to a wrong one
    read = settling([[1, 2, 9, 6], [1, 7, 3, 4], [1, 2, 5, 6]], [0, 1, 2, 3, 4])
    assert read.settled.tolist() == [1, 3, 3, 3]
    assert read.returns.tolist() == [False, True, False, True]
    assert read.loses.tolist() == [False, False, True, True]


@torch.no_grad()
def test_top_tokens_of_every_layer(tiny_model):
    model = tiny_model()
    ids = torch.randint(0, 300, (9,), generator=torch.Generator().manual_seed(1))
    hidden = model.model(ids[None], output_hidden_states=True).hidden_states[1:]
    states = [model.model.norm(h[0]) for h in hidden[:-1]] + [hidden[-1][0]]
    shares = torch.stack([model.lm_head(h)[:-1] for h in states]).softmax(-1)
    read = read_settling(Decoder(model), ids, num_top=3)
    order = shares.sort(-1, descending=True)
    assert torch.equal(read.top_ids, order.indices[..., :3])
    torch.testing.assert_close(read.probabilities, order.values[..., :3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(read.target_probabilities, shares[:, torch.arange(8), ids[1:]], rtol=1e-4, atol=1e-6)
    assert torch.equal(read.input_ids, ids)


def test_spellings_of_byte_level_tokens(tiny_tokenizer):
    ids = tiny_tokenizer("add(é\n", add_special_tokens=False).input_ids
    said = spellings(tiny_tokenizer, [*ids, 0])
    assert "".join(said[token] for token in ids) == r"add(\xc3\xa9" + "\n"  # é is two tokens of a byte each
    assert said[0] == "<|endoftext|>"


def test_spellings_of_sentencepiece_tokens():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    names = ["▁the", "cat", "<0x0A>", "<0xF0>", "▁"]
    bpe = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)  # Llama 2's
    said = spellings(PreTrainedTokenizerFast(tokenizer_object=bpe), range(6))
    assert said == {0: " the", 1: "cat", 2: "\n", 3: r"\xf0", 4: " ", 5: "[5]"}


def test_a_text_of_one_token_settles_nothing(tiny_model):
    read = read_settling(Decoder(tiny_model()), torch.tensor([5]))
    assert read.top_ids.shape == (4, 0, 5) and read.settled.tolist() == pytest.approx([])
