"""Load classes and functions from a user's Python file, named as FILE.py:NAME.

Loading executes the file. A name that a user types on the command line or passes in Python counts as their decision; a
name that was read from a file (a config.json, a config.yaml, a training state) does not, unless `trust` is active.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_trusted = False  # of the process, not of a context: the page answers from threads


class UntrustedCodeError(ValueError):
    """Report that a file, and not the user, names code to execute."""


def names_code(value: Any) -> bool:
    """Return whether a value, or one nested in it, has the form FILE.py:NAME."""
    if isinstance(value, Mapping):
        return any(map(names_code, value.values()))
    return any(map(names_code, value)) if isinstance(value, (list, tuple)) else '.py:' in str(value)


@contextmanager
def trust(trusted: bool = True) -> Iterator[None]:
    """Accept code that files name, in the whole process, until the block ends. The option --trust enters it."""
    global _trusted
    before, _trusted = _trusted, trusted or _trusted
    try:
        yield
    finally:
        _trusted = before


def refusal(key: str, value: Any, source: str) -> str:
    """Return why a value that was read from `source` is not used, or an empty string where it may be."""
    if _trusted or not names_code(value):
        return ''
    return (
        f'{source} names code to execute, {key}: {value}. If you trust it, add --trust (in Python: t2t_vit.trust), or '
        'name it yourself (with an option of train, or the class in Python)'
    )


def refuse_code(values: Mapping[str, Any], source: str) -> None:
    """Raise unless the values, which were read from `source`, are free of code or trusted.

    Raises:
        UntrustedCodeError: with a line for each value that names code.
    """
    if found := [text for key, value in values.items() if (text := refusal(key, value, source))]:
        raise UntrustedCodeError('\n'.join(found))


def check_source(pretrained_cfg: Any, model_args: Mapping[str, Any]) -> None:
    """Refuse code in a model's arguments if timm read them from a folder or the Hub.

    Args:
        pretrained_cfg: The configuration that timm passes to the entry point of a model.
        model_args: The other arguments that it passes, among them those of the folder's config.json.

    Raises:
        UntrustedCodeError: with a line for each argument that names code.
    """
    source, folder, hub_id = (
        pretrained_cfg.get(key) if isinstance(pretrained_cfg, Mapping) else getattr(pretrained_cfg, key, None)
        for key in ('source', 'file', 'hf_hub_id')
    )
    if source in ('local-dir', 'hf-hub'):
        values = {key: value for key, value in model_args.items() if not key.startswith('pretrained_')}
        refuse_code(values, f'{folder or hub_id}/config.json')


def load_code(reference: str) -> Any:
    """Execute FILE.py and return the class or function NAME of it, for a reference FILE.py:NAME.

    Raises:
        ValueError: if the file does not exist or does not define the name.
    """
    stem, _, name = reference.partition('.py:')
    file = Path(f'{stem}.py').expanduser()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ValueError(f'no file {file}')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f'{file} defines no function or class {name!r}')
    return getattr(module, name)
