"""Prediction and embedding of many images: the rows, that none is lost or doubled, and continuing."""

import csv
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import CLASSES, SMALLER
from PIL import Image
from rich.console import Console
from test_readme import commands

from t2t_vit import classifier, cli, predict
from t2t_vit.console import Live, console
from t2t_vit.data import DataError
from t2t_vit.export import ExportedModel, Metadata
from t2t_vit.hub import save_pretrained
from t2t_vit.results import Results, check_place
from t2t_vit.trained import load_trained, spoken_names
from t2t_vit.vectors import Embedding


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small untrained model for photos; read-only."""
    torch.manual_seed(0)
    net = timm.create_model('t2t_vit_4_16', num_classes=3, **SMALLER)
    net.pretrained_cfg.update(label_names=CLASSES, num_classes=3)
    return save_pretrained(net, tmp_path_factory.mktemp('models') / 'small', model_args=SMALLER)


@pytest.fixture(scope='module')
def many(photos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """List 100 paths; two are damaged, one of them alone in the last batch of 4 and shard of 12."""
    root = tmp_path_factory.mktemp('many')
    (root / 'text.png').write_text('not an image')
    files = [str(path) for path in sorted((photos / 'val').rglob('*.*'))] * 9
    paths = [*files[:17], 'text.png', *files[17:97], 'nowhere.png', files[97]]
    (root / 'list.txt').write_text('\n'.join([str(root / 'text.png') if p == 'text.png' else p for p in paths]))
    return root / 'list.txt'


def run(*words: object) -> int:
    return cli.main([*map(str, words), '--device', 'cpu', '--workers', '0', '--batch_size', '4'])


def parquet(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@pytest.fixture(scope='module')
def whole(many, model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the uninterrupted output as Parquet; read-only."""
    output = tmp_path_factory.mktemp('whole') / 'a.parquet'
    assert run('predict', many, '--checkpoint', model, '--output', output, '--shard_size', 12) == 0
    return output


def test_rows_equal_the_models_answers(whole, many, model):
    rows, (net, preprocessing, *_) = parquet(whole), load_trained(str(model))
    assert [row['index'] for row in rows] == list(range(100))
    assert [row['image'] for row in rows] == [os.path.join(many.parent, p) for p in many.read_text().split('\n')]
    assert [row['index'] for row in rows if row['error']] == [17, 98] and rows[17]['classes'] is None
    assert rows[17]['error'].startswith('ImageError: not an image')
    assert rows[98]['error'].startswith('FileNotFoundError')
    for row in rows[:3] + rows[99:]:
        image = preprocessing.transform()(preprocessing.convert(Image.open(row['image'])))
        p, c = net(image[None]).softmax(-1)[0].sort(descending=True)
        assert row['classes'] == [CLASSES[i] for i in c] and row['probabilities'] == pytest.approx(p.tolist(), abs=1e-5)


def test_record_holds_settings_and_environment(whole, model):
    assert sorted(path.name for path in whole.parent.iterdir()) == ['a.parquet', 'a.parquet.json']
    record = json.loads((whole.parent / 'a.parquet.json').read_text())
    assert record['settings']['model'] == 't2t_vit_4_16' and record['settings']['classes'] == CLASSES
    assert record['settings']['top_k'] == 3 and record['settings']['preprocessing']['input_size'] == [3, 16, 16]
    assert len(record['settings']['weights']) == 64 and record['environment']['checkpoint'] == str(model)


