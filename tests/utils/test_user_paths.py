"""Paths as users write them: home folders, and what can be no path is told with the field that it stands in."""

import pytest

from lskip.cli import main
from lskip.utils.user_paths import user_path

KIND = "B41 a path that is none"
NO_PATHS = {
    "nobody's home": ("~nobody_here/x", "'~nobody_here/x' is no path"),
    "too long a name": ("x" * 300, "'xxx.* is no path here .File name too long"),
    "too long a path": ("x/" * 3000, "'x/x/.* is no path here .File name too long"),
    "a NUL": ("a\0b", "'a.x00b' is no path"),
    "a link to itself": ("loop", "'loop' is no path here .Too many levels"),
    "below a link to itself": ("loop/x", "'loop/x' is no path here .Too many levels"),
    "empty": ("", "is empty"),
}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(("text", "said"), NO_PATHS.values(), ids=NO_PATHS)
def test_what_can_be_no_path_is_told_with_its_field(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=f"^place: {said}"):
        user_path(text, "place")


def test_home_is_put_in_and_nothing_needs_to_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/none/x", "place") == tmp_path / "none" / "x"
    (tmp_path / "file").touch()
    assert user_path("~/file/x", "place") == tmp_path / "file" / "x"  # the reader says what is wrong with it
    assert str(user_path("./~", "place")) == "~"


@pytest.mark.kind(KIND)
def test_what_fsspec_would_read_as_a_chain_of_file_systems_is_a_name(tmp_path, monkeypatch):
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    monkeypatch.chdir(tmp_path)
    for name in ("zip::e", "d::e", "simplecache::file", "x::zip"):
        for path in (name, f"{tmp_path}/{name}"):
            files, _ = url_to_fs(str(user_path(path, "place") / "checkpoints"))
            assert user_path(path, "place") == tmp_path / name and isinstance(files, LocalFileSystem)


OPTIONS = {
    "generate": ("--prompt=x", "--model"),
    "generate, an adapter": ("--prompt=x", "--num_speculations=2", "--exit_adapter"),
    "predict": ("--output=o.jsonl", "--prompts"),
    "predict, the output": ("--prompts=p.txt", "--output"),
    "export": ("--model=smollm2", "--output"),
    "adapt": ("--prompts=p.txt", "--output"),
    "sweep": ("--task=StdlibCode", "--output"),
    "sweep, a task": ("--task=LocalTask", "--output=o", "--task.path"),
    "inspect": ("--output",),
    "inspect, the data": ("--output=o", "--data"),
    "evaluate": ("--tasks=x", "--output"),
    "compare": ("run", "--figure"),
    "fit": ("--model=smollm2", "--run_folder"),
    "fit, a checkpoint": ("--model=smollm2", "--data.source=stdlib", "--ckpt_path"),
    "fit, the data": ("--model=smollm2", "--data.source"),
    "validate": ("--data.source=stdlib", "--model"),
}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("name", OPTIONS)
def test_nobodys_home_in_every_command(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\n")
    *others, option = OPTIONS[name]
    before = sorted(tmp_path.iterdir())
    assert main([name.partition(",")[0], *others, f"{option}=~nobody_here/x.jsonl"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{option.rpartition('.')[2].lstrip('-')}: '~nobody_here/x.jsonl' is no path" in said
    assert sorted(tmp_path.iterdir()) == before
