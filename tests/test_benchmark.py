import csv
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from PIL import Image

from t2t_vit import benchmark
from t2t_vit.benchmark import Row, bench, count_macs, save
from t2t_vit.cli import main
from t2t_vit.models.listing import build
from t2t_vit.timing import spread

# G multiply-adds, as the paper counts (all matmuls) and as most counters do (only those with weights)
MACS = {
    't2t_vit_7': (1.147, 0.976),
    't2t_vit_10': (1.516, 1.285),
    't2t_vit_12': (1.763, 1.492),
    't2t_vit_14': (4.783, 4.334),
    't2t_vit_19': (8.480, 7.787),
    't2t_vit_24': (13.662, 12.676),
    't2t_vit_t_14': (6.089, 4.334),
    't2t_vit_t_19': (9.785, 7.787),
    't2t_vit_t_24': (14.967, 12.676),
    'vit_small_patch16_224': (4.60, 4.24),
}


@pytest.fixture(autouse=True)
def do_not_keep_freed_memory(monkeypatch):
    """Leave the allocator of the test process as it is."""
    monkeypatch.setattr(benchmark, 'keep_freed_memory', lambda: None)


@pytest.mark.parametrize('name', MACS)
def test_count_macs_gives_published_numbers(name):
    counted = [macs / 1e9 for macs in count_macs(build(name, 224), 224)]
    assert counted == pytest.approx(MACS[name], abs=2e-3)


