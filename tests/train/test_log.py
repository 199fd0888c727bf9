"""Test the output of a run: plan, table of epochs, progress."""

import io
import re

import pytest
from accelerate import Accelerator
from conftest import SHORT, digits_config
from rich.console import Console

from t2t_vit.console import duration
from t2t_vit.train import run as running
from t2t_vit.train.log import Log
from t2t_vit.train.run import train


def test_output_fits_80_columns_without_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setattr(running, 'Log', lambda folder, accelerator: Log(folder, accelerator, interval=0))
    train(digits_config(output='run', **SHORT))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == [
        'model     t2t_vit_4_16, 161,772 trainable parameters, images of 1x16x16 on cpu',
        'weights   from scratch',
        'data      digits: 1,437 training and 360 validation images, 10 classes, in',
        '          memory',
        'classes   training + validation images: 0 142+36, 1 146+36, 2 142+35, 3 146+37,',
        '          4 145+36, 5 145+37, 6 145+36, 7 143+36, 8 139+35, 9 144+36',
        'schedule  1 epochs of 5 steps, 5 in all',
    ]
    names = [line.split()[0] for line in lines if line[:1].isalpha()]
    assert names[5:14] == ['batch', 'optimizer', 'ema', 'warning', 'input', 'time', 'memory', 'run', 'warning']
    table = next(i for i, line in enumerate(lines) if line.startswith(' epoch  train loss  val loss'))
    steps = lines[table + 1 : table + 6]
    assert [line.split()[1] for line in steps] == ['1/5', '2/5', '3/5', '4/5', '5/5']
    assert all(word in steps[0] for word in ('epoch 1/1', 'loss', 'images/s', 'left'))
    assert re.fullmatch(r' +1 +[\d.]+ +[\d.]+ +[\d.]+ % +[\d.]+ % +[\d,]+ +\d+ % +\d+:\d\d \*', lines[table + 6])
    assert re.search(r'images/s \(alone: input [\d,]+, model [\d,]+\), limited by the', lines[table + 7])
    assert lines[table + 8].startswith('best top-1') and len(lines) == table + 9
    assert max(map(len, lines)) <= 80
    assert '\x1b' not in ''.join(lines)


def test_progress_bar_on_a_terminal(tmp_path):
    screen = io.StringIO()
    log = Log(tmp_path, Accelerator(cpu=True), Console(file=screen, force_terminal=True, width=120))
    with log.live(10, 3):
        log.step(4, 'epoch 1/2  loss 1.234  lr 1.0e-03  99 images/s')
    assert '\x1b[' in screen.getvalue() and '4/10' in screen.getvalue() and '99 images/s' in screen.getvalue()


@pytest.mark.parametrize('seconds, text', [(5, '0:05'), (65.9, '1:05'), (3723, '1:02:03')])
def test_duration(seconds, text):
    assert duration(seconds) == text
