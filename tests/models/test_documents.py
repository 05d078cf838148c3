"""Documents in one row that are kept apart, against each of them alone."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lskip.data.collation import Border, collate
from lskip.layer_dropout import run_kept_rows
from lskip.models.decoder import Decoder
from lskip.models.readout import read_exits
from lskip.module import LayerSkipModule
from lskip.targets import SelfDistillation
from lskip.training.flex_attention import use_flex_attention

LENGTHS = ((5, 1, 9, 2), (7, 10))
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4},
    "qwen3": {},
    "gpt2": {},
    "opt": {},
}


def documents() -> list[list[Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [[torch.randint(1, 300, (length,), generator=random) for length in row] for row in LENGTHS]


def positions() -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])


def states_of(decoder: Decoder, ids: Tensor, position_ids: Tensor | None) -> Tensor:
    x, inputs = decoder.enter(ids, position_ids)
    for block in range(decoder.num_layers):
        x = decoder.block(block, x, inputs)
    return x


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_each_alone(tiny_config, family, attention):
    """Red where attention, a window or positions reach over a border; by transformers' own forward, in float64."""
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for it")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**tiny_config(family, **FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().double()
    rows = documents()
    alone = [[model(input_ids=document[None], use_cache=False).logits[0] for document in row] for row in rows]
    decoder, ids = Decoder(model), torch.stack([torch.cat(row) for row in rows])
    packed = decoder.decode(states_of(decoder, ids, positions()))
    expected = torch.stack([torch.cat(row) for row in alone])
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)
    joined = decoder.decode(states_of(decoder, ids, None))
    assert not torch.allclose(joined[0, 5:], expected[0, 5:], atol=1e-3)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad((part * weights).sum(), list(model.parameters())) for part in (packed, expected)
    )
    largest = max(part.abs().max() for part in wanted)
    for ours, theirs in zip(found, wanted, strict=True):  # eager attention's softmax is in float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(largest))


@torch.no_grad()
def test_rows_that_keep_a_block_keep_their_documents(tiny_model):
    decoder = Decoder(tiny_model("mistral", sliding_window=4))
    ids = torch.stack([torch.cat(row) for row in documents()]).repeat(2, 1)
    x, inputs = decoder.enter(ids, positions().repeat(2, 1))
    dropped = np.array([False, True, True, False])
    found = run_kept_rows(partial(decoder.block, 0), x, inputs, dropped)
    whole = decoder.block(0, x, inputs)
    torch.testing.assert_close(found[~dropped], whole[~dropped], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[dropped], x[dropped])


