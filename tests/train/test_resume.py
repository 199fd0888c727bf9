"""Test resuming: exactness, damaged files, changed classes and settings, other versions, locks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import PHOTOS, SHORT, digits_config, read_records, records, same_run
from filelock import FileLock
from PIL import Image

from t2t_vit.cli import main
from t2t_vit.data import Batch
from t2t_vit.models.safe_load import CheckpointError
from t2t_vit.settings import Setting, UsageError
from t2t_vit.train import resume
from t2t_vit.train.classes import describe_difference
from t2t_vit.train.processes import LOCK
from t2t_vit.train.resume import check_same_start, find_start, saved_settings
from t2t_vit.train.run import train
from t2t_vit.train.signals import Interrupted
from t2t_vit.train.state import load_state, read_state, saved_states
from t2t_vit.train.trainer import Trainer
from t2t_vit.train.upgrade import upgrade

OLD_RUN = Path(__file__).parents[1] / 'assets' / 'run-0.1.0'


def contents(folder: Path) -> dict[Path, bytes]:
    """Return all files of a folder except its lock."""
    return {file: file.read_bytes() for file in folder.rglob('*') if file.is_file() and file.name != LOCK}


@pytest.fixture
def run_copy(digits_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(digits_run, tmp_path / 'run'))


# classes


def photos_config(root: Path, output: Path, **changes: Any) -> Any:
    return digits_config(output=str(output), batch_size=8, **{**SHORT, **PHOTOS, 'data.root': str(root), **changes})


@pytest.fixture(scope='module')
def photos_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('resume') / 'run'
    train(photos_config(photos, folder))
    return folder


def rename_class(root: Path, old: str, new: str | None) -> None:
    for split in ('train', 'val'):
        folder = root / split / old
        folder.rename(root / split / new) if new else shutil.rmtree(folder)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda root: rename_class(root, 'sky', 'cloud'), "missing 'sky', new 'cloud'"),
        (lambda root: rename_class(root, 'sky', None), "missing 'sky'"),
        (lambda root: [shutil.copytree(root / s / 'sky', root / s / 'sea') for s in ('train', 'val')], "new 'sea'"),
    ],
    ids=['renamed', 'removed', 'added'],
)
def test_resume_rejects_changed_classes(photos, photos_run, tmp_path, capsys, change, message):
    root, folder = shutil.copytree(photos, tmp_path / 'data'), shutil.copytree(photos_run, tmp_path / 'run')
    change(root)
    before = contents(folder)
    assert main(['train', '--resume', str(folder), '--data.root', str(root), '--epochs', '2']) == 2
    assert message in capsys.readouterr().err and contents(folder) == before
    state = saved_states(folder / 'checkpoints')[0]
    with pytest.raises(UsageError, match=message):  # also into another folder
        train(photos_config(root, tmp_path / 'other', epochs=2), resume=str(state))
    assert not (tmp_path / 'other').exists()


def test_resume_rejects_another_order_of_classes(parquet, tmp_path, capsys):
    root, folder = shutil.copytree(parquet, tmp_path / 'data'), tmp_path / 'run'
    train(photos_config(root, folder))
    for file in root.iterdir():  # the same rows, with the numbers' names in another order
        table = pq.read_table(file)
        names = json.loads(table.schema.metadata[b'huggingface'])
        names['info']['features']['label']['names'].reverse()
        pq.write_table(table.replace_schema_metadata({'huggingface': json.dumps(names)}), file)
    before = contents(folder)
    assert main(['train', '--resume', str(folder), '--epochs', '2']) == 2
    said = ' '.join(capsys.readouterr().err.split())
    assert "another order, from class 0 on ('flower' before, 'sky' now)" in said and contents(folder) == before
    assert main(['eval', '--checkpoint', str(folder), '--data', str(root), '--output', str(tmp_path / 'out')]) == 2
    assert 'the same classes in another order' in capsys.readouterr().err


def test_changed_order_of_classes_is_named():
    assert describe_difference(['a', 'b', 'c'], ['a', 'c', 'b']) == (
        "another order, from class 1 on ('b' before, 'c' now)"
    )
    assert describe_difference(['a'], ['a']) == ''


def test_resume_notes_more_images_of_the_same_classes(photos, photos_run, tmp_path, capsys):
    root, folder = shutil.copytree(photos, tmp_path / 'data'), shutil.copytree(photos_run, tmp_path / 'run')
    shutil.copy(next((root / 'train' / 'sky').iterdir()), root / 'train' / 'sky' / 'more.png')
    train(photos_config(root, folder, epochs=2), resume=str(folder))
    said = ' '.join(capsys.readouterr().out.split())
    assert '25 training and 12 validation images, before it had 24 and 12' in said
    assert len(records(folder)) == 2


# from a state of another run


def test_run_from_a_state_of_another_run_keeps_a_model_of_its_own(digits_run, tmp_path):
    """Also if no epoch reaches the best score of the other run, whose model is not in the new folder."""
    state = torch.load(saved_states(digits_run / 'checkpoints')[0], weights_only=True)
    state['position']['best'] = 1.0
    torch.save(state, file := tmp_path / 'step-00000010.pt')
    train(digits_config(output=str(tmp_path / 'run'), epochs=4, val_interval=2), resume=str(file))
    assert (tmp_path / 'run' / 'model.safetensors').exists()
    position = read_state(saved_states(tmp_path / 'run' / 'checkpoints')[0])['position']
    assert position['best'] == max(records(tmp_path / 'run')[-1][key] for key in ('val_top1', 'val_top1_ema'))


def test_run_from_a_state_of_another_run_keeps_its_division(photos, tmp_path, capsys):
    """So that no image that was trained on is validated on."""
    root = tmp_path / 'photos'
    for name in ('flower', 'roof', 'sky'):
        shutil.copytree(photos / 'train' / name, root / name)
    divided = {'data.val_fraction': 0.25}
    train(photos_config(root, tmp_path / 'one', **divided))
    before = set(json.loads((tmp_path / 'one' / 'split.json').read_text())['train'])
    Image.new('RGB', (64, 64)).save(root / 'sky' / '00.png')
    state = str(saved_states(tmp_path / 'one' / 'checkpoints')[0])
    train(photos_config(root, tmp_path / 'two', epochs=2, **divided), resume=state)
    assert not before & set(json.loads((tmp_path / 'two' / 'split.json').read_text())['val'])
    (tmp_path / 'one' / 'split.json').unlink()
    with pytest.raises(
        UsageError, match='images that were trained on would be validated on. Put split.json of the run'
    ):
        train(photos_config(root, tmp_path / 'three', epochs=2, **divided), resume=state)


# under a time budget


def test_run_under_a_budget_resumes_with_the_command_that_started_it(tmp_path, monkeypatch, capsys):
    """Which asks for a longer warm-up than the epochs that fit have."""
    monkeypatch.setattr('t2t_vit.train.run.affordable_epochs', lambda *given: min(3, given[-1]))
    monkeypatch.setattr('t2t_vit.train.run.refit_budget', lambda *_: None)
    asked = {'epochs': 40, 'minutes': 5.0, 'optimizer.warmup_epochs': 10}
    config = digits_config(output=str(tmp_path / 'run'), **asked)
    with monkeypatch.context() as context, pytest.raises(Interrupted):
        context.setattr(Trainer, 'step', stopping_at(5, Trainer.step))
        train(config, resume='auto')
    said = ' '.join(capsys.readouterr().out.split())
    assert 'note warm-up reduced from 10 to 0 epochs' in said and 'the run has 3' in said
    train(config, resume='auto')
    assert len(records(tmp_path / 'run')) == 3


def stopping_at(last: int, step: Any) -> Any:
    def stopping(run: Trainer, batch: Batch) -> Any:
        outcome = step(run, batch)
        return outcome._replace(stop=True) if run.done == last else outcome

    return stopping


# damage


@pytest.mark.parametrize('seed', range(12))
def test_flipped_byte_of_a_state_is_noticed_or_without_effect(digits_run, tmp_path, seed):
    file = saved_states(digits_run / 'checkpoints')[0]
    chance, content = random.Random(seed), bytearray(file.read_bytes())
    place = chance.randrange(len(content)) if seed < 8 else chance.randrange(max(len(content) - 2000, 0), len(content))
    content[place] ^= 1 << chance.randrange(8)
    (tmp_path / file.name).write_bytes(content)
    try:
        found = read_state(tmp_path / file.name)
    except CheckpointError as error:
        assert str(tmp_path) in str(error)
        return
    want = read_state(file)
    assert all(torch.equal(found['model'][key], want['model'][key]) for key in want['model'])
    assert found['position'] == want['position'] and found['config'] == want['config']


def test_flipped_byte_falls_back_to_the_state_before(run_copy, digits_run, capsys):
    last = saved_states(run_copy / 'checkpoints')[0]
    content = bytearray(last.read_bytes())
    content[content.index(b'\x00' * 8, len(content) // 2) if b'\x00' * 8 in content else len(content) // 2] ^= 255
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(byte ^ 255 for byte in content[middle : middle + 64])
    last.write_bytes(content)
    train(digits_config(), resume=str(run_copy))
    assert f'skipped {last} cannot be read' in ' '.join(capsys.readouterr().out.split())
    assert same_run(run_copy, digits_run)


@pytest.mark.parametrize('content', [None, b'', b'epochs: 99\nbatch_size: {', b'optimizer: {lr: 7}\n'])
def test_damaged_config_is_rebuilt_from_the_state(run_copy, digits_run, content):
    file = run_copy / 'config.yaml'
    file.unlink() if content is None else file.write_bytes(content)
    saved_states(run_copy / 'checkpoints')[0].unlink()  # so that there is an epoch to do
    assert main(['train', '--resume', str(run_copy)]) == 0
    first, second = (yaml.safe_load((folder / 'config.yaml').read_text()) for folder in (run_copy, digits_run))
    assert first.pop('output') != second.pop('output') and first == second
    assert same_run(run_copy, digits_run)


def test_leftovers_of_a_killed_save_are_removed(run_copy):
    saved_states(run_copy / 'checkpoints')[0].unlink()
    leftovers = [run_copy / 'checkpoints' / 'draft', run_copy / '.draft-config.yaml', run_copy / '.draft-x' / 'model']
    for file in leftovers:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b'half')
    train(digits_config(), resume=str(run_copy))
    assert not any(file.exists() for file in leftovers) and not (run_copy / '.draft-x').exists()


# versions


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD_RUN, tmp_path / 'old'))


def test_run_of_version_0_1_0_resumes(old_run, capsys):
    """Continue a run that was stopped after three of six epochs, one of them cooldown, with the same schedule."""
    assert main(['train', '--resume', str(old_run)]) == 0
    expected = read_records(OLD_RUN.with_name('run-0.1.0-metrics.jsonl'))
    found = read_records(old_run / 'metrics.jsonl')
    assert [record['epoch'] for record in found] == list(range(6))
    for one, other in zip(found, expected):
        assert one['lr'] == pytest.approx(other['lr'], rel=1e-6)
        assert one['train_loss'] == pytest.approx(other['train_loss'], rel=1e-3)
        assert one['val_top1'] == pytest.approx(other['val_top1'], abs=0.02)
    config = yaml.safe_load((old_run / 'config.yaml').read_text())
    assert config['epochs'] == 6 and config['augment']['mixup_switch_prob'] == 0.25
    assert config['optimizer']['lr_base_size'] == 16 and 'switch' not in config['augment']
    assert read_state(saved_states(old_run / 'checkpoints')[0])['classes'] == [str(i) for i in range(10)]


def test_run_of_version_0_1_0_is_evaluated_and_predicted_with(old_run, capsys):
    assert main(['eval', '--checkpoint', str(old_run), '--data', 'digits', '--workers', '0']) == 0
    top1 = json.loads((old_run / 'scores.json').read_text())['top1']
    record = max(read_records(OLD_RUN / 'metrics.jsonl'), key=lambda record: record['val_top1'])
    assert top1 == pytest.approx(max(record['val_top1'], record['val_top1_ema']), abs=1e-6)
    assert main(['predict', 'digits', '--checkpoint', str(old_run), '--workers', '0']) == 0


def test_run_of_version_0_1_0_is_exported(old_run, tmp_path):
    pytest.importorskip('onnxscript')
    code = main(['export', '--checkpoint', str(old_run), '-o', str(tmp_path / 'model.onnx')])
    assert code == 0 and (tmp_path / 'model.onnx').stat().st_size > 10_000


def settings_in(file: str, **values: Any) -> list[Setting]:
    return [Setting(f'{key} in {file}', key, value, True) for key, value in values.items()]


def test_unknown_fields_of_an_older_version_are_named_and_dropped():
    kept, notes = upgrade(settings_in('x', epochs=4, colour=3), '0.1.0')
    assert [(setting.key, setting.value) for setting in kept] == [('epochs', 4)]
    assert notes == ['note      colour in x is no longer known and is ignored']


def test_unknown_fields_of_a_newer_version_are_refused():
    with pytest.raises(UsageError, match='version 9.1 of t2t-vit wrote colour in x'):
        upgrade(settings_in('x', epochs=4, colour=3), '9.1')
    assert upgrade(settings_in('x', epochs=4), '9.1')[0][0].value == 4


def test_state_with_unknown_position_of_a_newer_version_is_refused(run_copy):
    file = saved_states(run_copy / 'checkpoints')[0]
    state = torch.load(file, weights_only=True)
    torch.save({**state, 'position': {**state['position'], 'phase': 2}, 'version': '9.0'}, file)
    with pytest.raises(UsageError, match='position.phase'):
        read_state(file)
    torch.save({**state, 'position': {**state['position'], 'phase': 2}, 'version': '0.1.0'}, file)
    assert 'phase' not in read_state(file)['position'] and 'position.phase' in read_state(file)['notes'][0]


@pytest.mark.parametrize('position', [None, 7, [], {1: 2}])
def test_state_with_damaged_position_is_refused(position, run_copy):
    file = saved_states(run_copy / 'checkpoints')[0]
    torch.save({**torch.load(file, weights_only=True), 'position': position}, file)
    with pytest.raises(CheckpointError, match='its position must have named fields'):
        read_state(file)


def test_state_may_not_name_code(run_copy, tmp_path, capsys):
    (tmp_path / 'evil.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")\nX = 1\n')
    for file in saved_states(run_copy / 'checkpoints'):
        state = torch.load(file, weights_only=True)
        config = yaml.safe_load(state['config'])
        config['model_args']['block'] = f'{tmp_path}/evil.py:X'
        torch.save({**state, 'config': yaml.safe_dump(config)}, file)
    assert main(['train', '--resume', str(run_copy), '--epochs', '3']) == 2
    assert 'names code to execute' in capsys.readouterr().err and not (tmp_path / 'ran').exists()


# locks and finished runs


def test_second_training_in_a_folder_is_refused(run_copy, monkeypatch, capsys):
    monkeypatch.setattr('t2t_vit.train.processes.LOCK_SECONDS', 0.1)
    before = contents(run_copy)
    holder = subprocess.Popen(
        [
            sys.executable,
            '-c',
            f'import filelock, time; lock = filelock.FileLock({str(run_copy / LOCK)!r}); lock.acquire(); '
            'print(1, flush=True); time.sleep(60)',
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout and holder.stdout.readline()
    assert main(['train', '--resume', str(run_copy), '--epochs', '3']) == 2
    assert 'another process is training in' in capsys.readouterr().err and contents(run_copy) == before
    holder.kill()  # the lock ends with its owner
    holder.communicate()
    with FileLock(run_copy / LOCK, timeout=5):
        pass


@pytest.mark.parametrize('epochs', [1, 2])
def test_resume_of_a_finished_run_says_so_and_changes_nothing(run_copy, capsys, epochs):
    before = contents(run_copy)
    assert main(['train', '--resume', str(run_copy), '--epochs', str(epochs)]) == 0
    said = capsys.readouterr().out
    assert 'is finished: 2 epochs' in said and '--epochs 7' in said
    assert (', and 1 were asked for' in said) == (epochs == 1)
    assert contents(run_copy) == before


def test_saved_settings_of_a_folder_and_of_a_file_agree(digits_run):
    folder, file = (saved_settings(path) for path in (digits_run, saved_states(digits_run / 'checkpoints')[0]))
    assert [(s.key, s.value) for s in folder] == [(s.key, s.value) for s in file]
    assert not {s.key for s in folder} & {'weights', 'output'}


def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        train(digits_config(output=str(tmp_path / 'run'), **SHORT))
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / 'run').rglob('*') if file.is_file()}
    assert {name: oct(mode) for name, mode in modes.items() if name != LOCK and mode != 0o640} == {}
    assert load_state(tmp_path / 'run' / 'checkpoints')[0]


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Send Ctrl-C in the middle of a step."""
    step, made = Trainer.step, []

    def stopping(run: Trainer, batch: Batch) -> float:
        made.append(1)
        if len(made) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, batch)

    monkeypatch.setattr(Trainer, 'step', stopping)


@pytest.mark.parametrize('steps', [2, 5, 8], ids=['second step', 'last of an epoch', 'middle of the second'])
def test_interrupted_run_resumes_exactly(digits_run, tmp_path, monkeypatch, steps):
    config = digits_config(output=str(tmp_path))
    with monkeypatch.context() as context, pytest.raises(Interrupted, match='continue with --resume') as stop:
        stop_after(context, steps)
        train(config)
    assert str(tmp_path / 'checkpoints' / f'step-{steps:08}.pt') in str(stop.value) and stop.value.code == 130
    train(config, resume=str(tmp_path))
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
    """Test a folder whose checkpoints were deleted, and a run that was killed in its first validation."""
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
    """Test hosts that do not share the run folder."""
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
