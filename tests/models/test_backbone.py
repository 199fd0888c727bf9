"""The models as backbones of other libraries: the examples of docs/backbone.md learn, and levels fit decoders."""

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from test_models import tiny
from test_readme import ROOT, blocks

from t2t_vit import Pyramid

EXAMPLES = {
    name: block
    for _, block in blocks('python', (ROOT / 'docs' / 'backbone.md').read_text(encoding='utf-8'))
    for name in ('smp.Unet', 'FCOS(', 'memory')
    if name in block
}


def run(example):
    names = {}
    exec(compile(EXAMPLES[example], 'backbone.md', 'exec'), names)
    return names


def test_segmentation_learns():
    assert run('smp.Unet')['iou'] > 0.6  # 0.3 where all is background


def test_detection_learns():
    names = run('FCOS(')
    assert sum(names['overlaps']) / 32 > 0.5 and sum(names['right']) > 28


def test_anomaly_detection_finds_the_anomaly():
    names = run('memory')
    assert names['blotted'].amax((1, 2)).min() > names['normal'].max()
    inside = (names['rows'] - 30).abs().le(7) & (names['columns'] - 46).abs().le(7)
    assert inside.sum() >= 7


def test_transformers_encoder():
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmWrapperConfig(architecture='t2t_vit_4_16', num_labels=3)
    net = transformers.TimmWrapperForImageClassification(config).eval()
    assert net(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3)


def test_fastai_encoder():
    learners = pytest.importorskip('fastai.vision.learner')
    net = learners.create_timm_model('t2t_vit_4_16', 3, pretrained=False)
    assert (net[0] if isinstance(net, tuple) else net)(torch.zeros(2, 3, 16, 16)).shape == (2, 3)


@torch.no_grad()
def test_a_unet_of_stride_32_reads_the_last_block():
    """smp asks for four levels by number; the fourth is pooled."""
    torch.manual_seed(0)
    net = smp.Unet('tu-t2t_vit_7', encoder_weights=None, classes=2).eval()
    assert net.encoder.out_channels == [3, 0, 64, 64, 256, 256]
    images, model = torch.randn(1, 3, 64, 96), net.encoder.model.model
    before = net(images)
    assert before.shape == (1, 2, 64, 96) and len(model.blocks) == 7
    model.blocks[-1].mlp.fc2.bias += torch.randn(256)  # one number for all would be lost in the decoder's norms
    assert not torch.allclose(net(images), before)


@torch.no_grad()
def test_levels():
    model = tiny().eval()
    images = torch.randn(2, 3, 64, 96)
    first, second, *_, last = model.forward_intermediates(images, intermediates_only=True)
    maps = Pyramid(tiny().eval(), (0, 1, 2, 3))
    maps.model.load_state_dict(model.state_dict(), strict=False)  # its head and last norm are gone
    found = maps(images)
    for x, expected in zip(found, (first, second, last, torch.nn.functional.max_pool2d(last, 2))):
        torch.testing.assert_close(x, expected, rtol=0, atol=0)
    assert maps.feature_info.reduction() == [4, 8, 16, 32] and maps.feature_info.channels() == [16, 16, 32, 32]
    assert maps.feature_info.module_name() == [
        'tokens_to_token.attention1',
        'tokens_to_token.attention2',
        'blocks.1',
        'pool',
    ]


@pytest.mark.parametrize('indices, reductions', [((0, 3), [4, 32]), (2, [8, 16]), ((-1,), [16]), ([0, -1], [4, 16])])
def test_chosen_levels(indices, reductions):
    net = timm.create_model('t2t_vit_14', features_only=True, out_indices=indices, depth=2, device='meta')
    assert net.feature_info.reduction() == reductions
    maps = net(torch.empty(1, 3, 224, 160, device='meta'))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (channels, 224 // r, 160 // r) for r, channels in zip(reductions, net.feature_info.channels())
    ]


@pytest.mark.parametrize('indices', [(4,), (-4,), (), 4])
def test_unknown_levels_are_refused(indices):
    with pytest.raises(ValueError, match='levels are counted from -3 to 3'):
        Pyramid(tiny(), indices)


def test_unneeded_blocks_are_removed():
    assert [
        len(timm.create_model('t2t_vit_7', features_only=True, out_indices=i, depth=2, device='meta').model.blocks)
        for i in ((0, 1), (1, 2), (3,))
    ] == [0, 2, 2]
