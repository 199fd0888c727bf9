"""Muon: timm's updates, its parameter groups, and a run that is interrupted."""

import os
import signal

import pytest
import timm.optim
import torch
from accelerate import Accelerator
from conftest import digits_config

from t2t_vit.settings import UsageError
from t2t_vit.train import muon
from t2t_vit.train.muon import Muon
from t2t_vit.train.run import train
from t2t_vit.train.signals import Interrupted
from t2t_vit.train.state import read_state, saved_states
from t2t_vit.train.trainer import Trainer, load

MUON = {'optimizer.name': 'nmuon', 'optimizer.lr': 2e-3, 'optimizer.momentum': 0.95}


def updated(optimizer, dtype, monkeypatch, **args):
    """Return parameters after three steps with the same random gradients."""
    monkeypatch.setattr(muon, 'newton_schulz_dtype', lambda device: dtype)
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in [(24, 16)] * 3 + [(8, 4, 3, 3), (16, 40)]]
    vectors = [torch.randn(shape, generator=generator) for shape in [(9,), (5, 12)]]
    parameters = [torch.nn.Parameter(value.clone()) for value in matrices + vectors]
    groups = [
        dict(params=parameters[: len(matrices)], weight_decay=0.1),
        dict(params=parameters[len(matrices) :], weight_decay=0.0, use_fallback=True),
    ]
    stepper = optimizer(groups, lr=0.02, **args)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        stepper.step()
    assert all(parameter.grad is not None for parameter in parameters)
    return [p.detach() - start for p, start in zip(parameters, matrices + vectors)], stepper


ARGUMENTS = [
    {},
    {'nesterov': True},
    {'ns_coefficients': 'original', 'ns_steps': 3},
    {'safety_factor': 1.5, 'scale_eps': True, 'adjust_lr_fn': 'rms_to_rms'},
    {'adjust_lr_fn': None},
    {'conv_mode': 'batched'},
    {'algo': 'adamuon'},
]


@pytest.mark.parametrize('args', ARGUMENTS, ids=str)
def test_updates_equal_timms_with_every_argument(args, monkeypatch):
    expected, theirs = updated(timm.optim.Muon, None, monkeypatch, **args)
    for dtype, bound in ((torch.bfloat16, 1e-3), (torch.float32, 1e-2)):  # timm iterates in bfloat16
        found, ours = updated(Muon, dtype, monkeypatch, **args)
        for a, b in zip(found, expected):
            assert (a - b).norm() < bound * b.norm()
    assert [sorted(state) for state in ours.state.values()] == [sorted(state) for state in theirs.state.values()]


def test_matrices_of_hidden_layers_are_muons_and_the_rest_is_adamws(tmp_path):
    trainer = load(digits_config(output=str(tmp_path), **MUON), tmp_path, None, Accelerator(cpu=True))
    fallback = {id(p): group.get('use_fallback', False) for group in trainer.parts.groups for p in group['params']}
    for name, p in trainer.parts.net.named_parameters():
        assert fallback[id(p)] == (p.dim() < 2 or name in ('cls_token', 'head.weight')), name


@pytest.mark.parametrize('changes', [{}, {'optimizer.layer_decay': 0.7}, {'grad_accum_steps': 2}])
def test_interrupted_run_with_muon_resumes_exactly(tmp_path, monkeypatch, changes):
    step = Trainer.step

    def stopping(trainer, batch):
        if trainer.position.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer, batch)

    states = []
    for folder in (tmp_path / 'whole', tmp_path / 'parts'):
        config = digits_config(
            output=str(folder),
            epochs=1,
            **{'optimizer.warmup_epochs': 0, 'data.train_images': 512, 'data.val_images': 64},
            **MUON,
            **changes,
        )
        if folder.name == 'parts':
            with monkeypatch.context() as context, pytest.raises(Interrupted):
                context.setattr(Trainer, 'step', stopping)
                train(config)
            assert read_state(saved_states(folder / 'checkpoints')[0])['position']['step'] == 2
        train(config, resume='auto')
        states.append(read_state(saved_states(folder / 'checkpoints')[0]))
    for name, value in states[0]['model'].items():
        assert torch.equal(value, states[1]['model'][name]), name


@pytest.mark.parametrize(
    'name, value, choice', [('adjust_lr_fn', 'spectral', 'match_rms_adamw'), ('ns_coefficients', 'x', 'quintic')]
)
def test_wrong_value_of_an_argument_is_refused(name, value, choice, tmp_path):
    config = digits_config(output=str(tmp_path), **MUON, **{f'optimizer.opt_kwargs.{name}': value})
    with pytest.raises(UsageError, match=f"nmuon cannot be built with optimizer.opt_kwargs .*'{value}'.*{choice}"):
        load(config, tmp_path, None, Accelerator(cpu=True))


def test_unknown_argument_of_the_optimizer_is_refused():
    with pytest.raises(UsageError, match='nmuon takes no nestrov, did you mean nesterov'):
        digits_config(**MUON, **{'optimizer.opt_kwargs': {'nestrov': True}})