@pytest.mark.parametrize('gain, precision', [(0.0, 'no'), (6.0, 'bf16')])
def test_precision_auto_is_resolved_and_named(gain, precision, many, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('t2t_vit.models.precision.cpu_gain', lambda kind: gain)
    output = tmp_path / 'a.parquet'
    assert run('predict', many, '--checkpoint', model, '--output', output, '--precision', 'auto') == 0
    assert json.loads((tmp_path / 'a.parquet.json').read_text())['settings']['precision'] == precision
    assert f'note: precision {precision.replace("no", "float32")}: this processor' in ' '.join(
        capsys.readouterr().out.split()
    )


def test_formats_hold_equal_rows(whole, many, model, tmp_path, capsys):
    for name in ('a.csv', 'a.jsonl', 'parts'):
        assert run('predict', many, '--checkpoint', model, '--output', tmp_path / name, '--shard_size', 12) == 0
    assert 'images/s, 2 of them damaged; all 100 are in' in capsys.readouterr().out
    rows = parquet(whole)
    assert [json.loads(line) for line in (tmp_path / 'a.jsonl').read_text().splitlines()] == rows
    assert parquet(tmp_path / 'parts') == rows and len(list((tmp_path / 'parts').glob('part-*'))) == 9
    with (tmp_path / 'a.csv').open() as file:
        table = list(csv.DictReader(file))
    assert [*table[0]] == [
        'index',
        'image',
        'error',
        'class_1',
        'probability_1',
        'class_2',
        'probability_2',
        'class_3',
        'probability_3',
    ]
    assert [row['class_1'] for row in table] == [row['classes'][0] if row['classes'] else '' for row in rows]
    assert [float(row['probability_3'] or -1) for row in table] == pytest.approx(
        [row['probabilities'][2] if row['classes'] else -1 for row in rows]
    )
    assert not [path for path in tmp_path.rglob('.*')] and not (tmp_path / 'a.csv.parts').exists()


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='starts its processes by fork')
def test_predict_continues_after_kills(whole, many, model, tmp_path, monkeypatch):
    """SIGKILL at three moments: the rows of an uninterrupted run, and no part is computed twice."""
    output, parts = tmp_path / 'a.parquet', tmp_path / 'a.parquet.parts'
    words = ['predict', many, '--checkpoint', model, '--output', output, '--shard_size', 12]

    def slowly() -> None:
        torch.set_num_threads(1)
        table = predict.Job.table

        def slow(*args: Any) -> Any:
            time.sleep(0.05)
            return table(*args)

        predict.Job.table = slow  # type: ignore[method-assign]
        run(*words)

    for count in (1, 3, 6):
        child = multiprocessing.get_context('fork').Process(target=slowly)
        child.start()
        while child.is_alive() and len(list(parts.glob('part-*'))) < count:
            time.sleep(0.005)
        time.sleep(0.02 * count)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL and not output.exists()
    left = {path.name: path.read_bytes() for path in parts.glob('part-*')}
    assert 6 <= len(left) < 9
    (parts / '.part-00008-of-00009.parquet.dead').write_bytes(b'torn')
    monkeypatch.setattr(shutil, 'rmtree', lambda *args, **kwargs: None)  # killed before it could clean up
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob('part-*')}
    assert run(*words) == 0
    assert all((parts / name).stat().st_mtime_ns == time for name, time in before.items())
    assert all((parts / name).read_bytes() == content for name, content in left.items())
    assert parquet(output) == parquet(whole)
    monkeypatch.undo()
    made = output.stat().st_mtime_ns
    assert run(*words) == 0 and output.stat().st_mtime_ns == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.parquet', 'a.parquet.json']


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='starts its processes by fork')
def test_processes_share_the_parts(whole, many, model, tmp_path, monkeypatch, capsys):
    """Each computes its parts, numbered as torchrun does, at once or one by one."""
    words = ['predict', many, '--checkpoint', model, '--output', tmp_path / 'a.parquet', '--shard_size', 12]

    def share(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE='3')
        os._exit(run(*words))

    children = [multiprocessing.get_context('fork').Process(target=share, args=(rank,)) for rank in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert parquet(tmp_path / 'a.parquet') == parquet(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.parquet', 'a.parquet.json']
    monkeypatch.setenv('WORLD_SIZE', '3')
    words[5] = tmp_path / 'b.parquet'
    for rank, there in ((2, [2, 5, 8]), (0, [0, 2, 3, 5, 6, 8]), (1, [])):
        monkeypatch.setenv('RANK', str(rank))
        assert run(*words) == 0
        assert sorted(int(path.name[5:10]) for path in (tmp_path / 'b.parquet.parts').glob('part-*')) == there
    assert 'process 3 of 3' in (said := capsys.readouterr().out) and 'all 100 are in' in said
    assert run(*words) == 0 and 'nothing left to do' in capsys.readouterr().out
    assert run('predict', many, '--checkpoint', model) == 2
    assert '3 processes need an --output' in capsys.readouterr().err
    monkeypatch.setenv('RANK', 'x')
    assert run('predict', many, '--checkpoint', model) == 2 and 'RANK must be a whole number' in capsys.readouterr().err


def test_parquet_lists_have_no_fixed_size(whole):
    """Arrow before 26 cannot read or write a missing list of a fixed size."""
    kinds = [pq.read_schema(whole).field(name).type for name in ('classes', 'probabilities')]
    assert kinds == [pa.list_(pa.string()), pa.list_(pa.float32())]


def test_continuing_with_other_settings_is_refused(many, model, tmp_path, capsys):
    words = ['predict', many, '--checkpoint', model, '--output', tmp_path / 'a']
    assert run(*words, '--shard_size', 50) == 0
    (tmp_path / 'a' / 'part-00001-of-00002.parquet').unlink()
    net = timm.create_model(f'local-dir:{model}', pretrained=True)
    torch.nn.init.zeros_(net.head.weight)
    other = save_pretrained(net, tmp_path / 'other', model_args=SMALLER)
    words[3], words[1] = other, many.parent / 'text.png'
    assert run(*words, '--top_k', 2, '--precision', 'bf16') == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(' is ')[0] for line in lines] == [
        f't2t-vit: {key}' for key in ('weights', 'precision', 'images', 'image_names', 'shard_size', 'top_k')
    ]
    assert f'images is 100 in {tmp_path}/a/_conditions.json, and cannot become 1 there: choose another' in lines[2]


@pytest.mark.parametrize('name', ['a.parquet', 'a.npy', 'parts'])
def test_output_inside_the_input_folder_is_no_input(model, photos, tmp_path, monkeypatch, capsys, name):
    shutil.copytree(photos / 'val', tmp_path / 'val')
    command = 'embed' if name == 'a.npy' else 'predict'
    words = [command, tmp_path / 'val', '--checkpoint', model, '--output', tmp_path / 'val' / name, '--shard_size', 4]
    write = Results.write

    def interrupted(self: Results, part: int, *args: Any) -> None:
        if part == 2:
            raise KeyboardInterrupt
        write(self, part, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Results, 'write', interrupted)
        assert run(*words) == 130
    assert run(*words) == 0 and 'left out: 1 files ending in .json, 2 files that predict' in capsys.readouterr().out
    assert run(*words) == 0 and 'all 12 are in' in capsys.readouterr().out


def test_existing_files_are_not_overwritten(many, model, tmp_path, capsys):
    (tmp_path / 'a.csv').write_text('mine')
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'mine').touch()
    (tmp_path / 'c.npy.csv').write_text('mine')
    for words, name in ((['predict'], 'a.csv'), (['predict'], 'b'), (['embed'], 'c.npy')):
        assert run(*words, many, '--checkpoint', model, '--output', tmp_path / name) == 2
        assert f'{tmp_path / name}' in (error := capsys.readouterr().err) and 'exists, and ' in error
    for record in ('{"settings": 3}', '[]', '{', '{"other": {}}'):
        (tmp_path / 'd.csv.json').write_text(record)
        assert run('predict', many, '--checkpoint', model, '--output', tmp_path / 'd.csv') == 2
        assert f'{tmp_path / "d.csv.json"} is no record' in capsys.readouterr().err
    assert (tmp_path / 'a.csv').read_text() == 'mine' and len(list(tmp_path.rglob('*'))) == 5


