"""The chunked head loss against the naive sum of torch's cross_entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from lskip import losses
from lskip.losses import Supervision, Teacher, head_loss
from lskip.targets import Anchored, Labels, SelfDistillation


def make_rows(count=50, hidden=8, vocab=23, dtype=torch.float64, bias=False):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    states, weight = draw(count, hidden).to(dtype), draw(vocab, hidden).to(dtype)
    head_bias = draw(vocab).to(dtype) if bias else None
    labels = torch.randint(0, vocab, (count,), generator=generator)
    row_weights = torch.rand(count, generator=generator, dtype=torch.float64)
    differentiated = [part.requires_grad_() for part in (states, weight, head_bias) if part is not None]
    return states, weight, head_bias, labels, row_weights, differentiated


def naive(states, weight, bias, labels, row_weights):
    rows = cross_entropy(linear(states, weight, bias).to(row_weights.dtype), labels, reduction="none")
    return (rows * row_weights).sum(), rows


def compare(rows, rtol, atol, scale=0.37):
    """Return loss, losses of rows and all gradients, for an upstream gradient of `scale`."""
    *inputs, differentiated = rows
    loss, row_losses = head_loss(*inputs)
    expected, expected_rows = naive(*inputs)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=rtol, atol=atol, check_dtype=False)  # noqa: E731
    close(loss, expected)
    close(row_losses, expected_rows)
    assert not row_losses.requires_grad
    ours = torch.autograd.grad(loss * scale, differentiated)
    for grad, theirs in zip(ours, torch.autograd.grad(expected * scale, differentiated), strict=True):
        assert grad.dtype == theirs.dtype
        close(grad, theirs)


@pytest.fixture(params=[1, 7, 50, 1000], ids=lambda rows: f"{rows}_rows_at_once")
def chunked(request, monkeypatch):
    """Set the rows of a chunk; 7 does not divide the 50 rows."""
    monkeypatch.setattr(losses, "MIN_ROWS", request.param)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 1)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
def test_float64(chunked, bias):
    compare(make_rows(bias=bias), rtol=1e-12, atol=1e-12)


def test_float32(chunked):
    rows = make_rows(dtype=torch.float32, bias=True)
    compare((*rows[:4], rows[4].float(), rows[5]), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_near_to_the_exact_loss_as_the_naive_sum_is(chunked):
    rows = make_rows(count=50, hidden=64, vocab=200, dtype=torch.bfloat16)
    states, weight, bias, labels, row_weights, differentiated = rows
    exact_parts = [part.detach().double().requires_grad_() for part in (states, weight)]
    exact, _ = naive(*exact_parts, None, labels, row_weights)
    loss, row_losses = head_loss(states, weight, bias, labels, row_weights.float())
    assert loss.dtype == row_losses.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    theirs = torch.autograd.grad(naive(states, weight, bias, labels, row_weights.float())[0], differentiated)
    references = torch.autograd.grad(exact, exact_parts)
    for grad, other, reference in zip(torch.autograd.grad(loss, differentiated), theirs, references, strict=True):
        assert grad.dtype == torch.bfloat16
        error, other_error = ((g.double() - reference).norm() / reference.norm() for g in (grad, other))
        assert error < max(1.2 * other_error, 0.004)


def test_under_autocast_the_products_are_bfloat16_and_the_sums_float32(chunked):
    states, weight, bias, labels, row_weights, differentiated = make_rows(
        hidden=64, vocab=200, dtype=torch.float32, bias=True
    )
    exact, _ = naive(states, weight, bias, labels, row_weights.float())
    reference = torch.autograd.grad(exact, differentiated)
    with torch.autocast("cpu", torch.bfloat16):
        loss, row_losses = head_loss(states, weight, bias, labels, row_weights.float())
    assert loss.dtype == row_losses.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    assert loss.item() != pytest.approx(exact.item(), rel=1e-6)  # bfloat16 did take part
    for grad, expected in zip(torch.autograd.grad(loss, differentiated), reference, strict=True):
        assert grad.dtype == torch.float32
        assert ((grad - expected).norm() / expected.norm()).item() < 0.02


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(losses, "rows_at_once", lambda vocab_size, device: 2)
    states, weight, bias, labels, row_weights, _ = make_rows(count=5, hidden=3, vocab=4, bias=True)
    assert torch.autograd.gradcheck(lambda *parts: head_loss(*parts, labels, row_weights)[0], (states, weight, bias))


def test_a_second_derivative_is_refused_rather_than_wrong():
    *inputs, differentiated = make_rows()
    (grad, *_) = torch.autograd.grad(head_loss(*inputs)[0] ** 2, differentiated, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_tied_head_sums_its_gradient_with_the_embeddings():
    generator = torch.Generator().manual_seed(0)
    tied = torch.randn(23, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    ids, labels = torch.randint(0, 23, (2, 40), generator=generator)
    weights = torch.rand(40, generator=generator, dtype=torch.float64)
    grads = [
        torch.autograd.grad(loss(tied[ids].tanh(), tied, None, labels, weights)[0], tied)[0]
        for loss in (head_loss, naive)
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_a_frozen_side_gets_no_gradient_and_the_other_the_same(frozen):
    states, weight, _, labels, row_weights, _ = make_rows()
    (states if frozen == "states" else weight).requires_grad_(False)
    other = weight if frozen == "states" else states
    loss, _ = head_loss(states, weight, None, labels, row_weights)
    expected, _ = naive(states, weight, None, labels, row_weights)
    torch.testing.assert_close(*(torch.autograd.grad(total, other)[0] for total in (loss, expected)))


def test_no_rows_lose_nothing_and_have_gradients_of_zero():
    states, weight, bias, _, _, differentiated = make_rows(count=0, bias=True)
    loss, rows = head_loss(states, weight, bias, torch.empty(0, dtype=torch.long), torch.empty(0))
    assert loss.item() == 0 and rows.shape == (0,)
    assert [grad.any().item() for grad in torch.autograd.grad(loss, differentiated)] == [False] * 3


def test_large_logits_do_not_overflow():
    rows = make_rows()
    compare((rows[0].detach().mul(1e4).requires_grad_(), *rows[1:5], [rows[1]]), rtol=1e-10, atol=1e-10)


def test_backward_twice_gives_the_same_gradient():
    *inputs, differentiated = make_rows()
    loss, _ = head_loss(*inputs)
    first = torch.autograd.grad(loss * 0.5, differentiated, retain_graph=True)
    for grad, again in zip(first, torch.autograd.grad(loss * 0.5, differentiated), strict=True):
        assert torch.equal(grad, again)


class Counting(SelfDistillation):
    """Remembers how many rows it was given, and of the teacher."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def loss(self, logits, labels, teacher_logits):
        self.rows.append((len(logits), len(labels), len(teacher_logits)))
        return super().loss(logits, labels, teacher_logits)


