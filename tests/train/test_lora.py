"""Fine-tuning with low-rank adapters: which weights are trained and saved, and how a run resumes."""

import pytest
import timm
import torch
from conftest import SMALLER, digits_config, same_run
from safetensors.torch import load_file
from test_resume import stop_after

from t2t_vit import Classifier
from t2t_vit.cli import main
from t2t_vit.models.lora import add_adapters, has_adapters, merge_adapters, merged_model
from t2t_vit.settings import UsageError
from t2t_vit.train.run import train
from t2t_vit.train.signals import Interrupted
from t2t_vit.train.state import saved_states

pytest.importorskip('peft')
SHORT = {'optimizer.warmup_epochs': 0, 'optimizer.lr': 0.01, 'lora': 2}
SIZES = {'t2t_vit_4_16': {**SMALLER, 'img_size': 16}, 'vit_tiny_patch16_224': {'depth': 1, 'img_size': 32}}


@pytest.mark.parametrize('name', SIZES)
@torch.no_grad()
def test_merged_model_computes_the_same_as_the_adapted_one(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3, **SIZES[name]).eval()
    x = torch.randn(2, 3, SIZES[name]['img_size'], SIZES[name]['img_size'])
    before = net(x)
    add_adapters(net, 2)
    assert torch.allclose(net(x), before, atol=1e-6)  # adapters start as zero
    trained = {key for key, parameter in net.named_parameters() if parameter.requires_grad}
    assert {'head.weight', 'head.bias'} == {key for key in trained if '.lora_' not in key}
    for key, parameter in net.named_parameters():
        if '.lora_' in key:
            torch.nn.init.normal_(parameter, std=0.3)
    plain, expected = merged_model(net), net(x)
    assert torch.allclose(plain(x), expected, atol=1e-5) and not torch.allclose(expected, before, atol=1e-2)
    assert not has_adapters(plain.state_dict()) and has_adapters(net.state_dict())
    assert merged_model(plain) is plain


def test_model_without_linear_layers_is_refused():
    with pytest.raises(UsageError, match='has no Linear layers to adapt'):
        add_adapters(timm.create_model('resnet10t', num_classes=2), 2)


def test_run_saves_a_merged_model_and_resumes_exactly(digits_run, tmp_path, monkeypatch, capsys):
    def config(folder):
        return digits_config(output=str(folder), weights=str(digits_run), **SHORT)

    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    train(config(whole))
    said = ' '.join(capsys.readouterr().out.split())
    assert 'adapters of rank 2 and the head are trained' in said and 'frozen' in said
    before, after = load_file(digits_run / 'model.safetensors'), load_file(whole / 'model.safetensors')
    assert {*before} == {*after}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {'blocks.0.attn.qkv.weight', 'tokens_to_token.project.weight', 'head.bias'} <= changed
    assert not changed & {'cls_token', 'norm.weight', 'blocks.0.attn.proj.bias', 'pos_embed'}
    state = torch.load(saved_states(whole / 'checkpoints')[0], weights_only=True)
    loaded = Classifier.load(saved_states(whole / 'checkpoints')[0]).net.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in merge_adapters(state['ema']).items())
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 7)  # in the second epoch
        train(config(cut))
    train(digits_config(output=str(cut), **SHORT), resume=str(cut))  # without the weights, as the command resumes
    assert same_run(cut, whole)


def test_finetune_by_command_writes_a_run_that_trains_on(digits_run, tmp_path, capsys):
    words = ['finetune', 'digits', '--weights', str(digits_run), '--epochs', '1', '--batch', '256', '--lora', '2']
    assert main([*words, '--output', str(tmp_path / 'a'), '--data.channels', '1']) == 0
    said = ' '.join(capsys.readouterr().out.split())
    assert 'optimizer.layer_decay None' in said and 'adapters' in said
    assert main(['finetune', 'digits', '--weights', str(tmp_path / 'a'), '--epochs', '1', '--dry-run']) == 0


@pytest.mark.parametrize(
    'options, message',
    [
        ({'weights': None}, 'lora adapts trained weights: give them with --weights'),
        ({'lora': 0}, 'lora is at least 1, got 0'),
        ({'optimizer.frozen': ['norm.*']}, 'leave out optimizer.frozen'),
    ],
)
def test_lora_rejects_options_that_contradict_it(digits_run, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        train(digits_config(output=str(tmp_path / 'run'), **{'weights': str(digits_run), **SHORT, **options}))
    assert not (tmp_path / 'run').exists()
