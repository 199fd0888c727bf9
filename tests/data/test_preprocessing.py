"""Preprocessing that is saved with a model and read back."""

import json

import timm
import torch

import t2t_vit  # noqa: F401  registers the models
from t2t_vit.data import Preprocessing
from t2t_vit.trained import load_trained, save_folder


def test_background_and_bands_are_saved_with_the_model(tmp_path):
    args = {'depth': 1, 'token_dim': 16, 'img_size': (16, 16), 'in_chans': 5}
    model = timm.create_model('t2t_vit_4_16', num_classes=2, **args)
    saved = Preprocessing((16, 16), 5, (0.1,) * 5, (0.2,) * 5, background='#102030')
    model.pretrained_cfg.update(saved.as_cfg(), num_classes=2, label_names=['a', 'b'])
    save_folder(model, tmp_path, {'depth': 1, 'token_dim': 16})
    assert json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))['background'] == '#102030'
    assert load_trained(str(tmp_path)).preprocessing == saved
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)  # timm accepts the folder
    assert torch.equal(again.head.weight, model.head.weight)