def test_damaged_parts_are_named(tmp_path):
    results = Results(tmp_path / 'a.jsonl', 4, 2, {})
    results.begin({})
    rows = pa.table({'index': [0, 1], 'image': ['a', 'b'], 'error': ['x', 'y']})
    results.write(0, rows, 1)
    assert not results.finish()
    results.write(1, rows[:1], 1)
    with pytest.raises(DataError, match='part-00001-of-00002.parquet has 1 rows instead of 2: remove it'):
        results.finish()
    results.parts[0].write_bytes(b'torn')
    with pytest.raises(DataError, match='part-00000-of-00002.parquet cannot be read: remove it'):
        results.finish()
    assert not results.place.exists() and not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('name', ['a.parquet', 'a.csv', 'a.jsonl'])
def test_process_whose_parts_vanish_finds_the_output_complete(tmp_path, name):
    first, second = (Results(tmp_path / name, 4, 2, {}) for _ in range(2))
    first.begin({})
    for part in range(2):
        first.write(part, pa.table({'index': [0, 1], 'image': ['a', 'b'], 'error': ['x', 'y']}), 1)
    read = second.read

    def overtaken(part: int) -> pa.Table:
        if part == 1:
            assert first.finish()
        return read(part)

    second.read = overtaken  # type: ignore[method-assign]
    assert second.finish()
    assert [path.name for path in sorted(tmp_path.iterdir())] == [name, f'{name}.json']


