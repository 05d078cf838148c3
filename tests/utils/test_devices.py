"""Freed memory goes back to the system, where the C library lets it."""

import ctypes
import platform
import subprocess
import sys

import pytest

from lskip.utils import devices as heap

HOLES = """
import ctypes
from pathlib import Path
from lskip.utils.devices import trim_heap

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024

malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [malloc(100_000) for _ in range(1000)]  # small enough to come from the heap
for piece in pieces:
    ctypes.memset(piece, 1, 100_000)
full = resident()
for piece in pieces[:-1]:  # the last one holds the heap's end where it is
    free(piece)
freed = resident()
trim_heap()
print(full, freed, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_freed_between_pieces_in_use_is_given_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    full, freed, trimmed = map(float, done.stdout.split())
    assert freed > full - 10 and trimmed < full - 80


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_c_library_is_left_alone(error, monkeypatch):
    def refuse(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    heap.trim_heap()
