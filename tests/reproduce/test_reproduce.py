"""Test `t2t-vit reproduce`: printed sizes, scaling, verdicts, runs shared by processes, custom designs."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
from scipy import stats

from t2t_vit import cli
from t2t_vit.custom import UntrustedCodeError
from t2t_vit.reproduce.arms import ARMS, PAIRS, REFERENCE, Inputs, Pair, base_of, build_scaled, published_ratio, scale
from t2t_vit.reproduce.command import reproduce
from t2t_vit.reproduce.comparison import RESULT, Plan, read_arm, read_plan, results, run_config, run_folder
from t2t_vit.reproduce.prepare import prepare
from t2t_vit.reproduce.runs import lock_of, locked, time_left, train_all
from t2t_vit.reproduce.structures import PRINTED, ROWS, TOLERANCE, Structure, measure_structure
from t2t_vit.reproduce.verdicts import (
    FAILS,
    HOLDS,
    OPEN,
    SIZE_TOLERANCE,
    Arm,
    Verdict,
    holm,
    judge,
    overall,
    p_value,
    pooled_std,
    standard_error,
    verdicts,
)
from t2t_vit.settings import UsageError
from t2t_vit.train.run import train

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
    """Read the committed table."""
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


def test_structures_contain_every_printed_row(table):
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


def test_structures_explain_differences_over_one_percent(table):
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
def test_committed_structures_match_models(name, table):
    found = measure_structure(PRINTED[name])
    row = next(row for row in table if row['model'] == name)
    assert [f'{found.params:.6f}', f'{found.gmacs:.6f}'] == [row['params'], row['gmacs']]


# the scaling rule

INPUTS = Inputs(32, 8, 3, 10)


@pytest.fixture(scope='module')
def small():
    """Scale a few models of each kind to half a million parameters."""
    found = {
        REFERENCE: scale(REFERENCE, 500_000, INPUTS),
        'vit_s_16': scale('vit_s_16', 500_000 * published_ratio('vit_s_16', REFERENCE), INPUTS),
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
        found[name] = scale(name, published_ratio(name, base) * found[base].parameters, INPUTS)
    return found


def test_scaled_pairs_keep_published_ratio(small):
    pairs = [pair for pair in PAIRS if {pair.first, pair.second} <= small.keys()]
    assert len(pairs) >= 6
    for pair in pairs:
        ratio = small[pair.first].parameters / small[pair.second].parameters
        assert ratio == pytest.approx(PRINTED[pair.first].params / PRINTED[pair.second].params, rel=SIZE_TOLERANCE), (
            pair
        )


def test_scaling_includes_head_of_mobilenet(small):
    """At the published 1280 channels the head would be most of the network."""
    whole, tiny = (build_scaled('scaled_mobilenetv2_140', args, INPUTS) for args in ({}, small['mobilenetv2_140'].args))
    shares = [model.conv_head.weight.numel() / sum(p.numel() for p in model.parameters()) for model in (whole, tiny)]
    assert shares == pytest.approx([0.18, 0.18], abs=0.03)
    published = timm.create_model('mobilenetv2_100', num_classes=10)
    assert {k: v.shape for k, v in whole.state_dict().items()} == {
        k: v.shape for k, v in published.state_dict().items()
    }


def test_scaling_changes_only_widths(small):
    assert set(small[REFERENCE].args) == {'embed_dim', 'num_heads', 'token_dim', 'splits'}
    plain, heads = (small[name].args for name in ('vit_s_16', 'vit_s_16_resnext'))
    assert plain['embed_dim'] == heads['embed_dim'] and 4 * 0.66 < heads['num_heads'] / plain['num_heads'] < 4 * 1.5
    assert small['t2t_vit_14_no_t2t'].args['splits'] == [[8, 8, 0]]
    assert set(small['resnet50'].args) == {'channels', 'output_stride'}


def test_pairs_cover_all_arms_with_published_differences():
    assert {name for pair in PAIRS for name in (pair.first, pair.second)} == set(ARMS)
    for pair in PAIRS:
        assert pair.published == pytest.approx(PRINTED[pair.first].top1 - PRINTED[pair.second].top1, abs=0.01)


def test_scaling_rejects_small_budget():
    with pytest.raises(UsageError, match='t2t_vit_14 has no widths for 5,000 parameters'):
        scale(REFERENCE, 5000, INPUTS)


# verdicts


@pytest.mark.parametrize(
    'difference, p, relation, verdict',
    [
        (2.0, 0.04, '>', HOLDS),
        (2.0, 0.06, '>', OPEN),
        (-2.0, 0.04, '>', FAILS),
        (-2.0, 0.04, '<', HOLDS),
        (2.0, 0.04, '<', FAILS),
        (0.5, 0.04, '=', HOLDS),
        (0.5, 0.06, '=', OPEN),
        (-2.0, 0.04, '=', FAILS),
        (2.0, 0.04, '?', 'better'),
        (-2.0, 0.04, '?', 'worse'),
    ],
)
def test_judge_follows_p_and_sign(difference, p, relation, verdict):
    assert judge(difference, p, relation) == verdict


def test_p_values_match_scipy():
    """With two arms the pooled test is the ordinary t test, and TOST is two one-sided tests of shifted samples."""
    first, second = [52.0, 54.0, 53.0], [52.5, 53.5, 52.2]
    a, b = arm('a', *first), arm('b', *second)
    difference, error, freedom = a.mean - b.mean, standard_error([a, b], [a, b]), 4
    assert p_value(difference, error, freedom, '>') == pytest.approx(stats.ttest_ind(first, second).pvalue)
    one_sided = [
        stats.ttest_ind([x + 1 for x in first], second, alternative='greater').pvalue,
        stats.ttest_ind([x - 1 for x in first], second, alternative='less').pvalue,
    ]
    assert p_value(difference, error, freedom, '=') == pytest.approx(max(one_sided))


def test_holm_corrects_step_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1] and holm([]) == []


def arm(name, *top1, parameters=100, custom=False):
    return Arm(name, list(top1), list(range(len(top1))), parameters, 1.0, 1.0, 10.0, 1000, custom)


def test_interval_uses_std_pooled_over_all_arms():
    arms = {a.name: a for a in (arm(REFERENCE, 52, 54), arm('t2t_vit_14_no_t2t', 50, 50), arm('vit_s_16', 40, 42, 44))}
    std, freedom = pooled_std(list(arms.values()))
    assert (std**2, freedom) == (pytest.approx((2 + 0 + 8) / 4), 4)
    found = next(v for v in verdicts(arms, 10.0) if v.pair.claim == 'T2T > hard split')
    assert (found.difference, found.text) == (3, OPEN)
    assert found.half == pytest.approx(2.7764 * std, abs=1e-3)  # t(0.975, 4), two seeds each


def test_p_is_corrected_for_the_number_of_judged_pairs():
    arms = {name: arm(name, 52.0, 53.5, 52.6, parameters=published_ratio(name, REFERENCE)) for name in ARMS}
    arms['t2t_vit_14_no_t2t'] = arms['t2t_vit_14_no_t2t']._replace(top1=[50.0, 50.9, 50.1])
    judged = [v for v in verdicts(arms, 10.0) if v.p is not None]
    found = next(v for v in judged if v.pair.claim == 'T2T > hard split')
    pair, everyone = [arms[REFERENCE], arms['t2t_vit_14_no_t2t']], list(arms.values())
    single = p_value(found.difference, standard_error(pair, everyone), pooled_std(everyone)[1], '>')
    assert found.p == pytest.approx(len(judged) * single)  # the smallest p is multiplied by their number


def test_one_seed_decides_nothing():
    """The interval is that of the validation images, for orientation."""
    arms = {a.name: a for a in (arm(REFERENCE, 60), arm('t2t_vit_14_no_t2t', 50))}
    found = next(v for v in verdicts(arms, 10.0) if v.pair.claim == 'T2T > hard split')
    assert found.half == pytest.approx(100 * 1.96 * (0.6 * 0.4 / 1000 + 0.5 * 0.5 / 1000) ** 0.5, rel=1e-3)
    assert found.text == 'not decided (one seed)'
    arms = {a.name: a for a in (arm(REFERENCE, 60, 60), arm('t2t_vit_14_no_t2t', 50, 50))}
    found = next(v for v in verdicts(arms, 10.0) if v.pair.claim == 'T2T > hard split')
    assert found.text == 'not decided (too few seeds)' and overall([found]) == OPEN


def test_arm_at_chance_decides_nothing():
    arms = {a.name: a for a in (arm(REFERENCE, 60), arm('t2t_vit_14_no_t2t', 11))}
    found = next(v for v in verdicts(arms, 10.0) if v.pair.claim == 'T2T > hard split')
    assert found.text == f'{OPEN}: t2t_vit_14_no_t2t did not learn'


@pytest.mark.parametrize('parameters, text', [(220, HOLDS), (150, 'not judged: size ratio 0.67, in the paper 0.44')])
def test_pair_with_another_size_ratio_is_not_judged(parameters, text):
    arms = {a.name: a for a in (arm(REFERENCE, 60, 60.1, 60.2), arm('vit_s_16', 50, 50.1, parameters=parameters))}
    assert next(v for v in verdicts(arms, 10.0) if v.pair.second == 'vit_s_16' and v.difference).text == text


def test_claim_holds_if_all_its_pairs_do():
    def of(text, difference=1.0):
        return Verdict(Pair('', '', '>', '', 1.0), difference, 1.0, 0.01, 1.0, text, '')

    assert overall([of(HOLDS), of(HOLDS)]) == HOLDS
    assert overall([of(HOLDS), of(FAILS)]) == FAILS
    assert overall([of(HOLDS), of(OPEN)]) == overall([of(HOLDS), of('not run', None)]) == OPEN


# preparation


@pytest.fixture
def data(monkeypatch):
    """Replace the dataset by eight labels, six of one class."""
    source = SimpleNamespace(labels=[0] * 6 + [1] * 2, classes=['a', 'b'])
    monkeypatch.setattr('t2t_vit.reproduce.prepare.open_train_val', lambda *args: (source, source, None))
    return dict(data='x', batch_size=4)


def test_plan_keeps_values_and_recipe(tmp_path, data):
    recipe, folder = tmp_path / 'mine.yaml', tmp_path / 'out'
    given = {**data, 'recipe': str(recipe)}
    recipe.write_text('base: reproduce\noptimizer: {lr: 0.5}\n')
    assert prepare(folder, given, [REFERENCE]) == [REFERENCE]
    plan = read_plan(folder)
    assert (plan.majority, plan.chance, Plan('x').chance) == (0.75, 0.75, 0.1)
    assert prepare(folder, given, [REFERENCE]) == [REFERENCE] and read_plan(folder) == plan
    recipe.write_text('base: reproduce\noptimizer: {lr: 0.1}\n')
    config = run_config(plan, folder, 't2t_vit_14', {}, 0, None)
    assert config.optimizer.lr == 0.5 and config.optimizer.weight_decay == 0.05
    with pytest.raises(UsageError, match='has changed since'):
        prepare(folder, given, [REFERENCE])
    recipe.unlink()
    assert prepare(folder, dict(data='x'), [REFERENCE]) == [REFERENCE] and read_plan(folder) == plan
    for text, message in (('data: x\n', 'it lacks img_size'), ('[1]', 'is damaged'), ('nothing: 1', 'is damaged')):
        (folder / 'plan.yaml').write_text(text)
        with pytest.raises(UsageError, match=message):
            read_plan(folder)


def test_recipe_may_leave_mean_and_std_open(tmp_path):
    (recipe := tmp_path / 'mine.yaml').write_text('base: reproduce\ndata: {mean: null, std: null}\n')
    config = run_config(Plan('digits', recipe=str(recipe), in_chans=1), tmp_path, REFERENCE, {}, 0, None)
    assert config.data.mean is None and config.data.std is None


def test_cnns_have_another_recipe_if_one_is_given(tmp_path, data):
    given = {**data, 'recipe': 'reproduce-few', 'cnn_recipe': 'reproduce-few-cnn'}
    prepare(tmp_path, given, [REFERENCE])
    plan = read_plan(tmp_path)
    rates = {
        model: run_config(plan, tmp_path, model, {}, 0, None).optimizer.lr
        for model in (REFERENCE, 'vit_s_16', 'resnet50', 'scaled_mobilenetv2_140')
    }
    assert rates == {REFERENCE: 2e-3, 'vit_s_16': 2e-3, 'resnet50': 2e-2, 'scaled_mobilenetv2_140': 2e-2}
    assert run_config(plan, tmp_path, 'resnet50', {}, 0, None).batch_size == 4  # the plan's
    with pytest.raises(UsageError, match='cnn_recipe is reproduce-few-cnn in .* and cannot change to reproduce'):
        prepare(tmp_path, {**data, 'cnn_recipe': 'reproduce'}, [REFERENCE])
    with pytest.raises(UsageError, match="cnn_recipe must be a YAML file or one of .*, got 'none'"):
        prepare(tmp_path / 'new', {**data, 'cnn_recipe': 'none'}, [REFERENCE])


def test_plans_without_a_cnn_recipe_are_read(tmp_path, data):
    prepare(tmp_path, data, [REFERENCE])
    text = (tmp_path / 'plan.yaml').read_text()
    (tmp_path / 'plan.yaml').write_text(text.replace('cnn_recipe: null\n', ''))
    plan = read_plan(tmp_path)
    assert plan.cnn_recipe is None and not (tmp_path / 'cnn_recipe.yaml').exists()
    assert run_config(plan, tmp_path, 'resnet50', {}, 0, None).optimizer.lr == 1e-3


def test_prepare_reports_all_problems_and_writes_nothing(tmp_path, data):
    folder = tmp_path / 'out'
    with pytest.raises(UsageError) as caught:
        prepare(folder, {**data, 'reduction': 5}, ['t2t_vit_15'], ['none.py:Block'], seeds=0)
    assert [line.split(',')[0] for line in str(caught.value).splitlines()] == [
        'reduction must be one of 4',
        "unknown arm 't2t_vit_15'",
        'blocks: there is no file none.py',
        'seeds must be at least 1',
    ]
    (tmp_path / 'mine.py').write_text('class Broken:\n    pass\n')
    for arms, blocks, plan in (
        ([], [f'{tmp_path}/mine.py:Broken'], {}),
        ([], [], {'parameters': 5000}),
        ([], [], {'batch_size': 9}),
        ([], [], {'epochs': 0}),
    ):
        with pytest.raises(UsageError):
            prepare(folder, {**data, **plan}, arms, blocks)
    assert not folder.exists()
    prepare(folder, data, [REFERENCE])


def test_arm_of_the_paper_cannot_name_code(tmp_path, data):
    folder = tmp_path / 'out'
    prepare(folder, data, [REFERENCE])
    file = folder / 'arms' / f'{REFERENCE}.yaml'
    file.write_text(file.read_text().replace('num_heads:', 'block: evil.py:Block\n  num_heads:'))
    with pytest.raises(UntrustedCodeError, match='names code to execute'):
        prepare(folder, data, [REFERENCE])


def test_help_names_every_arm():
    assert {*re.findall(r'\w+', reproduce.__doc__ or '')} >= {*ARMS}


# runs shared by processes


def test_lock_of_a_run_ends_with_its_process(tmp_path):
    run = tmp_path / 'runs' / 'seed-0'
    assert not locked(run)
    hold = (
        'import sys, time; from pathlib import Path; from t2t_vit.reproduce.runs import lock_of\n'
        'with lock_of(Path(sys.argv[1])):\n    print("locked", flush=True); time.sleep(600)'
    )
    with subprocess.Popen([sys.executable, '-c', hold, str(run)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == 'locked\n'
        assert locked(run)
        process.kill()
    assert not locked(run)
    with lock_of(run):
        assert locked(run)


@pytest.mark.parametrize(
    'durations, text',
    [([], ''), ([60, 180], '; 4 runs left, about 8 min for one process'), ([3600], '; 4 runs left, about 4.0 h for')],
)
def test_time_left_is_the_mean_of_finished_runs(durations, text):
    assert time_left(durations, 4).startswith(text)


def test_script_gives_every_process_the_same_arguments(tmp_path):
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
    """Run two arms and the designs of docs/reproduce.md: killed in the first run, finished by two threads together."""
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
        cli.main([*words, '--minutes', '1e-9'])  # prepared, and nothing trained

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
    assert not (first / RESULT).exists() and not locked(first) and list(first.glob('checkpoints/*.pt'))
    names = ['mobilenetv1_100', 't2t_vit_14']
    with ThreadPoolExecutor(2) as two:
        list(two.map(lambda order: train_all(out, order, 1, 'cpu', 1), (names, names[::-1])))
    assert cli.main([*words, '--blocks', f'[{mine}:ScaledBlock]', '--token_layers', f'[{mine}:PooledTokens]']) == 0
    return out


@pytest.mark.timeout(900)
def test_killed_comparison_resumes(comparison):
    assert [(row['arm'], row['custom']) for row in results(comparison)] == [
        ('PooledTokens', True),
        ('ScaledBlock', True),
        ('mobilenetv1_100', False),
        ('t2t_vit_14', False),
    ]
    assert not list(comparison.glob('runs/*/*/failed.txt'))


def test_failed_run_is_skipped_and_named(comparison, tmp_path, capsys):
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
    assert 'failed: runs/mobilenetv1_100/seed-1: ValueError: no (skipped until' in capsys.readouterr().out
    assert 'runs/mobilenetv1_100/seed-1 (ValueError: no)' in (out / 'README.md').read_text()


def test_commands_open_a_scaled_mobilenet_that_the_package_alone_does_not_register(comparison):
    run = run_folder(comparison, 'mobilenetv1_100', 0)
    script = (
        'import sys, timm, t2t_vit; from t2t_vit import cli\n'
        'assert not timm.is_model("scaled_mobilenetv1_100")\n'
        'sys.exit(cli.main(["predict", "digits", "--checkpoint", sys.argv[1], "--workers", "0", "--device", "cpu"]))'
    )
    done = subprocess.run([sys.executable, '-c', script, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_resumed_run_equals_uninterrupted_run(comparison, tmp_path):
    row = read_arm(comparison, 'mobilenetv1_100')
    plan = read_plan(comparison)
    whole = train(run_config(plan, comparison, row['model'], row['args'], 0, tmp_path / 'run', 'cpu', 1))
    found = json.loads((run_folder(comparison, 'mobilenetv1_100', 0) / RESULT).read_text())
    assert (found['train_loss'], found['top1']) == (whole['train_loss'], whole['val_top1'])
    assert found['images_seen'] == 3 * 64 and found['parameters'] == row['parameters']


def test_report_contents(comparison):
    text = (comparison / 'README.md').read_text()
    assert '| mobilenetv1_100 |' in text and '64 training and 20 validation images' in text
    assert re.search(r'your design \| ScaledBlock \| \? \| t2t_vit_14 \| [+-]', text)
    assert 'two proportions' in text and str(comparison.parent) not in text
    assert '--data digits --img_size 16' in text and '--output out`' in text and not list(comparison.glob('.*'))
    assert {'arms.png', 'claims.png', 'arms.csv', 'verdicts.csv', 'runs.csv', 'plan.yaml'} <= {
        file.name for file in comparison.iterdir()
    }


def test_custom_designs_replace_one_argument(comparison):
    plain, scaled, pooled = (read_arm(comparison, name) for name in ('t2t_vit_14', 'ScaledBlock', 'PooledTokens'))
    assert scaled['parameters'] == plain['parameters'] + 14 * plain['args']['embed_dim']
    assert read_arm(Path(os.path.relpath(comparison)), 'ScaledBlock') == scaled  # from any working directory
    assert scaled['args'] == {**plain['args'], 'block': f'{comparison}/custom/mine.py:ScaledBlock'}
    assert set(pooled['args']) - set(plain['args']) == {'token_layer'}


@pytest.mark.parametrize(
    'words, message',
    [
        (['accuracy', '--data', 'digits'], 'needs --output'),
        (['accuracy', '--output', 'new'], 'needs --data'),
        (
            ['accuracy', '--output', 'new', '--data', 'digits', '--reduction', '5', '--parameters', '0'],
            'reduction must be one of 4, 8, 16, got 5\nt2t-vit: parameters must be above 0',
        ),
        (['accuracy', '--output', 'old', '--epochs', '9'], 'epochs is 3 in old and cannot change to 9'),
        (['accuracy', '--output', 'old', '--arms', '[t2t_vit_15]'], "unknown arm 't2t_vit_15', did you mean"),
        (['accuracy', '--output', 'old', '--blocks', '[none.py:Block]'], 'there is no file none.py'),
        (
            [
                'accuracy',
                '--output',
                'old',
                '--blocks',
                '[old/custom/mine.py:A]',
                '--token_layers',
                '[old/custom/mine.py:A]',
            ],
            'would have the same name: rename one',
        ),
        (['report', '--output', 'new'], 'new is not the folder of a comparison'),
    ],
)
def test_usage_errors(words, message, comparison, tmp_path, monkeypatch, capsys):
    (tmp_path / 'old').symlink_to(comparison)
    monkeypatch.chdir(tmp_path)
    assert cli.main(['reproduce', *words]) == 2
    assert message in capsys.readouterr().err
