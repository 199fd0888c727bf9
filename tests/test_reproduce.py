"""`t2t-vit reproduce`: printed sizes, the scaling rule, verdicts, runs that processes share, designs of one's own."""

import csv
import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from t2t_vit import cli
from t2t_vit.reproduce.arms import ARMS, PAIRS, REFERENCE, Pair, Place, base_of, published_share, shrink
from t2t_vit.reproduce.runs import LOST, RESULT, follow, read_arm, read_plan, results, run_config, run_folder, take
from t2t_vit.reproduce.structures import PRINTED, ROWS, TOLERANCE, Structure, measure_structure
from t2t_vit.reproduce.verdicts import FAILS, HOLDS, OPEN, Arm, Verdict, judge, overall, pooled, verdicts
from t2t_vit.settings import UsageError
from t2t_vit.train.loop import train

ROOT = Path(__file__).parents[1]
TINY = ['--data', 'digits', '--parameters', '150000', '--img_size', '16', '--reduction', '4', '--epochs', '3',
        '--batch_size', '32', '--train_images', '64', '--val_images', '20', '--threads', '1', '--device', 'cpu']


# structures

@pytest.fixture(scope='module')
def table():
    """The committed table, row by row."""
    with (ROOT / 'results' / 'structures' / 'structures.csv').open() as file:
        return list(csv.DictReader(file))


def test_every_printed_row_is_there(table):
    assert [(row['model'], float(row['params_printed']), float(row['gmacs_printed'])) for row in table] == [
        (row.name, row.params, row.gmacs) for row in ROWS]
    assert PRINTED['t2t_vit_14'].top1 == 81.5 and PRINTED['vit_s_16'][3:5] == (48.6, 10.1)
    assert PRINTED['t2t_vit_14_wide'].top1 == 77.9  # not the second of its rows


def test_differences_over_one_percent_are_explained(table):
    for row, printed in zip(table, ROWS):
        counts = Structure(printed, *(float(row[key]) for key in ('params', 'params_all', 'gmacs', 'gmacs_weights')))
        far = [name for name, ours, theirs in (('parameters', counts.params, printed.params),
                                               ('MACs', counts.gmacs, printed.gmacs))
               if abs(ours / theirs - 1) > TOLERANCE]
        said = '; '.join(counts.explanations())
        assert all(f'{name}: ' in said for name in far) and (far or not said), (row['model'], far, said)
        assert said == row['why']


@pytest.mark.parametrize('name', ['mobilenetv2_140', 'vit_s_16_shallow_wide'])
def test_the_table_is_what_the_models_are(name, table):
    found = measure_structure(PRINTED[name])
    row = next(row for row in table if row['model'] == name)
    assert [f'{found.params:.6f}', f'{found.gmacs:.4f}'] == [row['params'], row['gmacs']]


# the scaling rule

PLACE = Place(32, 8, 3, 10)


@pytest.fixture(scope='module')
def small():
    """A few models of each kind at half a million parameters."""
    found = {REFERENCE: shrink(REFERENCE, 500_000, PLACE), 'vit_s_16': shrink(
        'vit_s_16', 500_000 * published_share('vit_s_16', REFERENCE), PLACE)}
    for name in ('t2t_vit_14_no_t2t', 't2t_vit_dense', 'vit_s_16_resnext', 'vit_s_16_shallow_wide', 'resnet50',
                 'mobilenetv2_140'):
        base = base_of(name)
        found[name] = shrink(name, published_share(name, base) * found[base].parameters, PLACE)
    return found


def test_pairs_keep_their_published_ratio(small):
    pairs = [pair for pair in PAIRS if {pair.first, pair.second} <= small.keys()]
    assert len(pairs) >= 4
    for pair in pairs:
        ratio = small[pair.first].parameters / small[pair.second].parameters
        assert ratio == pytest.approx(PRINTED[pair.first].params / PRINTED[pair.second].params, rel=.08), pair
    assert small['mobilenetv2_140'].parameters == pytest.approx(
        small[REFERENCE].parameters * 6.9 / 21.5, rel=.08)


