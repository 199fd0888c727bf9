"""Tell glibc when to keep freed memory and when to return it."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt


def keep_freed_memory() -> None:
    """Let glibc keep freed memory in the process, as other allocators do; do nothing without glibc.

    By default glibc returns large tensors to the system when they are freed, and every new one costs a page fault for
    each 4 KB (measured in results/speed-epyc-2026-11-29). The process then stays as large as it once was.
    """
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        if not libc.mallopt(MMAP_THRESHOLD, 2**30):
            libc.mallopt(MMAP_THRESHOLD, 2**25)  # the most that older versions take


def trim_memory() -> None:
    """Return freed memory to the system: glibc keeps fragments between images and tensors, more with each request."""
    if sys.platform == 'linux' and hasattr(libc := ctypes.CDLL(None), 'malloc_trim'):
        libc.malloc_trim(0)
