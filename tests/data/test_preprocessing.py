"""Preprocessing that is saved with a model and read back."""

import numpy as np
import pytest
import timm
import torch
from conftest import crops
from PIL import Image
from torchvision.transforms import InterpolationMode

import t2t_vit  # noqa: F401  registers the models
from t2t_vit.data import Preprocessing
from t2t_vit.data.preprocessing import resize_pixels
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


@pytest.mark.parametrize('mode', [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
@pytest.mark.parametrize('size', [(24, 24), (17, 90), (150, 224)])
def test_resizing_differs_from_pillow_by_at_most_two(mode, size):
    preprocessing = Preprocessing(size, 3, (0.5,) * 3, (0.5,) * 3)
    for _, _, image in list(crops())[::6]:
        found = resize_pixels(preprocessing.pixels(np.array(image)), size, mode)
        expected = np.asarray(image.resize(size[::-1], Image.Resampling[mode.name]))
        difference = abs(found.permute(1, 2, 0).numpy().astype(int) - expected)
        assert found.dtype == torch.uint8 and difference.max() <= 2 and difference.mean() < 0.1


@pytest.mark.parametrize('channels', [1, 3])
def test_pixels_are_those_of_the_converted_image(channels):
    preprocessing = Preprocessing((8, 8), channels, (0.5,) * channels, (0.5,) * channels)
    photo = next(image for _, _, image in crops())
    grey, fixed = np.asarray(photo.convert('L')), np.asarray(photo)
    fixed.flags.writeable = False
    for image in (photo, np.array(photo), fixed, grey, photo.convert('CMYK'), photo.convert('RGBA')):
        found, expected = preprocessing.pixels(image), np.asarray(preprocessing.convert(image))
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected.reshape(*expected.shape[:2], channels))


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
def test_evaluation_in_batches_equals_timms_transform(crop_mode):
    preprocessing = Preprocessing((24, 24), 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop_mode=crop_mode)
    photos = [image for _, _, image in list(crops())[:4]]
    found = preprocessing.normalize(torch.stack([preprocessing.evaluate(np.array(photo)) for photo in photos]))
    assert torch.equal(found, torch.stack([preprocessing.transform()(photo) for photo in photos]))