def test_widths_change_and_nothing_else(small):
    assert set(small[REFERENCE].args) == {'embed_dim', 'num_heads', 'token_dim', 'splits'}
    plain, heads = (small[name].args for name in ('vit_s_16', 'vit_s_16_resnext'))
    assert plain['embed_dim'] == heads['embed_dim'] and 4 * 0.66 < heads['num_heads'] / plain['num_heads'] < 4 * 1.5
    assert small['t2t_vit_14_no_t2t'].args['splits'] == [[8, 8, 0]]
    assert set(small['resnet50'].args) == {'channels', 'output_stride'}


def test_every_pair_is_of_arms_that_are_printed():
    assert {name for pair in PAIRS for name in (pair.first, pair.second)} == set(ARMS)
    for pair in PAIRS:
        assert pair.published == pytest.approx(PRINTED[pair.first].top1 - PRINTED[pair.second].top1, abs=.01)
        assert pair.size is None or PRINTED[pair.first].params / PRINTED[pair.second].params <= pair.size


def test_a_budget_that_is_too_small():
    with pytest.raises(UsageError, match='t2t_vit_14 has no widths for 5,000 parameters'):
        shrink(REFERENCE, 5000, PLACE)


# verdicts

@pytest.mark.parametrize('difference, half, relation, verdict', [
    (2.0, 1.9, '>', HOLDS), (2.0, 2.1, '>', OPEN), (-2.0, 1.9, '>', FAILS), (-2.0, 1.9, '<', HOLDS),
    (2.0, 1.9, '<', FAILS), (0.5, 0.4, '=', HOLDS), (0.5, 0.6, '=', OPEN), (-2.0, 0.9, '=', FAILS)])
def test_what_an_interval_says(difference, half, relation, verdict):
    assert judge(difference, half, relation) == verdict


def arm(name, *top1, parameters=100, own=False):
    return Arm(name, list(top1), list(range(len(top1))), parameters, 1., 1., 10., 1000, own)


def test_the_interval_is_a_pooled_t():
    arms = {a.name: a for a in (arm(REFERENCE, 52, 54), arm('t2t_vit_14_no_t2t', 50, 50), arm('vit_s_16', 40, 42, 44))}
    deviation, freedom = pooled(list(arms.values()))
    assert (deviation ** 2, freedom) == (pytest.approx((2 + 0 + 8) / 4), 4)
    found = next(v for v in verdicts(arms, 10.) if v.pair.claim == 'T2T > hard split')
    assert (found.difference, found.text) == (3, OPEN)
    assert found.half == pytest.approx(2.7764 * deviation, abs=1e-3)  # t(0.975, 4), two seeds each


def test_one_seed_falls_back_on_the_validation_images():
    arms = {a.name: a for a in (arm(REFERENCE, 60), arm('t2t_vit_14_no_t2t', 50))}
    found = next(v for v in verdicts(arms, 10.) if v.pair.claim == 'T2T > hard split')
    assert found.half == pytest.approx(100 * 1.96 * (.6 * .4 / 1000 + .5 * .5 / 1000) ** .5, rel=1e-3)
    assert found.text == HOLDS


def test_an_arm_at_chance_decides_nothing():
    arms = {a.name: a for a in (arm(REFERENCE, 60), arm('t2t_vit_14_no_t2t', 11))}
    found = next(v for v in verdicts(arms, 10.) if v.pair.claim == 'T2T > hard split')
    assert found.text == f'{OPEN}: t2t_vit_14_no_t2t did not learn'


def test_half_the_size_is_part_of_the_claim():
    arms = {a.name: a for a in (arm(REFERENCE, 60, 60.1), arm('vit_s_16', 50, 50.1, parameters=150))}
    found = next(v for v in verdicts(arms, 10.) if v.pair.second == 'vit_s_16' and v.pair.size)
    assert found.text == 'holds, but at 0.67 of the size'


