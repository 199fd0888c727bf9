"""The screen."""

import sys

from rich.console import Console


def console() -> Console:
    """Where tables are printed; in a pipe or a file, wide enough that none is cut."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
