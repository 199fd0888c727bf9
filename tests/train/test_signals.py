"""Test that the first signal saves, also while the run waits for images, and the second ends the process."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import SHORT, digits_config, same_run
from PIL import Image
from test_survival import FORKS

from t2t_vit.data import DataError, waiting
from t2t_vit.data.batches import epoch_order
from t2t_vit.data.waiting import DataWatch, Stalled
from t2t_vit.scoring import score
from t2t_vit.train import run, trainer
from t2t_vit.train.run import train
from t2t_vit.train.signals import INTERRUPTED, RESTART, Interrupted, WaitInterrupted, stop_signals
from t2t_vit.train.state import load_state


def test_first_signal_is_noted():
    with stop_signals() as signals:
        assert not signals
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(signals) == [signal.SIGTERM] and signals.code == RESTART
        os.kill(os.getpid(), signal.SIGINT)  # at once: a launcher that passes on what a terminal sent too
        assert signals.code == INTERRUPTED


def test_signal_ends_a_wait():
    with stop_signals() as signals:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        try:
            with pytest.raises(WaitInterrupted), signals.interrupt_waiting():
                time.sleep(20)
        finally:
            signal.signal(signal.SIGALRM, before)
        with pytest.raises(WaitInterrupted), signals.interrupt_waiting():
            raise AssertionError('a wait must not begin after a signal')


@pytest.mark.parametrize(
    'pair, code',
    [
        (('SIGTERM', 'SIGTERM'), RESTART),
        (('SIGUSR1', 'SIGTERM'), RESTART),
        (('SIGINT', 'SIGINT'), INTERRUPTED),
        (('SIGTERM', 'SIGINT'), INTERRUPTED),
    ],
)
def test_second_signal_ends_the_process(pair, code):
    """Block the main thread in a call that never returns to Python."""
    script = textwrap.dedent("""
        import ctypes, signal
        from t2t_vit.train.signals import stop_signals
        with stop_signals():
            print('ready', flush=True)
            mutex = ctypes.create_string_buffer(128)
            while True:
                ctypes.CDLL(None).pthread_mutex_lock(mutex)  # the second time it waits for ever
    """)
    process = subprocess.Popen(
        [sys.executable, '-c', script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == 'ready\n'
    process.send_signal(getattr(signal, pair[0]))
    time.sleep(0.8)
    assert process.poll() is None
    process.send_signal(getattr(signal, pair[1]))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code and 'second signal' in errors


# waiting for images


class Slow:
    """A source whose last image of the first epoch hangs once the file `hanging` exists."""

    classes = ['a', 'b']

    def __init__(self, hanging: Path) -> None:
        self.labels, self.hanging = [0, 1] * 8, hanging
        self.last = int(epoch_order(16, digits_config().seed, 0)[-1])

    def open(self, index: int) -> Image.Image:
        if index == self.last and self.hanging.exists():
            time.sleep(1000)
        return Image.new('L', (16, 16), 15 * index)

    def name(self, index: int) -> str:
        return f'slow/{index}'


def slow_source(setattr, hanging):
    """Let `train` read from a source that hangs in the first epoch, after the time of a few steps was measured."""
    train_epoch = run.train_epoch
    setattr(trainer, 'open_train_val', lambda *_, **__: (Slow(hanging), Slow(hanging), None))
    setattr(run, 'train_epoch', lambda *args: (hanging.touch(), train_epoch(*args)))


@pytest.fixture
def slow_training(monkeypatch, tmp_path):
    slow_source(monkeypatch.setattr, tmp_path / 'hanging')


def slow_config(folder, **changes):
    changes = {'data.memory': False, 'augment.rotate': 0, 'batch_size': 2, 'save_minutes': 10, **SHORT, **changes}
    return digits_config(output=str(folder), **changes)


def once(condition, act):
    """Call `act` 2 s after `condition` holds, but never when a signal would end the tests."""
    handler = signal.getsignal(signal.SIGTERM)

    def watch():
        for _ in range(1200):
            if condition() and signal.getsignal(signal.SIGTERM) is not handler:
                time.sleep(2)
                if signal.getsignal(signal.SIGTERM) is not handler:
                    act()
                return
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize('workers', [0, 1])
def test_signal_while_training_waits_for_images_saves(tmp_path, slow_training, workers):
    once((tmp_path / 'hanging').exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match='the state is saved in .*step-0000000') as stop:
        train(slow_config(tmp_path / 'run', **{'data.workers': workers}))
    state = load_state(tmp_path / 'run' / 'checkpoints')[0]
    assert stop.value.code == RESTART and state and state['position']['step'] == 7  # all steps but the last
    assert state['damaged'] == []


@pytest.mark.parametrize('workers, name, code', [(0, 'SIGINT', INTERRUPTED), (1, 'SIGTERM', RESTART)])
def test_signal_while_the_first_steps_are_measured_stops_and_writes_nothing(
    tmp_path, slow_training, workers, name, code
):
    hanging = tmp_path / 'hanging'
    hanging.touch()
    config = slow_config(tmp_path / 'run', batch_size=16, **{'data.workers': workers})
    once(lambda: True, lambda: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(Interrupted, match='stopped before the first step, nothing is lost') as stop:
        train(config)
    assert stop.value.code == code and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('workers', [0, 1])
def test_source_that_does_not_answer_stops_the_run_and_is_named(tmp_path, slow_training, workers, monkeypatch, capsys):
    monkeypatch.setattr(waiting, 'FIRST_NOTE', 1.0)
    with pytest.raises(
        Stalled, match=r'no images for 2 s: one of slow/\d+, slow/\d+ does not answer; the state is saved in .*00007.pt'
    ):
        train(slow_config(tmp_path / 'run', **{'data.workers': workers, 'data.timeout': 2.0}))
    said = ' '.join(capsys.readouterr().out.split())
    assert 'waiting: no images for 1 s: one of slow/' in said and 'stops after 2 s (data.timeout)' in said
    assert load_state(tmp_path / 'run' / 'checkpoints')[0]


def test_source_that_does_not_answer_while_steps_are_measured_is_named(tmp_path, slow_training):
    (tmp_path / 'hanging').touch()
    config = slow_config(tmp_path / 'run', batch_size=16, **{'data.workers': 0, 'data.timeout': 2.0})
    with pytest.raises(Stalled, match=r'no images for 2 s: one of slow/\d+, slow/\d+, slow/\d+ and 13 more does not'):
        train(config)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('signalled', [False, True])
def test_source_that_does_not_answer_while_it_is_read_into_memory_is_named(tmp_path, slow_training, signalled):
    (tmp_path / 'hanging').touch()
    timeout = 60.0 if signalled else 2.0
    config = slow_config(tmp_path / 'run', **{'data.memory': True, 'data.timeout': timeout})
    if signalled:
        once(lambda: True, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match='stopped before the first step, nothing is lost'):
            train(config)
    else:
        with pytest.raises(Stalled, match=rf'no images for 2 s: one of slow/{Slow(tmp_path).last} does not answer'):
            train(config)
    assert not (tmp_path / 'run').exists()


def test_killed_data_worker_is_named(tmp_path, slow_training):
    def kill_workers():
        for process in multiprocessing.active_children():
            if process.daemon:  # as DataLoader starts them
                process.kill()

    once((tmp_path / 'hanging').exists, kill_workers)
    with pytest.raises(DataError, match='a process that opens images died: .*fewer workers'):
        train(slow_config(tmp_path / 'run', **{'data.workers': 1}))


# several processes


def train_slowly(folder, rank, port):
    """Train as one of two processes; only the second one waits for an image that does not come."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        LOCAL_WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    slow_source(setattr, folder / 'hanging')
    try:
        train(slow_config(folder / 'run', batch_size=4, **{'data.workers': 0}))
    except Interrupted as stop:
        (folder / f'said-{rank}').write_text(str(stop))
        sys.exit(stop.code)


