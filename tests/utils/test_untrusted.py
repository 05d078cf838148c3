import json
import time

import pytest
import yaml

from lskip.utils.untrusted import parse_json, parse_yaml, printable, read_text, time_limit

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.kind("B31 B32 YAML that bombs, runs or does not parse")
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(BOMB, id="B32 aliases"),
        pytest.param("!!python/object/apply:os.system [ls]", id="B31 python"),
        pytest.param("a: [1, 2", id="B31 broken"),
        pytest.param("\x07", id="B31 binary"),
        pytest.param("a: &a [*a]", id="contains itself"),
        pytest.param("[" * 5000, id="deep"),
        pytest.param("2024-13-45: 1", id="no such date"),
        pytest.param("a: " + "9" * 5000, id="a number of 5000 digits"),
        pytest.param("a: 1\nb: [{c: 1, c: 1}]", id="a key twice"),
    ],
)
def test_what_is_no_plain_yaml_is_one_sentence_and_takes_no_time(text):
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"^here is not "):
        parse_yaml(text, "here")
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("content", [None, 3, "text", {"a": [1, {"b": None}]}, {"lr": 0.1}])
def test_plain_yaml_is_what_pyyaml_says(content):
    assert parse_yaml(yaml.safe_dump(content), "here") == content


def test_aliases_within_bounds_are_kept():
    assert parse_yaml("a: &a {x: 1}\nb: *a\n", "here") == {"a": {"x": 1}, "b": {"x": 1}}
    assert parse_yaml("a: &a {1: 1}\nb: {<<: *a, '1': 2}\n", "here")["b"] == {1: 1, "1": 2}


@pytest.mark.parametrize("text", ['{"a": ', "[" * 100_000, "9" * 5000, ""])
def test_what_is_no_json_is_one_sentence(text):
    with pytest.raises(ValueError, match=r"^line 3 is not JSON"):
        parse_json(text, "line 3")


def test_text_is_read_with_and_without_a_mark_within_its_size(tmp_path):
    (tmp_path / "marked").write_bytes("\ufeffdéf".encode())
    assert read_text(tmp_path / "marked", "prompts") == "déf"
    (tmp_path / "latin").write_bytes("déf".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts: '.*latin' is not UTF-8 text \(byte 1\)"):
        read_text(tmp_path / "latin", "prompts")
    (tmp_path / "large").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(ValueError, match="larger than the 1 MiB"):
        read_text(tmp_path / "large", "prompts", 2**20)


def test_nothing_printed_moves_the_cursor():
    assert printable("\x1b]0;title\x07\x1b[2J a\tb\nc \u202e \ud800") == (
        "\\x1b]0;title\\x07\\x1b[2J a\tb\nc \\u202e \\ud800"
    )
    text = json.loads('"größe 漢字 🌍 e\u0301"')
    assert printable(text) == text


def test_what_does_not_end_is_ended():
    with pytest.raises(ValueError, match="it took too long"), time_limit(0.1, "it took too long"):
        while True:
            pass
    with time_limit(0.1, "it took too long"):
        pass
    time.sleep(0.15)  # no alarm is left behind