def test_never_more_rows_of_logits_than_a_chunk_neither_the_exits_nor_the_teachers(chunked):
    *inputs, differentiated = make_rows()
    target = Counting()
    supervision = [Supervision(30, target, Teacher(torch.ones(30, 8, dtype=torch.float64))), Supervision(20, Labels())]
    torch.autograd.grad(head_loss(*inputs, supervision=supervision)[0], differentiated)
    assert sum(rows for rows, *_ in target.rows) == 30
    assert max(rows for rows, *_ in target.rows) == min(chunked, 30)
    assert all(len(set(rows)) == 1 for rows in target.rows)


def teach(states, weight, bias, labels, row_weights, teacher_states, foreign_head, softcap):
    """20 rows taught by the trained head's own, 10 anchored to a foreign head, 20 by labels: naively, by autograd."""

    def logits(rows, head=weight, head_bias=bias):
        found = linear(rows, head, head_bias)
        return found if softcap is None else softcap * (found / softcap).tanh()

    def divergence(student, teacher):
        return (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.log_softmax(-1))).sum(-1)

    own = logits(teacher_states).detach()
    rows = torch.cat(
        [
            4 * divergence(logits(states[:20]) / 2, own[:20] / 2),
            cross_entropy(logits(states[20:30]), labels[20:30], reduction="none")
            + 0.3 * divergence(logits(states[20:30]), logits(teacher_states[20:], foreign_head, None)),
            cross_entropy(logits(states[30:]), labels[30:], reduction="none"),
        ]
    )
    return (rows * row_weights).sum(), rows


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_supervisions_side_by_side_and_no_gradient_to_a_teacher(chunked, bias, softcap):
    *inputs, differentiated = make_rows(bias=bias)
    draw = torch.Generator().manual_seed(1)
    teacher_states = torch.randn(30, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    foreign_head = torch.randn(23, 8, generator=draw, dtype=torch.float64, requires_grad=True)
    supervision = [
        Supervision(20, SelfDistillation(temperature=2.0), Teacher(teacher_states[:20])),
        Supervision(10, Anchored(0.3), Teacher(teacher_states[20:], foreign_head)),
        Supervision(20, Labels()),
    ]
    loss, rows = head_loss(*inputs, softcap, supervision)
    expected, expected_rows = teach(*inputs, teacher_states, foreign_head.detach(), softcap)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows, expected_rows, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, differentiated)
    loss.backward()
    for part, grad in zip(differentiated, wanted, strict=True):
        torch.testing.assert_close(part.grad, grad, rtol=1e-11, atol=1e-12)
    assert teacher_states.grad is None and foreign_head.grad is None


def test_distillation_under_autocast_is_near_the_exact_one(chunked):
    inputs = make_rows(hidden=64, vocab=200, dtype=torch.float32)
    *rows, differentiated = inputs
    states = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    supervision = [Supervision(50, SelfDistillation(), Teacher(states))]
    exact = torch.autograd.grad(head_loss(*rows[:4], rows[4].float(), supervision=supervision)[0], differentiated)
    with torch.autocast("cpu", torch.bfloat16):
        loss, losses_of_rows = head_loss(*rows[:4], rows[4].float(), supervision=supervision)
    assert losses_of_rows.dtype == torch.float32
    for grad, expected in zip(torch.autograd.grad(loss, differentiated), exact, strict=True):
        assert 0 < (grad - expected).norm() / expected.norm() < 0.03


def test_chunks_by_vocabulary():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert losses.rows_at_once(8192, cpu) == 1024
    assert losses.rows_at_once(128_000, cpu) == 128  # few rows make slow products: never fewer than that
    assert losses.rows_at_once(128_000, gpu) == 524
