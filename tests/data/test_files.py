"""Files of a source: read by their kind, refused by name, or left out with a warning."""

import codecs
import gzip
import json
import lzma
import os

import numpy as np
import pytest

from lskip.data.corpora import read_texts
from lskip.data.files import folder_files
from lskip.data.json_rows import read_json
from tests.data.test_datamodule import data_maker, texts

LINES = "".join(json.dumps({"text": text}) + "\n" for text in texts(60)).encode()
LIST = json.dumps([{"text": text} for text in texts(60)], indent=1).encode()
KIND = "K12 which files are read, and as what"


@pytest.fixture
def text_data(tmp_path, tiny_tokenizer):
    return data_maker(tmp_path, tiny_tokenizer)


def write(folder, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder / "source")


def documents(data) -> set[str]:
    return {text for split in ("train", "val", "test") for text in data.documents(split)["text"]}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("d.ndjson", LINES, id="F41 ndjson"),
        pytest.param("d.JSONL", LINES, id="upper case JSONL"),
        pytest.param("d.JSON", LIST, id="upper case JSON"),
        pytest.param("d.json", LINES, id="lines in a .json"),
        pytest.param("d.jsonl", LIST, id="a list in a .jsonl"),
        pytest.param("d.json", LINES.replace(b"}", b"\n}"), id="objects over several lines"),
        pytest.param("d.jsonl", LINES.replace(b"\n", b"\r\n\r\n"), id="blank lines and carriage returns"),
        pytest.param("d.json", LIST[:-1] + b"]\n" + LIST, id="two lists in a .json"),
        pytest.param("d.jsonl", b"[" + LINES.replace(b"\n", b"]\n[")[:-1], id="a list a line"),
        pytest.param("d.json", codecs.BOM_UTF8 + LIST + codecs.BOM_UTF8 + LIST, id="K16 joined lists"),
        pytest.param("d.jsonl", codecs.BOM_UTF8 + LINES, id="K16 byte order mark"),
        pytest.param("d.jsonl", codecs.BOM_UTF8 + LINES[:0] + LINES + codecs.BOM_UTF8 + LINES, id="K16 joined files"),
        pytest.param("d.json", codecs.BOM_UTF8 + LIST, id="K16 byte order mark before a list"),
        pytest.param("d.jsonl", LINES.decode().encode("utf-16"), id="K16 UTF-16"),
        pytest.param("d.json", LIST.decode().encode("utf-32"), id="K16 UTF-32"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_file(text_data, tmp_path, name, content, streaming):
    source = write(tmp_path, {name: content}) + f"/{name}"
    if streaming:
        expected = text_data([{"text": text} for text in texts(60)]).documents("val")["text"][:]
        assert text_data(source=source, streaming=True).documents("val")["text"][:] == expected
    else:
        assert documents(text_data(source=source)) == set(texts(60))


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param({"train.json": LIST}, None, id="F43 train.json"),
        pytest.param({"train.json": LINES}, None, id="train.json of lines"),
        pytest.param(
            {"README.md": b"hello", "train.jsonl": LINES}, "1 files left out, such as README", id="F44 README"
        ),
        pytest.param(
            {"README.md": b"a", "LICENSE": b"b", "dataset_infos.json": b"{}", ".gitattributes": b"c", "t.jsonl": LINES},
            "3 files left out",
            id="F44 a cloned data set",
        ),
        pytest.param({"README.md": b"a", "train.json": LIST}, "1 files left out", id="README and a .json"),
        pytest.param({"name.py": b"a = 1", "train.json": LIST}, "such as name.py", id="script and a .json"),
        pytest.param({"a.ndjson": LINES, "deep/B.JSONL": LINES, "c.json": LIST}, None, id="three spellings of rows"),
        pytest.param({"a.jsonl": LINES, "b.xlsx": b"a,b"}, "1 files left out, such as b.xlsx", id="xlsx beside rows"),
        pytest.param({"a.JSONL.GZ": gzip.compress(LINES), "b.jsonl": b""}, None, id="compressed rows"),
        pytest.param({"x.jsonl/d.jsonl": LINES}, None, id="a folder named x.jsonl"),
        pytest.param(
            {"train.jsonl": LINES, "test.jsonl": b""},
            "1 files of other splits are read as well, such as test",
            id="splits",
        ),
        pytest.param({"train-0.jsonl": LINES, "testing.jsonl": b""}, None, id="no split"),
        pytest.param({"a.jsonl": LINES, "b.jsonl": b""}, None, id="an empty file"),
    ],
)
def test_rows_of_a_folder(text_data, tmp_path, recwarn, files, words):
    assert documents(text_data(source=write(tmp_path, files))) == set(texts(60))
    said = " ".join(str(warning.message) for warning in recwarn if "source:" in str(warning.message))
    assert words in said if words else not said


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("d.jsonl.gz", LINES, "cannot read '.*d.jsonl.gz'", id="not gz"),
        pytest.param("d.jsonl.gz", gzip.compress(LINES)[:-9], "cannot read .* .Truncated", id="gz that is cut"),
        pytest.param("d.jsonl.zst", LINES, "cannot read '.*d.jsonl.zst'", id="not zst"),
        pytest.param("d.tar.gz", gzip.compress(LINES), "a .tar file is not read; unpack it first", id="tar.gz"),
        pytest.param("d.parquet.gz", gzip.compress(LINES), "a .parquet file is compressed inside", id="parquet.gz"),
        pytest.param("d.csv", b"", "is empty", id="empty csv"),
        pytest.param("d.csv", b"\n\n", "its first row must name the columns", id="blank csv"),
        pytest.param("d.csv", b"text,text\na,b\n", "its first row must name the columns, each once", id="csv twice"),
        pytest.param("d.csv", b"text,\na,b\n", "its first row must name the columns", id="csv without a name"),
        pytest.param("d.csv", b"text\n\na,b\n", "line 3: 2 values for the 1 columns", id="csv too many"),
        pytest.param("d.tsv", b'text\tb\n"a\nc"\n', "line 2: 1 value for the 2 columns", id="tsv too few"),
        pytest.param("d.csv", b'text\n"a\n', "line 2 is not a row of .csv .unexpected end", id="csv open quote"),
        pytest.param("d.csv", b"a,b\n1,2\n", "has the columns", id="csv of other columns"),
        pytest.param("d.csv", b"text\ncaf\xe9\n", "is not UTF-8 text", id="Latin-1 csv"),
        pytest.param("d.jsonl", gzip.compress(LINES), "is not UTF-8 text|NUL bytes in line 1", id="gz named otherwise"),
        pytest.param("d.txt.xz", lzma.compress(LINES), "a .xz file is not read", id="xz"),
        *[
            pytest.param(f"d{suffix}", LINES, f"d{suffix}': a {suffix.lower()} file is not read", id=suffix)
            for suffix in (".XLSX", ".lz4", ".zip", ".tar", ".arrow", ".pdf", ".docx")
        ],
        pytest.param(
            "d.txt", "caf\u00e9\n".encode("latin-1"), r"d.txt' is not UTF-8 text \(line 1\)", id="F47 Latin-1"
        ),
        pytest.param("d.md", b"good\nb\x92d\n", r"d.md' is not UTF-8 text \(line 2\)", id="F47 Windows-1252"),
        pytest.param("d.jsonl", b'{"text": "caf\xe9"}\n', "is not UTF-8 text", id="Latin-1 rows"),
        pytest.param("d.txt", b"a\0b\n", "NUL bytes in line 1", id="NUL"),
        pytest.param("d.txt", b"version https://git-lfs.github.com/spec/v1\noid 1\n", "git lfs pull", id="LFS pointer"),
        pytest.param("d.txt", b"", "holds no documents", id="empty"),
        pytest.param("d.txt", b" \n\n", "holds no |every row is empty", id="blank"),
        pytest.param("d.ndjson", b"", "is empty", id="empty ndjson"),
        pytest.param("d.json", b"[]", "holds no documents", id="empty list"),
    ],
)
def test_a_file_that_is_refused(text_data, tmp_path, name, content, words, streaming):
    source = write(tmp_path, {name: content}) + f"/{name}"
    with pytest.raises(ValueError, match=f"^source: .*({words})") as refused:
        data = text_data(source=source, streaming=streaming)
        data.setup("fit")
        next(iter(data.train_dataloader()))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 250 + len(source)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param({"data-0.arrow": b"\0", "state.json.lock": b"\0", "b.zip": b"a"}, "no", id="nothing that is read"),
        pytest.param(
            {"data-0-of-1.arrow": b"\0", "dataset_info.json": b"{}", "state.json": b"{}"},
            "no text files",
            id="save_to_disk",
        ),
        pytest.param(
            {"dataset_dict.json": b'{"splits": []}', "train/data-0.arrow": b"\0", "train/state.json": b"{}"},
            "no text files",
            id="save_to_disk of splits",
        ),
        pytest.param({"a.xz": b"a", "b.xlsx": b"a,b"}, r"no text files, such as a.xz", id="packed and xlsx alone"),
        pytest.param({"a.jsonl": LINES, "b.csv.gz": b"a"}, ".csv and .jsonl files", id="csv beside rows"),
        pytest.param({"a.txt": b"\xe9", "b.txt": b"\xe8"}, "no documents", id="all of it Latin-1"),
    ],
)
def test_a_folder_that_is_refused(text_data, tmp_path, files, words):
    with pytest.raises(ValueError, match=f"source: .* holds {words}"):
        text_data(source=write(tmp_path, files)).setup("fit")


