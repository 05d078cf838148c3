"""Choice of tokens: transformers' processors row by row, the right distribution, one argmax where that is enough."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lskip.inference import GenerationSettings, TextGenerator
from lskip.inference.decoding.batch_chooser import BatchChooser
from lskip.inference.decoding.noise import gumbel_noise
from lskip.inference.decoding.sampling import TokenChooser

PROMPT = [7, 42, 99, 3]
EVERYTHING = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4}
NONE = torch.empty(0, dtype=torch.long)


def make_chooser(seed=0, eos_ids=(), prompt=(), **settings):
    return TokenChooser(GenerationSettings(**settings), seed, eos_ids, list(prompt))


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def chi_square_p(counts, probabilities):
    expected = probabilities * counts.sum()
    if counts[expected == 0].sum() > 0:
        return 0.0  # what cannot be has been
    big = expected >= 5
    statistic = ((counts - expected)[big] ** 2 / expected[big]).sum()
    rest, expected_rest = counts[~big].sum(), expected[~big].sum()
    if expected_rest > 0:
        statistic = statistic + (rest - expected_rest) ** 2 / expected_rest
    freedom = torch.tensor(int(big.sum()) - 1 + int(expected_rest > 0), dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))  # the distribution's upper tail


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.7, "top_k": 6}, [TemperatureLogitsWarper(0.7), TopKLogitsWarper(6)]),
        ({"temperature": 1.5, "top_p": 0.8}, [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.8)]),
        ({"temperature": 1.5, "min_p": 0.1}, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.1)]),
    ],
)
def test_sampled_tokens_follow_the_processed_distribution(settings, warpers):
    logits = random_logits(1, 12, seed=5)
    probabilities = LogitsProcessorList(warpers)(None, logits.clone()).softmax(-1)[0].double()
    draws = torch.cat(
        [make_chooser(1, prompt=[0] * position, **settings).sample(logits, NONE) for position in range(2500)]
    )
    assert chi_square_p(torch.bincount(draws, minlength=12).double(), probabilities) > 1e-4


def test_sampling_is_argmax_with_the_noise_of_the_absolute_position():
    logits, drafted = random_logits(3, 50), torch.tensor([4, 5])
    chooser = make_chooser(9, prompt=PROMPT, temperature=1.0)
    for _ in range(2):
        own = [(row + gumbel_noise(9, len(chooser.text) + j, 50)).argmax() for j, row in enumerate(logits)]
        assert chooser.sample(logits, drafted).tolist() == own
        # A draft's row stands where the drafted tokens end.
        assert chooser.sample(logits[2:], drafted).tolist() == own[2:]
        assert chooser.sample(logits[1:], drafted).tolist() == own[1:]
        chooser.text.append(1)


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.4}, {"repetition_penalty": 0.8}, EVERYTHING])
def test_every_row_is_processed_with_its_own_prefix(settings):
    """The reference runs transformers' processors on one unpadded row at a time."""
    processors = [RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])]
    if "temperature" in settings:
        processors += [TemperatureLogitsWarper(0.7), TopKLogitsWarper(9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)]
    chooser, text = make_chooser(prompt=[3, 3, 8], **settings), [3, 3, 8]
    for new in ([], [11, 2], [5]):  # the text grows between rounds
        chooser.text += new
        text += new
        logits, drafted = random_logits(4, 20, seed=len(text)), [7, 0, 14]
        for first in (0, 3):  # all rows of a verification, or a draft's last one alone
            ours = chooser.scores(logits[first:], torch.tensor(drafted))
            for row in range(first, 4):
                prefix = torch.tensor([text + drafted[:row]])
                truth = LogitsProcessorList(processors)(prefix, logits[row : row + 1].clone())
                assert torch.equal(ours[row - first], truth[0])


