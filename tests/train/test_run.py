"""Runs: what they leave, that they repeat bit for bit, also when cut short, and what stops them."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from conftest import PHOTOS, SHORT, SMALLER, digits_config, read_records, records, same_run
from rich.console import Console
from safetensors.torch import load_file

from t2t_vit.console import duration
from t2t_vit.data import Batch, DataError, Digits, DiskBatches, MemoryBatches, find_images, printable
from t2t_vit.scoring import score
from t2t_vit.settings import UsageError
from t2t_vit.train import resume, trainer
from t2t_vit.train import run as running
from t2t_vit.train.log import Log
from t2t_vit.train.resume import check_same_start, find_start
from t2t_vit.train.run import train
from t2t_vit.train.short_runs import scale_to_data
from t2t_vit.train.signals import RESTART, Interrupted
from t2t_vit.train.state import load_state, read_state, saved_states
from t2t_vit.train.trainer import Trainer, load

GREY_PHOTOS = {'data.channels': 1, 'augment.rotate': 0}


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ctrl-C in the middle of a step."""
    step, made = Trainer.step, []

    def stopping(run: Trainer, batch: Batch) -> float:
        made.append(1)
        if len(made) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, batch)

    monkeypatch.setattr(Trainer, 'step', stopping)


# what a run leaves


def test_run_folder_has_all_files(digits_run):
    assert {str(p.relative_to(digits_run)) for p in digits_run.rglob('*') if p.is_file()} >= {
        'config.yaml',
        'config.json',
        'model.safetensors',
        'README.md',
        'metrics.jsonl',
        'curves.png',
        'checkpoints/step-00000005.pt',
        'checkpoints/step-00000010.pt',
    }
    assert matplotlib.image.imread(digits_run / 'curves.png').std() > 0


@pytest.mark.parametrize('seconds, drawings', [(0, [1, 2, 3]), (3600, [1, 3])], ids=['every epoch', 'first and last'])
def test_curves_are_drawn_at_intervals_and_at_the_end(tmp_path, monkeypatch, seconds, drawings):
    made: list[int] = []
    monkeypatch.setattr(running, 'DRAW_SECONDS', seconds)
    monkeypatch.setattr(running, 'plot_curves', lambda records, path: made.append(len(records)))
    train(digits_config(output=str(tmp_path), epochs=3, **{'optimizer.warmup_epochs': 0}))
    assert made == drawings


def test_records_of_every_epoch(digits_run):
    found = read_records(digits_run / 'metrics.jsonl')
    assert [record['epoch'] for record in found] == [0, 1]
    assert found[1]['train_loss'] < found[0]['train_loss'] < 3
    assert all(0 <= record['val_top1'] <= record['val_top5'] <= 1 for record in found)


def test_config_yaml_repeats_the_run(digits_run, tmp_path):
    config = yaml.safe_load((digits_run / 'config.yaml').read_text())
    assert config.pop('output') == str(digits_run)
    assert config == {key: value for key, value in yaml.safe_load(digits_config().to_yaml()).items() if key != 'output'}


def test_run_folder_loads_in_timm(digits_run):
    model = timm.create_model(f'local-dir:{digits_run}', pretrained=True).eval()
    expected = timm.create_model('t2t_vit_4_16', in_chans=1, num_classes=10, **SMALLER).eval()
    expected.load_state_dict(load_file(digits_run / 'model.safetensors'))
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(model(images), expected(images))
    cfg = model.pretrained_cfg
    assert cfg['label_names'] == [str(i) for i in range(10)]
    assert (*cfg['input_size'], *cfg['mean'], *cfg['std']) == (1, 16, 16, 0.305, 0.376)


def test_run_folder_keeps_model_args(tmp_path):
    args = {'model_args.depth': 2, 'model_args.token_layer': 'convolution', 'data.img_size': [16, 24]}
    train(digits_config(output=str(tmp_path), **SHORT, **args))
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert (len(model.blocks), model.img_size) == (2, (16, 24))
    assert 'conv' in dict(model.tokens_to_token.attention1.named_children())


# the same again


def test_run_repeats_bit_for_bit(digits_run, tmp_path):
    train(digits_config(output=str(tmp_path)))
    assert same_run(tmp_path, digits_run)


def test_other_seed_gives_another_run(digits_run, tmp_path):
    train(digits_config(output=str(tmp_path), seed=1, **SHORT))
    assert records(tmp_path)[0]['train_loss'] != records(digits_run)[0]['train_loss']


