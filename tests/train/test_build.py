"""What is built of a configuration: which parameters learn, at which rate; and the plan, which changes nothing."""

import time

import pytest
import torch
import yaml
from accelerate import Accelerator, tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from conftest import digits_config, read_records

from t2t_vit.fast.memory import Recompute
from t2t_vit.settings import UsageError
from t2t_vit.train.build import build_optimizer, check_groups, parameter_groups
from t2t_vit.train.measure import affordable_epochs, measure
from t2t_vit.train.plan import plan
from t2t_vit.train.run import refit_budget, train
from t2t_vit.train.state import saved_states
from t2t_vit.train.trainer import load


def make(folder, **changes):
    return load(digits_config(output=str(folder), **changes), folder, None, Accelerator(cpu=True))


def test_frozen_parameters_stay_and_the_others_learn(tmp_path):
    run = make(tmp_path, **{'optimizer.frozen': ['norm.*', 'cls_token']})
    before = {name: value.clone() for name, value in run.parts.net.named_parameters()}
    run.step(next(run.data.train.epoch()))
    run.step(next(run.data.train.epoch()))
    same = {name for name, value in run.parts.net.named_parameters() if torch.equal(value, before[name])}
    assert same == {'norm.weight', 'norm.bias', 'cls_token'}


@pytest.mark.parametrize('args', [{'num_heads': 7}, {'block': 'x'}, {'num_heads': 0}])
def test_build_rejects_impossible_model_args(tmp_path, args):
    ((key, value),) = args.items()
    with pytest.raises(UsageError, match=f't2t_vit_4_16 cannot be built with .*{key} {value}'):
        make(tmp_path, **{f'model_args.{key}': value})


def test_frozen_pattern_without_match_is_refused(tmp_path):
    with pytest.raises(UsageError, match='no parameter is named cls_tokn, did you mean cls_token'):
        make(tmp_path, **{'optimizer.frozen': ['cls_tokn']})


def test_freezing_everything_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r'optimizer.frozen \* leaves nothing to train'):
        make(tmp_path, **{'optimizer.frozen': ['*']})


def test_optimizer_that_needs_second_derivatives_is_refused():
    with pytest.raises(UsageError, match='optimizer.name adahessian needs second derivatives'):
        digits_config(**{'optimizer.name': 'adahessian'})


@pytest.mark.parametrize(
    'model, args, not_hidden',
    [
        ('deit_tiny_distilled_patch16_224', {'embed_dim': 48, 'depth': 1}, ['head.weight', 'head_dist.weight']),
        (
            'swin_tiny_patch4_window7_224',
            {'embed_dim': 12, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 1, 1), 'window_size': 2},
            ['head.fc.weight', 'layers.0.blocks.0.attn.relative_position_bias_table'],
        ),
    ],
)
def test_muon_leaves_all_heads_and_positions_to_adamw(tmp_path, model, args, not_hidden):
    run = make(tmp_path, model=model, model_args=args, **{'data.img_size': 64, 'optimizer.name': 'nmuon'})
    fallback = {id(p) for group in run.parts.groups if group.get('use_fallback') for p in group['params']}
    names = {name: id(parameter) in fallback for name, parameter in run.parts.net.named_parameters()}
    assert all(names[name] for name in not_hidden)
    assert not all(names.values())


def test_body_lr_scale_spares_the_head(tmp_path):
    run = make(tmp_path, **{'optimizer.body_lr_scale': 0.01})
    rates = {id(p): group['lr_scale'] for group in run.parts.groups for p in group['params']}
    assert {name: rates[id(p)] for name, p in run.parts.net.named_parameters()} == {
        name: 1.0 if name.startswith('head.') else 0.01 for name, _ in run.parts.net.named_parameters()
    }


def test_norms_biases_and_class_token_have_no_weight_decay(tmp_path):
    run = make(tmp_path)
    decay = {id(p): group['weight_decay'] for group in run.parts.groups for p in group['params']}
    for name, p in run.parts.net.named_parameters():
        assert (decay[id(p)] == 0) == (p.ndim <= 1 or name == 'cls_token'), name


