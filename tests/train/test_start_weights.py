"""Test starting from the weights of a run, with and without its head."""

import timm
import torch
from accelerate import Accelerator
from conftest import SHORT, digits_config
from safetensors.torch import load_file

from t2t_vit.train.run import train
from t2t_vit.train.start_weights import describe_origin, describe_weights, load_start_weights
from t2t_vit.train.trainer import load
from t2t_vit.trained import save_folder

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


@torch.no_grad()
def test_size_of_a_run_tells_the_grid_of_its_table(tmp_path):
    """The weights are for 4×16 tokens, the model for 8×8."""
    size = dict(img_size=(16, 64), pretrained_cfg_overlay=dict(input_size=(3, 16, 64)))
    source = timm.create_model('t2t_vit_7_32', depth=1, num_classes=2, **size).eval()
    save_folder(source, tmp_path, dict(depth=1))
    net = timm.create_model('t2t_vit_7_32', depth=1, num_classes=2).eval()
    load_start_weights(net, str(tmp_path), ['0', '1'])
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(net(image), source(image))


def test_origin_is_name_and_licence_of_the_weights(tmp_path, monkeypatch):
    run = tmp_path / 'run'
    run.mkdir()
    net = timm.create_model('t2t_vit_7_32', depth=1, pretrained_cfg_overlay=dict(license='cc-by-4.0'))
    save_folder(net, run, dict(depth=1))
    released, unknown = (tmp_path / name for name in ('81.5_T2T_ViT_14.pth.tar', 'mine.pth'))
    for file in (released, unknown):
        file.touch()
    monkeypatch.setattr('timm.models._hub.hf_hub_download', lambda *_, **__: str(run / 'config.json'))
    for weights, name, licence in (
        (None, None, None),
        ('t2t_vit_14.in1k', 't2t_vit_14.in1k', 'bsd-3-clause-clear'),
        ('t2t_vit_r_4_64.imagenette', 't2t_vit_r_4_64.imagenette', 'apache-2.0'),
        ('hf-hub:alice/birds', 'hf-hub:alice/birds', 'cc-by-4.0'),
        (str(run), 'run', 'cc-by-4.0'),
        (f'local-dir:{run}', 'run', 'cc-by-4.0'),
        (str(run / 'model.safetensors'), 'model.safetensors', 'cc-by-4.0'),
        (str(released), released.name, 'bsd-3-clause-clear'),
        (str(unknown), 'mine.pth', None),
    ):
        assert describe_origin(weights) == {'weights': name, 'license': licence}


def test_model_of_the_hub_is_described_as_its_folder_without_its_weights(tmp_path, monkeypatch):
    args = dict(depth=1, in_chans=1, token_layer='convolution')
    net = timm.create_model('t2t_vit_7_32', num_classes=2, **args)
    net.pretrained_cfg.update(num_classes=2, label_names=['cat', 'dog'])
    save_folder(net, tmp_path, args)
    (tmp_path / 'model.safetensors').unlink()
    monkeypatch.setattr('timm.models._hub.hf_hub_download', lambda *_, **__: str(tmp_path / 'config.json'))
    start, expected = describe_weights('hf-hub:alice/cats'), describe_weights(str(tmp_path))
    assert (start.model, start.model_args) == (expected.model, expected.model_args)
    assert start.model_args == dict(depth=1, token_layer='convolution', global_pool='token')
    for key in ('input_size', 'mean', 'std', 'label_names'):
        assert list(start.cfg[key]) == list(expected.cfg[key])