@pytest.mark.parametrize('steps', [2, 5, 8], ids=['second step', 'last of an epoch', 'middle of the second'])
def test_interrupted_run_resumes_exactly(digits_run, tmp_path, monkeypatch, steps):
    config = digits_config(output=str(tmp_path))
    with monkeypatch.context() as context, pytest.raises(Interrupted, match='continue with --resume') as stop:
        stop_after(context, steps)
        train(config)
    assert str(tmp_path / 'checkpoints' / f'step-{steps:08}.pt') in str(stop.value) and stop.value.code == 130
    train(config, resume=str(tmp_path))
    assert same_run(tmp_path, digits_run)


@pytest.mark.parametrize('call', [1, 2], ids=['weights', 'average'])
def test_signal_during_validation_is_exact(digits_run, tmp_path, monkeypatch, call):
    """It does not wait for the next step: what is not scored yet, the resumed run scores."""
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


def test_resume_is_exact_with_all_randomness(photos, tmp_path, monkeypatch):
    random = {
        **PHOTOS,
        'data.root': str(photos),
        'data.memory': False,
        'batch_size': 8,
        'augment.mixup': 0.8,
        'augment.cutmix': 1.0,
        'augment.reprob': 0.5,
        'augment.aa': 'rand-m9-mstd0.5-inc1',
        'model_args.drop_path_rate': 0.2,
        'model_args.drop_rate': 0.2,
    }
    train(digits_config(output=str(tmp_path / 'whole'), **random))
    config = digits_config(output=str(tmp_path / 'parts'), **random)
    with monkeypatch.context() as context, pytest.raises(Interrupted):
        stop_after(context, 5)
        train(config)
    train(config, resume=str(tmp_path / 'parts'))
    assert same_run(tmp_path / 'parts', tmp_path / 'whole')


def test_resume_with_more_epochs_follows_their_schedule(digits_run, tmp_path):
    """The schedule is that of all epochs from the first resumed step on, not the old one begun anew."""
    config = digits_config(output=str(tmp_path), epochs=3)
    rates = []
    for state in (None, read_state(digits_run / 'checkpoints' / 'step-00000010.pt')):
        run = load(config, tmp_path, state, Accelerator(cpu=True))
        run.parts.schedule.step_update(11)
        rates.append([group['lr'] for group in run.parts.optimizer.param_groups])
    assert rates[0] == rates[1] and rates[0][0] < 1e-3


def test_truncated_state_is_skipped(digits_run, tmp_path, capsys):
    config = digits_config(output=str(tmp_path))
    train(config)
    last = saved_states(tmp_path / 'checkpoints')[0]
    last.write_bytes(last.read_bytes()[:1000])
    train(config, resume=str(tmp_path))
    assert f'skipped {last} cannot be read' in ' '.join(capsys.readouterr().out.split())
    assert same_run(tmp_path, digits_run)


def test_resuming_a_finished_run_changes_nothing(digits_run, tmp_path):
    config = digits_config(output=str(tmp_path))
    record = train(config)
    assert train(config, resume=str(tmp_path)) == record
    assert same_run(tmp_path, digits_run)


def test_interrupt_of_the_whole_process_group_saves(photos, tmp_path):
    """As a terminal does it, with workers under way."""
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
    """Which receives no signals."""
    results: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: results.append(train(digits_config(output=str(tmp_path), **SHORT))))
    thread.start()
    thread.join()
    assert results[0]['epoch'] == 0


# what it can be made of


@pytest.mark.parametrize(
    'changes',
    [
        {'augment.mixup': 0.8, 'augment.cutmix': 1.0},
        {'precision': 'bf16'},
        {'ema_decay': 0},
        {'optimizer.layer_decay': 0.7, 'optimizer.clip_grad': 1.0},
        {'optimizer.name': 'sgd', 'epochs': 2, 'optimizer.cooldown_epochs': 1, 'optimizer.lr': 0.1},
        {'model': 'vit_tiny_patch16_224', 'model_args': {'depth': 1}, 'data.img_size': 16},
        {'model': 'test_convnext', 'model_args': {}, 'data.img_size': 32},
    ],
    ids=' '.join,
)
def test_options_train(tmp_path, changes):
    record = train(digits_config(output=str(tmp_path), **{**SHORT, **changes}))
    assert 0 < record['train_loss'] < 10
    assert ('val_top1_ema' in record) == ('ema_decay' not in changes)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).num_classes == 10


@pytest.mark.parametrize('source', ['photos', 'parquet'])
@pytest.mark.parametrize('memory', [False, True], ids=['disk', 'memory'])
def test_folder_and_parquet_train_from_disk_and_memory(request, tmp_path, source, memory):
    config = digits_config(
        output=str(tmp_path),
        batch_size=8,
        **SHORT,
        **PHOTOS,
        **{'data.root': str(request.getfixturevalue(source)), 'data.memory': memory},
    )
    run = load(config, tmp_path, None, Accelerator(cpu=True))
    assert type(run.data.train) is type(run.data.val) is (MemoryBatches if memory else DiskBatches)
    train(config)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).pretrained_cfg['label_names'] == [
        'flower',
        'roof',
        'sky',
    ]


