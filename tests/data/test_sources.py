"""Sources that TextData reads, and those that it refuses."""

import json

import pytest
from datasets import Dataset

from lskip.data import TextData
from lskip.data.corpora import installed_package_files, read_texts, standard_library_files
from lskip.data.sources import open_source
from tests.data.test_datamodule import data_maker, split_by_hand, texts


@pytest.fixture
def text_data(tmp_path, tiny_tokenizer):
    return data_maker(tmp_path, tiny_tokenizer)


# Sources


def test_each_kind_of_file_gives_the_same_documents(text_data, tmp_path):
    expected = set(text_data().documents("val")["text"])
    table = Dataset.from_dict({"text": texts()})
    table.to_parquet(tmp_path / "corpus.parquet")
    (tmp_path / "corpus.json").write_text(json.dumps([{"text": text} for text in texts()]))
    for folder, suffix in (("tables", "jsonl"), ("sources", "py")):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for i, text in enumerate(texts()):
            content = json.dumps({"text": text}) + "\n" if suffix == "jsonl" else text
            (tmp_path / folder / ("deep" if i % 2 else ".") / f"{i}.{suffix}").write_text(content)
    (tmp_path / "tables" / "README.md").write_text("what this is")
    (tmp_path / "sources" / "sample.jsonl").write_text('{"text": "a sample"}')
    (tmp_path / "sources" / ".hidden.py").write_text("hidden")
    (tmp_path / "sources" / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "sources" / "old.py").write_bytes("# caf\u00e9".encode("latin-1"))
    for name in ("corpus.parquet", "corpus.json"):
        assert set(text_data(source=str(tmp_path / name)).documents("val")["text"]) == expected, name
    for name, left_out in (("tables", "README.md"), ("sources", "sample.jsonl")):
        with pytest.warns(UserWarning, match=f"1 files left out, such as {left_out}"):
            data = text_data(source=str(tmp_path / name))
            data.setup("validate")
        assert set(data.documents("val")["text"]) == expected, name


def test_a_long_txt_is_many_documents(text_data, tmp_path):
    book = "\n\n".join(f"Paragraph {i}: " + "word " * 300 for i in range(200))
    (tmp_path / "book.txt").write_text(book)
    pieces = [row["text"] for row in read_texts([str(tmp_path / "book.txt")])]
    assert "".join(pieces) == book and all(4000 <= len(piece) < 6000 for piece in pieces[:-1])
    data = text_data(source=str(tmp_path / "book.txt"))
    assert sum(len(data.documents(split)) for split in ("train", "val", "test")) == len(pieces)


def test_a_named_column(text_data):
    rows = [{"content": text, "messages": "?"} for text in texts()]
    assert set(text_data(rows, text_column="content").documents("val")["text"]) == {
        text for text in texts() if split_by_hand(text) == "val"
    }


def test_the_embedded_corpora():
    files = standard_library_files()
    parts = {part for file in files for part in file.parts[-3:-1]}
    assert not parts & {"site-packages", "test", "tests"}
    assert 8e6 < sum(file.stat().st_size for file in files) < 20e6
    assert {"json", "asyncio"} <= parts and any("torch" in file.parts for file in installed_package_files())


def test_a_hub_name_goes_to_load_dataset(text_data, monkeypatch):
    asked = []

    def hub(path, **arguments):
        asked.append((path, arguments["name"], arguments["split"]))
        return Dataset.from_dict({"text": texts()})

    monkeypatch.setattr("lskip.data.sources.load_dataset", hub)
    monkeypatch.setattr("lskip.data.sources.hub_lacks", lambda name, kind: None)
    for source in ("org/name", "org/name:config", "name:config:validation", "name::validation"):
        assert len(text_data(source=source).documents("val")) > 0
    assert asked == [
        ("org/name", None, "train"),
        ("org/name", "config", "train"),
        ("name", "config", "validation"),
        ("name", None, "validation"),
    ]


# Bad input