def test_decay_all_and_same_min_lr_match_the_release(tmp_path):
    """Decay on all that learns, and one end for the rates of head and body: eta_min of a plain cosine."""
    run = make(
        tmp_path,
        **{
            'optimizer.body_lr_scale': 0.1,
            'optimizer.decay_all': True,
            'optimizer.same_min_lr': True,
            'optimizer.min_lr': 1e-4,
            'optimizer.warmup_epochs': 0,
        },
    )
    groups = run.parts.optimizer.param_groups
    assert {group['weight_decay'] for group in groups} == {0.05}
    rates = []
    for step in (0, 5, 10):  # of ten
        run.parts.schedule.step_update(step)
        rates.append(sorted({group['lr'] for group in groups}))
    assert rates == [pytest.approx([2e-4, 2e-3]), pytest.approx([1.5e-4, 1.05e-3]), pytest.approx([1e-4])]


def test_measurement_leaves_the_run_as_it_is(tmp_path):
    run = make(tmp_path, model='resnet10t', model_args={}, **{'data.img_size': 32})  # which has running statistics
    before = {name: value.clone() for name, value in run.parts.task.state_dict().items()}
    measured = measure(run)
    assert measured.steps >= 1 and 0 < measured.step < measured.epoch and measured.memory > 1e8
    assert all(torch.equal(value, before[name]) for name, value in run.parts.task.state_dict().items())
    assert all(p.grad is None for p in run.parameters) and run.done == 0


def test_threads_that_slow_the_run_down_are_named(tmp_path):
    run, threads = make(tmp_path, threads=None), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measured = measure(run)
        assert measured.one_thread > 0 and torch.get_num_threads() == 2
        said = '\n'.join(plan(run, measured._replace(compute=0.5, one_thread=0.1)))
        assert 'warning   2 threads take 5.0 times as long as one' in said and '--threads 1' in said
        assert 'as long as one' not in '\n'.join(plan(run, measured._replace(compute=0.1, one_thread=0.1)))
        torch.set_num_threads(1)
        assert measure(run).one_thread == 0
    finally:
        torch.set_num_threads(threads)


def test_budget_takes_what_fits():
    assert affordable_epochs(60, training=8, validation=2, interval=1) == 5
    assert affordable_epochs(10, training=8, validation=2, interval=1) == 0
    # 30 epochs of 1 s and validations of 10 s after the 14th, the 28th and the last
    assert affordable_epochs(2 + 1.1 * 60.1, training=1, validation=10, interval=14) == 29
    assert 29 + 10 * 3 <= 60.1
    assert affordable_epochs(1e9, 1e-3, 0, 1, most=7) == 7


def test_fewer_epochs_have_the_schedule_of_a_run_of_that_many(tmp_path):
    long, short = make(tmp_path, epochs=9), make(tmp_path, epochs=3)
    long.set_epochs(3)
    for run in (long, short):
        run.parts.schedule.step_update(7)
    assert long.lr == short.lr and long.total_steps == short.total_steps == 15


def test_settings_reduced_for_a_short_run_return_with_more_epochs(tmp_path):
    run = make(tmp_path, epochs=60, **{'optimizer.warmup_epochs': 10})
    assert run.set_epochs(5) == [
        'note      warm-up reduced from 10 to 1 epochs and cooldown from 0 to 0: the run has 5'
    ]
    assert run.config.optimizer.warmup_epochs == 1
    assert run.set_epochs(60) == [] and run.config.optimizer.warmup_epochs == 10


def test_time_of_an_epoch_is_estimated_from_the_part_that_was_trained(tmp_path):
    run = make(tmp_path, epochs=9, minutes=5.0)
    now = time.monotonic()
    run.position.step, run.epoch_start, run.epoch_began = 5, 4, now - 2.0  # the last step of a resumed epoch
    refit_budget(run, now, 9)
    assert run.epoch_seconds == [pytest.approx(10, abs=1)]
    run.epoch_start = 5  # and an epoch that only lacks its scores
    refit_budget(run, now, 9)
    assert len(run.epoch_seconds) == 1


