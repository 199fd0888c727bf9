"""Interrupt and damage training runs at random moments, resume them, and compare with unbroken ones (`make torture`).

    python tests/stress/torture.py [--harms 200] [--kinds kill signals flip limit disk] [--processes 1] [--disk] [--old]

Each run of three epochs on the digits saves after every step. One harm after another is done to it, at a random time,
also while it starts and while it saves; then it is resumed, until it ends:

- kill: SIGKILL;
- signals: Ctrl-C, SIGTERM or SIGUSR1, and another one up to 1.2 s later; the exit code must be the documented one;
- flip: SIGKILL, then one to three bits of a file of the run folder are flipped; it is noticed, or changes nothing;
- limit: no file may grow beyond a random size;
- disk: a file system (tmpfs, needs root) that is full after a random number of bytes.

Metrics, model, weights, EMA weights and moments must then equal those of an unbroken run, bit for bit. `--processes`
train together; with `--disk` two worker processes each read and augment images, with mixup; with `--old` the run is one
of version 0.1.0 that this version continues.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import same_run
from fuzz_damage import flip
from test_survival import DISK, Forked, finish, options

from t2t_vit.models.safe_load import CheckpointError
from t2t_vit.train.signals import INTERRUPTED, RESTART
from t2t_vit.train.state import saved_states
from t2t_vit.trained import load_trained

KINDS = ('kill', 'signals', 'flip', 'limit', 'disk')
OLD_RUN = Path(__file__).parents[1] / 'assets' / 'run-0.1.0'
OLD_OPTIONS = ['--epochs', '6', '--save_minutes', '0', '--data.workers', '0']
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
CODES = {0, RESTART, INTERRUPTED, *(-number for number in STOPS)}  # by the signal itself only before it is handled
LARGE = 1 << 20  # kB of the file system


class Torture:
    """Runs under harm, and counts of what happened."""

    def __init__(self, given: argparse.Namespace, room: Path) -> None:
        self.given, self.room, self.counts = given, room, Counter[str]()
        self.mounted = os.geteuid() == 0 and 'disk' in given.kinds
        self.kinds = [kind for kind in given.kinds if kind != 'disk' or self.mounted]
        (room / 'runs').mkdir()
        if self.mounted:
            subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={LARGE}k', 'tmpfs', str(room / 'runs')], check=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(['umount', '-l', str(self.room / 'runs')], check=True)

    def start(self, folder: Path, limit: int | None = None) -> Forked:
        """Start a run, or continue it."""
        words = options(folder, *(DISK if self.given.disk else []))
        if self.given.old:
            words = ['train', '--resume', str(folder), *OLD_OPTIONS]
        return Forked(words, self.room / f'{folder.name}.log', self.given.processes, limit)

    def prepare(self, folder: Path) -> Path:
        """Return the folder of a new run, which has the old run in it if one is continued."""
        return Path(shutil.copytree(OLD_RUN, folder)) if self.given.old else folder

    def set_space(self, kilobytes: int) -> None:
        """Set the size of the file system."""
        subprocess.run(['mount', '-o', f'remount,size={kilobytes}k', str(self.room / 'runs')], check=True)

    def wait(self, run: Forked, folder: Path) -> None:
        """Wait until a random moment: in a third of the cases while the run starts, else after its next state."""
        states = folder / 'checkpoints'
        held = saved_states(states)[:1]
        if random.random() < 1 / 3:
            time.sleep(random.uniform(0, 3))
            return
        while run.poll() is None and saved_states(states)[:1] == held:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.4))

    def harm(self, kind: str, folder: Path) -> bool:
        """Continue a run and harm it in a way; return whether it ended before."""
        large = max((file.stat().st_size for file in folder.glob('checkpoints/*.pt')), default=400_000)
        if kind == 'limit':
            run = self.start(folder, random.randrange(20_000, 2 * large))
        elif kind == 'disk':
            used = shutil.disk_usage(self.room / 'runs').used
            self.set_space((used + random.randrange(8_000, 3 * large)) // 1024 + 1)
            run = self.start(folder)
        else:
            run = self.start(folder)
        if kind in ('limit', 'disk'):
            output, _ = run.communicate(timeout=300)
            if kind == 'disk':
                self.set_space(LARGE)
            clear = run.returncode == 0 or (
                run.returncode == 2
                and ('cannot be written' in output or 'cannot write' in output or '[Errno' in output)
            )
            self.count(kind, 'full' if run.returncode else 'enough', clear, output)
            return run.returncode == 0
        self.wait(run, folder)
        if run.poll() is not None:
            output, _ = run.communicate()
            return self.ended(run, output, folder)
        if kind == 'signals':
            for number in random.choices(STOPS, k=2):
                if run.poll() is None:
                    run.send_signal(number)
                time.sleep(random.uniform(0, 1.2))
            output, _ = run.communicate(timeout=120)
            clear = run.returncode in CODES and 'Traceback' not in output
            self.count(kind, f'exit code {run.returncode}', clear, output)
            return run.returncode == 0
        run.kill()
        run.communicate()
        self.count(kind, 'done')
        files = [file for file in folder.rglob('*') if file.is_file() and file.stat().st_size]
        if kind == 'flip' and files:
            self.flip(random.choice(files), folder)
        return False

    def ended(self, run: Forked, output: str, folder: Path) -> bool:
        """Check how a run ended by itself."""
        if run.returncode == 0:
            return True
        self.count('start', f'exit code {run.returncode}', False, output)
        return True

    def flip(self, file: Path, folder: Path) -> None:
        """Flip bits of a file, continue the run, and put the file back if nothing replaced it."""
        whole = file.read_bytes()
        changed = flip(random.Random(random.random()), whole)
        file.write_bytes(changed)
        run = self.start(folder)
        output, _ = run.communicate(timeout=300)
        refused = run.returncode == 2 and ('damaged' in output or 'cannot be read' in output)
        name = 'state' if file.suffix == '.pt' else file.name
        if refused or 'skipped' in output:
            self.count('flip', f'{name}: {"refused" if refused else "skipped"}')
        elif file.exists() and file.read_bytes() == changed and file.name in ('config.json', 'model.safetensors'):
            try:
                load_trained(str(folder))
                self.count('flip', f'{name}: accepted', False, output)
            except CheckpointError:
                self.count('flip', f'{name}: refused')
        else:
            self.count('flip', f'{name}: no effect', run.returncode == 0, output)
        if file.exists() and file.read_bytes() == changed:
            file.write_bytes(whole)

    def count(self, kind: str, what: str, right: bool = True, output: str = '') -> None:
        """Count an outcome; print it if it is wrong."""
        self.counts[f'{kind}: {what}'] += 1
        if not right:
            self.counts['WRONG'] += 1
            print(f'WRONG: {kind}: {what}\n{output[-2000:]}', flush=True)


def main(argv: list[str] | None = None) -> int:
    """Return the number of wrong outcomes."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--harms', type=int, default=200)
    parser.add_argument('--kinds', nargs='+', choices=KINDS, default=KINDS)
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--disk', action='store_true')
    parser.add_argument('--old', action='store_true')
    parser.add_argument('--seed', type=int, default=0)
    given = parser.parse_args(argv)
    random.seed(given.seed)
    room = Path(tempfile.mkdtemp())
    torture = Torture(given, room)
    begun, done, runs = time.monotonic(), 0, 0
    try:
        unbroken = torture.prepare(room / 'runs' / 'unbroken')
        finish(torture.start(unbroken))
        while done < given.harms:
            folder, harms = torture.prepare(room / 'runs' / f'run{runs}'), 0
            ended = False
            while not ended:
                ended = torture.harm(random.choice(torture.kinds), folder)
                harms += not ended
            runs, done = runs + 1, done + harms
            same = same_run(folder, unbroken)
            torture.count('run', 'equal' if same else 'DIFFERENT', same)
            print(
                f'run {runs}: {harms} harms, {"equal" if same else "DIFFERENT"}; {done} in '
                f'{time.monotonic() - begun:.0f} s',
                flush=True,
            )
            shutil.rmtree(folder)
        for name, count in sorted(torture.counts.items()):
            print(f'{count:6} {name}')
    finally:
        torture.close()
        shutil.rmtree(room)
    print(f'{done} harms, {runs} runs, {torture.counts["WRONG"]} wrong outcomes')
    return torture.counts['WRONG']


if __name__ == '__main__':
    sys.exit(main() > 0)
