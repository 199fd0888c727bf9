"""Signals: the first saves, also while waiting for images; the second ends the process."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from conftest import digits_config
from PIL import Image
from test_run import SHORT

from t2t_vit.data import DataError
from t2t_vit.train import run, trainer, waiting
from t2t_vit.train.measure import Measured
from t2t_vit.train.run import train
from t2t_vit.train.signals import INTERRUPTED, RESTART, Interrupted, WaitInterrupted, stop_signals
from t2t_vit.train.state import load_state
from t2t_vit.train.waiting import Stalled


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
    """Also while the main thread is inside a call that never returns to Python."""
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
    """A source whose sixth image does not come."""

    classes = ['a', 'b']

    def __init__(self) -> None:
        self.labels = [0, 1] * 8

    def open(self, index: int) -> Image.Image:
        if index == 5:
            time.sleep(1000)
        return Image.new('L', (16, 16), 15 * index)

    def name(self, index: int) -> str:
        return f'slow/{index}'


@pytest.fixture
def slow_training(monkeypatch):
    """Let `train` read from a source that hangs in the middle of the first epoch."""
    monkeypatch.setattr(trainer, 'open_train_val', lambda *_, **__: (Slow(), Slow(), None), raising=False)
    monkeypatch.setattr(trainer, 'open_source', lambda *_, **__: Slow(), raising=False)
    monkeypatch.setattr(trainer, 'measure_input', lambda *_: 0.0)
    monkeypatch.setattr(run, 'measure', lambda _: Measured(1.0, 8.0, 0, 0, 1))  # it would read the slow image


def slow_config(folder, **changes):
    changes = {'data.memory': False, 'augment.rotate': 0, 'batch_size': 2, 'save_minutes': 10, **SHORT, **changes}
    return digits_config(output=str(folder), **changes)


def once_training(act):
    """Call `act` 3 s after the run handles signals; never before, when a signal would end the tests."""
    handler = signal.getsignal(signal.SIGTERM)

    def watch():
        for _ in range(1200):
            if signal.getsignal(signal.SIGTERM) is not handler:
                time.sleep(3)
                if signal.getsignal(signal.SIGTERM) is not handler:
                    act()
                return
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize('workers', [0, 1])
def test_signal_is_answered_while_waiting_for_images(tmp_path, slow_training, workers):
    once_training(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match='the state is saved in .*step-0000000'):
        train(slow_config(tmp_path / 'run', **{'data.workers': workers}))
    state = load_state(tmp_path / 'run' / 'checkpoints')[0]
    assert state and 0 < state['position']['step'] < 8  # whole steps, up to the image that did not come
    assert state['damaged'] == []


@pytest.mark.parametrize('workers', [0, 1])
def test_source_that_does_not_answer_stops_the_run_and_is_named(tmp_path, slow_training, workers, monkeypatch, capsys):
    monkeypatch.setattr(waiting, 'FIRST_NOTE', 1.0)
    with pytest.raises(
        Stalled, match=r'no images for 2 s: one of slow/\d+, slow/\d+ does not answer; the state is sav'
    ):
        train(slow_config(tmp_path / 'run', **{'data.workers': workers, 'data.timeout': 2.0}))
    assert 'waiting: no images for 1 s: one of slow/' in capsys.readouterr().out
    assert load_state(tmp_path / 'run' / 'checkpoints')[0]


def test_killed_data_worker_is_named(tmp_path, slow_training):
    def kill_workers():
        for process in multiprocessing.active_children():
            if process.daemon:  # as DataLoader starts them
                process.kill()

    once_training(kill_workers)
    with pytest.raises(DataError, match='a process that opens images died: .*fewer data.workers'):
        train(slow_config(tmp_path / 'run', **{'data.workers': 1}))
