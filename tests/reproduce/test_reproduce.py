"""`t2t-vit reproduce`: printed sizes, the scaling rule, verdicts, runs that processes share, designs of one's own."""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm

import t2t_vit
from t2t_vit import cli
from t2t_vit.reproduce.arms import ARMS, PAIRS, REFERENCE, Pair, Place, base_of, build_small, published_share, shrink
from t2t_vit.reproduce.runs import (
    LOST,
    RESULT,
    Plan,
    follow,
    make_plan,
    read_arm,
    read_plan,
    results,
    run_config,
    run_folder,
    take,
)
from t2t_vit.reproduce.structures import PRINTED, ROWS, TOLERANCE, Structure, measure_structure
from t2t_vit.reproduce.verdicts import CLOSE, FAILS, HOLDS, OPEN, Arm, Verdict, judge, overall, pooled, verdicts
from t2t_vit.settings import UsageError
from t2t_vit.train.run import train
from t2t_vit.trained import load_model

ROOT = Path(__file__).parents[2]
TINY = [
    '--data',
    'digits',
    '--parameters',
    '150000',
    '--img_size',
    '16',
    '--reduction',
    '4',
    '--epochs',
    '3',
    '--batch_size',
    '32',
    '--train_images',
    '64',
    '--val_images',
    '20',
    '--threads',
    '1',
    '--device',
    'cpu',
]


# structures


@pytest.fixture(scope='module')
def table():
    """The committed table, row by row."""
    with (ROOT / 'results' / 'structures' / 'structures.csv').open() as file:
        return list(csv.DictReader(file))


AS_PRINTED = """
t2t_vit_7 71.7 4.3 1.1, t2t_vit_10 75.2 5.9 1.5, t2t_vit_12 76.5 6.9 1.8, t2t_vit_14 81.5 21.5 4.8,
t2t_vit_14 83.3 21.5 17.1, t2t_vit_19 81.9 39.2 8.5, t2t_vit_24 82.3 64.1 13.8, t2t_vit_t_14 81.7 21.5 6.1,
t2t_vit_t_19 82.2 39.2 9.8, t2t_vit_t_24 82.6 64.1 15.0, vit_s_16 78.1 48.6 10.1, deit_small_patch16_224 79.9 22.1 4.6,
vit_base_patch16_224 79.8 86.4 17.6, vit_large_patch16_224 81.1 304.3 63.6, resnet50 79.1 25.5 4.3,
resnet101 79.9 44.6 7.9, resnet152 80.8 60.2 11.6, mobilenetv1_100 70.8 4.2 0.6, mobilenetv2_100 72.8 3.5 0.3,
mobilenetv2_140 75.6 6.9 0.6, mobilenetv3_large_100 75.2 5.4 0.2, vit_s_16_deep_narrow 79.0 24.5 5.5,
vit_s_16_shallow_wide 69.9 47.9 9.9, vit_s_16_dense 76.8 46.7 9.7, vit_s_16_se 78.4 49.2 10.2,
vit_s_16_resnext 78.0 48.6 10.1, vit_s_16_ghost 73.7 32.1 6.9, t2t_vit_14_wide 77.9 25.1 5.0,
t2t_vit_dense 80.6 23.7 5.5, t2t_vit_14_se 81.6 21.9 4.9, t2t_vit_14_resnext 81.5 21.5 4.8,
t2t_vit_16_ghost 79.5 16.3 3.7, t2t_vit_14_no_t2t 79.5 21.1 4.2, t2t_vit_c_14 80.8 21.3 4.6, t2t_vit_14 81.5 21.5 4.8,
t2t_vit_t_14 81.7 21.5 6.1, t2t_vit_14_wide 78.8 25.0 5.4"""  # of the paper's tables: top-1, M parameters, GMACs


def test_every_printed_row_is_there(table):
    printed = [(name, *map(float, figures)) for name, *figures in map(str.split, AS_PRINTED.split(','))]
    assert (
        [
            (row['model'], *(float(row[key]) for key in ('top1_printed', 'params_printed', 'gmacs_printed')))
            for row in table
        ]
        == printed
        == [(row.name, row.top1, row.params, row.gmacs) for row in ROWS]
    )
    assert PRINTED['t2t_vit_14_wide'].top1 == 77.9  # not the second of its rows


