"""Preprocessing that is saved with a model and read back."""

import pytest
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
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)  # timm keeps the background, too
    for loaded in (load_trained(str(tmp_path)).preprocessing, Preprocessing.of(again.pretrained_cfg)):
        assert loaded == saved
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize('notes', [None, [], ['pretrained on cats'], ['background: no colour'], [7]])
def test_other_notes_of_a_model_are_no_background(notes):
    cfg = Preprocessing((8, 8), 3, (0.5,) * 3, (0.5,) * 3).as_cfg()
    assert Preprocessing.of({**cfg, 'notes': notes}).background == 'white'