def test_interrupt_says_how_to_continue(many, model, tmp_path, monkeypatch, capsys):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict.Job, 'table', stop)
    assert run('predict', many, '--checkpoint', model, '--output', tmp_path / 'a') == 130
    assert capsys.readouterr().err == 't2t-vit: stopped; the same command continues from what is done\n'
    assert run('predict', many, '--checkpoint', model) == 130
    assert capsys.readouterr().err == 't2t-vit: stopped, nothing to save\n'


def test_interrupt_counts_errors_and_not_unread_images(many, model, monkeypatch, capsys):
    table, calls = predict.Job.table, []

    def stop(*args: Any) -> pa.Table:
        calls.append(0)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return table(*args)

    monkeypatch.setattr(predict.Job, 'table', stop)
    assert run('predict', many, '--checkpoint', model) == 130
    assert capsys.readouterr().out.splitlines()[-1].startswith('1 of 24 images have no prediction:')


def test_rows_are_printed_batch_by_batch(many, model, monkeypatch, capsys):
    def look(self: Live, done: int, text: str) -> None:
        seen.append((done, capsys.readouterr().out.count('\n')))

    seen: list[Any] = []
    monkeypatch.setattr(Live, 'show', look)
    assert run('predict', many, '--checkpoint', model, '--top_k', 1) == 0
    assert seen[0] == (4, 0) and [done for done, _ in seen] == [*range(4, 101, 4)]
    assert all(said == seen[1][1] > 0 for _, said in seen[1:])  # the batch before, and no other
    assert capsys.readouterr().out.splitlines()[-1].startswith('2 of 100 images have no prediction:')


