"""What an exit adapter is trained on: rows from answers, their split, and the states on disk."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lskip.adapters import states as adapter_states
from lskip.adapters.answers import frequent_words, is_held_out, read_answers
from lskip.adapters.row_store import INDEX, INDEX_FILE, SUMS_FILE
from lskip.adapters.states import AnswerData, StateCache


def answer_states(model, rows, exit_layer, folder):
    with StateCache(model, exit_layer, folder) as cache:
        return cache.states(rows)


@pytest.fixture
def rows(answers_file, tiny_tokenizer):
    """Function model -> rows of 120 answers, some held out."""
    return lambda model: read_answers([answers_file], model, tiny_tokenizer, 40)


def test_rows_are_prompt_and_answer(tmp_path, tiny_model, tiny_tokenizer):
    text = "return a"
    messages = [{"role": "user", "content": "x"}]
    lines = [
        {"prompt": f"def f{i}(x):", "text": text, "finish_reason": reason}
        for i in range(60)
        for reason in ("eos", "length")
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [*lines, lines[0]]))
    rows = read_answers([path, path], tiny_model(), tiny_tokenizer, 64)
    assert len(rows) == 120  # each once
    encode = lambda text: tiny_tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    told = {(row.token_ids, row.prompt_length): row.held_out for row in rows}
    for i in range(60):
        prompt = encode(f"def f{i}(x):")
        for answer in (encode(text), [*encode(text), 0]):
            assert told[(*prompt, *answer), len(prompt)] == is_held_out(f"def f{i}(x):")
    cut = read_answers([path], tiny_model(), tiny_tokenizer, 12)
    assert max(len(row.token_ids) for row in cut) == 12
    with pytest.raises(ValueError, match=r"line 1 of .* need a tokenizer with a chat template"):
        path.write_text(json.dumps({"messages": messages, "text": text}))
        read_answers([path], tiny_model(), tiny_tokenizer, 64)


def test_prompts_are_encoded_as_the_model_was_given_them(tmp_path, tiny_model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "User: {{ messages[0].content }}"
    lines = [{"prompt": f"def f{i}(x):", "text": "return x"} for i in range(60)]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    for chat, before in ((None, "User: "), (True, "User: "), (False, "")):
        rows = read_answers([path], tiny_model(), tokenizer, 64, chat)
        prompts = {tokenizer.decode(row.token_ids[: row.prompt_length]) for row in rows}
        assert prompts == {f"{before}{line['prompt']}" for line in lines}


def test_three_in_a_hundred_prompts_are_held_out():
    share = sum(is_held_out(f"prompt {i}") for i in range(20000)) / 20000
    assert 0.025 < share < 0.035
    assert is_held_out([{"role": "user", "content": "a"}]) == is_held_out([{"content": "a", "role": "user"}])


@pytest.mark.kind("K12 which files are read, and as what")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "answers: line 1 of .* is not JSON"),
        ('{"prompt": "x"}', "line 1 of .*: text: is missing"),
        ('{"prompt": 5, "text": "x"}', "line 1 of .*: prompt: 5 is not a text"),
        ('{"text": "x"}', "line 1 of .*: needs either the key 'prompt'"),
        ('{"messages": [{"role": "user", "content": "x"}], "text": "y"}', "line 1 of .*: prompt: chat messages need"),
        ('{"prompt": "x", "text": "\\ud83d"}', r"line 1 of .*: text: holds .\\ud83d., half a character"),
        ('{"prompt": "x", "text": "y", "seed": ' + "9" * 5000 + "}", "line 1 of .*Exceeds the limit"),
        ('{"prompt": "x", "text": ""}', "of 0 answers within 40 tokens none"),
        ('{"prompt": "x", "text": "y"}', "of 1 answers within 40 tokens none is held out"),
    ],
)
def test_files_that_are_no_answers(tmp_path, tiny_model, tiny_tokenizer, content, message):
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_answers([tmp_path / "answers.jsonl"], tiny_model(), tiny_tokenizer, 40)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text"])
def test_states_on_disk_are_the_models_own(tmp_path, tiny_model, rows, family):
    """Against transformers' hidden states of each row alone."""
    model = tiny_model(family)
    wanted = rows(model)
    train, held_out = answer_states(model, wanted, 3, tmp_path / "cache")
    for states, side in ((train, False), (held_out, True)):
        picked = [row for row in wanted if row.held_out == side]
        assert len(states) == len(picked) > 0
        for row, kept in list(zip(picked, states, strict=True))[:: 1 if side else 20]:
            with torch.no_grad():
                output = model(torch.tensor([row.token_ids]), output_hidden_states=True)
            assert kept["token_ids"].tolist() == list(row.token_ids)
            torch.testing.assert_close(kept["exit_states"].float(), output.hidden_states[3][0], rtol=0.01, atol=0.01)
            torch.testing.assert_close(kept["last_states"].float(), output.hidden_states[-1][0], rtol=0.01, atol=0.01)
            scored = kept["scored"].nonzero().flatten().tolist()
            assert scored == list(range(row.prompt_length - 1, len(row.token_ids) - 1))
            assert ("choices" in kept) == side
            if side:
                logits = output.logits[0]
                chosen = logits[scored].gather(1, kept["choices"][scored][:, None].long()).squeeze(1)
                assert (logits[scored].max(-1).values - chosen < 0.1).all()  # but for the rounding of states
                assert (kept["choices"] >= 0).sum() == len(scored)


