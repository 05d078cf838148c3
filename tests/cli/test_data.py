"""`lskip data`: what it prints of rows is what a run trains on."""

import json
import re

import pytest

from lskip.cli import main
from lskip.cli.data import mask_of, rows_of
from lskip.data import TextData
from tests.data.test_datamodule import write_jsonl

PAIRS = [{"prompt": f"{i}+1=\n", "completion": f"<{i + 1}>" * (1 + i % 3)} for i in range(60)]
TEXTS = [{"text": f"def f{i}(x): return x + {i}\n"} for i in range(60)]


@pytest.fixture
def show(tmp_path, tiny_tokenizer, capsys):
    """Return a function (rows, **options) -> (what `lskip data` prints, the data module of the same options)."""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")

    def printed(rows: list[dict], **options) -> tuple[str, TextData]:
        same = {"source": write_jsonl(tmp_path / "rows.jsonl", rows), "tokenizer": str(tmp_path / "tokenizer")}
        same |= {"block_size": 64, "batch_size": 4, "cache_dir": str(tmp_path / "cache"), **options}
        shown = {name: same.pop(name) for name in ("split", "show") if name in same}
        capsys.readouterr()
        given = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in {**same, **shown}.items()
        }
        assert main(["data", *(f"--{name}={value}" for name, value in given.items())]) == 0
        return capsys.readouterr().out, TextData(**same)

    return printed


def lines_of(out: str, row: int) -> list[str]:
    """Return the lines of a row's documents."""
    return re.split(r"\n\n", out)[1 + row].split("\n")[1:]


@pytest.mark.parametrize("pack", [False, True])
def test_pairs_with_what_is_scored_of_them(show, pack):
    out, data = show(PAIRS, pack=pack, show=2)
    batch = next(iter(data.train_dataloader()))
    for row in (0, 1):
        documents = [line for line in lines_of(out, row) if "padding" not in line]
        ends = int(
            (batch["input_ids"][row] == data.tokenizer.eos_token_id).logical_and(batch["labels"][row] != -100).sum()
        )
        assert len(documents) == ends and (ends > 1) == pack
        for line in documents:
            last, number, answer = re.fullmatch(
                r"  positions 0 to (\d+): (\d+)\+1=⏎«(.*)<\|endoftext\|>»", line
            ).groups()
            assert answer == f"<{int(number) + 1}>" * (1 + int(number) % 3)
            assert int(last) == len(data.tokenizer(f"{number}+1=\n{answer}").input_ids)  # and the end of the text


def test_the_numbers_are_those_of_the_batches(show):
    out, data = show(PAIRS, show=0)
    batches = list(data.train_dataloader())
    # A pair is as long as up to its last scored token; what of a batch lies behind is padding.
    tokens = sum(int((row != -100).nonzero().max()) + 1 for batch in batches for row in batch["labels"])
    scored = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    computed = sum(batch["input_ids"].numel() for batch in batches)
    said = (
        f"{tokens:,} tokens, {scored / tokens:.0%} of them scored, {computed / tokens:.2f} positions computed for each"
    )
    assert out.count("\n") == 1 and f"train: {len(data.blocks('train'))} rows; " in out and said in out


def test_validation_in_its_order(show):
    out, data = show(PAIRS, split="val", show=1, val_fraction=0.3)
    first = data.documents("val")[0]
    assert f"{first['prompt'][:-1]}⏎«{first['completion']}" in out


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_texts_joined_and_apart(show, documents):
    out, data = show(TEXTS, documents=documents, show=1, block_size=40)
    row = next(rows_of(data.train_dataloader()))
    ends = int((row.ids[:-1] == data.tokenizer.eos_token_id).sum())  # before another document begins
    assert len(lines_of(out, 0)) == len(row.starts) == (1 if documents == "joined" else 1 + ends) and ends
    scored = [re.fullmatch(r"  positions 0 to \d+: (.*)«.*»", line)[1] for line in lines_of(out, 0)]
    assert [bool(context) for context in scored] == [documents == "separate"] * len(scored)  # a first token is not


def test_the_mask_is_what_attention_reads(show):
    """Against a definition of its own: a position reads those before it back to its document's first."""
    _, data = show(TEXTS, documents="separate", block_size=24)
    row = next(rows_of(data.train_dataloader()))
    places = next(iter(data.train_dataloader()))["position_ids"][0].tolist()
    expected = ["".join("██" if at - places[at] <= key <= at else "··" for key in range(24)) for at in range(24)]
    assert mask_of(row).split("\n") == expected and len(row.starts) > 1


def test_what_is_refused(tmp_path, capsys):
    for option, field in {"--show=-1": "show", "--split=all": "split", "--block_size=0": "block_size"}.items():
        assert main(["data", "--source=home_assistant", f"--cache_dir={tmp_path}", option]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("lskip data: error: ") and field in line
