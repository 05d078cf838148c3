import binascii
import errno
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jinja2
import pyarrow
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

import lskip
from lskip.cli import entry, main
from lskip.utils.user_errors import is_users_mistake, one_line


def raised(call, *arguments) -> BaseException:
    """What a call of a library raises, with its traceback."""
    with pytest.raises(BaseException) as caught:
        call(*arguments)
    return caught.value


FROM_LIBRARIES = {
    "K10 a template's": lambda: jinja2.Template("{% if %}"),
    "a zip's": lambda: zipfile.ZipFile(__file__),
    "an Arrow file's": lambda: pyarrow.ipc.open_file(pyarrow.py_buffer(b"not arrow")),
    "base64's": lambda: binascii.a2b_base64("abc"),
    "text's": lambda: b"\xff".decode(),
    "a repository's name": lambda: (_ for _ in ()).throw(HFValidationError("x")),
    "the hub offline": lambda: (_ for _ in ()).throw(OfflineModeIsEnabled("x")),
    "no copy of the hub's": lambda: (_ for _ in ()).throw(LocalEntryNotFoundError("x")),
}

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried …"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        FileNotFoundError(2, "No such file", "x"),
        MisconfigurationException("x"),
        jinja2.TemplateError("x"),
        jinja2.exceptions.UndefinedError("x"),
        SafetensorError("x"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(NO_MEMORY),
    ],
)
def test_what_a_user_can_mend_is_a_sentence(error):
    assert is_users_mistake(error)
    assert one_line(error) and "\n" not in one_line(error)


@pytest.mark.parametrize(
    "error", [KeyError("x"), AttributeError("x"), TypeError("x"), IndexError("x"), RuntimeError("x")]
)
def test_what_lskip_gets_wrong_is_not(error):
    assert not is_users_mistake(error)


def test_memory_that_is_not_there_is_said_in_words():
    assert one_line(RuntimeError(NO_MEMORY)).startswith("memory: not enough")


def test_a_sentence_does_nothing_to_a_terminal():
    assert one_line(ValueError("model: '\x1b[2J\x07'")) == "model: '\\x1b[2J\\x07'"


def test_errors_of_libraries_are_sentences():
    for name, call in FROM_LIBRARIES.items():
        assert is_users_mistake(raised(call)), name
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    assert is_users_mistake(panic("index out of bounds"))
    assert is_users_mistake(HfHubHTTPError.__new__(HfHubHTTPError))


@pytest.mark.kind("K10 mistakes of the user that arrive as other exceptions")
@pytest.mark.parametrize(
    ("source", "module", "is_users"),
    [
        pytest.param("1 // 0", "lightning.pytorch.loops", True, id="B45 a flag of Lightning's"),
        pytest.param("1 // 0", "lskip.models.readout", False, id="a division of lskip's"),
        pytest.param("f = lambda: f()\nf()", "yaml.composer", True, id="nested by the user"),
        pytest.param("f = lambda: f()\nf()", "lskip.models.readout", False, id="without end in lskip"),
        pytest.param("1 // 0", "mine", False, id="a class of one's own"),
        pytest.param("raise RuntimeError('x')", "lightning.pytorch.callbacks.early_stopping", True, id="F31 monitor"),
        pytest.param("raise ImportError('needs x')", "lightning.fabric.plugins", True, id="a package that is not here"),
        pytest.param("import lskip.not_there", "lskip.models.readout", False, id="a module that lskip misspells"),
        pytest.param("raise TypeError('x')", "lightning.fabric.utilities.device_parser", True, id="devices"),
        pytest.param("raise RuntimeError('x')", "torch.nn.modules", False, id="an operation of torch"),
        pytest.param("raise KeyError('x')", "torch.optim", False, id="a key in a library"),
        pytest.param("{}['x']", "lskip.models.readout", False, id="a key in lskip"),
    ],
)
def test_whose_line_raised_decides(source, module, is_users):
    space = {"__name__": module}
    error = raised(exec, compile(source, module, "exec"), space)
    assert is_users_mistake(error) is is_users
    if is_users:
        assert "\n" not in one_line(error)


@pytest.mark.kind("K10 mistakes of the user that arrive as other exceptions")
@pytest.mark.parametrize("error", [KeyError("planted"), AttributeError("planted"), TypeError("x"), IndexError("x")])
def test_a_fault_of_lskip_shows_its_traceback(error, monkeypatch):
    def broken(arguments):
        raise error

    monkeypatch.setattr(entry, "_command", lambda name: broken)
    with pytest.raises(type(error)):
        main(["generate", "--prompt=x"])


# The process: its streams, its arguments, impatience.


def start(*arguments, **settings):
    environment = {**os.environ, "PYTHONPATH": str(Path(lskip.__file__).parent.parent)}
    return subprocess.Popen([sys.executable, "-m", "lskip", *arguments], env=environment, text=True, **settings)


class Full(io.StringIO):
    """A stream on a disk that is full."""

    def __init__(self, path: Path, held: bool):
        super().__init__()
        self.file, self.held = path.open("wb"), held

    def write(self, text: str) -> int:
        if not self.held:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(text)

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fileno(self) -> int:
        return self.file.fileno()


@pytest.mark.kind("B45 small tracebacks")
@pytest.mark.parametrize("held", [pytest.param(True, id="B45 full"), pytest.param(False, id="full, not buffered")])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["configs"]])
def test_an_output_on_a_full_disk_is_one_sentence(arguments, held, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Full(tmp_path / "out", held))
    assert main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "No space left on device" in errors


@pytest.mark.kind("B45 small tracebacks")
def test_errors_on_a_full_disk_are_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Full(tmp_path / "err", False))
    assert main(["generat"]) == 2


@pytest.mark.kind("B45 small tracebacks")
@pytest.mark.parametrize("descriptor", [pytest.param(1, id="closed output"), pytest.param(2, id="closed errors")])
def test_closed_streams(descriptor):
    process = start(
        "configs", "list", stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(descriptor)
    )
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in output + errors


@pytest.mark.kind("B45 small tracebacks")
@pytest.mark.parametrize("command", ["fit", "generate", "configs"])
@pytest.mark.parametrize("bad", [pytest.param("\udcff", id="F32 no UTF-8"), pytest.param("a\0b", id="NUL")])
@pytest.mark.parametrize("option", ["--prompt", "--model", "--data.source", "--config"])
def test_arguments_that_are_no_text(command, bad, option, capsys):
    for arguments in ([f"{option}={bad}"], [option, bad]):
        assert main([command, *arguments]) == 2
        assert capsys.readouterr().err.count(": error: ") == 1
