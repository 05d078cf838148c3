"""The loss of a row of logits for each target: by hand, and against autograd in float64."""

import math

import pytest
import torch

from lskip.losses import Supervision, head_loss
from lskip.targets import LK, Anchored, ExitTarget, Labels, SelfDistillation

HALF, QUARTER = math.log(0.5), math.log(0.25)


def draw(rows=6, vocab=11, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    student, teacher = scale * torch.randn(2, rows, vocab, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), torch.randint(0, vocab, (rows,), generator=generator), teacher


def divergence(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def outcomes(logits, top):
    """Return the probabilities of the tokens `top`, and of all others together."""
    kept = logits.softmax(-1).gather(1, top)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)


def agrees(target, expected, student, labels, teacher):
    """`target` has these losses, and the gradient of their sum that autograd finds."""
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    losses, gradient = target.loss(student.detach().clone(), labels, teacher.clone())
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_by_hand():
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): 1/2 ln 2 + 0 - 1/4 ln 2; the gradient is q - p.
    logits, teacher = torch.tensor([[QUARTER, QUARTER, HALF]]) + 5, torch.tensor([[HALF, QUARTER, QUARTER]])
    losses, gradient = SelfDistillation().loss(logits, torch.tensor([0]), teacher)
    assert losses.tolist() == pytest.approx([0.25 * math.log(2)])
    assert gradient[0].tolist() == pytest.approx([-0.25, 0, 0.25], abs=1e-6)


def test_top_k_by_hand():
    # Of p only the first token, 1/2 against q's 1/4: 1/2 ln 2 + 1/2 ln (1/2 : 3/4). The others are pushed down
    # together, by 1 - (1/2 : 3/4) = 1/3 of their q.
    logits, teacher = torch.tensor([[QUARTER, QUARTER, HALF]]), torch.tensor([[HALF, QUARTER, QUARTER]])
    losses, gradient = SelfDistillation(top_k=1).loss(logits, torch.tensor([0]), teacher)
    assert losses.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)])
    assert gradient[0].tolist() == pytest.approx([-0.25, 1 / 12, 1 / 6], abs=1e-6)


def test_labels():
    student, labels, teacher = draw()
    agrees(Labels(), torch.nn.functional.cross_entropy(student, labels, reduction="none"), student, labels, teacher)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_temperature(temperature):
    student, labels, teacher = draw()
    p, q = ((part / temperature).softmax(-1) for part in (teacher, student))
    agrees(SelfDistillation(temperature), temperature**2 * divergence(p, q), student, labels, teacher)


@pytest.mark.parametrize("top_k", [1, 4, 10])
def test_top_k_is_the_divergence_with_the_rest_as_one_outcome(top_k):
    student, labels, teacher = draw()
    top = teacher.topk(top_k).indices
    expected = 4 * divergence(outcomes(teacher / 2, top), outcomes(student / 2, top))
    agrees(SelfDistillation(2.0, top_k), expected, student, labels, teacher)


def copies(student, labels, teacher):
    """Return arguments for a target, copied since it may overwrite them."""
    return student.detach().clone(), labels, teacher.clone()


@pytest.mark.parametrize("top_k", [11, 1000])
def test_top_k_of_the_whole_vocabulary_is_the_full_one(top_k):
    parts = draw()
    for ours, full in zip(
        SelfDistillation(2.0, top_k).loss(*copies(*parts)), SelfDistillation(2.0).loss(*copies(*parts)), strict=True
    ):
        assert torch.equal(ours, full)


def test_a_hot_student_learns_with_a_gradient_of_the_same_size():
    """At a high temperature the gradient tends to the difference of the centred logits over V, whatever T."""
    student, labels, teacher = draw(scale=0.1)
    hot, hotter = (SelfDistillation(t).loss(*copies(student, labels, teacher))[1] for t in (50.0, 100.0))
    torch.testing.assert_close(hot, hotter, rtol=0.02, atol=1e-5)


def test_lk_by_hand():
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): alpha = 3/4, and only the first token is drafted too seldom. More of it
    # comes from all others: (1 - 1/4, -1/4, -1/2) / 4 is the gradient of alpha.
    logits, teacher = torch.tensor([[QUARTER, QUARTER, HALF]]) - 2, torch.tensor([[HALF, QUARTER, QUARTER]])
    losses, gradient = LK(eta=None).loss(logits.clone(), torch.tensor([0]), teacher.clone())
    assert losses.tolist() == pytest.approx([math.log(4 / 3)])
    assert gradient[0].tolist() == pytest.approx([-1 / 4, 1 / 12, 1 / 6], abs=1e-6)
    # At eta = 4/3 ln 2 KL (1/4 ln 2, gradient q - p) and 1 - alpha = 1/4 weigh the same.
    losses, gradient = LK(eta=4 / 3 * math.log(2)).loss(logits, torch.tensor([0]), teacher)
    assert losses.tolist() == pytest.approx([1 / 2 * (0.25 * math.log(2) + 0.25)])
    assert gradient[0].tolist() == pytest.approx([(-1 / 4 - 3 / 16) / 2, 1 / 32, (1 / 4 + 1 / 8) / 2], abs=1e-6)


