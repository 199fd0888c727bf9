"""Test runs that begin on smaller images."""

import pytest
import torch
from accelerate import Accelerator
from conftest import digits_config, same_run
from rich.console import Console

from t2t_vit.console import Live
from t2t_vit.data import Preprocessing
from t2t_vit.settings import UsageError
from t2t_vit.train.measure import affordable_epochs, measure
from t2t_vit.train.plan import plan
from t2t_vit.train.run import train, work_of_more
from t2t_vit.train.signals import Interrupted
from t2t_vit.train.small_images import SmallImages
from t2t_vit.train.teacher import Teacher
from t2t_vit.train.trainer import Trainer, load

HALF = {'data.start_scale': 0.5, 'data.start_share': 0.6}


def make(folder, **changes):
    return load(digits_config(output=str(folder), **{**HALF, **changes}), folder, None, Accelerator(cpu=True))


def test_first_steps_are_on_smaller_images(tmp_path, monkeypatch):
    seen, accumulate = [], Trainer.accumulate_gradients
    monkeypatch.setattr('t2t_vit.train.run.measure', lambda trainer: measure(trainer, steps=1))

    def recording(run, batch):
        seen.append((batch.images.shape[2:], batch.images.is_contiguous(memory_format=torch.channels_last)))
        return accumulate(run, batch)

    monkeypatch.setattr(Trainer, 'accumulate_gradients', recording)
    train(digits_config(output=str(tmp_path), **HALF))
    assert [tuple(size) for size, _ in seen[-10:]] == [(8, 8)] * 6 + [(16, 16)] * 4
    assert all(packed for _, packed in seen)


def test_reduced_images_keep_their_content():
    ramp = torch.linspace(0, 1, 64).expand(2, 3, 64, 64)
    reduced = SmallImages(0.75, 0.5).reduce(ramp)
    assert reduced.shape == (2, 3, 48, 48)
    torch.testing.assert_close(reduced.mean(), ramp.mean())
    assert SmallImages(0.75, 0.5).reduce(torch.zeros(1, 3, 32, 64)).shape == (1, 3, 24, 48)


@pytest.mark.parametrize('step', [4, 8], ids=['on smaller images', 'on images of full size'])
def test_resumed_run_is_exact(tmp_path, monkeypatch, step):
    train(digits_config(output=str(tmp_path / 'whole'), **HALF))
    config = digits_config(output=str(tmp_path / 'parts'), **HALF)
    with monkeypatch.context() as context, pytest.raises(Interrupted):
        context.setattr(Trainer, 'step', stopping_at(step, Trainer.step))
        train(config)
    train(config, resume=str(tmp_path / 'parts'))
    assert same_run(tmp_path / 'parts', tmp_path / 'whole')


def stopping_at(last, step):
    def stopping(run, batch):
        outcome = step(run, batch)
        return outcome._replace(stop=True) if run.done == last else outcome

    return stopping


def test_work_counts_small_steps_at_their_cost():
    small = SmallImages(0.5, 0.6, cost=0.4)
    assert small.work(0, 10, 10) == pytest.approx(6 * 0.4 + 4)
    assert small.work(0, 5, 10) + small.work(5, 8, 10) + small.work(8, 10, 10) == pytest.approx(small.work(0, 10, 10))
    assert SmallImages(1.0, 0.6).work(2, 10, 10) == 8
    assert SmallImages(0.5, 0.6).cost == 0.25


def test_budget_takes_the_cheap_epochs_into_account(tmp_path):
    run = make(tmp_path)
    run.small.cost = 0.5
    assert affordable_epochs(2 + 1.1 * 7.1, 1, 0, 1, lambda n: work_of_more(run, 0, n)) == 10  # six at half the price
    assert affordable_epochs(2 + 1.1 * 6.1, 1, 0, 1, lambda n: work_of_more(run, 6, n)) == 7  # 1.8 of which are cheap


def test_cost_is_measured_and_the_plan_names_both_sizes(tmp_path):
    run = make(tmp_path, epochs=5, **{'model_args.depth': 4})
    measured = measure(run)
    assert 0 < run.small.cost <= 1
    said = '\n'.join(plan(run, measured))
    assert 'schedule  5 epochs of 5 steps, 25 in all, the first 15 of them on images of 8x8' in said
    assert ' to ' in said.split('time ')[1].splitlines()[0]
    assert 'on images of' not in '\n'.join(plan(make(tmp_path, **{'data.start_scale': 1.0})))


def test_progress_estimates_the_time_left_by_work(monkeypatch):
    clock = iter([0.0, 0.0, 6.0])
    monkeypatch.setattr('t2t_vit.console.time.monotonic', lambda: next(clock))
    live = Live(Console(quiet=True), 'step', 10, work=SmallImages(0.5, 0.6, cost=0.5).work)
    with live:
        assert live.left(6) == '0:08'  # three units of work took six seconds, four are left


def test_teacher_sees_images_of_its_own_size():
    seen = []

    class Recording(torch.nn.Identity):
        def forward(self, images):
            seen.append(images.shape)
            return images.mean((2, 3))

    student = Preprocessing((16, 16), 3, (0.5,) * 3, (0.25,) * 3)
    Teacher(Recording(), student)(torch.zeros(2, 3, 12, 12))
    assert seen == [(2, 3, 16, 16)]


def test_model_that_takes_one_size_only_is_refused(tmp_path):
    run = make(tmp_path, model='vit_tiny_patch16_224', model_args={}, **{'data.img_size': 32})
    with pytest.raises(UsageError, match='data.start_scale 0.5: vit_tiny_patch16_224 does not take images of 16x16'):
        measure(run)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'data.start_scale': 0.0}, 'data.start_scale is above 0 and at most 1, got 0.0'),
        ({'data.start_share': 1.0}, 'data.start_share is above 0 and below 1, got 1.0'),
        ({**HALF, 'objective.kind': 'token_labels'}, 'data.start_scale is not for objective.kind token_labels'),
    ],
)
def test_invalid_values_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        digits_config(**changes)