@pytest.mark.parametrize(
    'words, message',
    [
        (['--picture', 'p.xyz'], 'picture must end in .png, got p.xyz'),
        (['--picture', 'taken/p.png'], 'taken is a file; expected a folder'),
        (['--output', 'taken/deep/a.csv'], 'taken is a file; expected a folder'),
        (['--output', 'taken'], 'output taken is a file; expected a folder, or a file that ends in .csv'),
    ],
)
def test_output_that_cannot_be_written_is_refused_first(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'taken').touch()
    assert run('predict', 'nowhere.png', '--checkpoint', 'nowhere', *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('name', ['preds.v2', 'preds.txt/', 'there.old'])
def test_folder_with_a_dot_is_an_output(tmp_path, name):
    (tmp_path / 'there.old').mkdir()
    assert check_place(f'{tmp_path}/{name}', ['.csv']) == []
    assert check_place(f'{tmp_path}/preds.old', ['.csv']) != [] != check_place(f'{tmp_path}/a.npy/', ['.csv'])


def test_picture_of_a_complete_output_is_not_drawn_and_named(many, model, tmp_path, capsys):
    words = ['predict', many, '--checkpoint', model, '--output', tmp_path / 'a.csv', '--picture', tmp_path / 'p.png']
    assert run(*words) == 0 and f'the picture is {tmp_path / "p.png"}' in capsys.readouterr().out
    assert run(*words) == 0
    assert f'{tmp_path / "p.png"} is not drawn: this command classified no image' in capsys.readouterr().out


@pytest.mark.parametrize('name', [None, 'a.csv', 'a.jsonl', 'a.parquet'])
def test_class_names_that_are_not_utf8_are_written_portably(tmp_path, capsys, name):
    net = timm.create_model('t2t_vit_4_16', num_classes=2, **SMALLER)
    net.pretrained_cfg.update(label_names=['caf\udce9', 'tea'], num_classes=2)
    place = save_pretrained(net, tmp_path / 'model', model_args=SMALLER)
    Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
    words = ['--output', tmp_path / name] if name else []
    assert run('predict', tmp_path / 'a.png', '--checkpoint', place, *words) == 0
    said = str(parquet(tmp_path / name)) if name == 'a.parquet' else (tmp_path / name).read_text() if name else ''
    assert 'caf\\xe9' in (said.replace('\\\\', '\\') if name else capsys.readouterr().out)


@pytest.mark.parametrize(
    'words, message',
    [
        (
            ['--output', 'a.xml', '--top_k', 0, '--shard_size', 0, '--max_pixels', 0],
            'top_k must be at least 1, got 0|shard_size must be at least 1, got 0|max_pixels must be at least 1, got 0|'
            'output must be a folder, or a file that ends in .csv, .jsonl, .parquet; got a.xml',
        ),
        (['--precision', 'int8'], 'expected no or bf16 or fp16'),
    ],
)
def test_invalid_options_are_reported_together(model, capsys, words, message):
    assert run('predict', 'digits', '--checkpoint', model, *words) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in message.split('|'))


def test_progress_without_a_terminal(capsys):
    with Live(Console(), 'image', 8, 2, interval=0) as live:
        live.show(4, '9 images/s')
    assert capsys.readouterr().out.startswith('image 4/8  9 images/s  0:00 left')


# vectors


@pytest.mark.parametrize('kind', ['features', 'class_token', 'pooled', 'pyramid'])
def test_vectors_equal_the_models_features(many, model, tmp_path, kind):
    assert run('embed', many, '--checkpoint', model, '--output', tmp_path / 'a.npy', '--kind', kind) == 0
    vectors, (net, preprocessing, *_) = np.load(tmp_path / 'a.npy'), load_trained(str(model))
    images = torch.stack(
        [
            preprocessing.transform()(preprocessing.convert(Image.open(path)))
            for path in many.read_text().split('\n')[:2]
        ]
    )
    tokens = net.forward_features(images)
    expected = {
        'features': tokens[:, 0],
        'class_token': tokens[:, 0],
        'pooled': tokens[:, 1:].mean(1),
        'pyramid': torch.cat(
            [m.mean((2, 3)) for m in net.forward_intermediates(images, indices=[0, 2], intermediates_only=True)], 1
        ),
    }[kind]
    assert vectors.shape == (100, expected.shape[1]) and vectors.dtype == np.float32
    assert np.allclose(vectors[:2], expected.detach(), atol=1e-5)
    assert np.flatnonzero(np.isnan(vectors).all(1)).tolist() == [17, 98]
    assert np.isnan(vectors).sum() == 2 * vectors.shape[1]
    with (tmp_path / 'a.npy.csv').open() as file:
        assert [bool(row['error']) for row in csv.DictReader(file)] == [i in (17, 98) for i in range(100)]


def test_vectors_in_parquet_equal_npy(many, model, tmp_path):
    for name in ('a.parquet', 'a.npy'):
        assert run('embed', many, '--checkpoint', model, '--output', tmp_path / name, '--shard_size', 30) == 0
    rows, vectors = parquet(tmp_path / 'a.parquet'), np.load(tmp_path / 'a.npy')
    assert all(np.array_equal(row['embedding'], vector) for row, vector in zip(rows, vectors) if not row['error'])
    assert [row['index'] for row in rows if row['embedding'] is None] == [17, 98]