def test_spread_is_median_and_quartiles():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert spread([2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.timeout(600)
def test_bench_reports_speed_ratio_memory_and_conditions(tmp_path):
    rows = bench(
        ['t2t_vit_4_16'],
        baseline='vit_s_16',
        img_sizes=[32],
        batch_size=1,
        rounds=3,
        seconds=0.01,
        threads=1,
        device='cpu',
        output=str(tmp_path),
    )
    assert [(row.model, row.mode) for row in rows] == [
        ('vit_s_16', 'infer'),
        ('t2t_vit_4_16', 'infer'),
        ('vit_s_16', 'train'),
        ('t2t_vit_4_16', 'train'),
    ]
    base, ours = rows[2:]
    assert base.ratio == 1 and ours.ratio > 1  # 0.9 M parameters against 48 M
    assert ours.ratio_low <= ours.ratio <= ours.ratio_high
    assert 0 < ours.memory_ratio < 1 and base.memory_mb > 180  # the gradients of 48 M in float32
    table = list(csv.DictReader((tmp_path / 'bench.csv').read_text().splitlines()))
    assert len(table) == 4 and float(table[3]['ratio']) == ours.ratio and table[3]['precision'] == 'float32'
    assert table[0]['timm'] == timm.__version__ and table[0]['command'].startswith('t2t-vit')
    assert '| t2t_vit_4_16 |' in (tmp_path / 'README.md').read_text()


def row(model, img_size, speed):
    return Row(
        model,
        'infer',
        False,
        speed,
        speed,
        speed,
        1.0,
        1.0,
        1.0,
        100.0,
        1.0,
        1,
        1.0,
        1.0,
        8,
        img_size,
        'float32',
        'cpu',
        1,
        3,
        '2.6',
        '1.0',
        't2t-vit bench',
    )


def test_save_plots_speed_against_top1_or_over_sizes(tmp_path):
    save([row('t2t_vit_14', 224, 20.0), row('resnet50', 224, 15.0), row('unscored', 224, 9.0)], tmp_path / 'one')
    for sizes in ([224], [224, 448]):  # bench saves after each size
        save([row('t2t_vit_14', size, 2000 / size) for size in sizes], tmp_path / 'sizes')
    assert {f.name for f in (tmp_path / 'one').iterdir()} == {'bench.csv', 'README.md', 'speed.png'}
    assert {f.name for f in (tmp_path / 'sizes').iterdir()} == {'bench.csv', 'README.md', 'sizes.png'}
    save([replace(row('t2t_vit_14', size, 2000 / size), memory_mb=None) for size in (224, 448)], tmp_path / 'unknown')
    assert (tmp_path / 'unknown' / 'sizes.png').exists()
    with Image.open(tmp_path / 'one' / 'speed.png') as image:
        assert image.size[0] > 800


def test_weights_in_half_precision_are_benchmarked():
    seen = set()
    model = build('t2t_vit_4_16', 16)
    model.head.register_forward_hook(lambda module, args, output: seen.add((args[0].dtype, output.dtype)))
    for mode in ('infer', 'train'):
        benchmark.work(model, mode, False, torch.randn(2, 3, 16, 16), 'bf16_weights')()
    assert seen == {(torch.bfloat16, torch.bfloat16)} and model.head.weight.dtype == torch.bfloat16


def test_training_step_of_more_images_than_classes():
    model = timm.create_model('t2t_vit_4_16', depth=1, num_classes=3)
    benchmark.work(model, 'train', False, torch.randn(5, 3, 16, 16), 'float32')()


def test_build_model_from_python_file(tmp_path):
    (tmp_path / 'mine.py').write_text(
        'import timm\ndef small(img_size):\n    return timm.create_model("t2t_vit_4_16", img_size=img_size, depth=1)\n'
    )
    assert len(build(f'{tmp_path / "mine"}.py:small', 16).blocks) == 1


def test_plain_form_has_published_macs():
    plain = timm.create_model('t2t_vit_14', fast=False)
    assert [macs / 1e9 for macs in count_macs(plain, 224)] == pytest.approx(MACS['t2t_vit_14'], abs=2e-3)


def test_bench_compiles_each_model_for_each_size(monkeypatch):
    """Compile nine models of one class: without a reset torch stops at the eighth recompilation."""
    seen = []
    monkeypatch.setattr(
        torch,
        'compile',
        partial(
            torch.compile,
            backend=lambda graph, inputs: seen.append([type(n) for i in inputs for n in i.shape]) or graph.forward,
        ),
    )
    names = [f'small.py:small_{i}' for i in range(9)]
    monkeypatch.setattr(
        benchmark, 'build', lambda name, img_size: timm.create_model('t2t_vit_4_16', img_size=img_size, depth=1)
    )
    rows = bench(
        names,
        baseline=names[0],
        modes=['infer'],
        compiled=[True],
        img_sizes=[16, 24],
        batch_size=1,
        rounds=1,
        seconds=0.001,
        device='cpu',
        memory=False,
    )
    assert len(rows) == 2 * 9 and all(kind is int for kinds in seen for kind in kinds)


@pytest.mark.parametrize(
    'option, sentence',
    [
        ('rounds', 'rounds must be at least 1'),
        ('batch_size', 'batch_size must be at least 1'),
        ('threads', 'threads must be at least'),
        ('seconds', 'seconds must be above 0'),
    ],
)
def test_bench_rejects_invalid_numbers(option, sentence, capsys):
    assert main(['bench', 't2t_vit_4_16', f'--{option}', '0']) == 2
    assert sentence in capsys.readouterr().err


def test_bench_rejects_an_output_below_a_file_before_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('t2t_vit.benchmark.build', None)
    (tmp_path / 'taken').touch()
    assert main(['bench', 't2t_vit_4_16', '--output', f'{tmp_path}/taken/speed']) == 2
    assert 'taken is a file; expected a folder' in capsys.readouterr().err


def test_bench_rejects_unknown_models(tmp_path, capsys):
    with pytest.raises(ValueError, match='no file'):
        build(f'{tmp_path}/none.py:small', 16)
    (tmp_path / 'mine.py').touch()
    with pytest.raises(ValueError, match='mine.py defines no function or class .small'):
        build(f'{tmp_path}/mine.py:small', 16)
    for line, sentence in {
        'def small(): pass': 'must be a function of img_size that returns a model, got one of ()',
        'small = 3': 'must be a function of img_size that returns a model, got int',
        'def small(img_size): return img_size': 'must return a model, a torch.nn.Module, got int',
    }.items():
        (tmp_path / 'mine.py').write_text(line)
        assert main(['bench', f'{tmp_path}/mine.py:small', '--rounds', '1']) == 2
        assert sentence in ' '.join(capsys.readouterr().err.split())
    assert main(['bench', 't2t_vit_8', '--rounds', '1']) == 2
    assert 't2t_vit_8' in capsys.readouterr().err