def test_differences_over_one_percent_are_explained(table):
    for row, printed in zip(table, ROWS):
        counts = Structure(printed, *(float(row[key]) for key in ('params', 'params_all', 'gmacs', 'gmacs_weights')))
        far = [
            name
            for name, ours, theirs in (
                ('parameters', counts.params, printed.params),
                ('MACs', counts.gmacs, printed.gmacs),
            )
            if abs(ours / theirs - 1) > TOLERANCE
        ]
        said = '; '.join(counts.explanations())
        assert all(f'{name}: ' in said for name in far) and (far or not said), (row['model'], far, said)
        assert said == row['why']


@pytest.mark.parametrize('name', ['mobilenetv2_140', 'vit_s_16_shallow_wide'])
def test_the_table_is_what_the_models_are(name, table):
    found = measure_structure(PRINTED[name])
    row = next(row for row in table if row['model'] == name)
    assert [f'{found.params:.6f}', f'{found.gmacs:.6f}'] == [row['params'], row['gmacs']]


# the scaling rule

PLACE = Place(32, 8, 3, 10)


@pytest.fixture(scope='module')
def small():
    """A few models of each kind at half a million parameters."""
    found = {
        REFERENCE: shrink(REFERENCE, 500_000, PLACE),
        'vit_s_16': shrink('vit_s_16', 500_000 * published_share('vit_s_16', REFERENCE), PLACE),
    }
    for name in (
        't2t_vit_14_no_t2t',
        't2t_vit_dense',
        'vit_s_16_resnext',
        'vit_s_16_shallow_wide',
        'resnet50',
        't2t_vit_12',
        'mobilenetv2_140',
    ):
        base = base_of(name)
        found[name] = shrink(name, published_share(name, base) * found[base].parameters, PLACE)
    return found


def test_pairs_keep_their_published_ratio(small):
    pairs = [pair for pair in PAIRS if {pair.first, pair.second} <= small.keys()]
    assert len(pairs) >= 6
    for pair in pairs:
        ratio = small[pair.first].parameters / small[pair.second].parameters
        assert ratio == pytest.approx(PRINTED[pair.first].params / PRINTED[pair.second].params, rel=CLOSE), pair


def test_a_mobilenet_is_scaled_as_a_whole(small):
    """Its head too, which at the published 1280 channels would be most of so small a network."""
    whole, tiny = (build_small('scaled_mobilenetv2_140', args, PLACE) for args in ({}, small['mobilenetv2_140'].args))
    shares = [model.conv_head.weight.numel() / sum(p.numel() for p in model.parameters()) for model in (whole, tiny)]
    assert shares == pytest.approx([0.18, 0.18], abs=0.03)
    published = timm.create_model('mobilenetv2_100', num_classes=10)
    assert {k: v.shape for k, v in whole.state_dict().items()} == {
        k: v.shape for k, v in published.state_dict().items()
    }


def test_widths_change_and_nothing_else(small):
    assert set(small[REFERENCE].args) == {'embed_dim', 'num_heads', 'token_dim', 'splits'}
    plain, heads = (small[name].args for name in ('vit_s_16', 'vit_s_16_resnext'))
    assert plain['embed_dim'] == heads['embed_dim'] and 4 * 0.66 < heads['num_heads'] / plain['num_heads'] < 4 * 1.5
    assert small['t2t_vit_14_no_t2t'].args['splits'] == [[8, 8, 0]]
    assert set(small['resnet50'].args) == {'channels', 'output_stride'}


def test_every_pair_is_of_arms_that_are_printed():
    assert {name for pair in PAIRS for name in (pair.first, pair.second)} == set(ARMS)
    for pair in PAIRS:
        assert pair.published == pytest.approx(PRINTED[pair.first].top1 - PRINTED[pair.second].top1, abs=0.01)


def test_a_budget_that_is_too_small():
    with pytest.raises(UsageError, match='t2t_vit_14 has no widths for 5,000 parameters'):
        shrink(REFERENCE, 5000, PLACE)


# verdicts


@pytest.mark.parametrize(
    'difference, half, relation, verdict',
    [
        (2.0, 1.9, '>', HOLDS),
        (2.0, 2.1, '>', OPEN),
        (-2.0, 1.9, '>', FAILS),
        (-2.0, 1.9, '<', HOLDS),
        (2.0, 1.9, '<', FAILS),
        (0.5, 0.4, '=', HOLDS),
        (0.5, 0.6, '=', OPEN),
        (-2.0, 0.9, '=', FAILS),
    ],
)
def test_what_an_interval_says(difference, half, relation, verdict):
    assert judge(difference, half, relation) == verdict