@pytest.mark.parametrize("eta", [None, 0.5, 3.0])
@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
def test_lk(eta, scale):
    student, labels, teacher = draw(scale=scale)
    p, q = (part.softmax(-1) for part in (teacher, student))
    alpha = torch.minimum(p, q).sum(-1)
    if eta is None:
        expected = -alpha.log()
    else:
        weight = (-eta * alpha.detach()).exp()
        expected = weight * divergence(p, q) + (1 - weight) * (1 - alpha)
    agrees(LK(eta), expected, student, labels, teacher)


def test_lk_of_a_certain_teacher_is_the_cross_entropy():
    student, labels, _ = draw()
    certain = torch.full_like(student, -1e4).scatter(1, labels[:, None], 0.0)
    for ours, theirs in zip(
        LK(eta=None).loss(student.detach().clone(), labels, certain.detach()),
        Labels().loss(student.detach().clone(), labels),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_lk_learns_from_distributions_that_hardly_overlap():
    """alpha is e^-300 there, 0 in float32, and so its own gradient."""
    logits, teacher = torch.tensor([[300.0, 0.0, -10.0]]), torch.tensor([[0.0, 300.0, -10.0]])
    losses, gradient = LK(eta=None).loss(logits, torch.tensor([1]), teacher)
    # Twice e^-300: q of the second token, p of the first.
    assert losses.tolist() == pytest.approx([300 - math.log(2)])
    assert gradient[0].tolist() == pytest.approx([1 / 2, -1 / 2, 0], abs=1e-4)  # float32 of 300


def test_lk_of_equal_distributions_is_nothing():
    student, labels, _ = draw()
    for eta in (None, 3.0):
        losses, gradient = LK(eta).loss(student.detach().clone(), labels, student.detach().clone())
        torch.testing.assert_close(losses, torch.zeros_like(losses), rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_anchored_adds_the_divergence_to_the_labels():
    student, labels, teacher = draw()
    expected = torch.nn.functional.cross_entropy(student, labels, reduction="none")
    expected = expected + 0.7 * divergence(teacher.softmax(-1), student.softmax(-1))
    agrees(Anchored(0.7), expected, student, labels, teacher)


@pytest.mark.parametrize("target", [SelfDistillation(), SelfDistillation(top_k=2), LK(), LK(None), Anchored(1.0)])
def test_logits_far_apart_stay_finite(target):
    logits = torch.tensor([[300.0, -300.0, 0.0, 1.0]])
    losses, gradient = target.loss(logits, torch.tensor([1]), -torch.tensor([[300.0, -300.0, 0.0, 1.0]]))
    assert losses.isfinite().all() and gradient.isfinite().all() and losses > 100


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SelfDistillation(temperature=0), "temperature: 0 "),
        (lambda: SelfDistillation(temperature=math.nan), "temperature: nan "),
        (lambda: SelfDistillation(top_k=0), "top_k: 0 "),
        (lambda: SelfDistillation(top_k=2.5), "top_k: 2.5 "),
        (lambda: LK(0), "eta: 0 "),
        (lambda: LK(-1.0), "eta: -1.0 "),
        (lambda: Anchored(-1.0), "anchor_weight: -1.0 "),
    ],
)
def test_numbers_out_of_range_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("wrong", [None, torch.zeros(()), (torch.zeros(()), None), "a mean", "a gradient of a mean"])
def test_what_a_target_of_ones_own_returns_is_looked_at(wrong):
    """Red where a mean is taken for the loss of every row."""

    class Own(ExitTarget):
        def loss(self, logits, labels, teacher_logits):
            losses, gradient = Labels().loss(logits, labels)
            return {"a mean": (losses.mean(), gradient), "a gradient of a mean": (losses, gradient.mean(0))}.get(
                wrong if isinstance(wrong, str) else "", wrong
            )

    states, head = torch.randn(3, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match=r"^exit_target: Own.loss must return losses \[3\] and gradients \[3, 7\]$"):
        head_loss(states, head, None, torch.tensor([1, 2, 3]), torch.ones(3), None, [Supervision(3, Own())])