def test_scores_equal_those_of_generate(tiny_model):
    """The order of processors and min_new_tokens are those of transformers' generate for the same logits."""
    model = tiny_model("llama", eos_token_id=5)
    torch.manual_seed(0)
    theirs = model.generate(
        torch.tensor([PROMPT]), do_sample=True, min_new_tokens=3, max_new_tokens=6, output_scores=True,
        output_logits=True, return_dict_in_generate=True, eos_token_id=5, pad_token_id=0, **EVERYTHING,
    )  # fmt: skip
    chooser = make_chooser(eos_ids=(5,), prompt=PROMPT, min_new_tokens=3, **EVERYTHING)
    emitted = theirs.sequences[0, len(PROMPT) :].tolist()
    assert len(emitted) > 3
    for logits, scores, token in zip(theirs.logits, theirs.scores, emitted, strict=True):
        torch.testing.assert_close(chooser.scores(logits, NONE), scores)
        chooser.text.append(token)
    rows = torch.cat(theirs.logits)  # the same in one verification
    chooser = make_chooser(eos_ids=(5,), prompt=PROMPT, min_new_tokens=3, **EVERYTHING)
    torch.testing.assert_close(chooser.scores(rows, torch.tensor(emitted[:-1])), torch.cat(theirs.scores))