def arm(name, *top1, parameters=100, own=False):
    return Arm(name, list(top1), list(range(len(top1))), parameters, 1.0, 1.0, 10.0, 1000, own)


def test_the_interval_is_a_pooled_t():
    arms = {a.name: a for a in (arm(REFERENCE, 52, 54), arm('t2t_vit_14_no_t2t', 50, 50), arm('vit_s_16', 40, 42, 44))}
    deviation, freedom = pooled(list(arms.values()))
    assert (deviation**2, freedom) == (pytest.approx((2 + 0 + 8) / 4), 4)
    found = next(v for v in verdicts(arms, 10.0) if v.pair.claim == 'T2T > hard split')
    assert (found.difference, found.text) == (3, OPEN)
    assert found.half == pytest.approx(2.7764 * deviation, abs=1e-3)  # t(0.975, 4), two seeds each


def test_one_seed_decides_nothing():
    """However far apart; the interval is that of the validation images, for orientation."""
    arms = {a.name: a for a in (arm(REFERENCE, 60), arm('t2t_vit_14_no_t2t', 50))}
    found = next(v for v in verdicts(arms, 10.0) if v.pair.claim == 'T2T > hard split')
    assert found.half == pytest.approx(100 * 1.96 * (0.6 * 0.4 / 1000 + 0.5 * 0.5 / 1000) ** 0.5, rel=1e-3)
    assert found.text == 'not decided (one seed)'
    arms = {a.name: a for a in (arm(REFERENCE, 60, 60), arm('t2t_vit_14_no_t2t', 50, 50))}
    found = next(v for v in verdicts(arms, 10.0) if v.pair.claim == 'T2T > hard split')
    assert found.text == 'not decided (too few seeds)' and overall([found]) == OPEN


def test_an_arm_at_chance_decides_nothing():
    arms = {a.name: a for a in (arm(REFERENCE, 60), arm('t2t_vit_14_no_t2t', 11))}
    found = next(v for v in verdicts(arms, 10.0) if v.pair.claim == 'T2T > hard split')
    assert found.text == f'{OPEN}: t2t_vit_14_no_t2t did not learn'


@pytest.mark.parametrize('parameters, text', [(220, HOLDS), (150, 'not judged: 0.67 of the size, in the paper 0.44')])
def test_another_ratio_of_sizes_is_another_comparison(parameters, text):
    arms = {a.name: a for a in (arm(REFERENCE, 60, 60.1, 60.2), arm('vit_s_16', 50, 50.1, parameters=parameters))}
    assert next(v for v in verdicts(arms, 10.0) if v.pair.second == 'vit_s_16' and v.difference).text == text


def test_a_claim_holds_where_all_its_pairs_do():
    def of(text, difference=1.0):
        return Verdict(Pair('', '', '>', '', 1.0), difference, 1.0, 1.0, text, '')

    assert overall([of(HOLDS), of(HOLDS)]) == HOLDS
    assert overall([of(HOLDS), of(FAILS)]) == FAILS
    assert overall([of(HOLDS), of(OPEN)]) == overall([of(HOLDS), of('not run', None)]) == OPEN


# runs that processes share


def test_claims_on_a_run(tmp_path):
    run = tmp_path / 'run'
    mine = take(run)
    assert mine is not None and take(run) is None
    mine.release()
    with subprocess.Popen([sys.executable, '-c', '']) as gone:
        pass
    (run / 'taken-0').write_text(f'{socket.gethostname()} {gone.pid}')  # its process is dead
    second = take(run)
    assert second is not None and second.file.name == 'taken-1' and take(run) is None
    second.file.write_text('another-host 1')
    assert take(run) is None
    os.utime(second.file, (time.time() - 2 * LOST,) * 2)
    third = take(run)
    assert third is not None and third.file.name == 'taken-2'
    (run / RESULT).write_text('{}')
    third.release()
    assert take(run) is None  # done


