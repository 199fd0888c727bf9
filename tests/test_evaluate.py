"""The command eval: its files, its notes, and what it refuses."""

import csv
import json
import os
import shutil
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
import timm
import torch
from conftest import CLASSES, SMALLER
from PIL import Image

from t2t_vit import Classifier, cli
from t2t_vit.data import Split
from t2t_vit.hub import save_pretrained


@pytest.fixture(scope='module')
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    net = timm.create_model('t2t_vit_4_16', num_classes=3, **SMALLER)
    torch.nn.init.normal_(net.head.weight)
    net.pretrained_cfg.update(label_names=CLASSES, num_classes=3)
    return net


@pytest.fixture(scope='module')
def folder(net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(net, tmp_path_factory.mktemp('models') / 'small', model_args=SMALLER)


def evaluate(*words: object) -> int:
    return cli.main(['eval', *map(str, words), '--device', 'cpu', '--workers', '0'])


def test_eval_writes_every_image_and_the_confusion(folder, photos, tmp_path, capsys):
    assert evaluate('--checkpoint', folder, '--data', photos, '--output', tmp_path, '--temperature', 'true') == 0
    scores = json.loads((tmp_path / 'scores.json').read_text())
    with (tmp_path / 'images.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == scores['images'] == 12
    right = [row['label'] == row['predicted'] for row in rows]
    assert sum(right) / 12 == pytest.approx(scores['top1'])
    assert all(Path(row['image']).parent.name == row['label'] for row in rows)
    with (tmp_path / 'confusion.csv').open(newline='') as file:
        table = list(csv.reader(file))
    assert table[0] == ['true', *CLASSES] and [row[0] for row in table[1:]] == CLASSES
    assert sum(int(table[i + 1][i + 1]) for i in range(3)) == sum(right)
    for name in ('confusion.png', 'mistakes.png'):
        assert (tmp_path / name).read_bytes()[1:4] == b'PNG'
    assert set(scores['intervals']) >= {'top1', 'balanced_accuracy', 'precision', 'f1', 'auroc', 'calibration_error'}
    assert scores['classes']['sky']['images'] == 4 and scores['per_class']['sky'] == scores['classes']['sky']['recall']
    printed = capsys.readouterr().out
    assert all(text in printed for text in ('balanced accuracy', 'AUROC %', '95 % interval', 'temperature '))


def test_eval_says_if_images_were_trained_on(folder, photos, tmp_path, capsys):
    """That is, those of a folder that the run divided itself."""
    run, root = shutil.copytree(folder, tmp_path / 'run'), tmp_path / 'photos'
    for name in CLASSES:
        shutil.copytree(photos / 'val' / name, root / name)
    names = sorted(str(file.relative_to(root)) for file in root.rglob('*.*'))
    (run / 'config.yaml').write_text(f'data: {{root: {root}}}\n')
    Split(names[::2], names[1::2]).save(run / 'split.json')
    assert evaluate('--checkpoint', run, '--data', root) == 0
    said = 'note: the run was trained on 6 of these 12 images, so the scores are too good'
    assert said in capsys.readouterr().out
    assert evaluate('--checkpoint', run) == evaluate('--checkpoint', run, '--data', photos) == 0
    assert 'trained on' not in capsys.readouterr().out


@pytest.mark.parametrize('output', ['taken', 'taken/deep'])
def test_eval_refuses_a_file_as_output_before_it_scores(folder, photos, tmp_path, capsys, monkeypatch, output):
    monkeypatch.setattr(Classifier, 'load', None)  # not reached
    (tmp_path / 'taken').touch()
    assert evaluate('--checkpoint', folder, '--data', photos, '--output', tmp_path / output) == 2
    assert f'{tmp_path / "taken"} is a file; expected a folder' in capsys.readouterr().err


def test_eval_refuses_a_run_folder_that_cannot_be_written_before_it_scores(folder, photos, capsys, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda *_: False)
    monkeypatch.setattr(Classifier, 'load', None)  # not reached
    assert evaluate('--checkpoint', folder, '--data', photos) == 2
    assert f'{folder} cannot be written to: choose another output' in capsys.readouterr().err


def test_eval_scores_data_that_lack_a_class(folder, photos, tmp_path, capsys):
    for name in ('flower', 'sky'):
        (tmp_path / name).symlink_to(photos / 'val' / name)
    assert evaluate('--checkpoint', folder, '--data', tmp_path, '--output', tmp_path / 'out') == 0
    scores = json.loads((tmp_path / 'out' / 'scores.json').read_text())
    assert scores['images'] == 8 and scores['per_class']['roof'] is None and scores['per_class']['sky'] is not None
    assert "has no images of 1 of 3 classes: 'roof'" in capsys.readouterr().out


@pytest.fixture(scope='module')
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders 1, 2 and 10, of one colour each."""
    root = tmp_path_factory.mktemp('numbers')
    for name, colour in (('1', 'red'), ('2', 'lime'), ('10', 'blue')):
        (root / name).mkdir()
        for i in range(2):
            Image.new('RGB', (20, 20), colour).save(root / name / f'{i}.png')
    return root


def test_eval_asks_for_the_order_of_a_checkpoint_without_names(net, numbers, tmp_path, capsys):
    """The two orders give permuted classes; timm's own checkpoints are recognised."""
    names = {'state_dict': net.state_dict()}
    torch.save(names, tmp_path / 'old.pth')
    torch.save({**names, 'arch': 'x', 'version': 2, 'epoch': 3}, tmp_path / 'timm.pth')
    options = ['--model', 't2t_vit_4_16', '--data', numbers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('t2t_vit.trained.build_from_file', lambda name, path, ema: (net, []))
        patch.setattr(net, 'pretrained_cfg', {**net.pretrained_cfg, 'label_names': None})
        assert evaluate('--checkpoint', tmp_path / 'old.pth', *options) == 2
        assert '--classes text or --classes natural' in capsys.readouterr().err
        found = {}
        for file, choice in (('old', 'text'), ('old', 'natural'), ('timm', None)):
            words = ['--checkpoint', tmp_path / f'{file}.pth', *options, '--output', tmp_path / f'{file}-{choice}']
            assert evaluate(*words, *(['--classes', choice] if choice else [])) == 0
            found[choice] = json.loads((tmp_path / f'{file}-{choice}' / 'scores.json').read_text())['per_class']
            assert 'the checkpoint names no classes' in capsys.readouterr().out
        assert found[None] == found['natural'] and list(found['natural']) == ['1', '2', '10']
        assert list(found['text']) == ['1', '10', '2']


def test_eval_reports_outputs_that_are_not_finite(net, photos, tmp_path, capsys):
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state['head.weight'][0] = float('nan')
    other = timm.create_model('t2t_vit_4_16', num_classes=3, **SMALLER)
    other.load_state_dict(state)
    other.pretrained_cfg.update(net.pretrained_cfg)
    place = save_pretrained(other, tmp_path / 'nan', model_args=SMALLER)
    assert evaluate('--checkpoint', place, '--data', photos) == 1
    assert 'computes NaN or infinity for all 12 images' in capsys.readouterr().err
    words = [photos / 'val', '--checkpoint', place, '--device', 'cpu', '--workers', 0, '--output', tmp_path / 'a.jsonl']
    assert cli.main(['predict', *map(str, words)]) == 1
    error = capsys.readouterr().err
    assert 'NaN or infinity for 12 of 12 images' in error and 'not finite: head.weight' in error
    rows = [json.loads(line) for line in (tmp_path / 'a.jsonl').read_text().splitlines()]
    assert {row['error'] for row in rows} == {'the model computed NaN or infinity for this image'}
    assert rows[0]['classes'] is None and 'NaN' not in (tmp_path / 'a.jsonl').read_text().replace('NaN or', '')


def test_class_names_of_all_kinds_in_every_output(net, tmp_path, capsys):
    """Markup, mathematics, line breaks, formulas and bars in names; all of them can be read back."""
    names = ['=1+1|x', '$a$ <b>', 'two\nlines "q"']
    for i, name in enumerate(names):
        (tmp_path / 'data' / name).mkdir(parents=True)
        Image.new('RGB', (20, 20), (90 * i, 50, 200)).save(tmp_path / 'data' / name / '-a.png')
    odd = os.path.join(os.fsencode(tmp_path / 'data' / 'two\nlines "q"'), b'caf\xe9.png')
    with open(odd, 'wb') as file:
        Image.new('RGB', (20, 20)).save(file, 'png')
    other = timm.create_model('t2t_vit_4_16', num_classes=3, **SMALLER)
    other.load_state_dict(net.state_dict())
    other.pretrained_cfg.update(net.pretrained_cfg, label_names=sorted(names))
    place = save_pretrained(other, tmp_path / 'model', model_args=SMALLER)
    for flag in ('false', 'true'):
        words = ['--checkpoint', place, '--data', tmp_path / 'data', '--output', tmp_path / flag]
        assert evaluate(*words, '--spreadsheet', flag) == 0
        with (tmp_path / flag / 'images.csv').open(newline='', encoding='utf-8') as file:
            *rows, last = csv.DictReader(file)
        assert unquote_to_bytes(last['image'].removeprefix('file://')) == odd
        assert [row['label'].removeprefix("'" if flag == 'true' else '') for row in rows] == sorted(names)
        assert [row['label'][0] for row in rows] == ['$', "'" if flag == 'true' else '=', 't']
        assert (tmp_path / flag / 'confusion.png').exists() and (tmp_path / flag / 'mistakes.png').exists()
        assert list(json.loads((tmp_path / flag / 'scores.json').read_text('utf-8'))['per_class']) == sorted(names)
    assert r'two\nlines "q"' in capsys.readouterr().out


def test_folds_are_trained_by_command_and_averaged(photos, tmp_path, capsys):
    root = tmp_path / 'photos'
    for name in CLASSES:
        for split in ('train', 'val'):
            shutil.copytree(photos / split / name, root / name, dirs_exist_ok=True)
    small = ['--model', 't2t_vit_4_16', '--model_args.depth', '1', '--imgsz', '16', '--epochs', '1', '--workers', '0']
    for fold in ('0', '1'):
        words = ['--data.fold', fold, '--data.folds', '2', '--output', str(tmp_path / f'fold-{fold}')]
        assert cli.main(['train', str(root), *small, *words]) == 0
    capsys.readouterr()
    runs = tmp_path / 'fold-0', tmp_path / 'fold-1'
    assert evaluate(*runs, '--output', tmp_path / 'folds') == 0
    said = capsys.readouterr().out
    means = json.loads((tmp_path / 'folds' / 'means.json').read_text())
    tops = [json.loads((tmp_path / 'folds' / f'{i}-fold-{i}' / 'scores.json').read_text())['top1'] for i in (0, 1)]
    assert means['top1']['mean'] == pytest.approx(sum(tops) / 2) and means['top1']['values'] == tops
    assert means['top1']['std'] == pytest.approx(abs(tops[0] - tops[1]) / 2**0.5)
    assert means['together']['images'] == sum(
        file.is_file() for file in root.rglob('*')
    )  # each image was validated on once
    assert means['together']['top1'] == pytest.approx(sum(tops) / 2)
    assert 'mean and standard deviation over 2 models' in said and 'all 36 images together' in said
    assert evaluate(runs[0], runs[0], '--output', tmp_path / 'same') == 0
    assert json.loads((tmp_path / 'same' / 'means.json').read_text())['together'] is None
