"""The screened head: it must find what the whole head finds, and be asked where that is all that counts."""

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.layers import lm_head as module
from lskip.inference.layers.lm_head import ScreenedHead, ScreenInt8, keeps_bounds, screened_head
from lskip.models.decoder import Decoder
from tests.conftest import make_model, needs_halved

pytestmark = needs_halved  # the same kernels' build
WORDS, SIZE = 3000, 64
PROMPT = list(range(40, 60))


def head_and_states(kind):
    """A head [V, D] and states [8, D] that are hard in some way."""
    torch.manual_seed(0)
    weight, x = torch.randn(WORDS, SIZE), torch.randn(8, SIZE)
    if kind != "flat":
        x += 3 * weight[torch.randint(0, WORDS, (8,))]
    if kind == "close":  # each token has a double that is a little better, or a little worse
        weight[1::2] = weight[::2] + 2e-4 * torch.randn(WORDS // 2, SIZE)
    if kind == "outlier":
        x[:, 5] *= 40
        weight[:, 9] *= 40
    if kind == "uneven":  # one row sets the scale of all
        x *= torch.logspace(-2, 1, 8)[:, None]
        weight *= torch.logspace(-1, 1, WORDS)[torch.randperm(WORDS), None]
    if kind == "large":  # numbers that all have one sign: sums in 16 bits would be full at once
        weight, x = weight.abs(), x.abs() + 5
    return weight, x


def rounded_to_8_bits(x):
    """Levels 0 … 255 from the least to the largest number, 0 among them, in float64."""
    x = x.double()
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round(-low / scale)
    return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale


def test_the_screens_products_round_both_sides_and_nothing_else():
    """Whole numbers are multiplied exactly; some of these would overflow 16 bits if weights had all 8."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), torch.randn(3, 64)
    scale = weight.double().abs().amax(1, keepdim=True) / 64
    expected = rounded_to_8_bits(x) @ (torch.round(weight.double() / scale) * scale).T
    matrix = ScreenInt8(weight)
    assert torch.allclose(matrix(x).double(), expected, atol=1e-4) and matrix(x).dtype == torch.float32
    assert matrix.nbytes == 96 * 64 + 4 * 96


KINDS = ["clear", "flat", "close", "outlier", "uneven", "large"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_argmax_is_that_of_the_whole_head(kind, monkeypatch):
    monkeypatch.setattr(module, "MOST_LEFT", 1)
    weight, x = head_and_states(kind)
    head = ScreenedHead(weight)
    expected = (x.double() @ weight.double().T).argmax(1)
    assert head.argmax(x.view(4, 2, SIZE)).tolist() == expected.view(4, 2).tolist()
    for row, token in zip(x, expected, strict=True):
        assert int(head.argmax(row.view(1, 1, SIZE))) == token


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_logits_are_within_their_bounds(kind):
    weight, x = head_and_states(kind)
    head = ScreenedHead(weight)
    off = (head(x).double() - x.double() @ weight.double().T).abs()
    assert (off <= head.bound(head.rotation.rotate(x))).all()
    assert off.max() > 0.02 * head.bound(head.rotation.rotate(x)).max()  # not so wide that they say nothing
    assert keeps_bounds(weight)


def test_sums_of_16_bits_do_not_overflow(monkeypatch):
    """In the rotated basis, where rounding happens: every product as large as it can be."""
    head = ScreenedHead(torch.randn(32, SIZE))
    monkeypatch.setattr(head.rotation, "rotate", lambda x: x)
    head.rounded = type(head.rounded)(torch.ones(32, SIZE))
    assert torch.allclose(head(torch.ones(1, SIZE)), torch.full((1, 32), float(SIZE)))


def test_few_tokens_are_left_or_it_says_so():
    weight, x = head_and_states("clear")
    head, seen = ScreenedHead(weight), []
    head.weight = Watched(weight, seen)
    assert head.argmax(x[None]) is not None and len(seen[0]) < WORDS / 50
    assert head.argmax(torch.zeros(1, 1, SIZE)) is None  # all are as likely
    assert head.argmax(torch.full((1, 1, SIZE), torch.nan)) is None


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e38])
def test_it_says_so_where_a_token_has_numbers_that_are_not_finite(broken):
    """Wherever the token stands: the whole head's logits show it then."""
    torch.manual_seed(0)
    weight, x = torch.randn(WORDS, SIZE), torch.full((1, 1, SIZE), 10.0)
    weight[2000, 5] = broken
    assert ScreenedHead(weight).argmax(x) is None


def test_however_many_are_left_few_are_copied_at_once(monkeypatch):
    monkeypatch.setattr(module, "COPIED_AT_ONCE", 10)
    weight, x = head_and_states("flat")
    head, seen = ScreenedHead(weight), []
    head.weight = Watched(weight, seen)
    assert head.argmax(x[None])[0].tolist() == (x @ weight.T).argmax(1).tolist()
    assert len(seen) > 2 and max(map(len, seen)) == 10


class Watched:
    """A head's matrix that notes which of its rows are read."""

    def __init__(self, weight, seen):
        self.weight, self.seen = weight, seen

    def __len__(self):
        return len(self.weight)

    def index_select(self, dim, ids):
        self.seen.append(ids)
        return self.weight.index_select(dim, ids)


def test_banned_tokens_are_left_out_where_they_are_banned():
    weight, x = head_and_states("clear")
    exact = (x @ weight.T).view(2, 4, -1)
    first = exact.argmax(-1)
    banned = [int(first[0, 1]), int(first[1, 2]), 7]

    def ban(logits):
        logits[0, :2, banned] = -torch.inf

    ban(exact)
    expected = exact.argmax(-1)
    assert (expected != first).nonzero().tolist() == [[0, 1]]
    assert ScreenedHead(weight).argmax(x.view(2, 4, SIZE), ban).tolist() == expected.tolist()


@pytest.fixture
def screened(monkeypatch):
    """Lets tiny models have one; counts its answers."""
    monkeypatch.setattr(module, "FEWEST_NUMBERS", 0)
    monkeypatch.setattr(module, "MOST_LEFT", 1)
    answers, argmax = [], ScreenedHead.argmax

    def counted(self, x, ban=None):
        answers.append(argmax(self, x, ban))
        return answers[-1]

    monkeypatch.setattr(ScreenedHead, "argmax", counted)
    return answers


def texts(generator, **settings):
    """Tokens of one prompt alone and of three in a batch."""
    alone = generator.generate(PROMPT, max_new_tokens=24, **settings).token_ids
    prompts = [PROMPT[:size] for size in (20, 3, 9)]
    batch = dict(generator.generate_batch(prompts, batch_size=3, max_new_tokens=24, **settings))
    return [alone, *(batch[index].token_ids for index in range(3))]


WAYS = [
    (None, {}),
    (None, {"num_speculations": 2, "exit_layer": 2}),
    ("int8", {"num_speculations": 3, "draft": "weights"}),
    ("int4", {"num_speculations": 2, "exit_layer": 2, "draft": "weights"}),
]


@pytest.mark.parametrize(("draft_weights", "settings"), WAYS)
@pytest.mark.parametrize("min_new_tokens", [0, 24])
def test_texts_are_those_of_the_whole_head(screened, draft_weights, settings, min_new_tokens):
    model = make_model(tie_word_embeddings=True, hidden_size=64)
    whole = make_model(tie_word_embeddings=False, hidden_size=64)  # the same one, its head a matrix of its own
    whole.load_state_dict(model.state_dict())
    ends_it = TextGenerator(whole, weights="plain").generate(PROMPT, max_new_tokens=8).token_ids[-1]
    model.generation_config.eos_token_id = whole.generation_config.eos_token_id = ends_it
    expected = texts(TextGenerator(whole, weights="plain"), min_new_tokens=min_new_tokens)
    assert not screened and (len(expected[0]) == 24) == (min_new_tokens == 24)
    generator = TextGenerator(model, weights="plain", draft_weights=draft_weights)
    assert texts(generator, min_new_tokens=min_new_tokens, **settings) == expected
    assert len(screened) > 6
    if draft_weights:  # drafts are decoded by the same one
        assert generator.draft_runner.screen is generator.runner.screen
        assert generator.memory()["draft"] == generator.draft_runner.memory()["blocks"]


@pytest.mark.parametrize("settings", [{"temperature": 0.7, "seed": 1}, {"repetition_penalty": 1.3}])
def test_logits_are_made_where_a_chooser_wants_them(screened, settings):
    model = make_model(tie_word_embeddings=True, hidden_size=64)
    texts(TextGenerator(model, weights="plain", draft_weights="int8"), num_speculations=2, **settings)
    assert not screened


def test_who_has_one(screened, monkeypatch):
    tied, untied = make_model(tie_word_embeddings=True, hidden_size=64), make_model(tie_word_embeddings=False)
    assert TextGenerator(tied, weights="plain").runner.screen is not None
    assert TextGenerator(tied, weights="plain", bit_exact=True).runner.screen is None
    assert TextGenerator(untied, weights="plain").runner.screen is None
    # bfloat16 products round: tokens that tie there need not tie in float32
    assert TextGenerator(tied.bfloat16(), weights="plain", bit_exact=False).runner.screen is None
    monkeypatch.undo()
    assert screened_head(Decoder(tied.float())) is None  # too small


def test_its_bytes_are_counted(screened):
    model = make_model(tie_word_embeddings=True, hidden_size=64)
    head = TextGenerator(model, weights="plain").memory()["head"]
    assert head == 300 * 64 + 3 * 4 * 300  # numbers of 8 bits; a scale and two bounds a token
