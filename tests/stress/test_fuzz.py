"""Check that the fuzz run detects every kind of finding, and that a small run has none."""

import os
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest
from fuzz import Case, run_kind

from t2t_vit.models.safe_load import CheckpointError

ENV = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}  # for processes that import the tests' modules


def fine():
    Path('seen.txt').touch()


def wrong():
    return 'other'


def refuse():
    raise CheckpointError('it is damaged')


def nameless():
    raise CheckpointError('')


def another_error():
    return {}['key']


def execute():
    subprocess.run(['true'])


def leave():
    (Path(os.environ['TMPDIR']) / 'draft').touch()


def grow():
    bytearray(b'x' * (fuzz.MEMORY + (8 << 20)))


ENDINGS = [
    (fine, 'fine'),
    (refuse, 'refused'),
    (wrong, 'changed'),
    (nameless, 'leaked'),
    (another_error, 'leaked'),
    (execute, 'executed'),
    (leave, 'left'),
    (grow, 'large'),
    (lambda: os._exit(3), 'died'),
    (lambda: time.sleep(60), 'died'),
    (fine, 'fine'),
]


def test_fuzz_run_detects_each_kind_of_finding():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_small_fuzz_run_has_no_findings():
    done = subprocess.run([sys.executable, fuzz.__file__, '--count', '50'], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0 and '48 inputs, 0 findings' in done.stdout, done.stdout + done.stderr


def check_findings():
    """Check that each ending is recognised."""
    fuzz.MEMORY = 32 << 20
    ended = []
    for use, _ in ENDINGS:
        ended += [
            outcome.status
            for _, outcome in run_kind(
                lambda rng, folder, use=use: Case('made', use, ('seen.txt',), 'right' if use is wrong else None),
                'made',
                0,
                [0],
                patience=3,
            )
        ]
    assert ended == [status for _, status in ENDINGS]


def check_that_the_rest_runs_after_a_crash():
    def maker(rng, folder):
        return Case('made', (lambda: os._exit(3)) if rng.random() < 0.5 else refuse)

    ended = [(index, outcome.status) for index, outcome in run_kind(maker, 'made', 1, range(8))]
    assert [index for index, _ in ended] == [*range(8)]
    assert {status for _, status in ended} == {'died', 'refused'}


if __name__ == '__main__':
    check_findings()
    check_that_the_rest_runs_after_a_crash()
