"""Clients that look at a model at work: hooks, class activation maps, attributions, feature extractors."""

import client_models as cm
import pytest
import timm
import timm.layers
import torch
from timm.models import FeatureHookNet
from timm.utils import AttentionExtract
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

TOKENS = 1 + 4 * 4
HOOKED = {
    'vit_tiny_patch16_224': ['blocks.1.norm1', 'blocks.1.attn', 'blocks.1', 'norm'],
    't2t_vit_7': [
        *('tokens_to_token.attention1.norm1', 'tokens_to_token.attention2.kqv', 'tokens_to_token.project'),
        *('blocks.1.norm1', 'blocks.1.attn.qkv', 'blocks.1.attn.proj', 'blocks.1.mlp', 'blocks.1', 'norm'),
    ],
    't2t_vit_t_14': [
        *('tokens_to_token.attention1.attn.qkv', 'tokens_to_token.attention2.norm1', 'tokens_to_token.project'),
        *('blocks.0.attn', 'blocks.1.norm1', 'blocks.1', 'norm'),
    ],
}
EVERY = [(name, part) for name in cm.NAMES for part in HOOKED[name]]


def outputs(model, part, x):
    """Return what each call of a submodule returned during one forward pass, and the model's logits."""
    seen = []
    handle = model.get_submodule(part).register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(x)
    handle.remove()
    return seen, logits


@pytest.mark.parametrize('name, part', EVERY)
@torch.no_grad()
def test_forward_hook_fires_once_and_sees_all_tokens(name, part, agree):
    x = cm.images()
    seen, logits = outputs(cm.build(name), part, x)
    expected, expected_logits = outputs(cm.plain(name), part, x)
    assert len(seen) == len(expected) == 1
    if not part.startswith('tokens_to_token'):
        assert seen[0].shape[:2] == (2, TOKENS)
    agree(seen[0], expected[0])
    agree(logits, expected_logits)


@pytest.mark.parametrize('name, part', EVERY)
@torch.no_grad()
def test_hooks_may_replace_an_output(name, part, agree):
    found, expected, x = cm.build(name), cm.plain(name), cm.images()
    untouched = expected(x)
    for model in (found, expected):
        model.get_submodule(part).register_forward_hook(lambda module, args, output: output.flip(-1))
    assert cm.error(expected(x), untouched) > 1e-3
    agree(found(x), expected(x))


@pytest.mark.parametrize('name, part', EVERY)
def test_backward_hooks_see_the_gradient(name, part, agree):
    seen = []
    for model in (cm.build(name), cm.plain(name)):
        model.get_submodule(part).register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0]))
        cm.loss(model(cm.images().requires_grad_())).backward()
    found, expected = seen  # one each
    agree(found, expected)


@torch.no_grad()
def test_pre_hooks_see_the_input(t2t, agree):
    seen = []
    part = 'tokens_to_token.attention1.' + ('kqv' if t2t == 't2t_vit_7' else 'attn.qkv')
    for model in (cm.build(t2t), cm.plain(t2t)):
        model.get_submodule(part).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(cm.images())
    found, expected = seen
    assert expected.shape == (2, 256, 147)  # the windows of the first soft split
    agree(found, expected)


@torch.no_grad()
def test_global_hooks_fire_for_every_module(name):
    model, expected, seen = cm.build(name), cm.plain(name), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    model(cm.images())
    count = len(seen)
    expected(cm.images())
    handle.remove()
    assert count == len(seen) - count


@torch.no_grad()
def test_a_removed_hook_leaves_the_model_as_before(t2t, agree):
    model, x = cm.build(t2t), cm.images()
    before = model(x)
    outputs(model, 'norm', x)
    agree(model(x), before, 0)