@pytest.fixture
def computed(monkeypatch):
    """(row, blocks) of all that the model runs on from here on."""
    seen, compute = [], adapter_states._states_of

    def counted(batch, decoder, exit_layer, depth):
        seen.extend((row, depth) for row in batch)
        return compute(batch, decoder, exit_layer, depth)

    monkeypatch.setattr(adapter_states, "_states_of", counted)
    return seen


def assert_equal(found, expected):
    """Of two pairs of AnswerStates."""
    for states, others in zip(found, expected, strict=True):
        for row, other in zip(states, others, strict=True):
            assert row.keys() == other.keys()
            assert all(torch.equal(row[name], part) for name, part in other.items())


def test_a_killed_computation_goes_on(tmp_path, tiny_model, rows, computed):
    model = tiny_model()
    wanted = rows(model)
    whole = answer_states(model, wanted, 2, tmp_path / "whole")
    assert computed == [(row, 4) for row in sorted(wanted, key=lambda row: row.held_out)]
    answer_states(model, wanted, 2, tmp_path / "part")
    early, last = (next((tmp_path / "part").iterdir()) / "train" / part for part in ("exit_2", "last"))
    with (last / INDEX_FILE).open("r+b") as file:  # killed in the midst of writing the 9th batch of 8 rows
        file.truncate(64 * INDEX.itemsize + 3)
    with (early / INDEX_FILE).open("r+b") as file:
        file.truncate(72 * INDEX.itemsize)
    for folder in (early, last):
        for path in folder.glob("*states.bin"):
            path.write_bytes(path.read_bytes()[:-1000] + b"half a row")
    # Only the index tells what is whole: the files are ahead of it.
    del computed[:]
    again = answer_states(model, wanted, 2, tmp_path / "part")
    train = [row for row in wanted if not row.held_out]
    assert computed == [(row, 4) for row in train[64:]]
    assert_equal(again, whole)


def test_only_what_is_new_is_computed(tmp_path, tiny_model, rows, computed):
    """More answers in another order, another exit, another model."""
    model = tiny_model()
    wanted = rows(model)
    some = [row for row in wanted if row.held_out] + wanted[10:60:2]
    answer_states(model, some, 2, tmp_path)
    del computed[:]
    more = answer_states(model, wanted, 2, tmp_path)
    assert {row for row, _ in computed} == set(wanted) - set(some) and {depth for _, depth in computed} == {4}
    del computed[:]
    deeper = answer_states(model, wanted[::-1], 3, tmp_path)
    assert {row for row, _ in computed} == set(wanted) and {depth for _, depth in computed} == {3}
    del computed[:]
    assert_equal(answer_states(model, wanted, 2, tmp_path), more)
    assert not computed
    whole = answer_states(model, wanted[::-1], 3, tmp_path / "other")
    for states, others in zip(deeper, whole, strict=True):  # batches were others: equal but for rounding
        for row, other in zip(states, others, strict=True):
            torch.testing.assert_close(row["exit_states"], other["exit_states"], rtol=0.02, atol=0.02)
    del computed[:]
    answer_states(tiny_model(seed=1), wanted, 2, tmp_path)
    assert len(computed) == len(wanted)


