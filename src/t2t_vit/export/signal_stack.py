"""Keep the stack on which a thread handles signals, which OpenVINO replaces and later unmaps."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None


class Stack(ctypes.Structure):
    """Mirror `stack_t` of Linux's <signal.h>."""

    _fields_ = [('pointer', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]


@contextmanager
def keep_signal_stack() -> Iterator[None]:
    """Restore this thread's alternate signal stack on exit; do nothing except on Linux.

    OpenVINO's CPU plugin installs a stack of its own with sigaltstack. Once two plugins have been freed, the thread is
    left with the unmapped stack of the first, and the next signal (SIGCHLD of a subprocess is enough) kills the process
    without a message.
    """
    if LIBC is None:
        yield
        return
    before = Stack()
    LIBC.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        LIBC.sigaltstack(ctypes.byref(before), None)