@pytest.mark.kind(KIND, "F47")
def test_files_that_are_no_text_are_counted(text_data, tmp_path):
    good = {f"g{i}.txt": text.encode() for i, text in enumerate(texts(40))}
    bad = {f"l{i:02d}.txt": b"caf\xe9 " * i for i in range(1, 31)}
    with pytest.warns(UserWarning, match=r"30 files are not UTF-8 text and are left out, such as .*l01.txt"):
        assert documents(text_data(source=write(tmp_path, {**good, **bad}))) == set(texts(40))


@pytest.mark.kind(KIND)
def test_links_and_what_is_no_file(text_data, tmp_path):
    folder = tmp_path / "source"
    write(tmp_path, {"sub/a.jsonl": LINES})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_text('{"text": "from elsewhere"}\n')
    (folder / "loop").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.warns(UserWarning, match=r"1 files left out, such as pipe.jsonl"):
        assert documents(text_data(source=str(folder))) == {*texts(60), "from elsewhere"}
    with pytest.raises(ValueError, match="is neither a file nor a folder"):
        text_data(source=str(folder / "pipe.jsonl")).setup("fit")
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"source: cannot read '.*gone.jsonl' \(No such file"):
        text_data(source=str(folder)).setup("fit")


@pytest.mark.kind(KIND)
def test_an_unreadable_file_is_refused(text_data, tmp_path, monkeypatch):
    source = write(tmp_path, {"a.txt": b"a", "b.txt": b"b"})
    real = type(tmp_path).open

    def denied(self, *arguments, **more):
        if self.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **more)

    monkeypatch.setattr(type(tmp_path), "open", denied)
    with pytest.raises(ValueError, match=r"source: cannot read '.*b.txt' \(Permission denied\)"):
        text_data(source=source).setup("fit")


