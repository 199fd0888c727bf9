"""The fuzz run finds what it looks for, and a slice of it nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import fuzz
from fuzz import Case, run_kind

from t2t_vit.models.safe_load import CheckpointError

ENV = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}  # for processes that import the tests' modules


def fine():
    Path('seen.txt').touch()


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
    (nameless, 'leaked'),
    (another_error, 'leaked'),
    (execute, 'executed'),
    (leave, 'left'),
    (grow, 'large'),
    (lambda: os._exit(3), 'died'),
    (lambda: time.sleep(60), 'died'),
    (fine, 'fine'),
]


def test_the_run_itself():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_slice_of_it():
    done = subprocess.run([sys.executable, fuzz.__file__, '--count', '50'], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0 and '48 inputs, 0 findings' in done.stdout, done.stdout + done.stderr


def what_it_finds():
    """Each ending is told from the others."""
    fuzz.MEMORY = 32 << 20
    ended = []
    for use, _ in ENDINGS:
        ended += [
            outcome.status
            for _, outcome in run_kind(
                lambda rng, folder, use=use: Case('made', use, ('seen.txt',)), 'made', 0, [0], patience=3
            )
        ]
    assert ended == [status for _, status in ENDINGS]


def the_rest_is_run_behind_one_that_dies():
    def maker(rng, folder):
        return Case('made', (lambda: os._exit(3)) if rng.random() < 0.5 else refuse)

    ended = [(index, outcome.status) for index, outcome in run_kind(maker, 'made', 1, range(8))]
    assert [index for index, _ in ended] == [*range(8)]
    assert {status for _, status in ended} == {'died', 'refused'}


if __name__ == '__main__':
    what_it_finds()
    the_rest_is_run_behind_one_that_dies()
