"""Test that a run survives kills, preemption, full disks, lost processes and steps that are not finite."""

import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHORT, SMALLER, digits_config, records, same_run

from t2t_vit.cli import main
from t2t_vit.models.safe_load import CheckpointError
from t2t_vit.train.run import train
from t2t_vit.train.signals import RESTART
from t2t_vit.train.state import Position, load_state, save_state, saved_states
from t2t_vit.train.tasks import Classify
from t2t_vit.train.trainer import Diverged

OPTIONS = [
    'train',
    '--recipe',
    'digits',
    '--batch_size',
    '256',
    '--epochs',
    '3',
    '--optimizer.warmup_epochs',
    '1',
    '--save_minutes',
    '0',
    '--model_args.drop_path_rate',
    '0.1',
    *(word for key, value in SMALLER.items() for word in (f'--model_args.{key}', str(value))),
]

LOUD = ['--augment.mixup', '0.8', '--augment.cutmix', '1.0']  # each process draws for itself
DISK = [*LOUD, '--data.memory', 'false', '--data.workers', '2', '--augment.rotate', '0', '--augment.reprob', '0.25']
QUIET = [
    '--epochs',
    '1',
    '--optimizer.warmup_epochs',
    '0',
    '--model_args.token_layer',
    'transformer',
    '--model_args.drop_path_rate',
    '0',
]
FORKS = multiprocessing.get_context('forkserver')  # a process that has imported torch, and forks: seconds a start
FORKS.set_forkserver_preload(['pytest', 't2t_vit.train.run'])


