"""Answers that `lskip adapt` lets the model write: whose they are, and that none is written twice."""

import pytest
import torch

from lskip.adapter_answers import is_held_out
from lskip.adapter_recording import record_answers, row_of
from lskip.adapter_states import StateCache
from lskip.inference import TextGenerator
from lskip.prompt_file import Prompt

PROMPTS = [Prompt(i, {"prompt": f"def f{i}(a, b):"}) for i in range(60)] + [Prompt(60, {"prompt": "x = 1\n" * 50})]


@pytest.fixture
def record(tiny_model, tiny_tokenizer, tmp_path):
    """Function (prompts, exit_layer) -> rows and states."""
    model = tiny_model()

    def call(prompts=PROMPTS, exit_layer=2, folder="cache"):
        with StateCache(model, exit_layer, tmp_path / folder) as cache:
            rows = record_answers(cache, model, tiny_tokenizer, prompts, 24, 16, batch_size=7)
            return rows, cache.states(rows)

    call.model = model
    return call


@pytest.fixture
def asked(monkeypatch):
    """The prompts of each batch that a generator is given from here on."""
    batches, generate = [], TextGenerator.generate_batch
    monkeypatch.setattr(
        TextGenerator, "generate_batch", lambda self, ids, *a, **k: batches.append(ids) or generate(self, ids, *a, **k)
    )
    return batches


def test_answers_are_the_models_own(record, tiny_tokenizer, tmp_path, monkeypatch):
    rows, states = record()
    assert len(rows) == 60 and any(row.held_out for row in rows)  # the long prompt leaves no room
    assert [len(row.token_ids) for row in rows] == sorted(len(row.token_ids) for row in rows)
    generator = TextGenerator(record.model, tiny_tokenizer)
    told = {row.token_ids for row in rows}
    for prompt in PROMPTS[:60]:
        ids = tiny_tokenizer(prompt.content)["input_ids"]
        assert tuple([*ids, *generator.generate(ids, max_new_tokens=16).token_ids][:24]) in told
    with StateCache(record.model, 2, tmp_path / "other") as cache:
        computed = cache.states(rows)
    for side, other in zip(states, computed, strict=True):
        for row, expected in zip(side, other, strict=True):
            scored = expected["scored"]
            assert row.keys() == expected.keys() and torch.equal(row["scored"], scored)
            for name in ("exit_states", "last_states"):
                torch.testing.assert_close(row[name][scored], expected[name][scored], rtol=0.02, atol=0.02)
    assert states[1].greedy().all()


def test_no_answer_is_written_twice(record, asked, monkeypatch):
    first = [prompt for index, prompt in enumerate(PROMPTS[:60]) if index % 2 or is_held_out(prompt.content)]
    some = record(first)[0]
    rows, states = record()
    assert len(asked[1]) == 60 - len(some) and set(some) < set(rows) and len(rows) == 60
    again, same = record()
    assert len(asked) == 2 and again == rows
    for side, other in zip(states, same, strict=True):
        assert all(torch.equal(a["exit_states"], b["exit_states"]) for a, b in zip(side, other, strict=True))
    deeper = record(exit_layer=3)[0]
    assert len(asked) == 2 and deeper == rows


def test_a_kill_loses_what_was_under_way(record, asked, monkeypatch):
    class Killed(Exception):
        pass

    add, added = StateCache.add, []

    def killing(cache, row, *states):
        if len(added) == 20:
            raise Killed
        added.append(row)
        add(cache, row, *states)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StateCache, "add", killing)
        record()
    rows, _ = record()
    assert len(asked[1]) == 40 and set(added) <= set(rows) and len(rows) == 60
    assert rows == record(folder="other")[0]


def test_prompts_that_do_not_suffice(record):
    with pytest.raises(ValueError, match="answers: of 0 answers within 24 tokens none"):
        record(PROMPTS[60:])
    assert row_of([1, 2], False, [3, 4, 5], 4).token_ids == (1, 2, 3, 4)
