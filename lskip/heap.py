"""Memory that the process has freed, given back to the system."""

from __future__ import annotations

import ctypes


def trim_heap() -> None:
    """Where the C library is glibc. It keeps what was freed between pieces in use: after a model's conversion hundreds
    of MiB, which look as if lskip needed them and are nobody else's.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or Windows, where None names none
        return
    trim(ctypes.c_size_t(0))
