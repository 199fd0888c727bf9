"""The estimate of docs/scaling.md."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location('scaling', ROOT / 'scripts' / 'scaling.py')
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)


def run_of(size):
    return scaling.Run('t2t_vit_14', 1_281_167, 310, 512, 1e9, size)


def test_one_gpu_is_its_speed():
    machine = scaling.Machine(half=0)
    found = scaling.estimate(run_of(86e6), 1000, 1, machine)
    assert found.reduce == found.exposed == 0 and found.input == pytest.approx(1000)
    assert found.hours == pytest.approx(310 * 1_281_167 / 1000 / 3600, rel=1e-3)


def test_communication_by_hand():
    machine = scaling.Machine(inside=1e9, outside=1e8, latency=0)
    assert scaling.all_reduce(8e6, 8, machine) == pytest.approx(2 * 7 / 8 * 8e6 / 1e9)
    assert scaling.all_reduce(8e6, 16, machine) == pytest.approx(2 * 15 / 16 * 8e6 / 1e8)
    slow = scaling.estimate(run_of(8e6), 1e9, 8, machine)  # compute takes nothing: all of it shows
    assert slow.exposed == pytest.approx(slow.reduce, rel=1e-3)
    assert scaling.estimate(run_of(8e6), 100, 8, machine).exposed == 0  # compute takes seconds: nothing does


def test_the_document_shows_what_the_script_prints():
    """Some of its rows, for counting all takes long; and that all recipes and models have theirs."""
    text = (ROOT / 'docs' / 'scaling.md').read_text()
    assert {*scaling.tables({}, ['imagenet-7', 'cifar10-transfer'])} <= {*text.splitlines()}
    assert all(text.count(f'| {name} | ') == len(scaling.GPUS) + text.count(f' | {name} | ') for name in scaling.MODELS)
    assert all(
        text.count(f'| {name} | {model} |') == 1 for name in scaling.RECIPES for model in scaling.models_of(name)
    )


@pytest.mark.parametrize('name', scaling.RECIPES)
def test_heads_of_recipes_have_the_hours_of_the_document(name):
    lines = (ROOT / 'docs' / 'scaling.md').read_text().splitlines()
    header = scaling.recipes()[name].read_text()
    for model in scaling.models_of(name):
        row = next(line for line in lines if line.startswith(f'| {name} | {model} |'))
        hours = row.split('|')[7 if name.startswith('cifar') else 8].strip()
        assert re.search(rf'--model {model} +{hours} hours', header) or f'about {hours} hours' in header


def test_a_speed_is_of_a_batch():
    """What was measured is reached at that batch again."""
    name, speed = scaling.read_speed('t2t_vit_14=2900@256')
    assert (name, speed) == ('t2t_vit_14', pytest.approx(2900 * 1.25))
    run = run_of(86e6)._replace(batch=256)
    assert 256 / scaling.estimate(run, speed, 1).compute == pytest.approx(2900)
    assert '| 3,625 |' in '\n'.join(scaling.tables({name: speed}, ['imagenet-14']))
    with pytest.raises(SystemExit, match='got t2t_vit_14=2900'):
        scaling.read_speed('t2t_vit_14=2900')
