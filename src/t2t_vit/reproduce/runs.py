"""Train the runs of a comparison, each in a new process; several processes and machines can share the folder.

A process locks a run while it trains it (filelock). The operating system drops the lock when the process dies, so
another one resumes the run from its last state. Machines that share a folder need a file system that passes on locks
(NFS does).
"""

import json
import math
import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .. import __version__
from ..benchmark import count_macs
from ..console import console
from ..timing import device_name
from ..train.config import Config
from ..train.run import train
from ..train.signals import RESTART, Interrupted, stop_signals
from ..train.state import git_revision
from ..trained import pick_device
from .arms import build_scaled
from .comparison import RESULT, Plan, read_arm, read_plan, run_config, run_folder, write_once

FAILED = 3  # exit code of a run that cannot be finished
LOCK_SECONDS = 2  # how long a process waits for a lock that another one may only be testing


def lock_of(run: Path) -> FileLock:
    """Return the lock of a run."""
    run.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(run.with_name(f'{run.name}.lock'))


def locked(run: Path) -> bool:
    """Return whether another process trains a run."""
    try:
        with lock_of(run).acquire(timeout=0):
            return False
    except Timeout:
        return True


def work(folder: Path, arm: str, seed: int, device: str, threads: int | None) -> None:
    """Train one run, from its last state if it has one; the exit code of the process says how it ended."""
    run = run_folder(folder, arm, seed)
    try:
        with lock_of(run).acquire(timeout=LOCK_SECONDS):
            if not settled(run):
                train_run(folder, arm, seed, run, device, threads)
    except Timeout:  # another process trains it
        return
    except Interrupted as stop:
        raise SystemExit(stop.code) from None
    except Exception as error:  # the other runs go on; a damaged installation fails in all of them
        traceback.print_exc()
        run.mkdir(parents=True, exist_ok=True)
        (run / 'failed.txt').write_text(f'{type(error).__name__}: {error}\n', encoding='utf-8')
        raise SystemExit(FAILED) from None


def train_run(folder: Path, arm: str, seed: int, run: Path, device: str, threads: int | None) -> None:
    """Train a run and write its result."""
    plan = read_plan(folder)
    row = read_arm(folder, arm)
    config = run_config(plan, folder, row['model'], row['args'], seed, run, device, threads)
    last = train(config, resume='auto')
    write_once(run / RESULT, json.dumps(result(plan, row, config, last) | dict(arm=arm), indent=1) + '\n')
    for state in (run / 'checkpoints').glob('*.pt'):  # large, and no longer needed
        state.unlink()


def result(plan: Plan, row: dict[str, Any], config: Config, last: dict[str, Any]) -> dict[str, Any]:
    """Return the scores after the last epoch, size, speed and conditions of a run."""
    run = Path(str(config.output))
    done = [json.loads(file.read_text(encoding='utf-8')) for file in run.parent.glob(f'*/{RESULT}')]
    macs, macs_weights = (
        (done[0]['macs'], done[0]['macs_weights'])
        if done
        else count_macs(build_scaled(row['model'], row['args'], plan.inputs), plan.img_size, plan.in_chans)
    )
    records = [json.loads(line) for line in (run / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    speeds = sorted(record['images_per_second'] for record in records)
    return dict(
        seed=config.seed,
        custom=row.get('custom', row.get('own', False)),
        top1=last['val_top1'],
        train_loss=last['train_loss'],
        val_loss=last['val_loss'],
        parameters=row['parameters'],
        macs=macs,
        macs_weights=macs_weights,
        images_per_second=speeds[len(speeds) // 2],
        images_seen=plan.images_seen,
        train_images=plan.count,
        val_images=plan.val_count,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        device=device_name(pick_device(config.device)),
        threads=torch.get_num_threads(),
        precision=plan.precision,
        torch=torch.__version__,
        version=__version__,
        revision=git_revision(),
    )


@contextmanager
def child(*args: Any) -> Iterator[Any]:
    """Start a process that calls `work`; on exit, tell it to save and stop, and wait for it."""
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
    if 'forkserver' in methods:
        context.set_forkserver_preload([__name__])  # so that the imports, which take seconds, are done once
    process = context.Process(target=work, args=args)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.terminate()
        process.join()


def train_all(
    folder: Path,
    names: list[str],
    seeds: int,
    device: str = 'auto',
    threads: int | None = None,
    minutes: float | None = None,
) -> bool:
    """Train all runs that no other process trains, the first seed of every arm first.

    Failed runs are skipped until their failed.txt is removed. Ctrl-C, SIGTERM and SIGUSR1 save the current run and
    stop.

    Args:
        folder: Folder of the comparison.
        names: Names of the arms.
        seeds: Number of seeds, from 0.
        device: As train's.
        threads: As train's.
        minutes: Save and stop after this time; no limit by default.

    Returns:
        Whether all runs are finished or have failed.
    """
    end = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    runs = [(arm, seed, run_folder(folder, arm, seed)) for seed in range(seeds) for arm in names]
    durations: list[float] = []
    with stop_signals() as stopped:
        for i, (arm, seed, run) in enumerate(runs):
            if settled(run) or locked(run):
                continue
            if stopped or time.monotonic() >= end:
                return False
            left = sum(not settled(run) for _, _, run in runs)
            console().print(f'run {i + 1} of {len(runs)}: {arm}, seed {seed}{time_left(durations, left)}')
            start = time.monotonic()
            with child(folder, arm, seed, device, threads) as process:
                while process.is_alive() and not stopped and time.monotonic() < end:
                    process.join(min(1.0, max(end - time.monotonic(), 0)))
            if process.exitcode in (
                RESTART,
                130,
                -signal.SIGTERM,
                -signal.SIGINT,
            ):  # the signal may reach the child only
                return False
            if process.exitcode not in (0, FAILED):  # such as out of memory: it would fail again
                write_once(run / 'failed.txt', f'its process ended with exit code {process.exitcode}\n')
            if (run / RESULT).exists():
                durations.append(time.monotonic() - start)
    return all(settled(run) for _, _, run in runs)


def time_left(durations: list[float], left: int) -> str:
    """Return the estimated time for `left` runs, from the mean duration of those that this process finished."""
    if not durations:
        return ''
    minutes = left * sum(durations) / len(durations) / 60
    text = f'{minutes / 60:.1f} h' if minutes >= 90 else f'{minutes:.0f} min' if minutes >= 1 else '1 min'
    return f'; {left} runs left, about {text} for one process'


def settled(run: Path) -> bool:
    """Return whether a run is finished or has failed."""
    return (run / RESULT).exists() or (run / 'failed.txt').exists()