@pytest.fixture
def without_compiler():
    """Have flex attention run as it is written; compiling it takes a minute on a CPU."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings(action="ignore"):
        yield


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])  # transformers has none for it
@torch.no_grad()
def test_flex_attention_sees_what_the_mask_shows(tiny_config, family, apart, without_compiler):
    """Also of the rows that keep a block; against eager attention, which goes by the mask of all pairs of tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**tiny_config(family, **FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.stack([torch.cat(row) for row in documents()]).repeat(2, 1)
    found = {}
    for attention in ("eager", "flex_attention"):
        model.set_attn_implementation(attention)
        decoder = Decoder(model)
        x, inputs = decoder.enter(ids, positions().repeat(2, 1) if apart else None)
        for block in range(decoder.num_layers):
            dropped = np.array([block == 1, block > 1, False, block == 3])
            x = run_kept_rows(partial(decoder.block, block), x, inputs, dropped)
        found[attention] = x
    torch.testing.assert_close(found["flex_attention"], found["eager"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_loss_by_flex_attention_is_that_of_the_mask(tiny_model, without_compiler):
    """With an anchor, and rows that skip blocks."""
    packed, _ = batches()
    losses = []
    for flex in (False, True):
        module = LayerSkipModule(tiny_model("mistral", sliding_window=4), flex_attention=flex, anchor_weight=0.5)
        if flex:
            models = [root.model for root in (module, *module.supervision.teachers())]
            use_flex_attention(models, torch.device("cuda"))
        module.drop_rates.values, module.exit_weights.values = [0.0, 0.4, 0.4, 0.4], [0.1, 0.2, 0.3, 0.4]
        losses.append(torch.stack([module.early_exit_loss(packed, batch)[0] for batch in range(4)]))
    assert len(set(losses[0].tolist())) > 1  # other rows skip
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("gpt2", {}, "flex_attention: true, and transformers has none for gpt2; allowed: false"),
        ("llama", {"attention_dropout": 0.1}, "the model has attention_dropout 0.1"),
    ],
)
def test_models_without_flex_attention_are_refused(tiny_model, family, config, words):
    with pytest.raises(ValueError, match=words):
        LayerSkipModule(tiny_model(family, **config), flex_attention=True)


@pytest.mark.parametrize(
    ("border", "row", "places"),
    [
        (Border(0), [5, 0, 7, 8, 0, 9], [0, 1, 0, 1, 2, 0]),
        (Border(0), [0, 0, 7, 8, 6, 0], [0, 0, 0, 1, 2, 3]),
        (Border(0, (1,)), [5, 0, 1, 8, 0, 1], [0, 1, 0, 1, 2, 0]),
        (Border(0, (0,)), [0, 4, 0, 0, 7, 0], [0, 1, 2, 0, 1, 2]),  # one token is begin and end
        (Border(0, (0,)), [0, 0, 7, 0, 0, 3], [0, 0, 1, 2, 0, 1]),
        (Border(0, (0, 2)), [5, 0, 0, 2, 4, 0], [0, 1, 0, 1, 2, 3]),
    ],
)
def test_borders_are_found_by_the_tokens_around_them(border, row, places):
    """By hand; the first token of a document is not scored, as none before it tells of it."""
    other = [3] * len(row)
    batch = collate([{"input_ids": np.array(row)}, {"input_ids": np.array(other)}], border)
    assert batch["position_ids"].tolist() == [places, list(range(len(row)))]
    expected = [-100 if place == 0 else token for token, place in zip(row, places, strict=True)]
    assert batch["labels"][0].tolist() == expected and batch["labels"][1].tolist()[1:] == other[1:]
    assert len(batch["scored_tokens"]) == sum(place > 0 for place in places) + len(row) - 1


def test_rows_of_one_document_take_the_attention_without_a_mask():
    batch = collate([{"input_ids": np.array([3, 4, 5, 0])}], Border(0))
    assert "position_ids" not in batch and batch["labels"].tolist() == [[3, 4, 5, 0]]


def batches() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the packed rows, and each document that has a token to predict as a row of its own."""
    rows, ends = documents(), torch.zeros(1, dtype=torch.long)
    closed = [[torch.cat([document[:-1], ends]) for document in row] for row in rows]
    packed = collate([{"input_ids": torch.cat(row).numpy()} for row in closed], Border(0))
    assert torch.equal(packed["position_ids"], positions())
    return packed, [{"input_ids": each[None]} for row in closed for each in row if len(each) > 1]


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"exit_target": SelfDistillation()}])
def test_the_loss_is_the_mean_over_the_tokens_of_each_alone(tiny_model, settings):
    """Red where a first token is scored, and where the anchor's own pass joins what the model keeps apart."""
    module = LayerSkipModule(tiny_model("llama").double(), lr_scheduler=None, anchor_weight=0.5, **settings).train()
    with torch.no_grad():
        module.decoder.head_weight.mul_(1.5)  # so that the anchor says something
    module.exit_weights.values = [0.1, 0.2, 0.3, 0.4]
    packed, alone = batches()
    losses = [module.early_exit_loss(each, 0)[0] * (each["input_ids"].shape[1] - 1) for each in alone]
    expected = sum(losses) / sum(each["input_ids"].shape[1] - 1 for each in alone)
    found, _ = module.early_exit_loss(packed, 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(part, list(module.parameters())) for part in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_validation_reads_each_alone(tiny_model):
    decoder, (packed, alone) = Decoder(tiny_model("mistral", sliding_window=4)), batches()
    apart = read_exits(decoder, packed["input_ids"], packed["labels"], [1, 4], None, packed["position_ids"])
    each = [read_exits(decoder, one["input_ids"], None, [1, 4]) for one in alone]
    torch.testing.assert_close(apart.losses, torch.cat([one.losses for one in each], 1), rtol=1e-5, atol=1e-5)
