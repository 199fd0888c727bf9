"""Freed memory stays in the process, and every command and run asks for that."""

import subprocess
import sys

import pytest
from conftest import digits_config

from t2t_vit.cli import main
from t2t_vit.settings import UsageError
from t2t_vit.train.run import train

FAULTS = """
import resource
import numpy as np
from t2t_vit.allocator import keep_freed_memory

def faults(megabytes=40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.empty(megabytes << 20, np.uint8)[::4096] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
def test_freed_memory_is_used_again_without_page_faults():
    found = subprocess.run([sys.executable, '-c', FAULTS], capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert before > 1000 and after < before / 10


def test_commands_and_runs_keep_freed_memory(monkeypatch):
    asked = []
    for place in ('cli', 'train.run'):
        monkeypatch.setattr(f't2t_vit.{place}.keep_freed_memory', lambda place=place: asked.append(place))
    assert main(['bench', '--rounds', '0']) == 2
    assert asked == ['cli']
    with pytest.raises(UsageError, match='nowhere holds no state'):
        train(digits_config(), resume='nowhere')
    assert asked == ['cli', 'train.run']
