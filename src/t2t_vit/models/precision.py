"""Computing in full precision inside a mixed-precision region."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch


def full_precision(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context without autocast on the device of `x`; a null context if autocast is off anyway.

    The null context keeps exported graphs free of autocast regions.
    """
    if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):  # autocast does not know meta, and raises
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function so that it runs without autocast on the device of its first argument.

    TorchScript, which knows no such context, compiles the decorated function itself.
    """

    @wraps(function)
    def run(x: torch.Tensor, *args: Any) -> Any:
        with full_precision(x):
            return function(x, *args)

    return run
