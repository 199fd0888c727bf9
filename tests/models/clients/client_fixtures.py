"""Fixtures of the client tests; a plugin, since tests import from the one file named conftest."""

from collections.abc import Callable
from pathlib import Path

import client_models as cm
import pytest
import torch


@pytest.fixture(params=cm.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Return each model in turn."""
    return request.param


@pytest.fixture(params=cm.T2T)
def t2t(request: pytest.FixtureRequest) -> str:
    """Return each T2T-ViT in turn."""
    return request.param


@pytest.fixture
def agree(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Return a function that fails if two tensors, or two dictionaries of gradients, differ by too much."""

    def agree(found, expected, tolerance: float = 1e-5) -> None:
        measure = cm.gradient_error if isinstance(found, dict) else cm.error
        difference = measure(found, expected)
        record_property('gradient_error' if isinstance(found, dict) else 'error', difference)
        assert difference <= tolerance

    return agree


@pytest.fixture(autouse=True)
def seed_of_clients(request: pytest.FixtureRequest) -> None:
    """Fix the random state of the tests in this folder."""
    if request.path.parent == Path(__file__).parent:
        torch.manual_seed(0)