def test_greedy_answers_are_told_from_others(tmp_path, tiny_model, rows):
    model = tiny_model()
    read = [row for row in rows(model) if row.held_out]
    chains = []
    for row in read:
        ids = torch.tensor([row.token_ids[: row.prompt_length]])
        said = model.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0)[0].tolist()
        chains.append(replace(row, token_ids=tuple(said)))
    other = replace(chains[0], token_ids=(*chains[0].token_ids[:-1], (chains[0].token_ids[-1] + 1) % 300))
    train = [row for row in rows(model) if not row.held_out][:8]
    _, held_out = answer_states(model, [*train, *chains, other], 2, tmp_path)
    assert held_out.greedy().tolist() == [True] * len(chains) + [False]
    data = AnswerData(held_out, held_out, batch_size=50, val_answers=50, seed=0)
    (batch,) = data.held_out_loader()
    assert len(batch["token_ids"]) == len(chains)


def test_words_are_the_most_frequent_ones(tiny_model, tiny_tokenizer, rows):
    model = tiny_model()
    words = frequent_words(rows(model), 10, model, tiny_tokenizer).tolist()
    counts = torch.zeros(300)
    for row in rows(model):
        if not row.held_out:
            counts += torch.bincount(torch.tensor(row.token_ids[row.prompt_length :]), minlength=300)
    assert words == sorted(words) and 0 in words and len(words) == 10
    left_out = counts.clone()
    left_out[words] = 0
    assert left_out.max() <= counts[[word for word in words if word]].min()


def flip(path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def cut(path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def index_of(path, tokens: int) -> None:
    index = np.frombuffer((path / INDEX_FILE).read_bytes(), INDEX).copy()
    index["tokens"][20] = tokens
    (path / INDEX_FILE).write_bytes(index.tobytes())


def add_garbage(path) -> None:
    with path.open("ab") as file:
        file.write(bytes(range(256)) * 5)


DAMAGE = {
    "B18 states cut": (lambda folder: cut(folder / "last_states.bin", 40_000), False),
    "a part of the states gone": (lambda folder: (folder / "last_states.bin").unlink(), False),
    "states garbled": (lambda folder: flip(folder / "last_states.bin", 9_000), True),
    "index cut": (lambda folder: cut(folder / INDEX_FILE, 30 * INDEX.itemsize + 5), False),
    "index gone": (lambda folder: (folder / INDEX_FILE).unlink(), False),
    "garbage behind the index": (lambda folder: add_garbage(folder / INDEX_FILE), False),
    "a length below 0": (lambda folder: index_of(folder, -5), False),
    "a length of a lifetime": (lambda folder: index_of(folder, 2**62), False),
    "another length": (lambda folder: index_of(folder, 3), True),
    "checksums gone": (lambda folder: (folder / SUMS_FILE).unlink(), False),
    "a checksum garbled": (lambda folder: flip(folder / SUMS_FILE, 40), True),
}


@pytest.mark.kind("B18 damaged caches and files")
@pytest.mark.parametrize(("damage", "warned"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_states_are_computed_again(tmp_path, tiny_model, rows, capsys, damage, warned):
    model = tiny_model()
    wanted = rows(model)
    whole = answer_states(model, wanted, 2, tmp_path / "whole")
    answer_states(model, wanted, 2, tmp_path / "part")
    damage(next((tmp_path / "part").iterdir()) / "train" / "last")
    again = answer_states(model, wanted, 2, tmp_path / "part")
    assert ("are damaged, and computed again" in capsys.readouterr().err) == warned
    for states, others in zip(again, whole, strict=True):  # in other batches: equal but for rounding
        for row, other in zip(states, others, strict=True):
            torch.testing.assert_close(row["last_states"], other["last_states"], rtol=0.02, atol=0.02)
    assert_equal(answer_states(model, wanted, 2, tmp_path / "part"), again)
    assert not capsys.readouterr().err.count("damaged")