def test_weights_of_a_run_are_loaded(digits_run, tmp_path):
    trained = digits_config(weights=str(digits_run), output=str(tmp_path), **SHORT)
    run = load(trained, tmp_path, None, Accelerator(cpu=True))
    for name, tensor in load_file(digits_run / 'model.safetensors').items():
        assert torch.equal(run.parts.net.state_dict()[name], tensor)
    assert train(trained)['epoch'] == 0


def test_weights_for_other_classes_load_without_head(digits_run, photos, tmp_path):
    weights = digits_run / 'model.safetensors'
    config = digits_config(batch_size=8, weights=str(weights), **GREY_PHOTOS, **{'data.root': str(photos)})
    run = load(config, tmp_path, None, Accelerator(cpu=True))
    expected, found = load_file(weights), run.parts.net.state_dict()
    assert found['head.weight'].shape == (3, 128)
    assert torch.equal(found['blocks.0.attn.qkv.weight'], expected['blocks.0.attn.qkv.weight'])


# what stops it


def test_new_run_in_a_folder_with_a_run_is_refused(digits_run):
    before = {p: p.read_bytes() for p in digits_run.rglob('*') if p.is_file()}
    with pytest.raises(UsageError, match=f'holds a run: continue it with --resume {digits_run}'):
        train(digits_config(output=str(digits_run)))
    assert {p: p.read_bytes() for p in digits_run.rglob('*') if p.is_file()} == before


def test_new_run_in_a_folder_with_a_model_is_refused(digits_run, tmp_path):
    (tmp_path / 'model.safetensors').write_bytes((digits_run / 'model.safetensors').read_bytes())
    with pytest.raises(UsageError, match='holds a run'):
        train(digits_config(output=str(tmp_path)))


def test_model_without_a_state_is_not_overwritten(digits_run, tmp_path):
    """As where checkpoints were deleted; a run that was cut off in its first validation begins again."""
    for name in ('model.safetensors', 'metrics.jsonl'):
        (tmp_path / name).write_bytes((digits_run / name).read_bytes())
    config = digits_config(output=str(tmp_path), **SHORT)
    with pytest.raises(UsageError, match=f'{tmp_path} holds a model but no state of its run .* --weights {tmp_path}'):
        train(config, resume='auto')
    (tmp_path / 'metrics.jsonl').write_text('')
    assert find_start(tmp_path, 'auto') == (None, tmp_path / 'checkpoints', [])


def test_resume_with_another_output_is_refused(digits_run, tmp_path):
    with pytest.raises(UsageError, match=f'output is {tmp_path}: leave out output, or resume from one of the files'):
        train(digits_config(output=str(tmp_path)), resume=str(digits_run))


def test_ranks_that_disagree_are_refused(monkeypatch):
    """As where hosts do not share the folder of the run."""
    config, ours = digits_config(), {'position': {'epoch': 0, 'step': 3}}
    for other, message in (
        ((config.to_yaml(), (0, 0)), 'starts in epoch 1, step 4, rank 1 in epoch 1, step 1; output must be'),
        ((digits_config(epochs=3).to_yaml(), (0, 3)), 'epochs is 2 in rank 0 and 3 in rank 1'),
    ):
        monkeypatch.setattr(resume, 'gather_object', lambda found, other=other: [*found, other])
        with pytest.raises(UsageError, match=message):
            check_same_start(config, ours)
    monkeypatch.setattr(
        resume,
        'gather_object',
        lambda found: [*found, (digits_config(**{'data.root': '/elsewhere', 'threads': 3}).to_yaml(), (0, 3))],
    )
    check_same_start(config, ours)


def test_resume_notes_another_number_of_processes(digits_run, tmp_path, capsys):
    shutil.copytree(digits_run, tmp_path / 'run')
    last = saved_states(tmp_path / 'run' / 'checkpoints')[0]
    torch.save({**read_state(last), 'processes': 2}, last)
    train(digits_config(), resume=str(tmp_path / 'run'), dry_run=True)
    assert 'note 1 processes continue a state of 2' in ' '.join(capsys.readouterr().out.split())


def test_single_class_is_refused(photos, tmp_path):
    for split in ('train', 'val'):
        (tmp_path / split).mkdir()
        (tmp_path / split / 'sky').symlink_to(photos / split / 'sky')
    with pytest.raises(DataError, match='of one class, sky'):
        train(digits_config(**PHOTOS, **{'data.root': str(tmp_path)}), dry_run=True)


