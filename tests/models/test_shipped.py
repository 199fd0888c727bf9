"""The small trained models of the package: they load under their name everywhere, and classify."""

import json
import re

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images

from t2t_vit import Classifier, cli
from t2t_vit.models.shipped import compared, locate, shipped
from t2t_vit.train.start_weights import describe_weights, load_start_weights
from t2t_vit.trained import from_pretrained, hash_tensors, read_weights

NAMES = list(shipped())


def test_package_has_a_t2t_vit_a_vit_and_a_resnet():
    resnet, vit, t2t = compared()
    assert (resnet[:6], vit[:3], t2t[:7]) == ('resnet', 'vit', 't2t_vit')
    counts = [sum(p.numel() for p in from_pretrained(name).parameters()) for name in compared()]
    assert max(counts) < 1.1 * min(counts)
    assert sum(file.stat().st_size for folder in shipped().values() for file in folder.iterdir()) < 4 << 20


@pytest.mark.parametrize('name', NAMES)
def test_card_states_hash_score_data_and_licence(name):
    folder = shipped()[name]
    card = (folder / 'README.md').read_text('utf-8')
    weights = read_weights(folder / 'model.safetensors', ema=True)
    assert re.search('tensors: `(.+)`', card)[1] == hash_tensors(weights)
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}
    assert re.search(r'\d\d\.\d\d % top-1 on the 3,925 validation images', card) and '## Licence' in card
    assert locate(name) == str(folder) and locate('runs/photos') == 'runs/photos'


@pytest.mark.parametrize('name', NAMES)
def test_classifier_loads_by_name(name):
    model = Classifier.load(name, device='cpu')
    china = model.predict(load_sample_images().images[0])[0]
    assert len(model.classes) == 10 and 'church' in [label for label, _ in china.top_k[:3]]
    assert next(model.net.parameters()).dtype == torch.float32


@pytest.mark.parametrize('name', [name for name in NAMES if 'resnet' not in name])
def test_timm_knows_the_tag(name):
    net = timm.create_model(name, pretrained=True)
    expected = Classifier.load(name, device='cpu').net
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), expected.state_dict().values()))
    assert net.pretrained_cfg['label_names'] == expected.pretrained_cfg['label_names']
    assert timm.create_model(name, pretrained=True, num_classes=3).head.out_features == 3


@torch.no_grad()
def test_wide_images_keep_rows_and_columns():
    """32×128 has 4×16 tokens, as many as the 8×8 of the weights."""
    name, image = 't2t_vit_r_4_64.imagenette', torch.randn(1, 3, 32, 128)
    wide, square = (timm.create_model(name, pretrained=True, **size).eval() for size in (dict(img_size=(32, 128)), {}))
    torch.testing.assert_close(wide(image), square(image), atol=1e-3, rtol=0)  # the table is in float16


@pytest.mark.parametrize('name', NAMES)
def test_finetuning_leaves_out_the_head_for_other_classes(name):
    start = describe_weights(name)
    net = timm.create_model(start.model, num_classes=10, **start.model_args)
    report = load_start_weights(net, name, [f'class {i}' for i in range(10)])
    head = {'resnet': 'fc'}.get(name[:6], 'head')
    assert set(report.new) == {f'{head}.weight', f'{head}.bias'} and not report.resized
    assert str(report).startswith(f'{name}: ')
    same = load_start_weights(net, name, start.cfg['label_names'])
    assert not same.new  # for the same classes


def test_finetune_command_takes_the_name(capsys):
    assert cli.main(['finetune', 'digits', '--weights', 'vit_6_64.imagenette', '--print-config']) == 0
    assert 'weights: vit_6_64.imagenette' in capsys.readouterr().out


def test_list_of_models_has_the_tag(capsys):
    assert cli.main(['models', 'vit_6_64', '--json']) == 0
    assert json.loads(capsys.readouterr().out)[0]['published_weights'] == ['imagenette']