def test_budget_is_kept(tmp_path, capsys):
    clock = time.monotonic()
    train(digits_config(output=str(tmp_path / 'run'), epochs=1000, minutes=0.25))
    assert time.monotonic() - clock < 15
    config = yaml.safe_load((tmp_path / 'run' / 'config.yaml').read_text())
    assert config['epochs'] == len(read_records(tmp_path / 'run' / 'metrics.jsonl')) > 1
    assert 'within 0.25 minutes' in ' '.join(capsys.readouterr().out.split())


def test_budget_too_small_for_an_epoch_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r'does not fit into 0.0001 minutes: give --minutes [\d.]+ or more'):
        train(digits_config(output=str(tmp_path / 'run'), minutes=0.0001))
    assert not (tmp_path / 'run').exists()


def test_run_stops_early_without_a_better_score(tmp_path, capsys):
    lazy = {'optimizer.lr': 1e-9, 'optimizer.warmup_lr': 1e-9, 'patience': 2, 'epochs': 9, 'ema_decay': 0}
    lazy['weight_init'] = 'published'  # the smallest step changes the answers of a head that starts at zero
    train(digits_config(output=str(tmp_path), **lazy))
    assert 'stopped early: no better score in 2 epochs' in capsys.readouterr().out
    assert 3 <= len(read_records(tmp_path / 'metrics.jsonl')) < 9
    train(digits_config(output=str(tmp_path), **lazy), resume='auto')
    assert 'stopped early, after' in capsys.readouterr().out


def test_epochs_between_validations_have_no_scores(tmp_path, capsys):
    config = digits_config(output=str(tmp_path), epochs=5, val_interval=2)
    last = train(config)
    records = read_records(tmp_path / 'metrics.jsonl')
    assert [record['epoch'] for record in records if 'val_top1' in record] == [1, 3, 4] and last == records[-1]
    assert all('train_loss' in record for record in records)
    said = capsys.readouterr().out
    assert 'validation every 2 epochs' in ' '.join(said.split())
    rows = [line.split()[0] for line in said.splitlines() if line.startswith('     ') and '%' in line]
    assert rows == ['2', '4', '5']


def test_validations_do_not_change_the_weights(tmp_path):
    for name, interval in (('each', 1), ('some', 3)):
        train(digits_config(output=str(tmp_path / name), epochs=4, val_interval=interval))
    each, some = (torch.load(saved_states(tmp_path / name / 'checkpoints')[0])['model'] for name in ('each', 'some'))
    assert all(torch.equal(each[name], some[name]) for name in each)


def test_patience_is_asked_after_validations(tmp_path, capsys):
    lazy = {'optimizer.lr': 1e-9, 'optimizer.warmup_lr': 1e-9, 'epochs': 9, 'ema_decay': 0, 'weight_init': 'published'}
    train(digits_config(output=str(tmp_path), patience=2, val_interval=3, **lazy))
    assert 'stopped early' in capsys.readouterr().out
    records = read_records(tmp_path / 'metrics.jsonl')
    assert len(records) == 6 and 'val_top1' in records[-1]


@pytest.mark.parametrize(
    'fitting, epochs', [([5, 1, 0], 2), ([1, 3, 2, 1, 0], 4), ([1, 20, 20, 20, 20, 20, 20], 6)], ids=str
)
def test_epochs_are_as_many_as_fit_at_the_end_of_each(tmp_path, monkeypatch, fitting, epochs):
    answers = iter(fitting)
    monkeypatch.setattr('t2t_vit.train.run.affordable_epochs', lambda *given: min(next(answers), given[-1]))
    train(digits_config(output=str(tmp_path), epochs=6, minutes=5.0, val_interval=9))
    records = read_records(tmp_path / 'metrics.jsonl')
    assert ['val_top1' in record for record in records] == [False] * (epochs - 1) + [True]
    assert yaml.safe_load((tmp_path / 'config.yaml').read_text())['epochs'] == epochs