def test_a_claim_holds_where_all_its_pairs_do():
    def of(text, difference=1.):
        return Verdict(Pair('', '', '>', '', 1.), difference, 1., 1., text, '')
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
    words = ['reproduce', 'accuracy', '--output', str(out), *TINY, '--seeds', '1', '--arms',
             '[mobilenetv1_100,t2t_vit_14]']
    with pytest.raises(SystemExit, match='75'):
        cli.main([*words, '--minutes', '1e-9'])  # begun, and nothing trained

    first = run_folder(out, 'mobilenetv1_100', 0)
    alone = ('import sys; from pathlib import Path; from t2t_vit.reproduce.runs import work; '
             'work(Path(sys.argv[1]), "mobilenetv1_100", 0, "cpu", 1)')
    with subprocess.Popen([sys.executable, '-c', alone, str(out)], stdout=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 200
        while not list(first.glob('checkpoints/step-*.pt')):
            assert killed.poll() is None and time.monotonic() < deadline
            time.sleep(.02)
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
        ('PooledTokens', True), ('ScaledBlock', True), ('mobilenetv1_100', False), ('t2t_vit_14', False)]
    assert [file.name for file in first.glob('taken-*')] == ['taken-0']  # the dead one's; the next was released
    assert not list(comparison.glob('runs/*/*/failed.txt'))


def test_it_ends_as_an_unbroken_run(comparison, tmp_path):
    row = read_arm(comparison, 'mobilenetv1_100')
    whole = train(run_config(read_plan(comparison), row['model'], row['args'], 0, tmp_path / 'run', 'cpu', 1))
    found = json.loads((run_folder(comparison, 'mobilenetv1_100', 0) / RESULT).read_text())
    assert (found['train_loss'], found['top1']) == (whole['train_loss'], whole['val_top1'])
    assert found['images_seen'] == 3 * 64 and found['parameters'] == row['parameters']


def test_the_report(comparison):
    text = (comparison / 'README.md').read_text()
    assert '| mobilenetv1_100 |' in text and '64 training and 20 validation images' in text
    assert re.search(r'your design \| ScaledBlock \| \? \| t2t_vit_14 \| [+-]', text)
    assert 'two proportions' in text and str(comparison.parent) not in text
    assert {'arms.png', 'claims.png', 'arms.csv', 'verdicts.csv', 'runs.csv', 'plan.yaml'} <= {
        file.name for file in comparison.iterdir()}
    assert len(list((comparison / 'configs').iterdir())) == 4


def test_own_designs_stand_in_the_same_model(comparison):
    plain, scaled, pooled = (read_arm(comparison, name) for name in ('t2t_vit_14', 'ScaledBlock', 'PooledTokens'))
    assert scaled['parameters'] == plain['parameters'] + 14 * plain['args']['embed_dim']
    assert scaled['args'] == {**plain['args'], 'block': f'{comparison}/own/mine.py:ScaledBlock'}
    assert set(pooled['args']) - set(plain['args']) == {'token_layer'}


@pytest.mark.parametrize('words, message', [
    (['accuracy', '--data', 'digits'], 'needs --output'),
    (['accuracy', '--output', 'new'], 'needs --data'),
    (['accuracy', '--output', 'new', '--data', 'digits', '--reduction', '5', '--parameters', '0'],
     'reduction is one of 4, 8, 16, got 5\nt2t-vit: parameters is above 0'),
    (['accuracy', '--output', 'old', '--epochs', '9'], 'epochs is 3 in old, and cannot become 9 there'),
    (['accuracy', '--output', 'old', '--arms', '[t2t_vit_15]'], "unknown arm 't2t_vit_15', did you mean"),
    (['accuracy', '--output', 'old', '--blocks', '[none.py:Block]'], 'no file none.py'),
    (['report', '--output', 'new'], 'new holds no comparison')])
def test_mistakes_are_named(words, message, comparison, tmp_path, monkeypatch, capsys):
    (tmp_path / 'old').symlink_to(comparison)
    monkeypatch.chdir(tmp_path)
    assert cli.main(['reproduce', *words]) == 2
    assert message in capsys.readouterr().err