def test_a_plan_keeps_what_it_was_begun_with(tmp_path, monkeypatch):
    """The recipe as it was then, its base in it; and the share of the largest class, which a model may score unread."""
    source = SimpleNamespace(labels=[0] * 6 + [1] * 2, classes=['a', 'b'])
    monkeypatch.setattr('t2t_vit.reproduce.runs.open_source', lambda *args: source)
    mine, folder = tmp_path / 'mine.yaml', tmp_path / 'out'
    given = dict(data='x', batch_size=4, recipe=str(mine))
    mine.write_text('base: reproduce\noptimizer: {lr: 0.5}\n')
    plan = make_plan(folder, given)
    assert (plan.majority, plan.chance, Plan('x').chance) == (0.75, 0.75, 0.1) and make_plan(folder, given) == plan
    mine.write_text('base: reproduce\noptimizer: {lr: 0.1}\n')
    config = run_config(plan, folder, 't2t_vit_14', {}, 0, None)
    assert config.optimizer.lr == 0.5 and config.optimizer.weight_decay == 0.05
    with pytest.raises(UsageError, match='has changed since'):
        make_plan(folder, given)
    mine.unlink()
    assert read_plan(folder) == make_plan(folder, dict(data='x'))
    for text, message in (('data: x\n', 'it has no img_size'), ('[1]', 'is damaged'), ('nothing: 1', 'is damaged')):
        (folder / 'plan.yaml').write_text(text)
        with pytest.raises(UsageError, match=message):
            read_plan(folder)


def test_the_script_says_the_same_to_every_process(tmp_path):
    log, out = tmp_path / 'calls', tmp_path / 'out'
    (tmp_path / 'python').write_text(f'#!/bin/sh\necho "$@" >> {log}\ntouch {out}/plan.yaml\n')
    (tmp_path / 'python').chmod(0o755)
    subprocess.run(
        ['bash', str(ROOT / 'scripts' / 'reproduce_gpu.sh'), 'photos', str(out), '1', '3'],
        check=True,
        env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'EXTRA': '--img_size 64'},
    )
    calls = log.read_text().splitlines()
    assert len(calls) == 4 and {call.replace('--minutes 0', '--minutes 1') for call in calls} == {calls[0]}
    assert '--data photos' in calls[0] and calls[0].endswith('--img_size 64')


