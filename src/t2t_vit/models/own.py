"""What a user keeps in a Python file of their own, by FILE.py:NAME."""

import importlib.util
from pathlib import Path
from typing import Any


def load_own(reference: str) -> Any:
    """The class or function NAME of FILE.py, which is executed.

    Raises:
        ValueError: if there is no such file, or nothing of that name in it.
    """
    stem, _, name = reference.partition('.py:')
    file = Path(f'{stem}.py').expanduser()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.exists():
        raise ValueError(f'no file {file}')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f'{file} has no function {name}, and no class')
    return getattr(module, name)
