"""Test starting from the weights of a run, with and without its head."""

import torch
from accelerate import Accelerator
from conftest import SHORT, digits_config
from safetensors.torch import load_file

from t2t_vit.train.run import train
from t2t_vit.train.trainer import load

GREY_PHOTOS = {'data.channels': 1, 'augment.rotate': 0}


def test_weights_of_a_run_are_loaded(digits_run, tmp_path):
    trained = digits_config(weights=str(digits_run), output=str(tmp_path), **SHORT)
    run = load(trained, tmp_path, None, Accelerator(cpu=True))
    for name, tensor in load_file(digits_run / 'model.safetensors').items():
        assert torch.equal(run.parts.net.state_dict()[name], tensor)
    assert train(trained)['epoch'] == 0


def test_weights_for_other_classes_load_without_head(digits_run, photos, tmp_path):
    weights = digits_run / 'model.safetensors'
    config = digits_config(batch_size=8, weights=str(weights), **GREY_PHOTOS, **{'data.root': str(photos)})
    run = load(config, tmp_path, None, Accelerator(cpu=True))
    expected, found = load_file(weights), run.parts.net.state_dict()
    assert found['head.weight'].shape == (3, 128)
    assert torch.equal(found['blocks.0.attn.qkv.weight'], expected['blocks.0.attn.qkv.weight'])
