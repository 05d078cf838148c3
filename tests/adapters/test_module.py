"""Training of an exit adapter: unrolled drafts against drafts made one by one, the loss against its equation."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from lskip.adapters.module import AdapterModule, TimeBudget, draft_loss
from lskip.adapters.states import collate
from lskip.adapters.unroll import draft_metrics, drafted_at, num_rounds, unrolled_states
from lskip.models.exit_adapter import AdapterShape, ExitAdapter
from lskip.targets import LK, SelfDistillation

WORDS = torch.arange(0, 300, 7)
WINDOWED = {"sliding_window": 3}


def double_adapter(model, num_blocks: int = 1, joins: bool = True) -> ExitAdapter:
    """Random, and double to the last bit: transformers' own norms compute in float32."""
    adapter = ExitAdapter(model, AdapterShape(2, num_blocks, joins), WORDS).eval().double()
    for parent in list(adapter.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                own = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=torch.float64)
                own.load_state_dict(child.state_dict())
                setattr(parent, name, own)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trained_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return adapter


def drafted_one_by_one(adapter, exit_states, last_states, start: int, num_steps: int) -> list[torch.Tensor]:
    """What decoding does in a round that begins at `start`: [D] for each draft step, each token alone, no cache."""

    def joined(position: int, previous: torch.Tensor) -> torch.Tensor:
        parts = [exit_states[position], previous] if adapter.shape.joins_last_state else [exit_states[position]]
        return adapter.join(torch.cat([F.rms_norm(part, part.shape) for part in parts]))

    before = [torch.zeros_like(last_states[0]), *last_states]
    inputs = [joined(position, before[position]) for position in range(start + 1)]
    outputs = []
    for step in range(num_steps):
        if step:
            inputs.append(joined(start + step, outputs[-1]))
        outputs.append(adapter.body.model(inputs_embeds=torch.stack(inputs)[None]).last_hidden_state[0, -1])
    return outputs


