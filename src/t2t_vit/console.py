"""The screen."""

import sys
from typing import Any, Dict

from rich.console import Console


def console() -> Console:
    """Where tables are printed; in a pipe or a file, wide enough that none is cut."""
    plain: Dict[str, Any] = dict(highlight=False, markup=False, emoji=False)  # names are no markup
    return Console(**plain) if sys.stdout.isatty() else Console(**plain, width=200)