def test_greedy_with_a_repetition_penalty_equals_generate(tiny_model):
    model = tiny_model("llama", eos_token_id=None)
    theirs = model.generate(
        torch.tensor([PROMPT]), do_sample=False, repetition_penalty=1.5, max_new_tokens=12, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    emitted = theirs.sequences[0, len(PROMPT) :]
    chooser = make_chooser(prompt=PROMPT, repetition_penalty=1.5)
    assert torch.equal(chooser.sample(torch.cat(theirs.logits), emitted[:-1]), emitted)
    assert not torch.equal(torch.cat(theirs.logits).argmax(-1), emitted)  # the penalty did something


def test_agreement_worked_by_hand():
    """There are slots that keep none, some with a later match by chance, and all."""
    own = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    drafted = torch.tensor([[9, 2, 3], [1, 9, 3], [1, 2, 3]])
    logits = torch.nn.functional.one_hot(own, 10).float()
    for settings in ({}, {"repetition_penalty": 1.0001}):  # all slots at once, and one by one
        accepted, tokens = BatchChooser([make_chooser(**settings) for _ in own]).verify(logits, drafted)
        assert accepted.tolist() == [0, 1, 3]
        assert tokens.tolist() == [1, 2, 4]
    accepted, tokens = BatchChooser([make_chooser()] * 3).verify(logits[:, :1], drafted[:, :0])
    assert (accepted.tolist(), tokens.tolist()) == ([0, 0, 0], [1, 1, 1])


@pytest.mark.parametrize("acceptance", ["shared_noise", "rejection"])
def test_a_slot_does_not_depend_on_its_neighbours(acceptance):
    draft, model = random_logits(4, 2, 1, 12), random_logits(4, 3, 12, seed=1)

    def run(slots):
        choosers = [make_chooser(slot, prompt=[1] * slot, acceptance=acceptance, **EVERYTHING) for slot in slots]
        batch, drafted = BatchChooser(choosers), torch.empty(len(slots), 0, dtype=torch.long)
        for step in range(2):
            ids = batch.sample(draft[slots, step], drafted)
            drafted = torch.cat([drafted, ids[:, None]], 1)
        return torch.stack([*drafted.T, *batch.verify(model[slots], drafted)]).T.tolist()

    assert run([0, 1, 2, 3]) == [run([slot])[0] for slot in range(4)]
    assert run([3, 1]) == [run([3])[0], run([1])[0]]


class Operations(TorchDispatchMode):
    """Record of the names of the tensor operations that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_greedy_is_one_argmax_whatever_the_number_of_slots():
    operations = []
    for slots in (2, 16):
        chooser = make_chooser(eos_ids=(0,), prompt=PROMPT, min_new_tokens=2)
        chooser.text += [1, 1]  # end tokens are allowed by now
        batch = BatchChooser([chooser] * slots)
        with Operations() as seen:
            batch.sample(random_logits(slots, 1, 8), torch.zeros(slots, 1, dtype=torch.long))
            batch.verify(random_logits(slots, 3, 8), torch.zeros(slots, 2, dtype=torch.long))
        operations.append(seen.names)
    assert operations[0] == operations[1]
    assert operations[0].count("argmax") == 2


@pytest.mark.parametrize("settings", [{}, EVERYTHING, {**EVERYTHING, "acceptance": "rejection"}])
@pytest.mark.parametrize("drafts", [True, False])
def test_nothing_waits_for_the_device(settings, drafts):
    """Meta tensors have no values, so that any read of one fails."""
    choosers = [make_chooser(slot, (2,), PROMPT, min_new_tokens=slot, **settings) for slot in range(3)]
    batch = BatchChooser(choosers)
    drafted = torch.empty(3, 0, dtype=torch.long, device="meta")
    for _ in range(2):
        ids = torch.empty(3, dtype=torch.long, device="meta")
        if drafts:
            ids = batch.sample(torch.empty(3, 1, 120, device="meta"), drafted)
        drafted = torch.cat([drafted, ids[:, None]], 1)
    accepted, own = batch.verify(torch.empty(3, 3, 120, device="meta"), drafted)
    assert accepted.shape == own.shape == (3,)
    assert accepted.device.type == own.device.type == "meta"


def test_noise_of_past_positions_is_freed():
    chooser = make_chooser(prompt=PROMPT, temperature=1.0)
    for _ in range(50):
        chooser.sample(random_logits(3, 20), torch.tensor([1, 1]))
        chooser.text += [1, 2]
        assert len(chooser._noise) <= 3


def test_end_tokens_are_banned_until_min_new_tokens():
    logits = torch.zeros(1, 3, 4)
    logits[..., 2] = 5.0
    for settings in ({}, {"temperature": 0.2}, {"temperature": 0.2, "acceptance": "rejection"}):
        chooser = make_chooser(eos_ids=(2,), prompt=[1] * 8, min_new_tokens=4, **settings)
        chooser.text += [1, 1]
        tokens = chooser.sample(logits[0], torch.tensor([0, 0])).tolist()
        assert 2 not in tokens[:2] and tokens[2] == 2
        assert logits[0, 0, 2] == 5.0  # the caller's logits are not changed
        for drafted, allowed in ((2, True), (1, False)):
            zeros = torch.zeros(1, drafted, dtype=torch.long)
            assert (BatchChooser([chooser]).sample(logits[:, :1].clone(), zeros).tolist() == [2]) is allowed


@pytest.mark.parametrize("acceptance", ["shared_noise", "rejection"])
def test_generated_text_follows_the_exact_joint_distribution(tiny_model, acceptance):
    """The first three tokens are compared with enumeration; the draft is far from the model."""
    model = tiny_model("llama", vocab_size=5, initializer_range=0.5, eos_token_id=None)
    prefixes = torch.cartesian_prod(torch.tensor([1]), torch.tensor([2]), torch.arange(5), torch.arange(5))
    with torch.inference_mode():
        first, second, third = model(prefixes).logits[:, 1:].softmax(-1).double().view(5, 5, 3, 5).unbind(2)
    joint = (first[0, 0][:, None, None] * second[:, 0, :, None] * third).flatten()
    generator, counts = TextGenerator(model), torch.zeros(125).double()
    drafted = accepted = 0
    for seed in range(400):
        ours = generator.generate(
            [1, 2],
            max_new_tokens=3,
            temperature=1.0,
            seed=seed,
            exit_layer=1,
            num_speculations=2,
            acceptance=acceptance,
        )
        a, b, c = ours.token_ids
        counts[(a * 5 + b) * 5 + c] += 1
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