def test_frozen_except_the_head(tmp_path):
    run = make(tmp_path, **{'optimizer.frozen': ['*', '!head.*']})
    assert {n for n, p in run.parts.net.named_parameters() if p.requires_grad} == {'head.weight', 'head.bias'}


def test_parameter_in_no_group_or_two_groups_is_refused(tmp_path):
    run = make(tmp_path)
    groups = parameter_groups(run.config, run.parts.task)
    for wrong in (groups[:1], [*groups, groups[0]]):
        with pytest.raises(RuntimeError, match='every trainable parameter must be in one group'):
            check_groups(run.parts.task, wrong)


def test_learning_rate_scales_with_batch_size(tmp_path):
    run = make(tmp_path, **{'optimizer.lr_base_size': 512})  # of a batch of 256
    optimizer = build_optimizer(run.config, parameter_groups(run.config, run.parts.task))
    assert optimizer.param_groups[0]['lr'] == pytest.approx(1e-3)
    assert any('lr 0.001 = 0.002 x 256 / 512' in line for line in plan(run))


def test_plan_does_not_change_the_model(tmp_path):
    run = make(tmp_path, model='resnet10t', model_args={}, **{'data.img_size': 32})  # which has running statistics
    before = {name: value.clone() for name, value in run.parts.task.state_dict().items()}
    plan(run)
    assert all(torch.equal(value, before[name]) for name, value in run.parts.task.state_dict().items())


@pytest.mark.parametrize(
    'decay, steps, last, advice',
    [
        (0.99996, 775_620, '25,000', ''),
        (0.99996, 20_000, '2,223', '0.9995 averages a tenth'),
        (0.99, 5, '1', 'reached'),
        (0.9, 50, '6', ''),
        (0.999999, 100_000, '11,112', '0.9999 averages a tenth'),
    ],
)
def test_plan_says_how_many_steps_ema_averages(tmp_path, decay, steps, last, advice):
    """After t steps t / (t + 9), up to the decay: over a ninth of the steps made, and its own in the paper's run."""
    run = make(tmp_path, ema_decay=decay)
    assert run.parts.ema.get_decay(steps) == pytest.approx(min(decay, (steps - 1) / (steps + 8)))
    run.total_steps = steps
    lines = [line for line in plan(run) if line.startswith(('ema', 'warning   ema'))]
    assert f'averages the last {last} steps at the end' in lines[0]
    assert len(lines) == 1 + bool(advice) and advice in lines[-1]


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert train(digits_config(output=str(tmp_path / 'run')), dry_run=True) == {}
    assert 'schedule  2 epochs of 5 steps' in capsys.readouterr().out
    assert not (tmp_path / 'run').exists()


def test_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(UsageError, match='unknown tracker .tensorbord., did you mean tensorboard'):
        train(digits_config(output=str(tmp_path), trackers=['tensorbord']))


class Tracker(GeneralTracker):
    """One that needs a folder, as TensorBoard's."""

    name, requires_logging_directory, told = 'tensorboard', True, []

    def __init__(self, run_name, logging_dir, **kwargs):
        super().__init__()
        self.told.append(logging_dir)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.told.append(values['optimizer.lr'])

    def log(self, values, step=None, **kwargs):
        self.told.append((step, values['train_loss']))


def test_tracker_receives_configuration_and_records(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, '_available_trackers', [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, 'tensorboard', Tracker)
    record = train(
        digits_config(output=str(tmp_path), trackers='tensorboard', epochs=1, **{'optimizer.warmup_epochs': 0})
    )
    assert Tracker.told == [str(tmp_path), 2e-3, (0, record['train_loss'])]


def test_recomputed_tensor_keeps_its_layout():
    """Also where the function lays it out otherwise than the original was."""
    value = torch.randn(3, 4).t()
    pack = Recompute(value, torch.Tensor.contiguous, value.clone())
    view = value[1:3]
    assert torch.equal(pack.unpack(pack(view)), view)