@pytest.mark.kind("B20 B40 told before anything is read", "B20", "B41", "B47")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 2**70}, "seed: 1180591620717411303424 is not a whole number from 0 to 9223372036854775807"),
        ({"num_workers": 5000}, "num_workers: 5000 is not a whole number from 0 to 128"),
        ({"block_size": 2**40}, "block_size: 1099511627776 is not a whole number from 2 to 16777216"),
        ({"batch_size": 2**40}, "batch_size: 1099511627776"),
        ({"vocab_size": 2**40}, "vocab_size: 1099511627776"),
        ({"val_fraction": float("nan")}, r"val_fraction: nan is not a number from 0 and below 1"),
        ({"test_fraction": float("inf")}, "test_fraction: inf"),
        ({"val_fraction": -0.0001}, "val_fraction: -0.0001"),
        ({"val_fraction": True}, "val_fraction: True"),
        ({"text_column": 5}, "text_column: 5 is no column's name"),
        ({"text_column": ""}, "text_column: ''"),
        ({"cache_dir": 5}, "cache_dir: 5"),
        ({"cache_dir": "/dev/null/cache"}, "cache_dir: cannot write '/dev/null/cache'"),
        ({"tokenizer": 5}, "tokenizer: 5 is neither"),
        ({"tokenizer": " "}, "tokenizer: ' '"),
        ({"source": "a\0b"}, "source: 'a.x00b' names no text"),
        ({"source": "x" * 5000}, "source: 'xxx.* is no path here .File name too long"),
        ({"source": ""}, "source"),
        ({"source": 3}, "source: 3"),
        ({"block_size": 1}, "block_size: 1 is not a whole number from 2 to 16777216"),
        ({"block_size": 16.5}, "block_size: 16.5"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": True}, "batch_size: True"),
        ({"vocab_size": 256}, "vocab_size: 256"),
        ({"num_workers": -1}, "num_workers: -1"),
        ({"seed": -1}, "seed: -1"),
        ({"val_fraction": 1.0}, "val_fraction: 1.0"),
        ({"val_fraction": "a"}, "val_fraction: 'a'"),
        ({"test_fraction": -0.1}, "test_fraction: -0.1"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "nothing to train on"),
        ({"max_val_blocks": 0}, "max_val_blocks: 0"),
        ({"streaming": True, "max_val_blocks": None}, "max_val_blocks"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message) as refused:
        TextData(**arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("source", ["nothing.jsonl", "./nothing", "/no/where", "~/nothing-here", "a/b/c", "a/b.txt"])
def test_a_missing_path_is_no_hub_lookup(source, monkeypatch):
    monkeypatch.setattr("lskip.data.sources.load_dataset", None)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        TextData(source=source)


@pytest.mark.parametrize(
    ("source", "meant"),
    [("corpus.json", "corpus.jsonl"), ("sub/corpus.jsonl", "sub/corpora.jsonl"), ("stdlb", "stdlib")],
)
def test_a_misspelled_source_names_the_near_one(text_data, tmp_path, monkeypatch, source, meant):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("corpus.jsonl", "sub/corpora.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}')
    with pytest.raises((ValueError, OSError), match=f"^source: .*did you mean '{meant}'"):
        text_data(source=source).setup("fit")


@pytest.mark.parametrize("name", ["owner/name", "plain"])
@pytest.mark.parametrize("cache", [None, "datasets", "hub"])
def test_the_hub_is_asked_once_for_a_data_set_that_is_not_here(tmp_path, monkeypatch, name, cache):
    asked, loaded = [], []

    def refuse(self, repo, *, repo_type, timeout):
        asked.append((repo, repo_type, timeout))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", refuse)
    monkeypatch.setattr("lskip.data.sources.load_dataset", lambda path, **_: loaded.append(path) or [])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if cache:  # as the two libraries name the folders
        by = {"datasets": name.replace("/", "___"), "hub": "datasets--" + name.replace("/", "--")}
        (tmp_path / cache / by[cache]).mkdir(parents=True)
        open_source(f"{name}:config:train", streaming=True)
    else:
        with pytest.raises(ValueError, match=f"cannot load '{name}:config:train', which is no local path"):
            open_source(f"{name}:config:train", streaming=True)
    assert asked == ([] if cache else [(name, "dataset", 5)]) and loaded == ([name] if cache else [])


def test_an_unreachable_hub_name_is_one_sentence(text_data):
    with pytest.raises(ValueError, match="cannot load 'no-such-org/no-such-data', which is no local path") as refused:
        text_data(source="no-such-org/no-such-data").setup("fit")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": ""}, {"text": None}, {"text": " \n"}], "every row is empty"),
        ([{"body": "a", "title": "b"}], "has the columns .*body.*title.*; needed: text, or prompt and completion"),
        ([{"prompt": "a"}], "has the columns .*prompt"),
        ([{"text": 1}], "line 1: 'text' must be text, not int"),
        ([{"prompt": "a", "completion": ["b"]}], "line 1: 'completion' must be text, not list"),
        ([{"messages": "hello"}], "line 1: 'messages' must be a list"),
        ([{"messages": [{"role": "user"}]}], "line 1: 'messages' must be a list"),
    ],
)
def test_bad_rows(text_data, rows, message):
    with pytest.raises(ValueError, match=message) as refused:
        text_data(rows).setup("fit")
    assert "\n" not in str(refused.value)


def test_bad_files(text_data, tmp_path):
    cases = {
        "empty.jsonl": ("", "empty"),
        "empty.txt": ("", "holds no documents"),
        "broken.jsonl": ("{not json\n", "broken.jsonl' line 1 is not JSON"),
        "broken.parquet": ("not parquet", "cannot load"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message) as refused:
            text_data(source=str(tmp_path / name)).setup("fit")
        assert "\n" not in str(refused.value)


def test_bad_folders(text_data, tmp_path):
    for name, files, message in (
        ("none", [], "holds no text files"),
        ("two", ["a.jsonl", "b.parquet"], "holds .jsonl and .parquet files"),
    ):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("x")
        with pytest.raises(ValueError, match=message):
            text_data(source=str(tmp_path / name)).setup("fit")


def test_a_named_column_that_is_not_there(text_data):
    with pytest.raises(ValueError, match=r"has the columns \['text'\]; needed: the text_column 'body'"):
        text_data(text_column="body").setup("fit")


def test_too_small_a_corpus(text_data):
    few = [{"text": f"tiny text number {i}"} for i in range(4)]
    with pytest.raises(ValueError, match=r"val_fraction: 0.01 leaves 0 of 4 documents for val.*too small a corpus"):
        text_data(few, val_fraction=0.01).val_dataloader()
    with pytest.raises(ValueError, match=r"test_fraction: 0.0 leaves 0 of 120 documents for test"):
        text_data(test_fraction=0.0).test_dataloader()
    with pytest.raises(
        ValueError, match=r"batch_size: 4096 on 1 device\(s\), but the training split has only \d+ rows"
    ):
        text_data(batch_size=4096).train_dataloader()


EMPTY = "K9 a part of the split is empty"


@pytest.mark.kind(EMPTY)
@pytest.mark.parametrize("group", [False, True], ids=["", "in groups"])
@pytest.mark.parametrize("own", [False, True], ids=["", "with a tokenizer of its own"])
@pytest.mark.parametrize(
    ("rows", "fractions", "empty"),
    [
        pytest.param(60, (0.999999, 0), "train test", id="F27 all for val"),
        pytest.param(60, (0, 0.999999), "train val", id="all for test"),
        pytest.param(60, (0.000001, 0.999998), "train val", id="almost all for test"),
        pytest.param(60, (0, 0), "val test", id="all for train"),
        pytest.param(1, (0.5, 0.4), None, id="one document"),
        pytest.param(2, (0.4, 0.4), None, id="two documents"),
    ],
)
def test_an_empty_split(text_data, rows, fractions, empty, group, own):
    rows = [{"text": text, **({"group": i // 4} if group else {})} for i, text in enumerate(texts(rows))]
    data = text_data(
        rows,
        val_fraction=fractions[0],
        test_fraction=fractions[1],
        **({"tokenizer": None, "vocab_size": 300} if own else {}),
    )
    sizes = {split: len(data.documents(split)) for split in ("train", "val", "test")}
    assert sum(sizes.values()) == len(rows) and (empty is None or empty.split() == [s for s in sizes if not sizes[s]])
    data.setup("fit"), data.setup("test")
    words = {
        "train": r"batch_size: 4 on 1 device\(s\), but the training split has only 0 rows",
        "val": "val_fraction: ",
    }
    for split, load in (("train", data.train_dataloader), ("val", data.val_dataloader), ("test", data.test_dataloader)):
        if sizes[split]:
            assert len(data.blocks(split))
            continue
        with pytest.raises(ValueError, match=f"^{words.get(split, 'test_fraction: ')}") as refused:
            load()
        assert "\n" not in str(refused.value)


@pytest.mark.kind(EMPTY)
def test_pairs_that_are_longer_than_a_row(text_data):
    rows = [{"prompt": "return x + 1\n" * 9 + str(i), "completion": "done"} for i in range(40)]
    data = text_data(rows)
    with pytest.warns(UserWarning, match="nothing scored within block_size=16"):
        data.setup("fit")
    with pytest.raises(ValueError, match=r"^block_size: in none of the \d+ val examples .* 16 tokens$"):
        data.val_dataloader()


@pytest.mark.kind(EMPTY)
@pytest.mark.parametrize(("fractions", "empty"), [((0, 0.2), "val"), ((0.2, 0), "test"), ((1e-9, 0.2), "val")])
def test_an_empty_split_of_a_stream(text_data, fractions, empty):
    data = text_data(streaming=True, val_fraction=fractions[0], test_fraction=fractions[1])
    data.setup("fit"), data.setup("test")
    with pytest.raises(ValueError, match=f"^{empty}_fraction: .*leaves 0 documents"):
        {"val": data.val_dataloader, "test": data.test_dataloader}[empty]()
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (4, 16)


@pytest.mark.kind(EMPTY)
def test_a_stream_without_training_documents(text_data):
    data = text_data(streaming=True, val_fraction=0.999999, test_fraction=0)
    with pytest.raises(ValueError, match="the stream holds no training row of block_size tokens"):
        next(iter(data.train_dataloader()))


@pytest.mark.kind("M11 data that a new user has", "M11")
@pytest.mark.parametrize("streaming", [False, True])
def test_a_fit_without_validation(text_data, tmp_path, streaming):
    from tests.data.test_order import fit

    data = text_data(texts_of_one(), val_fraction=0, test_fraction=0, streaming=streaming)
    assert len(fit(tmp_path, data, max_steps=5)) == 5
    data.trainer = None
    with pytest.raises(ValueError, match=r"^val_fraction: 0 leaves 0"):
        data.val_dataloader()


def texts_of_one() -> list[dict]:
    return [{"text": "\n".join(texts(30))}]


def test_unknown_split(text_data):
    with pytest.raises(ValueError, match="split: 'valid' is not one of train, val, test"):
        text_data().documents("valid")
    with pytest.raises(ValueError, match="split: 'valid' is not one of train, val, test"):
        text_data().blocks("valid")
