"""The last exit against lm-eval's own Hugging Face model on a task of its kinds; others against a slow reference."""

import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lskip.evaluation.lm_eval.exit_model import ExitModel, ExitScorer
from lskip.inference import TextGenerator
from lskip.models import readout
from lskip.models.decoder import Decoder
from lskip.models.exit_heads import TrainedExits

EXITS = [1, 2, 4]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["a", "\n"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCUMENTS = [
    {
        "question": f"def f{i}(a, b):" + " x = 1;" * (60 if i == 3 else i),  # one is longer than the context
        "choices": ["return a", "+", "print(a, b, 3)", "r"],
        "answer": i % 4,
        "text": f"for i in range({i}):\n    print(i)\n" * (1 if i != 2 else 12),  # as is this
    }
    for i in range(6)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The tasks as lm-eval loads them from a folder of YAML and JSON lines."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    arguments = {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        settings = {"task": name, "dataset_path": "json", "dataset_kwargs": arguments, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return TaskManager(include_path=folder, include_defaults=False).load(list(TASKS))


@pytest.fixture
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def exit_models(model, tiny_tokenizer):
    """Function batch size -> {exit layer: its ExitModel}, all with one scorer."""

    def make(batch_size=3):
        scorer = ExitScorer(Decoder(model), EXITS, batch_size)
        generator = TextGenerator(model, tiny_tokenizer)
        return {exit_layer: ExitModel(exit_layer, scorer, lambda: generator, tiny_tokenizer) for exit_layer in EXITS}

    return make


def logits_at(model, ids, exit_layer):
    """[len(ids), V], by transformers."""
    hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[exit_layer][0]
    return model.lm_head(hidden if exit_layer == 4 else model.model.norm(hidden))  # the last is normed already


@torch.no_grad()
def slow_score(model, context, continuation, exit_layer):
    """Log-likelihood of a continuation token by token, and whether each is the likeliest; 128 tokens of context."""
    total, greedy = 0.0, True
    ids = (context + continuation)[-129:]
    rows = logits_at(model, ids[:-1], exit_layer).log_softmax(-1)
    for place, token in zip(range(len(ids) - 1 - len(continuation), len(ids) - 1), continuation, strict=True):
        total += rows[place, token].item()
        greedy &= rows[place].argmax().item() == token
    return total, greedy


def test_the_last_exit_is_lm_evals_own_model(tasks, model, exit_models, tiny_tokenizer):
    reference = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=1, max_length=128)
    outcomes = [evaluate(lm, tasks, bootstrap_iters=10) for lm in (exit_models()[4], reference)]
    ours, theirs = (
        {name: [sample["resps"] for sample in outcome["samples"][name]] for name in TASKS} for outcome in outcomes
    )
    assert ours["answers"] == theirs["answers"]
    assert len({answers[0][0] for answers in ours["answers"]}) > 2  # they do differ
    for mine, other in zip(ours["rolling"], theirs["rolling"], strict=True):
        assert mine[0][0] == pytest.approx(other[0][0], rel=1e-6)
    for mine, other in zip(ours["choice"], theirs["choice"], strict=True):
        assert [score[0][0] for score in mine] == pytest.approx([score[0][0] for score in other], abs=1e-4)
        assert [score[0][1] for score in mine] == [score[0][1] for score in other]
    for task, metric in (("choice", "acc"), ("choice", "acc_norm"), ("rolling", "word_perplexity")):
        mine, other = (outcome["results"][task][f"{metric},none"] for outcome in outcomes)
        assert mine == pytest.approx(other, rel=1e-4)


@torch.no_grad()
def test_scores_of_every_exit_by_a_slow_reference(model, exit_models):
    random = torch.Generator().manual_seed(2)
    pairs = [
        [torch.randint(0, 300, (length,), generator=random).tolist() for length in lengths]
        for lengths in [(9, 4), (3, 1), (1, 128), (140, 6), (20, 2), (1, 1)]
    ]
    pairs.append([pairs[1][0], [7]])  # shares its text with another: both answers are one token
    for exit_layer in EXITS:
        context = pairs[0][0]
        likeliest = logits_at(model, context, exit_layer)[-1].argmax().item()
        pairs.append([context, [likeliest]])
    for exit_layer, exit_model in exit_models().items():
        found = exit_model._scorer.score(pairs, exit_layer)
        expected = [slow_score(model, *pair, exit_layer) for pair in pairs]
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert {greedy for _, greedy in found} == {True, False}


@torch.no_grad()
def test_exits_with_maps_of_their_own_are_scored_through_them(model):
    trained = TrainedExits(4, 32, heads=True, classifier=False)
    torch.manual_seed(0)
    torch.nn.init.normal_(trained.heads.maps[1].weight)
    context, continuation = [5, 6, 7], [8, 9]
    scorer = ExitScorer(Decoder(model), EXITS, trained=trained)
    hidden = model.model(torch.tensor([[5, 6, 7, 8]]), output_hidden_states=True).hidden_states[2][0]
    rows = model.lm_head(model.model.norm(trained.heads.maps[1](hidden))).log_softmax(-1)
    expected = (rows[2, 8] + rows[3, 9]).item()
    assert scorer.score([(context, continuation)], 2)[0][0] == pytest.approx(expected, rel=1e-4)
    assert slow_score(model, context, continuation, 2)[0] != pytest.approx(expected, rel=1e-2)


def rolling(text):
    return [Instance("loglikelihood_rolling", {}, (text,), 0)]


@torch.no_grad()
def test_a_long_text_is_scored_token_by_token_with_all_the_context_there_is(model, exit_models, tiny_tokenizer):
    text = "def f(a): return a + b\n" * 30
    ids = tiny_tokenizer.encode(text)
    assert len(ids) > 2 * 128 and len(ids) % 128
    for exit_layer, exit_model in exit_models().items():
        total = 0.0
        for start in range(0, len(ids), 128):
            end = min(start + 128, len(ids))
            # The last window reaches back as far as the context does.
            before = ids[max(0, end - 129) : start] if start else [tiny_tokenizer.eos_token_id]
            total += slow_score(model, before, ids[start:end], exit_layer)[0]
        assert exit_model.loglikelihood_rolling(rolling(text)) == pytest.approx([total], rel=1e-5)


@torch.no_grad()
def test_answers_of_an_early_exit_by_a_slow_reference(model, exit_models, tiny_tokenizer):
    contexts = ["def f(a):", "x", "for i in range(3):\n" * 12]
    kwargs = {"until": ["e"], "max_gen_toks": 30}
    found = exit_models()[2].generate_until([Instance("generate_until", {}, (c, kwargs), 0) for c in contexts])
    for context, answer in zip(contexts, found, strict=True):
        ids, written = tiny_tokenizer.encode(context)[-98:], []
        while len(written) < 30 and "e" not in tiny_tokenizer.decode(written):
            token = logits_at(model, ids + written, 2)[-1].argmax().item()
            if token == tiny_tokenizer.eos_token_id:
                break
            written.append(token)
        assert answer == tiny_tokenizer.decode(written).split("e")[0]


def test_one_pass_serves_all_exits(model, exit_models):
    passes = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    models = exit_models(batch_size=1)
    scores = [lm.loglikelihood_rolling(rolling("for i in range(10):")) for lm in models.values()]
    assert len(passes) == 1 and len({score[0] for score in scores}) == 3
    choices = [Instance("loglikelihood", {}, ("x = 1;", answer), 0) for answer in ("a", "b", "c")]
    models[4].loglikelihood(choices)
    assert len(passes) == 2  # answers of one token share theirs


def test_neither_padding_nor_chunks_change_a_score_and_no_chunk_is_larger(model, exit_models, monkeypatch):
    requests = [Instance("loglikelihood", {}, ("def " * i, " return a"), 0) for i in range(9)]
    alone = exit_models(batch_size=1)[2].loglikelihood(requests)
    rows = []
    model.lm_head.register_forward_pre_hook(lambda module, states: rows.append(states[0].shape[:-1].numel()))
    monkeypatch.setattr(readout, "rows_at_once", lambda vocab_size, device: 7)
    together = exit_models(batch_size=9)[2].loglikelihood(requests)
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone], abs=1e-4)
    assert max(rows) == 7 and sum(rows) > 3 * 2 * 7  # several an exit


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"max_gen_toks": 128}, "tasks: answers of up to 128 tokens are asked for, the context is 128"),
        ({"num_beams": 4, "max_gen_toks": 8}, "generation_kwargs: num_beams = 4 is not supported"),
        ({"typical_p": 0.2, "max_gen_toks": 8}, "generation_kwargs: typical_p = 0.2 is not supported"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(exit_models, kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        exit_models()[4].generate_until([Instance("generate_until", {}, ("x", kwargs), 0)])


def test_repeats_of_a_sampled_answer_differ(exit_models):
    kwargs = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    requests = [Instance("generate_until", {}, ("x", kwargs), 0)] * 3
    first, second = (exit_models()[4].generate_until(requests) for _ in range(2))
    assert len(set(first)) == 3 and first == second
