"""Kill a training run at random moments, resume it, and compare with an uninterrupted one (`make torture`).

    python tests/stress/torture.py [kills] [processes] [disk]

Each run of three epochs on the digits saves after every step. It is killed with SIGKILL after a random time, also in
the middle of saving, and resumed until it ends. Weights, EMA weights and moments must then equal those of an
uninterrupted run, bit for bit. Runs are repeated until there were `kills` (100) kills. `processes` (1) train together;
with `disk`, two worker processes each read and augment images, with mixup.
"""

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from test_run import same_run
from test_survival import DISK, finish, start

from t2t_vit.train.state import saved_states


def main(kills='100', processes='1', source='memory'):
    """Return the number of runs that ended with other weights."""
    kills, processes, words = int(kills), int(processes), DISK if source == 'disk' else []
    room = Path(tempfile.mkdtemp())
    begun = time.monotonic()
    finish(start(room / 'whole', *words, processes=processes))
    done = runs = wrong = 0
    while done < kills:
        folder, tries = room / f'run{runs}', 0
        while True:
            run = start(folder, *words, processes=processes)
            held = len(saved_states(folder / 'checkpoints')) and saved_states(folder / 'checkpoints')[0]
            while run.poll() is None and not (  # it has got past its start
                (found := saved_states(folder / 'checkpoints')) and found[0] != held
            ):
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.4))
            if run.poll() is not None:
                finish(run)
                break
            run.kill()
            run.communicate()
            done, tries = done + 1, tries + 1
        runs += 1
        same = same_run(folder, room / 'whole')
        wrong += not same
        print(
            f'run {runs}: killed {tries} times, {"the same to the last bit" if same else "DIFFERENT"}; '
            f'{done} kills in {time.monotonic() - begun:.0f} s',
            flush=True,
        )
        shutil.rmtree(folder)
    print(
        f'{done} kills, {runs} runs of {processes} processes, images from {source}, {wrong} of them different from '
        'the unbroken one'
    )
    shutil.rmtree(room)
    return wrong


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]) > 0)