@pytest.mark.kind(KIND)
def test_a_json_beside_more_text_is_text_with_a_word(tmp_path):
    folder = tmp_path / "source"
    write(tmp_path, {"a.py": b"a", "b.py": b"b", "package.json": b'{"name": "x"}', "rows.json": LIST})
    with pytest.warns(UserWarning, match="1 files of rows are read as text, such as rows.json"):
        kept, kind = folder_files(folder)
    assert kind == "text" and [path.name for path in kept] == ["a.py", "b.py", "package.json", "rows.json"]


# A .txt and its documents


def read(tmp_path, text: str, lone: bool = True, name: str = "d.txt", encoding: str = "utf-8") -> list[str]:
    (tmp_path / name).write_bytes(text.encode(encoding))
    return [row["text"] for row in read_texts([str(tmp_path / name)], lone)]


@pytest.mark.kind("M11 data that a new user has")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("one\ntwo\nthree\n", ["one", "two", "three"], id="M11 a document a line"),
        pytest.param("one\ntwo\n\n\n", ["one", "two"], id="M11 blank lines at the end alone"),
        pytest.param("one\r\ntwo\r\n", ["one", "two"], id="carriage returns"),
        pytest.param("\n\none\ntwo", ["one", "two"], id="blank lines before it"),
        pytest.param("one\n\ntwo\nthree\n", ["one\n\ntwo\nthree\n"], id="a blank line: no document a line"),
        pytest.param("one\r\n \r\ntwo\r\n", ["one\r\n \r\ntwo\r\n"], id="a line of blanks: no document a line"),
    ],
)
def test_a_lone_txt(tmp_path, text, expected):
    assert read(tmp_path, text) == expected
    assert read(tmp_path, text, encoding="utf-8-sig") == expected  # K16
    assert read(tmp_path, text, encoding="utf-16") == expected
    assert read(tmp_path, text, lone=False) == [text]  # among others a short file is a document
    assert read(tmp_path, text, name="d.md") == [text]


