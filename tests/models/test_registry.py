"""The models that `import t2t_vit` registers with timm."""

import subprocess
import sys

import pytest
import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from t2t_vit import VARIANTS
from t2t_vit.models.published import PUBLISHED
from t2t_vit.models.shipped import shipped

RELEASE = 'https://github.com/yitu-opensource/T2T-ViT/releases/download/main/'
FILES = {
    't2t_vit_7.in1k': '71.7_T2T_ViT_7.pth.tar',
    't2t_vit_10.in1k': '75.2_T2T_ViT_10.pth.tar',
    't2t_vit_12.in1k': '76.5_T2T_ViT_12.pth.tar',
    't2t_vit_14.in1k': '81.5_T2T_ViT_14.pth.tar',
    't2t_vit_14.in1k_384': '83.3_T2T_ViT_14.pth.tar',
    't2t_vit_14.cifar10': 'cifar10_t2t-vit_14_98.3.pth',
    't2t_vit_14.cifar100': 'cirfar100_t2t-vit-14_88.4.pth',
    't2t_vit_19.in1k': '81.9_T2T_ViT_19.pth.tar',
    't2t_vit_19.cifar10': 'cifar10_t2t-vit_19_98.4.pth',
    't2t_vit_19.cifar100': 'cifar100_t2t-vit-19_89.0.pth',
    't2t_vit_24.in1k': '82.3_T2T_ViT_24.pth.tar',
    't2t_vit_24.token_labeling_in1k': '84.2_T2T_ViT_24.pth.tar',
    't2t_vit_t_14.in1k': '81.7_T2T_ViTt_14.pth.tar',
    't2t_vit_t_19.in1k': '82.4_T2T_ViTt_19.pth.tar',
    't2t_vit_t_24.in1k': '82.6_T2T_ViTt_24.pth.tar',
}
CLASSES = {'cifar10': 10, 'cifar100': 100}


def python(code):
    """Return the output and warnings of a fresh interpreter."""
    done = subprocess.run([sys.executable, '-W', 'always', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_import_registers_every_variant():
    listed = 'print(*timm.list_models(["t2t_vit*", "vit_s_16*", "vit_6_*"]))'
    before, after = python(f'import timm; {listed}; import t2t_vit; {listed}')[0].splitlines()
    assert before == ''
    assert set(after.split()) == set(VARIANTS)


def test_every_published_file_is_listed():
    assert PUBLISHED.keys() == FILES.keys()
    assert set(timm.list_pretrained('*t2t_vit*')) == {*FILES, *(name for name in shipped() if 't2t_vit' in name)}


@pytest.mark.parametrize('name', FILES)
def test_published_file(name):
    cfg = timm.get_pretrained_cfg(name)
    tag = name.split('.')[1]
    size = 384 if tag == 'in1k_384' else 224
    assert cfg.url == RELEASE + FILES[name]
    assert cfg.input_size == (3, size, size)
    assert cfg.num_classes == CLASSES.get(tag, 1000)
    assert cfg.classifier == 'head'


@pytest.mark.parametrize('name', [name for name in FILES if 'cifar' not in name])
def test_images_of_imagenet(name):
    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert data['interpolation'] == 'bicubic'
    assert data['crop_pct'] == (1.0 if name.endswith('384') else 0.9)
    assert (data['mean'], data['std']) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@pytest.mark.parametrize('name', [name for name in FILES if 'cifar' in name])
def test_images_of_cifar(name):
    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert data['crop_pct'] == 1.0
    assert (data['mean'], data['std']) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@pytest.mark.parametrize('name', VARIANTS)
def test_model_knows_its_images(name):
    model = timm.create_model(name, device='meta')
    assert model.pretrained_cfg['input_size'] == (3, *model.img_size)
    assert model.img_size == (VARIANTS[name].img_size,) * 2


def test_model_of_384():
    model = timm.create_model('t2t_vit_14.in1k_384', device='meta')
    assert (model.img_size, model.grid_size) == ((384, 384), (24, 24))
    assert model.pos_embed.shape == (1, 1 + 24**2, 384)


def test_requested_size_overrides_the_tag():
    assert timm.create_model('t2t_vit_14.in1k_384', img_size=96, device='meta').grid_size == (6, 6)


def test_name_taken_by_timm_warns():
    """Ours is built, with one warning: a future timm may have a model of the same name."""
    out, err = python("""
import sys, types
import timm

def t2t_vit_7(pretrained=False, **kwargs): ...

t2t_vit_7.__module__ = 'timm.models.t2t'
sys.modules['timm.models.t2t'] = types.ModuleType('timm.models.t2t')
timm.models.register_model(t2t_vit_7)

import t2t_vit
print(isinstance(timm.create_model('t2t_vit_7', device='meta'), t2t_vit.T2TViT))
""")
    assert out == 'True\n'
    assert err.count('UserWarning') == 1
    assert 'timm has a model named t2t_vit_7 of its own (timm.models.t2t)' in err
    assert "timm.create_model('t2t_vit_7') builds the one of t2t_vit.models.variants" in err