def to_map(tokens):
    """(B, 1 + N, C) -> (B, C, h, w), without the class token: pytorch-grad-cam's `reshape_transform` for a ViT."""
    side = int((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)


@pytest.mark.parametrize('method', ['GradCAM', 'EigenCAM', 'LayerCAM'])
def test_class_activation_maps(name, method):
    cam = pytest.importorskip('pytorch_grad_cam')
    targets = [cam.utils.model_targets.ClassifierOutputTarget(3)] * 2
    maps = []
    for model in (cm.build(name), cm.plain(name)):
        with getattr(cam, method)(model, [model.blocks[-1].norm1], reshape_transform=to_map) as run:
            maps.append(torch.from_numpy(run(cm.images(), targets)))
    found, expected = maps
    assert expected.shape == (2, 64, 64) and expected.max() > 0.5 and expected.std() > 0.05
    assert cm.error(found, expected) < 1e-4  # scaled to [0, 1] by the map's own range


def test_captum_layer_grad_cam(name, agree):
    captum = pytest.importorskip('captum.attr')
    found, expected = (
        captum.LayerGradCam(model, model.blocks[-1].norm1).attribute(cm.images(), target=3, attr_dim_summation=False)
        for model in (cm.build(name), cm.plain(name))
    )
    assert expected.shape[1] == TOKENS
    agree(found, expected)


def test_captum_integrated_gradients(name, agree):
    captum = pytest.importorskip('captum.attr')
    found, expected = (
        captum.IntegratedGradients(model).attribute(cm.images(), target=3, n_steps=5).float()
        for model in (cm.build(name), cm.plain(name))
    )
    agree(found, expected)


def test_captum_layer_integrated_gradients(name, agree):
    captum = pytest.importorskip('captum.attr')
    part = 'patch_embed.proj' if name == cm.VIT else 'tokens_to_token.attention1.norm1'
    found, expected = (
        captum.LayerIntegratedGradients(model, model.get_submodule(part)).attribute(cm.images(), target=3, n_steps=5)
        for model in (cm.build(name), cm.plain(name))
    )
    agree(found.float(), expected.float())


@torch.no_grad()
def test_timm_features_by_hook(name, agree):
    """timm's `feature_cls='hook'` reads the blocks that `feature_info` names."""
    maps = []
    for model in (cm.build(name), cm.plain(name)):
        net = FeatureHookNet(model, out_indices=(len(model.feature_info) - 1,), flatten_sequential=False)
        maps.append(net(cm.images())[0])
    found, expected = maps
    assert expected.shape[:2] == (2, TOKENS)
    agree(found, expected)


@torch.no_grad()
def test_timm_features_only_by_hook(name):
    net = timm.create_model(name, features_only=True, feature_cls='hook', out_indices=(-1,), img_size=64, depth=2)
    assert net(cm.images())[0].shape[:2] == (2, TOKENS)


@pytest.mark.parametrize('method', ['fx', 'hook'])
@torch.no_grad()
def test_timm_attention_extract(name, method, agree):
    """As timm documents it: attention maps need unfused attention."""
    timm.layers.set_fused_attn(False)
    try:
        models = cm.build(name), cm.plain(name)
        names = None if method == 'fx' else ['blocks.*attn_drop']
        found, expected = (AttentionExtract(model, names, method=method)(cm.images()) for model in models)
    finally:
        timm.layers.set_fused_attn(True)
    found, expected = ({k: v for k, v in maps.items() if 'blocks' in k} for maps in (found, expected))
    assert len(expected) == 2 and found.keys() == expected.keys()
    for key, weights in expected.items():
        assert weights.shape[2:] == (TOKENS, TOKENS)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        agree(found[key], weights)


NODES = {
    'vit_tiny_patch16_224': {'blocks.0': 'first', 'blocks.1': 'second', 'norm': 'norm'},
    't2t_vit_7': {'tokens_to_token.attention1': 'map', 'blocks.0': 'first', 'blocks.1': 'second', 'norm': 'norm'},
    't2t_vit_t_14': {'tokens_to_token.attention2': 'map', 'blocks.0': 'first', 'blocks.1': 'second', 'norm': 'norm'},
}


@torch.no_grad()
def test_torchvision_feature_extractor(name, agree):
    """Without leaf modules or functions named, as for torchvision's own models."""
    x = cm.images()
    found = create_feature_extractor(cm.build(name), NODES[name])(x)
    expected = cm.plain(name)
    for part, label in NODES[name].items():
        seen, _ = outputs(expected, part, x)
        agree(found[label], seen[0])
    assert found['second'].shape[:2] == (2, TOKENS)


def draw_stripes(count, size=64):
    """Return images of stripes with a little noise, (count, 3, size, size)."""
    stripes = torch.sin(torch.arange(size) / 16 * 2 * torch.pi)
    return stripes.expand(count, 3, size, size) + 0.05 * torch.randn(count, 3, size, size)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('source', ['name', 'module'])
def test_anomalib_patch_core(t2t, source):
    """By name anomalib calls `forward_intermediates`, on a module torchvision's feature extractor."""
    patchcore = pytest.importorskip('anomalib.models.image.patchcore.torch_model')
    if source == 'name':
        backbone, layers = t2t, [0, 1]
    else:
        backbone, layers = cm.build(t2t), ['tokens_to_token.attention1', 'tokens_to_token.attention2']
    model = patchcore.PatchcoreModel(layers=layers, backbone=backbone, pre_trained=False, num_neighbors=3).train()
    model(draw_stripes(8))
    model.subsample_embedding(0.1)
    good, bad = draw_stripes(4), draw_stripes(4)
    bad[:, :, 24:36, 40:52] = 0.0
    with torch.no_grad():
        good, bad = model.eval()(good), model(bad)
    assert bad.pred_score.min() > 2 * good.pred_score.max()
    worst = bad.anomaly_map.flatten(1).argmax(1)
    rows, columns = worst // 64, worst % 64
    assert ((rows - 30).abs() <= 9).all() and ((columns - 46).abs() <= 9).all()