@pytest.mark.timeout(300)
def test_signal_saves_while_one_of_two_processes_waits_for_images(tmp_path):
    """Let the second process wait, and the first one wait for it in the exchange of gradients."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    processes = [FORKS.Process(target=train_slowly, args=(tmp_path, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    while not (tmp_path / 'hanging').exists() and all(process.is_alive() for process in processes):
        time.sleep(0.1)
    time.sleep(3)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [RESTART, RESTART]
    assert 'the state is saved in' in (tmp_path / 'said-0').read_text()
    state = load_state(tmp_path / 'run' / 'checkpoints')[0]
    assert state['position']['step'] == 3 and state['processes'] == 2


def test_wait_ends_soon_after_a_request_that_needs_an_agreement(monkeypatch):
    monkeypatch.setattr(waiting, 'ASKED', 0.2)
    asked: list[int] = []
    watch = DataWatch(say=str, asked=lambda: len(asked))
    began = time.monotonic()
    with watch.active(), pytest.raises(Stalled, match='one of a, b does not answer'), watch.waiting(lambda: 'a, b'):
        asked.append(1)
        time.sleep(20)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize('call', [1, 2], ids=['weights', 'average'])
def test_signal_during_validation_is_exact(digits_run, tmp_path, monkeypatch, call):
    """Send the signal before a score; the resumed run computes the missing scores."""
    calls: list[int] = []

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*args)

    config = digits_config(output=str(tmp_path))
    with monkeypatch.context() as context:
        context.setattr(trainer, 'score', stopping)
        with pytest.raises(Interrupted, match='step-00000005') as stop:
            train(config)
    assert stop.value.code == RESTART and len(calls) == call
    train(config, resume='auto')
    assert same_run(tmp_path, digits_run)


def test_interrupt_of_the_whole_process_group_saves(photos, tmp_path):
    """Send Ctrl-C as a terminal does, to the run and its data workers."""
    run = subprocess.Popen(
        [
            sys.executable,
            '-m',
            't2t_vit.cli',
            'train',
            '--recipe',
            'small-images',
            '--data.root',
            str(photos),
            '--batch_size',
            '4',
            '--model_args.depth',
            '1',
            '--data.memory',
            'false',
            '--output',
            str(tmp_path / 'run'),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 130, output
    assert f'continue with --resume {tmp_path / "run"}' in output and 'Traceback' not in output
    assert load_state(tmp_path / 'run' / 'checkpoints')[0]['position']['epoch'] >= 1


def test_training_works_in_another_thread(tmp_path):
    """Train in a thread, where Python delivers no signals."""
    results: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: results.append(train(digits_config(output=str(tmp_path), **SHORT))))
    thread.start()
    thread.join()
    assert results[0]['epoch'] == 0
