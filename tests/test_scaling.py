"""The estimate of docs/scaling.md."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location('scaling', ROOT / 'scripts' / 'scaling.py')
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)


def test_one_gpu_is_its_speed():
    machine = scaling.Machine(half=0)
    found = scaling.estimate(1000, 86e6, 1, machine)
    assert found.reduce == found.exposed == 0 and found.input == pytest.approx(1000)
    assert found.hours == pytest.approx(310 * 1_281_167 / 1000 / 3600, rel=1e-3)


def test_communication_by_hand():
    machine = scaling.Machine(inside=1e9, outside=1e8, latency=0)
    assert scaling.all_reduce(8e6, 8, machine) == pytest.approx(2 * 7 / 8 * 8e6 / 1e9)
    assert scaling.all_reduce(8e6, 16, machine) == pytest.approx(2 * 15 / 16 * 8e6 / 1e8)
    slow = scaling.estimate(1e9, 8e6, 8, machine)  # compute takes nothing: all of it shows
    assert slow.exposed == pytest.approx(slow.reduce, rel=1e-3)
    assert scaling.estimate(100, 8e6, 8, machine).exposed == 0  # compute takes seconds: nothing does


def test_the_document_shows_what_the_script_prints():
    assert '\n'.join(scaling.tables({})) in (ROOT / 'docs' / 'scaling.md').read_text()
    assert '2,900 |' in '\n'.join(scaling.tables({'t2t_vit_14': 2900}))