def test_embed_with_timm_models(many, tmp_path, capsys):
    """A convolutional network has a pyramid and no class token."""
    few = tmp_path / 'few.txt'
    few.write_text('\n'.join(many.read_text().split('\n')[:3]))
    place = save_pretrained(timm.create_model('test_resnet', num_classes=3), tmp_path / 'resnet')
    levels = [i['num_chs'] for i in timm.create_model('test_resnet').feature_info]
    swin = timm.create_model(  # its maps have their channels last
        'swin_tiny_patch4_window7_224', img_size=56, embed_dim=8, depths=(1, 1), num_heads=(1, 1), num_classes=3
    ).eval()
    image = torch.randn(1, 3, 56, 56)
    vectors = Embedding(swin, 'pooled', image).parts(image)[0]
    assert torch.equal(vectors, swin.forward_features(image).mean((1, 2)))
    for kind, width in (('pooled', levels[-1]), ('pyramid', sum(levels))):
        assert run('embed', few, '--checkpoint', place, '--output', tmp_path / f'{kind}.npy', '--kind', kind) == 0
        assert np.load(tmp_path / f'{kind}.npy').shape == (3, width)
    assert run('embed', many, '--checkpoint', place, '--output', tmp_path / 'b', '--kind', 'class_token') == 2
    assert 'ResNet has no class token: use --kind pooled' in capsys.readouterr().err


def test_predict_with_an_exported_file(whole, many, model, tmp_path, monkeypatch, capsys):
    """Its rows equal the model's; it has one kind of vectors. Loading is tested in tests/export."""
    net, preprocessing, names, *_ = load_trained(str(model))
    file, vectors = tmp_path / 'a.pt2', []
    file.write_bytes(b'a program')
    cfg = Metadata('t2t_vit_4_16', names, preprocessing.as_cfg(), 'float32', 'float', None, None, {})

    def compute(images: np.ndarray) -> 'tuple[torch.Tensor, torch.Tensor]':
        tokens = net.forward_features(torch.from_numpy(images))
        return net.forward_head(tokens), tokens[:, 0]

    monkeypatch.setattr(classifier, 'load_exported', lambda path: ExportedModel(path, cfg, compute, 'torch'))
    assert run('predict', many, '--checkpoint', file, '--output', tmp_path / 'a.parquet') == 0
    for row, expected in zip(parquet(tmp_path / 'a.parquet'), parquet(whole)):
        assert row['classes'] == expected['classes'] and row['error'] == expected['error']
        assert row['error'] or row['probabilities'] == pytest.approx(expected['probabilities'], abs=1e-5)
    for name, place in (('b.npy', file), ('c.npy', model)):
        assert run('embed', 'digits', '--checkpoint', place, '--output', tmp_path / name) == 0
        vectors.append(np.load(tmp_path / name))
    assert np.allclose(*vectors, atol=1e-5)
    assert len(json.loads((tmp_path / 'b.npy.json').read_text())['settings']['weights']) == 64
    capsys.readouterr()
    for words, message in (
        (['--kind', 'pooled'], 'an exported file returns the input of its head only'),
        (['--precision', 'bf16'], 'has its own precision: leave out --precision bf16'),
    ):
        assert run('embed', 'digits', '--checkpoint', file, '--output', tmp_path / 'd', *words) == 2
        assert message in capsys.readouterr().err
    assert cli.main(['embed', 'digits', '--checkpoint', str(file), '--output', 'd', '--device', 'cuda']) == 2
    assert 'exported files run on the CPU, not on cuda' in capsys.readouterr().err


# names


def test_imagenet_names_for_1000_classes():
    names = spoken_names([str(i) for i in range(1000)])
    assert (names[0], names[1], names[999]) == ('tench', 'goldfish', 'toilet tissue') and len({*names}) == 1000
    assert names[134] == 'crane (n02012849)' and names[517] == 'crane (n03126707)'
    assert spoken_names(['0', '1']) == ['0', '1'] and spoken_names(['a'] * 1000) == ['a'] * 1000