@pytest.mark.parametrize(
    ("family", "overrides", "num_blocks", "joins"),
    [
        ("llama", {}, 1, True),
        ("llama", {}, 2, True),
        ("llama", {}, 1, False),
        ("mistral", WINDOWED, 2, True),
        ("qwen2", {}, 1, True),
        ("qwen3", {}, 1, True),
    ],
)
def test_unrolled_drafts_are_those_made_one_by_one(tiny_model, family, overrides, num_blocks, joins):
    adapter = double_adapter(tiny_model(family, **overrides), num_blocks, joins)
    exit_states, last_states = torch.randn(2, 2, 9, 32, dtype=torch.float64)
    steps, some = 5, torch.tensor([1, 4, 7])
    with torch.no_grad():
        unrolled = list(unrolled_states(adapter, exit_states, last_states, steps))
        of_some = list(unrolled_states(adapter, exit_states, last_states, steps, some))
        for row in range(2):
            for start in range(9):
                chain = drafted_one_by_one(adapter, exit_states[row], last_states[row], start, min(steps, 9 - start))
                for step, expected in enumerate(chain):
                    torch.testing.assert_close(unrolled[step][row, start], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(of_some[0], unrolled[0])
    for all_rounds, some_rounds in zip(unrolled[1:], of_some[1:], strict=True):
        torch.testing.assert_close(some_rounds, all_rounds[:, some], rtol=1e-10, atol=1e-10)


def random_batch(lengths=((3, 9), (1, 5)), width: int = 32, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Rows of (tokens of the prompt, of both)."""
    rows = []
    for prompt, length in lengths:
        exit_states, last_states = torch.randn(2, length, width, dtype=dtype)
        positions = torch.arange(length)
        scored = (positions >= prompt - 1) & (positions < length - 1)
        choices = torch.randint(300, (length,)).where(scored, -1)
        rows.append({"exit_states": exit_states, "last_states": last_states, "scored": scored, "choices": choices})
    return collate(rows)


@pytest.mark.parametrize(("unroll_every", "counts"), [(1, [10, 8, 6]), (2, [10, 5, 3]), (4, [10, 2, 2])])
def test_the_loss_and_its_gradient_are_those_of_the_equation(tiny_model, unroll_every, counts):
    """Chains drafted one by one, divergences by their definition, and autograd through all of it."""
    adapter = double_adapter(tiny_model())
    head = adapter.body.lm_head.weight
    batch = random_batch()
    module = AdapterModule(adapter, unroll=3, decay=0.5, unroll_every=unroll_every)
    divergences = {step: [] for step in range(3)}
    for row, (prompt, length) in enumerate([(3, 9), (1, 5)]):
        exit_states, last_states = batch["exit_states"][row], batch["last_states"][row]
        for start in range(prompt - 1, length - 1):
            steps = min(3, length - 1 - start) if start % unroll_every == 0 else 1
            for step, state in enumerate(drafted_one_by_one(adapter, exit_states, last_states, start, steps)):
                target = (head @ last_states[start + step]).softmax(-1)
                divergences[step].append((target * (target.log() - (head @ state).log_softmax(-1))).sum())
    assert [len(parts) for parts in divergences.values()] == counts
    means = [torch.stack(parts).mean() for parts in divergences.values()]
    expected = (means[0] + 0.5 * means[1] + 0.25 * means[2]) / 1.75
    wanted = torch.autograd.grad(expected, adapter.trained_parameters())
    loss = module.loss(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for got, gradient in zip(torch.autograd.grad(loss, adapter.trained_parameters()), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-10)


def test_each_step_unrolls_other_rounds(tiny_model, monkeypatch):
    """Over as many steps as unroll_every says all rounds have had their turn, once each."""
    module, batch = AdapterModule(double_adapter(tiny_model()), unroll_every=3), random_batch()
    seen = []
    unrolled = module._unrolled
    monkeypatch.setattr(module, "_unrolled", lambda *given: seen.append(given[2].tolist()) or unrolled(*given))
    for step in range(3):
        monkeypatch.setattr(AdapterModule, "global_step", step)
        module.loss(batch)
    assert sorted(start for starts in seen for start in starts) == list(range(9))
    assert all(len(starts) == 3 for starts in seen)


def divergence(p, q):
    return (p * (p / q).log()).sum(-1)


def not_accepted(p, q):
    alpha = torch.minimum(p, q).sum(-1)
    weight = (-3 * alpha.detach()).exp()
    return weight * divergence(p, q) + (1 - weight) * (1 - alpha)


@pytest.mark.parametrize(("target", "equation"), [(SelfDistillation(), divergence), (LK(), not_accepted)])
def test_the_loss_in_chunks(monkeypatch, target, equation):
    torch.manual_seed(0)
    states, last_states = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8)
    head, weights = torch.randn(11, 8), torch.rand(7)
    expected = (equation((last_states @ head.T).softmax(-1), (states @ head.T).softmax(-1)) * weights).sum()
    monkeypatch.setattr("lskip.adapters.module.rows_at_once", lambda words, device: 3)
    loss = draft_loss(states, last_states, head, weights, target)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(2 * value, states)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("joins", [True, False])
def test_bf16_mixed_is_close_to_float32(tiny_model, joins):
    adapter = ExitAdapter(tiny_model(), AdapterShape(2, 1, joins), WORDS).eval()
    module, batch = AdapterModule(adapter), random_batch(dtype=torch.float32)
    assert module.unroll == (3 if joins else 1)
    exact = module.loss(batch)
    wanted = torch.autograd.grad(exact, adapter.trained_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.loss(batch)
    got = torch.autograd.grad(loss, adapter.trained_parameters())
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    flat = [torch.cat([part.flatten() for part in parts]) for parts in (got, wanted)]
    assert F.cosine_similarity(*flat, dim=0) > 0.98


def test_a_batch_without_an_answer_costs_nothing(tiny_model):
    module = AdapterModule(ExitAdapter(tiny_model(), AdapterShape(2), WORDS))
    batch = random_batch(dtype=torch.float32)
    batch["scored"][:] = False
    loss = module.loss(batch)
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in module.adapter.trained_parameters())


def test_rounds_lie_within_the_answer():
    """Positions 1 to 3 are scored; the two rounds begin at 1 and 3, or everywhere."""
    scored = torch.tensor([[False, True, True, True, False]])
    places = [drafted_at(scored, torch.tensor([1, 3]), step)[0].tolist() for step in (1, 2, 3)]
    assert places == [[1, 3], [2, 4], [3, 4]]
    counted = [drafted_at(scored, torch.arange(5), step)[1].tolist() for step in (1, 2, 3)]
    assert counted[0] == scored.tolist()
    assert counted[1] == [[False, True, True, False, False]]
    assert counted[2] == [[False, True, False, False, False]]
    assert not drafted_at(scored, torch.arange(5), 4)[1].any()


def test_tokens_per_round_by_hand():
    """Answer of 5: step 1 right at 0, 1, 3; step 2 at 1, 2."""
    hits = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    # d = 1: 0 is right, 1 added | 2 is wrong | 3 is right, 4 added
    assert num_rounds(hits.tolist(), 1) == 3
    # d = 2: 0 and 1 are right, 2 added | 3 is right, 4 is not
    assert num_rounds(hits.tolist(), 2) == 2
    told = draft_metrics([torch.cat([hits, torch.zeros(5, 3, dtype=torch.bool)], 1)])
    assert told["draft_agreement"] == pytest.approx(3 / 5)
    assert told["agreement"][:3] == pytest.approx([3 / 5, 2 / 4, 0])
    assert told["tokens_per_round"][2] == 5 / 2


def test_hits_are_taken_where_the_answer_is(tiny_model):
    adapter = double_adapter(tiny_model())
    batch = random_batch()
    module = AdapterModule(adapter)
    with torch.no_grad():
        chain = drafted_one_by_one(adapter, batch["exit_states"][0], batch["last_states"][0], 3, 4)
        words = [WORDS[(adapter.body.lm_head.weight @ state).argmax()] for state in chain]
        batch["choices"][0, 3:7] = torch.stack(words)
        hits = module.hits(batch)
    assert [len(answer) for answer in hits] == [6, 4]  # the first begins at position 2
    assert [hits[0][1 + step, step].item() for step in range(4)] == [True] * 4
    assert [tuple(answer.shape) for answer in module.hits(random_batch(lengths=((1, 3), (2, 4))))] == [(2, 6), (2, 6)]
    batch["choices"][0, 3:7] = -1
    assert not any(module.hits(batch)[0][1 + step, step] for step in range(4))


def test_the_schedule_follows_the_time(monkeypatch):
    budget, schedule = TimeBudget(1.0), SimpleNamespace(total_steps=None)
    module = SimpleNamespace(lr_schedulers=lambda: schedule)
    monkeypatch.setattr(budget, "time_elapsed", lambda: 15.0)
    for limit, expected in ((-1, 400), (300, 300)):
        budget.on_train_batch_start(SimpleNamespace(global_step=100, max_steps=limit), module, None, 0)
        assert schedule.total_steps == expected
