"""Sampling: the right distribution, and the same text with and without speculation."""

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lskip.inference import GenerationSettings, TextGenerator
from lskip.inference.sampling import TokenChooser, gumbel_noise

PROMPT = [7, 42, 99, 3]


def test_noise_is_gumbel_and_a_function_of_seed_and_position():
    noise = gumbel_noise(3, 11, 200_000).double()
    assert abs(noise.mean() - 0.5772) < 0.01  # Euler's constant
    assert abs(noise.var() - torch.pi**2 / 6) < 0.03
    gumbel_noise.cache_clear()
    assert torch.equal(gumbel_noise(3, 11, 200_000).double(), noise)
    for other in (gumbel_noise(4, 11, 200_000), gumbel_noise(3, 12, 200_000)):
        assert abs(torch.corrcoef(torch.stack([noise, other.double()]))[0, 1]) < 0.02


def chi_square_p(counts, probabilities):
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0
    big = expected >= 5
    statistic = ((counts - expected)[big] ** 2 / expected[big]).sum()
    rest, expected_rest = counts[~big].sum(), expected[~big].sum()
    if expected_rest > 0:
        statistic = statistic + (rest - expected_rest) ** 2 / expected_rest
    freedom = torch.tensor(int(big.sum()) - 1 + int(expected_rest > 0), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))  # the distribution's upper tail


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 6}, {"temperature": 1.5, "top_p": 0.8}]
)
def test_sampled_tokens_follow_the_processed_distribution(settings):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(5)) * 1.5
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    probabilities = warpers(None, logits.clone()).softmax(-1)[0].double()
    choose = TokenChooser(GenerationSettings(**settings), seed=1, eos_ids=(), first_eos=0)
    draws = torch.cat([choose(logits, position) for position in range(4000)])
    assert chi_square_p(torch.bincount(draws, minlength=12).double(), probabilities) > 1e-4


def test_second_token_with_speculation_follows_the_exact_marginal(tiny_model):
    """Summed over the first token by enumeration; the draft is far from the model."""
    model = tiny_model("llama", vocab_size=8, initializer_range=0.5, eos_token_id=None)
    prompt = [1, 2, 3]
    with torch.inference_mode():
        first = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        after = model(torch.tensor([[*prompt, token] for token in range(8)])).logits[:, -1].softmax(-1)
    joint = (first[:, None] * after).double().flatten()
    generator = TextGenerator(model)
    counts = torch.zeros(64).double()
    drafted = accepted = 0
    for seed in range(1500):
        ours = generator.generate(
            prompt, max_new_tokens=2, temperature=1.0, seed=seed, exit_layer=1, num_speculations=2
        )
        counts[ours.token_ids[0] * 8 + ours.token_ids[1]] += 1
        drafted, accepted = drafted + ours.drafted, accepted + ours.accepted
    assert 0.05 < accepted / drafted < 0.95
    assert chi_square_p(counts, joint) > 1e-4


@pytest.mark.parametrize("settings", [{}, {"top_k": 20, "top_p": 0.9}])
def test_a_seed_fixes_the_text_with_and_without_speculation(tiny_model, settings):
    model = tiny_model("llama", tie_word_embeddings=False, eos_token_id=None)
    generator = TextGenerator(model)
    texts, accepted = set(), 0
    for seed in range(10):
        chosen = {"temperature": 0.8, "seed": seed, "max_new_tokens": 25, **settings}
        truth = generator.generate(PROMPT, **chosen)
        for exit_layer, num_speculations in ((1, 2), (3, 5)):
            ours = generator.generate(PROMPT, exit_layer=exit_layer, num_speculations=num_speculations, **chosen)
            assert ours.token_ids == truth.token_ids
            accepted += ours.accepted
        texts.add(tuple(truth.token_ids))
    assert len(texts) == 10 and accepted > 0


def test_without_a_seed_texts_differ_and_can_be_had_again(tiny_model):
    generator = TextGenerator(tiny_model("llama", eos_token_id=None))
    first, second = (generator.generate(PROMPT, temperature=1.0, max_new_tokens=20) for _ in range(2))
    assert first.token_ids != second.token_ids
    again = generator.generate(PROMPT, temperature=1.0, max_new_tokens=20, seed=first.seed)
    assert again.token_ids == first.token_ids


def test_top_k_of_one_is_greedy(tiny_model):
    generator = TextGenerator(tiny_model("llama"))
    greedy = generator.generate(PROMPT, max_new_tokens=20).token_ids
    assert generator.generate(PROMPT, max_new_tokens=20, temperature=2.0, top_k=1, seed=5).token_ids == greedy
    assert generator.generate(PROMPT, max_new_tokens=20, temperature=2.0, top_p=1e-9, seed=5).token_ids == greedy


def test_end_tokens_are_barred_until_min_new_tokens():
    logits = torch.zeros(3, 4)
    logits[:, 2] = 5.0
    choose = TokenChooser(GenerationSettings(), seed=0, eos_ids=(2,), first_eos=12)
    assert choose(logits, 10).tolist()[2] == 2
    assert 2 not in choose(logits, 10).tolist()[:2]
    assert logits[0, 2] == 5.0  # the caller's logits are not changed