def test_imagenet_names_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    net = timm.create_model('t2t_vit_4_16', **SMALLER)
    torch.nn.init.zeros_(net.head.weight)
    net.head.bias.data[1] = 9
    place = save_pretrained(net, tmp_path, model_args=SMALLER)
    (tmp_path / 'a.png').write_bytes(b'')
    Image.new('L', (9, 9)).save(tmp_path / 'b.png')
    assert run('predict', tmp_path / 'b.png', tmp_path / 'a.png', '--checkpoint', place, '--top_k', 1) == 0
    output = capsys.readouterr().out
    assert 'goldfish 89.0 %' in output and f'1 of 2 images have no prediction: {tmp_path / "a.png"}' in output


# the guide


def test_guide_of_prediction(model, photos, tmp_path, monkeypatch, capsys):
    """Run its commands, then its code; neighbours are of the same class more often than by chance."""
    guide = (Path(__file__).parents[1] / 'docs' / 'predict.md').read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'runs').mkdir()
    (tmp_path / 'runs' / 'photos').symlink_to(model)
    (tmp_path / 'photos').symlink_to(photos)
    for words in commands(''.join(re.findall(r'^```sh\n(.*?)^```', guide, re.MULTILINE | re.DOTALL))):
        assert words[0] == 't2t-vit' and cli.main(words[1:]) == 0
    assert len((tmp_path / 'predictions.csv').read_text().splitlines()) > 20
    capsys.readouterr()
    names: dict[str, Any] = {}
    for block in re.findall(r'^```python\n(.*?)^```', guide, re.MULTILINE | re.DOTALL):
        if 'import ray' not in block:
            exec(compile(block, 'docs/predict.md', 'exec'), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.count('photos/train/') == 4 or 'photos/val' in line for line in lines)
    of = [Path(name).parent.name for name in names['names']]
    near = names['index'].kneighbors(names['vectors'], return_distance=False)
    assert np.mean([of[i] == of[j] for i, j, *_ in near]) > 0.5
    assert names['again'].pretrained_cfg['label_names'] == ['cat', 'dog']


# hostile names, locks, damage


def test_names_of_all_kinds_are_read_back_from_every_format(model, photos, tmp_path):
    """Line breaks, quotes, commas, leading dashes and bytes that are not UTF-8."""
    root = tmp_path / 'odd'
    root.mkdir()
    picture = (photos / 'val' / 'sky' / '35.png').read_bytes()
    names = [b'-a.png', b'=1+1.png', b'a\nb.png', b'caf\xe9.png', b'q"uo,te\'.png', 'é.png'.encode()]
    for name in names:
        with open(os.path.join(os.fsencode(root), name), 'wb') as file:
            file.write(picture if name != b'caf\xe9.png' else b'damaged')
    for name in ('a.csv', 'a.jsonl', 'a.parquet'):
        assert run('predict', root, '--checkpoint', model, '--output', tmp_path / name) == 0
    with (tmp_path / 'a.csv').open(newline='', encoding='utf-8') as file:
        rows = {'csv': list(csv.DictReader(file))}
    rows['jsonl'] = [json.loads(line) for line in (tmp_path / 'a.jsonl').read_text('utf-8').split('\n')[:-1]]
    rows['parquet'] = parquet(tmp_path / 'a.parquet')
    for found in rows.values():
        paths = [
            unquote_to_bytes(row['image'].removeprefix('file://'))
            if row['image'].startswith('file://')
            else row['image'].encode()
            for row in found
        ]
        assert sorted(os.path.basename(path) for path in paths) == sorted(names)
        assert all(os.path.exists(path) for path in paths)
        assert [bool(row['error']) for row in found] == [b'caf' in path for path in paths]
    assert run('predict', tmp_path / 'a.csv', '--checkpoint', model, '--output', tmp_path / 'again.jsonl') == 0
    again = [json.loads(line) for line in (tmp_path / 'again.jsonl').read_text('utf-8').split('\n')[:-1]]
    assert [(row['image'], row['classes']) for row in again] == [
        (row['image'], row['classes']) for row in rows['jsonl']
    ]


