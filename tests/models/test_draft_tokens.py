"""Which tokens drafts choose among: counted by hand, kept beside a checkpoint, named by the user."""

import json

import numpy as np
import pytest

from lskip.inference import load_generator
from lskip.models.draft_tokens import few_tokens, find_draft_tokens, keep_draft_tokens
from tests.conftest import make_model


def counts_of(**tokens: int) -> np.ndarray:
    counts = np.zeros(10_000, np.int64)
    for token, count in tokens.items():
        counts[int(token[1:])] = count
    return counts


def test_few_tokens_by_hand():
    assert few_tokens(counts_of(t7=5, t3=90, t9=5)) == [3, 7, 9]  # the most frequent first, then by id
    assert few_tokens(counts_of(t7=5)[:8000]) is None  # a small vocabulary
    assert few_tokens(counts_of()) is None
    assert few_tokens(counts_of(t3=999, t7=1)) == [3, 7]  # one of 1000 tokens was new: so may the next be
    assert few_tokens(counts_of(t3=998, t7=1)) is None
    # An eighth, 1250 tokens, must be 999 of 1000: here 1250 of them are said 999,000 times, and one more x times.
    counts = counts_of(**{f"t{token}": 800 for token in range(1250)})
    counts[9000] = 790
    assert len(few_tokens(counts)) == 1250 and 9000 not in few_tokens(counts)
    counts[5000:8000] = 1
    assert few_tokens(counts) is None


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    make_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def ids_of(generator) -> list[int] | None:
    return None if generator.draft_head is None else generator.draft_head.token_ids.tolist()


def test_the_kept_tokens_are_used_unless_the_user_names_others(folder, tiny_tokenizer):
    model = str(folder / "model")
    assert ids_of(load_generator(model)) is None
    keep_draft_tokens(folder / "model", [9, 4])
    assert ids_of(load_generator(model)) == [0, 4, 9]  # 0: the end of a text
    assert ids_of(load_generator(model, draft_tokens="all")) is None
    (folder / "mine.json").write_text("[77]")
    assert ids_of(load_generator(model, draft_tokens=str(folder / "mine.json"))) == [0, 77]
    (folder / "mine.json").write_text(json.dumps(["return a + b", "for i"]))
    expected = {0, *tiny_tokenizer("return a + b")["input_ids"], *tiny_tokenizer("for i")["input_ids"]}
    assert ids_of(load_generator(model, draft_tokens=str(folder / "mine.json"))) == sorted(expected)
    keep_draft_tokens(folder / "model", None)
    assert find_draft_tokens(None, model) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no list of token ids, and none of texts"),
        ("{}", "holds no list of token ids, and none of texts"),
        ('[1, "a"]', "holds no list of token ids, and none of texts"),
        ("[true]", "holds no list of token ids, and none of texts"),
        ('[""]', "holds no list of token ids, and none of texts"),
        ("[1", "is not JSON"),
        ("[300]", "has the token 300, not from 0 to 299"),
        ("[-1]", "has the token -1, not from 0 to 299"),
    ],
)
def test_other_files_are_refused_in_one_sentence(folder, content, message):
    (folder / "mine.json").write_text(content)
    with pytest.raises(ValueError, match=f"^draft_tokens: '.*mine.json' {message}"):
        load_generator(str(folder / "model"), draft_tokens=str(folder / "mine.json"))


def test_a_file_that_is_not_there_and_an_adapter_are_told(folder):
    with pytest.raises(FileNotFoundError, match=r"draft_tokens: there is no file 'gone.json'"):
        load_generator("smollm2", draft_tokens="gone.json")
    (folder / "mine.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"draft_tokens: '.*' is not for the exit_adapter, which"):
        load_generator("smollm2", draft_tokens=str(folder / "mine.json"), exit_adapter="smollm2")