@pytest.mark.kind("M11 data that a new user has", "M11")
def test_a_txt_with_a_document_a_line_trains(text_data, tmp_path):
    lines = [f"document number {i} of many" for i in range(300)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    data = text_data(source=str(tmp_path / "lines.txt"))
    assert documents(data) == set(lines) and len(data.train_dataloader()) > 10 and len(data.val_dataloader()) > 2


def by_hand(text: str, size: int = 4000) -> list[str]:
    """Return the pieces of a long .txt, cut at the first "\\n\\n" after so many characters."""
    pieces, start = [], 0
    while start < len(text):
        blank = text.find("\n\n", start + size)
        end = len(text) if blank < 0 else blank + 2
        pieces.append(text[start:end])
        start = end
    return pieces


@pytest.mark.parametrize("seed", range(4))
def test_a_book_is_cut_as_ever(tmp_path, seed):
    random = np.random.default_rng(seed)
    parts = ["word " * int(n) + "\n" * int(k) for n, k in random.integers([0, 1], [400, 5], (80, 2))]
    book = "".join(parts)
    assert read(tmp_path, book) == read(tmp_path, book, lone=False) == by_hand(book)
    spaced = book.replace("\n", "\r\n")  # no empty line in it, blank ones only
    assert "".join(read(tmp_path, spaced)) == spaced and len(read(tmp_path, spaced)) == len(by_hand(book))


# Long lines and large files


@pytest.mark.kind("B21 one long line", "B21")
def test_a_line_beyond_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("lskip.data.files.LONGEST", 1000)
    (tmp_path / "d.jsonl").write_text('{"text": "short"}\n{"text": "' + "x" * 2000 + '"}\n')
    with pytest.raises(ValueError, match=r"d.jsonl': line 2 is longer than 1,000 characters"):
        list(read_json([str(tmp_path / "d.jsonl")]))


@pytest.mark.kind("B21 one long line")
@pytest.mark.parametrize("size", [501, 600, 2000])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_its_bound_holds_for_characters_of_several_bytes(tmp_path, monkeypatch, size, encoding):
    """Where they are cut it is neither two lines nor no text."""
    monkeypatch.setattr("lskip.data.files.LONGEST", 500)
    (tmp_path / "d.txt").write_text("é" * size + "\nend\n", encoding=encoding)
    with pytest.raises(ValueError, match=r"d.txt': line 1 is longer than 500 characters"):
        list(read_texts([str(tmp_path / "d.txt")], lone=True))


@pytest.mark.kind("B21 one long line")
def test_a_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("lskip.data.json_rows.CHUNK", 7)
    rows = [{"text": "a \u00e9 [{,\n" * i, "n": -1.5e3, "deep": [[{"a": None}], True, '\\u12 "']} for i in range(30)]
    for indent in (None, 2):
        (tmp_path / "d.json").write_text(json.dumps(rows, indent=indent))
        found = list(read_json([str(tmp_path / "d.json")], lone=True))
        assert [{name: row[name] for name in rows[0]} for row in found] == rows