def test_errors_are_the_same_in_every_run(many, model, tmp_path):
    for name in ('a.jsonl', 'b.jsonl'):
        assert run('predict', many, '--checkpoint', model, '--output', tmp_path / name) == 0
    assert (tmp_path / 'a.jsonl').read_bytes() == (tmp_path / 'b.jsonl').read_bytes()
    assert ' at 0x' not in (tmp_path / 'a.jsonl').read_text()


def test_formulas_are_disarmed_for_spreadsheets(model, photos, tmp_path):
    name = tmp_path / '=cmd.png'
    name.write_bytes((photos / 'val' / 'sky' / '35.png').read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for flag, expected in (('false', '=cmd.png'), ('true', "'=cmd.png")):
            words = ['=cmd.png', '--checkpoint', model, '--output', f'{flag}.csv', '--spreadsheet', flag]
            assert run('predict', *words) == 0
            with open(f'{flag}.csv', newline='') as file:
                assert next(csv.DictReader(file))['image'] == expected


@pytest.mark.parametrize('rank, world', [(0, 1), (1, 2)], ids=['one process', 'one of two processes'])
def test_second_command_into_the_same_output_is_refused(many, model, tmp_path, rank, world):
    words = ['predict', many, '--checkpoint', model, '--output', tmp_path / 'a.csv']
    with Results(tmp_path / 'a.csv', 1, 1, {}).lock(rank, world):
        code = 'import sys; from t2t_vit import cli; sys.exit(cli.main(sys.argv[1:]))'
        done = subprocess.run([sys.executable, '-c', code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 2 and f'another command is writing to {tmp_path}/a.csv' in done.stderr
    assert not (tmp_path / 'a.csv').exists() and run(*words) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.csv', 'a.csv.json']


def test_damaged_parts_are_computed_again(whole, many, model, tmp_path):
    """Byte flips in finished parts are noticed when the command continues."""
    output = tmp_path / 'a'
    words = ['predict', many, '--checkpoint', model, '--output', output, '--shard_size', 12]
    assert run(*words) == 0
    part, chance = output / 'part-00003-of-00009.parquet', np.random.default_rng(0)
    content = part.read_bytes()
    for place in chance.integers(4, len(content) - 8, 4):
        part.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert run(*words) == 0
        assert parquet(output) == parquet(whole)


def test_prediction_lines_are_never_cut(model, photos, tmp_path, monkeypatch, capsys):
    """At 80 columns: a line for each image where it fits, else the whole name, and the classes below it."""
    monkeypatch.setenv('COLUMNS', '80')
    picture = (photos / 'val' / 'sky' / '35.png').read_bytes()
    long = tmp_path / ('x' * 100 + '.png')
    long.write_bytes(picture)
    (tmp_path / 'y.png').write_bytes(picture)
    monkeypatch.chdir(tmp_path)
    assert run('predict', 'y.png', '--checkpoint', model) == 0
    assert re.fullmatch(r'y\.png   (\w+ [\d.]+ %(   )?){3}\n', capsys.readouterr().out)
    assert run('predict', long, '--checkpoint', model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(long) and lines[1].startswith('    ') and lines[1].count('%') == 3 and len(lines) == 2


def test_reader_that_goes_ends_the_command_as_for_print(monkeypatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, 'stdout', Gone())
    with pytest.raises(BrokenPipeError):
        console().print('a')


@pytest.mark.parametrize('name', ['stdout', 'stderr'])
def test_closed_stream_is_no_error(model, photos, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    assert run('predict', photos / 'val' / 'sky' / '35.png', '--checkpoint', model) == 0


def test_one_image_starts_no_worker(model, photos, monkeypatch):
    counts = []
    original = classifier.open_pieces
    monkeypatch.setattr(
        classifier,
        'open_pieces',
        lambda opener, pieces, workers, device: counts.append(workers) or original(opener, pieces, workers, device),
    )
    assert cli.main(['predict', str(photos / 'val' / 'sky' / '35.png'), '--checkpoint', str(model)]) == 0
    assert counts == [0]
