"""Tables and compressed files of a source hold what Python's own writers of each form wrote."""

import bz2
import csv
import gzip
import io
import json

import pyarrow
import pytest

from lskip.data.sources import open_source
from tests.data.test_datamodule import data_maker

TEXTS = [f'Text {number},\n"é"\t|' for number in range(60)]


def zst(data: bytes) -> bytes:
    written = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(written, "zstd") as file:
        file.write(data)
    return written.getvalue().to_pybytes()


def written(kind: str) -> bytes:
    """Return the texts as a file of this kind."""
    if kind == "jsonl":
        return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if kind == "json":
        return json.dumps([{"text": text} for text in TEXTS]).encode()
    table = io.StringIO()
    rows = [["id", "text"], *([number, text] for number, text in enumerate(TEXTS))]
    csv.writer(table, csv.excel_tab if kind == "tsv" else csv.excel).writerows(rows)
    return table.getvalue().encode()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".zst", zst)]
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_what_a_file_holds_is_read(tmp_path, kind, suffix, compress, streaming):
    """Several compressed parts behind one another are one file, as split and cat leave them; marks may come first."""
    data = b"\xef\xbb\xbf" + written(kind)
    (tmp_path / f"d.{kind}{suffix}").write_bytes(compress(data[:700]) + compress(data[700:]))
    rows, _ = open_source(str(tmp_path / f"d.{kind}{suffix}"), streaming)
    assert [row["text"] for row in rows] == TEXTS


def test_a_compressed_txt_is_cut_as_the_txt_is(tmp_path):
    text = b"one line\nanother\n"
    for name, data in (("a.txt", text), ("b.txt.gz", gzip.compress(text)), ("c.txt.zst", zst(text))):
        (tmp_path / name).write_bytes(data)
        assert [row["text"] for row in open_source(str(tmp_path / name), False)[0]] == ["one line", "another"]


@pytest.mark.parametrize(
    ("columns", "kind"),
    [(("prompt", "completion"), "pairs"), (("instruction", "input", "output"), "pairs"), (("text", "b"), "text")],
)
def test_a_table_is_read_by_its_columns(tmp_path, tiny_tokenizer, columns, kind):
    rows = [[f"{column} {number}" for column in columns] for number in range(60)]
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    text_data = data_maker(tmp_path, tiny_tokenizer)
    whole = text_data([dict(zip(columns, row, strict=True)) for row in rows])
    table = text_data(source=str(tmp_path / "d.csv"))
    assert list(table.documents("train")) == list(whole.documents("train")) and len(table.documents("train"))
    table.setup("fit")
    assert table.training_documents["kind"] == kind