class Forked:
    """Run `t2t-vit WORDS` in a new process, or several that train together, with the methods of subprocess.Popen."""

    def __init__(self, words: Sequence[str], log: Path, processes: int = 1, limit: int | None = None) -> None:
        self.logs = [log, *(log.with_name(f'{log.name}.{rank}') for rank in range(1, processes))]
        with socket.create_server(('127.0.0.1', 0)) as free:
            port = free.getsockname()[1]
        together = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        self.processes = [
            FORKS.Process(
                target=run_forked,
                args=(
                    list(words),
                    self.logs[rank],
                    dict(together, RANK=rank, LOCAL_RANK=rank) if processes > 1 else {},
                    limit,
                ),
            )
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    @property
    def returncode(self) -> int | None:
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the workers that open images, which would end later

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        for process in self.processes:
            process.join(timeout)
        assert self.poll() is not None, 'it does not end'
        return ''.join(log.read_text() for log in self.logs if log.exists()), None


def run_forked(words: list[str], log: Path, environment: dict[str, object], limit: int | None) -> None:
    os.setsid()
    if limit:  # bytes that a file may have
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    os.environ.update({key: str(value) for key, value in environment.items()})
    multiprocessing.set_start_method('fork', force=True)  # for what opens images, as it is for the command
    with log.open('w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(main(words))


def options(folder: Path, *words: str) -> list[str]:
    """Return options that save after every step."""
    return [*OPTIONS, '--output', str(folder), '--resume', 'auto', *words]


def start(folder: Path, *words: str, processes: int = 1) -> Forked:
    """Run the command line in new processes."""
    folder.parent.mkdir(exist_ok=True)
    return Forked(options(folder, *words), folder.parent / f'{folder.name}.log', processes)


def launch(folder: Path, *words: str) -> 'subprocess.Popen[str]':
    """Run the command line under an elastic launcher: two processes, restarts for two losses."""
    return subprocess.Popen(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            '2',
            '--max_restarts',
            '2',
            '--monitor_interval',
            '0.2',
            '-m',
            't2t_vit.cli',
            *options(folder, *words),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )


def wait_for_step(folder: Path, step: int, run: Any) -> None:
    while run.poll() is None and not any(
        int(file.stem.split('-')[1]) >= step for file in saved_states(folder / 'checkpoints')
    ):
        time.sleep(0.005)


def finish(run: Any) -> str:
    output, _ = run.communicate(timeout=800)
    assert run.returncode == 0, output
    return output


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('unbroken') / 'run'
    finish(start(folder))
    return folder


def test_killed_run_resumes_exactly(unbroken, tmp_path):
    """Kill a run in the first and the third epoch; torture.py does it at random moments."""
    for step in (2, 12):
        run = start(tmp_path / 'run')
        wait_for_step(tmp_path / 'run', step, run)
        run.kill()
        run.communicate()
    output = finish(start(tmp_path / 'run'))
    assert 'from epoch 3, step' in output
    assert same_run(tmp_path / 'run', unbroken)


def workers(run: 'subprocess.Popen[str]') -> list[int]:
    """Return the processes that an elastic launcher has started."""
    return [int(pid) for pid in Path(f'/proc/{run.pid}/task/{run.pid}/children').read_text().split()]


@pytest.fixture(scope='module')
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with two processes, with mixup and dropout."""
    folder = tmp_path_factory.mktemp('pair') / 'run'
    finish(start(folder, *LOUD, processes=2))
    return folder


@pytest.mark.timeout(900)  # six starts of torch, on a machine that may be busy
@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='finds processes as Linux lists them')
def test_launcher_restarts_both_processes_after_one_is_lost(pair, tmp_path):
    """Kill one process twice; both continue from the last state."""
    run = launch(tmp_path / 'parts', *LOUD)
    for step in (4, 9):
        wait_for_step(tmp_path / 'parts', step, run)
        os.kill(workers(run)[-1], signal.SIGKILL)
    output = finish(run)
    assert output.count('model     t2t_vit_4_16') == 3
    assert same_run(tmp_path / 'parts', pair)


def test_two_processes_train_as_one(tmp_path):
    """Compare one process with two, without random numbers inside a step: equal except for rounding."""
    for processes, name in ((1, 'one'), (2, 'pair')):
        finish(start(tmp_path / name, *QUIET, processes=processes))
    for a, b in zip(records(tmp_path / 'one'), records(tmp_path / 'pair')):
        assert a.keys() == b.keys()
        assert a['train_loss'] == pytest.approx(b['train_loss'], rel=1e-3)
        assert a['val_top1'] == pytest.approx(b['val_top1'], abs=0.02) and b['train_loss'] < 3
        assert a['val_loss'] == pytest.approx(b['val_loss'], rel=1e-3)


def test_preempted_run_resumes_exactly(unbroken, tmp_path):
    run = start(tmp_path / 'run')
    wait_for_step(tmp_path / 'run', 3, run)
    run.send_signal(signal.SIGUSR1)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == RESTART and 'continue with --resume' in output and 'Traceback' not in output
    finish(start(tmp_path / 'run'))
    assert same_run(tmp_path / 'run', unbroken)


def test_resume_from_a_state_file_into_another_folder(unbroken, tmp_path):
    """Check that the configuration in the state file is used."""
    run = start(tmp_path / 'first')
    wait_for_step(tmp_path / 'first', 6, run)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == RESTART
    state = saved_states(tmp_path / 'first' / 'checkpoints')[0]
    finish(Forked(['train', '--resume', str(state), '--output', str(tmp_path / 'second')], tmp_path / 'log'))
    assert same_run(tmp_path / 'second', unbroken)


# states


def test_only_damaged_states_are_refused(tmp_path):
    for step in 3, 5:
        (tmp_path / f'step-{step:08}.pt').write_bytes(b'PK torn')
    with pytest.raises(CheckpointError, match='no state can be read: .*00005.pt.*00003.pt'):
        load_state(tmp_path)


def test_last_states_are_kept(tmp_path):
    for step in range(5, 20, 5):
        save_state(tmp_path, {'position': vars(Position(epoch=step)), 'config': {}}, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['step-00000010.pt', 'step-00000015.pt']
    assert load_state(tmp_path)[0]['position']['epoch'] == 15


@pytest.fixture
def full_disk():
    """No file may grow beyond 200 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_the_last_good_state(tmp_path, full_disk):
    save_state(tmp_path, {'position': {}, 'config': {}, 'model': torch.zeros(10)}, 1, keep=1)
    with pytest.raises(OSError, match=f'the state cannot be written to {tmp_path}: .*'):
        save_state(tmp_path, {'position': {}, 'config': {}, 'model': torch.zeros(100_000)}, 2, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001.pt']
    assert load_state(tmp_path)[0]['model'].shape == (10,)


@pytest.mark.parametrize('minutes, what', [(0, 'state'), (10, 'model')])
def test_full_disk_ends_a_run_with_a_message(tmp_path, full_disk, minutes, what):
    with pytest.raises(OSError, match=f'the {what} cannot be written'):
        train(digits_config(output=str(tmp_path), save_minutes=minutes))
    assert not [file for file in tmp_path.rglob('*') if file.suffix in ('.pt', '.safetensors')]


# steps


def spoil(monkeypatch, steps):
    """Make the loss NaN in these steps."""
    forward, made = Classify.forward, []

    def spoiled(task, batch):
        made.append(1)
        return forward(task, batch) * (float('nan') if len(made) - 5 in steps else 1)  # five are measured before

    monkeypatch.setattr(Classify, 'forward', spoiled)


def test_step_without_finite_gradient_is_skipped(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {2, 3, 5})
    record = train(digits_config(output=str(tmp_path), max_skipped_steps=3, **SHORT))
    assert record['skipped'] == 3 and record['train_loss'] < 3
    assert '3 steps were skipped' in capsys.readouterr().out
    model = load_state(tmp_path / 'checkpoints')[0]['model']
    assert all(value.isfinite().all() for value in model.values())


def test_too_many_skipped_steps_stop_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, range(7, 99))
    with pytest.raises(Diverged, match='not finite in 3 steps in a row, the last of them step 4 of epoch 2 .*nan'):
        train(digits_config(output=str(tmp_path), max_skipped_steps=3))
    assert load_state(tmp_path / 'checkpoints')[0]['position']['epoch'] == 1


# micro-batches


def test_micro_batches_give_the_same_step(tmp_path):
    """Compare one micro-batch with four: equal except for rounding."""
    quiet = {'model_args.token_layer': 'transformer', **SHORT}
    for parts in 1, 4:
        train(digits_config(output=str(tmp_path / str(parts)), accumulate=parts, **quiet))
    one, four = (records(tmp_path / name)[0] for name in '14')
    assert one['train_loss'] == pytest.approx(four['train_loss'], rel=1e-4)
    assert one['val_loss'] == pytest.approx(four['val_loss'], rel=1e-3)
