import jinja2
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

from lskip.user_errors import is_users_mistake, one_line

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
