"""Answers that `lskip adapt` lets the model write: whose they are, and that none is written twice."""

import pytest
import torch

from lskip.adapters.answers import is_held_out
from lskip.adapters.record import record_answers, row_of
from lskip.adapters.row_store import RowStore
from lskip.adapters.states import StateCache
from lskip.inference import TextGenerator
from lskip.inference.prompt_file import Prompt

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
    assert sum(map(len, asked)) == 60 and set(some) < set(rows) and len(rows) == 60
    again, same = record()
    assert sum(map(len, asked)) == 60 and again == rows
    for side, other in zip(states, same, strict=True):
        assert all(torch.equal(a["exit_states"], b["exit_states"]) for a, b in zip(side, other, strict=True))
    deeper = record(exit_layer=3)[0]
    assert sum(map(len, asked)) == 60 and deeper == rows


class Killed(Exception):
    pass


def killed_at(count: int, monkeypatch, part: type, name: str):
    """From here on a method raises when it is called for the last time of `count`."""
    method, calls = getattr(part, name), []

    def killing(*arguments):
        calls.append(1)
        if len(calls) == count:
            raise Killed
        return method(*arguments)

    monkeypatch.setattr(part, name, killing)


@pytest.mark.kind("B25 the same bits after a kill")
@pytest.mark.parametrize(
    ("part", "name", "counts", "left"),
    [
        pytest.param(StateCache, "add", [21], 60, id="B25 within the first group"),
        pytest.param(StateCache, "add", [40, 9], 32, id="within the second group, twice"),
        pytest.param(RowStore, "append", [59], 32, id="between the parts of a row"),
        pytest.param(RowStore, "append", [57], 60, id="before a group counts as answered"),
    ],
)
def test_a_kill_changes_no_bit_and_loses_a_group_at_most(record, asked, monkeypatch, part, name, counts, left):
    whole_rows, whole = record(folder="whole")
    del asked[:]
    for count in counts:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(count, patch, part, name)
            record()
    del asked[:]
    rows, states = record()
    assert rows == whole_rows and sum(map(len, asked)) == left
    for side, other in zip(states, whole, strict=True):
        for row, expected in zip(side, other, strict=True):
            assert row.keys() == expected.keys() and all(torch.equal(row[part], expected[part]) for part in row)


@pytest.mark.kind("B20 B40 told before anything is read")
def test_prompts_of_which_none_is_held_out_are_not_answered(record, asked):
    with pytest.raises(ValueError, match=r"answers: of .* answers within 24 tokens none is held out"):
        record([prompt for prompt in PROMPTS if not is_held_out(prompt.content)])
    assert not asked


def test_prompts_that_do_not_suffice(record):
    with pytest.raises(ValueError, match="answers: of 0 answers within 24 tokens none"):
        record(PROMPTS[60:])
    assert row_of([1, 2], False, [3, 4, 5], 4).token_ids == (1, 2, 3, 4)