@pytest.fixture(scope='module')
def comparison(tmp_path_factory):
    """Two of the paper's arms and the page's own designs: killed in the first run, finished by two at once."""
    folder = tmp_path_factory.mktemp('comparison')
    page = (ROOT / 'docs' / 'reproduce.md').read_text()
    example = re.search(r'```python\n(# mine\.py\n.*?)```', page, re.DOTALL)
    assert example
    mine = folder / 'mine.py'
    mine.write_text(example[1])
    out = folder / 'out'
    words = [
        'reproduce',
        'accuracy',
        '--output',
        str(out),
        *TINY,
        '--seeds',
        '1',
        '--arms',
        '[mobilenetv1_100,t2t_vit_14]',
    ]
    with pytest.raises(SystemExit, match='75'):
        cli.main([*words, '--minutes', '1e-9'])  # begun, and nothing trained

    first = run_folder(out, 'mobilenetv1_100', 0)
    alone = (
        'import sys; from pathlib import Path; from t2t_vit.reproduce.runs import work; '
        'work(Path(sys.argv[1]), "mobilenetv1_100", 0, "cpu", 1)'
    )
    with subprocess.Popen([sys.executable, '-c', alone, str(out)], stdout=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 200
        while not list(first.glob('checkpoints/step-*.pt')):
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        killed.kill()
    assert not (first / RESULT).exists() and list(first.glob('taken-*')) and list(first.glob('checkpoints/*.pt'))
    names = ['mobilenetv1_100', 't2t_vit_14']
    with ThreadPoolExecutor(2) as two:
        list(two.map(lambda order: follow(out, order, 1, 'cpu', 1), (names, names[::-1])))
    assert cli.main([*words, '--blocks', f'[{mine}:ScaledBlock]', '--token_layers', f'[{mine}:PooledTokens]']) == 0
    return out


def test_a_killed_comparison_goes_on(comparison):
    first = run_folder(comparison, 'mobilenetv1_100', 0)
    assert [(row['arm'], row['own']) for row in results(comparison)] == [
        ('PooledTokens', True),
        ('ScaledBlock', True),
        ('mobilenetv1_100', False),
        ('t2t_vit_14', False),
    ]
    assert [file.name for file in first.glob('taken-*')] == ['taken-0']  # the dead one's; the next was released
    assert not list(comparison.glob('runs/*/*/failed.txt'))


def test_a_failed_run_is_settled_and_named(comparison, tmp_path, capsys):
    out = tmp_path / 'out'
    shutil.copytree(comparison, out)
    words = ['reproduce', 'accuracy', '--output', str(out), '--arms', '[mobilenetv1_100]', '--seeds', '2']
    with pytest.raises(SystemExit, match='75'):
        cli.main([*words, '--minutes', '0'])  # at once
    run = run_folder(out, 'mobilenetv1_100', 1)
    assert not run.exists()
    run.mkdir()
    (run / 'failed.txt').write_text('ValueError: no\n')
    with pytest.raises(SystemExit, match='^1$'):
        cli.main(words)
    assert 'failed: runs/mobilenetv1_100/seed-1: ValueError: no (left out until' in capsys.readouterr().out
    assert 'runs/mobilenetv1_100/seed-1 (ValueError: no)' in (out / 'README.md').read_text()


def test_a_run_loads_where_comparisons_are_unknown(comparison):
    load_model(str(run_folder(comparison, 'mobilenetv1_100', 0)))
    home = timm.models.model_entrypoint('scaled_mobilenetv1_100').__module__
    assert sys.modules[home] in vars(t2t_vit).values()  # the package itself imports what registers it


def test_it_ends_as_an_unbroken_run(comparison, tmp_path):
    row = read_arm(comparison, 'mobilenetv1_100')
    plan = read_plan(comparison)
    whole = train(run_config(plan, comparison, row['model'], row['args'], 0, tmp_path / 'run', 'cpu', 1))
    found = json.loads((run_folder(comparison, 'mobilenetv1_100', 0) / RESULT).read_text())
    assert (found['train_loss'], found['top1']) == (whole['train_loss'], whole['val_top1'])
    assert found['images_seen'] == 3 * 64 and found['parameters'] == row['parameters']


def test_the_report(comparison):
    text = (comparison / 'README.md').read_text()
    assert '| mobilenetv1_100 |' in text and '64 training and 20 validation images' in text
    assert re.search(r'your design \| ScaledBlock \| \? \| t2t_vit_14 \| [+-]', text)
    assert 'two proportions' in text and str(comparison.parent) not in text
    assert '--data digits --img_size 16' in text and '--output out`' in text and not list(comparison.glob('.*'))
    assert {'arms.png', 'claims.png', 'arms.csv', 'verdicts.csv', 'runs.csv', 'plan.yaml'} <= {
        file.name for file in comparison.iterdir()
    }
    assert len(list((comparison / 'configs').iterdir())) == 4


def test_own_designs_stand_in_the_same_model(comparison):
    plain, scaled, pooled = (read_arm(comparison, name) for name in ('t2t_vit_14', 'ScaledBlock', 'PooledTokens'))
    assert scaled['parameters'] == plain['parameters'] + 14 * plain['args']['embed_dim']
    assert read_arm(Path(os.path.relpath(comparison)), 'ScaledBlock') == scaled  # however the folder is spelled
    assert scaled['args'] == {**plain['args'], 'block': f'{comparison}/own/mine.py:ScaledBlock'}
    assert set(pooled['args']) - set(plain['args']) == {'token_layer'}


@pytest.mark.parametrize(
    'words, message',
    [
        (['accuracy', '--data', 'digits'], 'needs --output'),
        (['accuracy', '--output', 'new'], 'needs --data'),
        (
            ['accuracy', '--output', 'new', '--data', 'digits', '--reduction', '5', '--parameters', '0'],
            'reduction is one of 4, 8, 16, got 5\nt2t-vit: parameters is above 0',
        ),
        (['accuracy', '--output', 'old', '--epochs', '9'], 'epochs is 3 in old, and cannot become 9 there'),
        (['accuracy', '--output', 'old', '--arms', '[t2t_vit_15]'], "unknown arm 't2t_vit_15', did you mean"),
        (['accuracy', '--output', 'old', '--blocks', '[none.py:Block]'], 'no file none.py'),
        (
            ['accuracy', '--output', 'old', '--blocks', '[old/own/mine.py:A]', '--token_layers', '[old/own/mine.py:A]'],
            'is called as another design, own/mine.py:A: rename one',
        ),
        (['report', '--output', 'new'], 'new holds no comparison'),
    ],
)
def test_mistakes_are_named(words, message, comparison, tmp_path, monkeypatch, capsys):
    (tmp_path / 'old').symlink_to(comparison)
    monkeypatch.chdir(tmp_path)
    assert cli.main(['reproduce', *words]) == 2
    assert message in capsys.readouterr().err