def test_resume_of_a_folder_without_state_is_refused(tmp_path):
    with pytest.raises(UsageError, match='holds no state to resume from'):
        train(digits_config(), resume=str(tmp_path))


def test_resume_rejects_changed_settings(digits_run):
    changes = {'optimizer.lr': 0.1, 'model_args.drop_rate': 0.5, 'batch_size': 64, 'epochs': 9, 'data.workers': 0}
    with pytest.raises(UsageError) as error:
        train(digits_config(**changes), resume=str(digits_run))
    states = digits_run / 'checkpoints'
    assert str(error.value).splitlines() == [
        f'optimizer.lr is 0.002 in {states}, and cannot become 0.1 there',
        f'batch_size is 256 in {states}, and cannot become 64 there',
        f'model_args.drop_rate is None in {states}, and cannot become 0.5 there',
    ]


def test_validation_with_unknown_classes_is_refused(photos, tmp_path):
    for name in ('cat', 'dog'):
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        (tmp_path / 'data' / 'train' / name / '1.jpg').write_bytes(b'')
    (tmp_path / 'data' / 'val').symlink_to(photos / 'val')
    with pytest.raises(DataError, match='flower'):
        train(digits_config(output=str(tmp_path / 'run'), **{'data.root': str(tmp_path / 'data')}))
    assert not (tmp_path / 'run').exists()


def test_short_run_scales_its_settings_down(tmp_path, capsys):
    changes = {'epochs': 1, 'optimizer.warmup_epochs': 10, 'optimizer.cooldown_epochs': 10, 'optimizer.min_lr': 0.1}
    train(digits_config(output=str(tmp_path / 'run'), batch_size=2000, **changes))
    said = ' '.join(capsys.readouterr().out.split())
    for line in (
        'note batch_size 2000 reduced to 1437: there are 1,437 training images',
        'note warm-up reduced from 10 to 0 epochs and cooldown from 10 to 0: the run has 1',
        'note optimizer.min_lr reduced from 0.1 to 2e-05: lr is lower',
    ):
        assert line in said
    config = yaml.safe_load((tmp_path / 'run' / 'config.yaml').read_text())
    assert (config['batch_size'], config['optimizer']['warmup_epochs']) == (1437, 0)


def test_too_few_images_for_all_processes():
    config = digits_config(batch_size=8, grad_accum_steps=4)
    assert scale_to_data(config, 3) == (config, [])  # which open_data refuses
    assert scale_to_data(config, 6)[0].batch_size == 4


def test_mean_and_std_for_other_channels_are_refused():
    with pytest.raises(UsageError, match='a value for each of 1 channels'):
        train(digits_config(**{'data.mean': [0.1, 0.2], 'data.std': [1, 1]}))


# what it says


def test_damaged_images_are_counted_and_named(photos, tmp_path, capsys):
    (tmp_path / 'train').mkdir()
    for name in ('flower', 'roof', 'sky'):
        (tmp_path / 'train' / name).symlink_to(photos / 'train' / name)
        (tmp_path / 'val' / name).mkdir(parents=True)
        for file in (photos / 'val' / name).iterdir():
            (tmp_path / 'val' / name / file.name).symlink_to(file)
    odd = ['text\n1.jpg', *(f'text{i}.jpg' for i in range(4)), 'text\udce9.jpg']
    names = [str(tmp_path / 'val' / 'sky' / name) for name in odd]
    for name in names:
        Path(name).write_text('not an image')
    train(digits_config(output=str(tmp_path / 'run'), batch_size=8, **SHORT, **PHOTOS, **{'data.root': str(tmp_path)}))
    assert records(tmp_path / 'run')[0]['damaged'] == 6
    said = f'6 damaged images were left out: {", ".join(map(printable, names[:5]))}, …; all of them are named in '
    assert said + str(tmp_path / 'run' / 'damaged.txt') in capsys.readouterr().out
    listed = find_images([str(tmp_path / 'run' / 'damaged.txt')])
    assert [listed.name(i) for i in range(len(listed))] == names
    state = load_state(tmp_path / 'run' / 'checkpoints')[0]
    assert state['damaged'] == names  # a resumed run knows those of before
    run = load(
        digits_config(batch_size=8, **SHORT, **PHOTOS, **{'data.root': str(photos)}),
        tmp_path,
        state,
        Accelerator(cpu=True),
    )
    assert run.damaged() == names


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


def test_digits_train_in_colour(tmp_path):
    config = digits_config(**{'data.channels': 3, 'data.mean': None, 'data.std': None})
    run = load(config, tmp_path, None, Accelerator(cpu=True))
    images, labels, *_ = next(run.data.val.epoch())
    assert images.shape == (256, 3, 16, 16) and labels.tolist()[:5] == list(Digits('val').labels[:5])
