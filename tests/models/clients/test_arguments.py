"""Arguments that tools pass to a timm ViT: a T2T-ViT takes or refuses them as timm's ViT does."""

from functools import partial

import client_models as cm
import pytest
import timm
import torch
from torch import nn


@pytest.mark.parametrize('norm_layer', [partial(nn.LayerNorm, eps=1e-3), 'layernorm', 'rmsnorm'])
def test_norm_layer(name, norm_layer, agree):
    model = cm.build(name, norm_layer=norm_layer)
    norms = [model.blocks[0].norm1, model.blocks[1].norm2, model.norm]
    if norm_layer == 'rmsnorm':
        assert {type(norm).__name__ for norm in norms} == {'RmsNorm'}
    else:
        assert all(isinstance(norm, nn.LayerNorm) for norm in norms)
        assert {norm.eps for norm in norms} == {norms[0].eps}
        assert norm_layer == 'layernorm' or norms[0].eps == 1e-3
    agree(cm.gradients(model, cm.images()), cm.gradients(cm.plain(name, norm_layer=norm_layer), cm.images()))


@pytest.mark.parametrize('act_layer', [nn.ReLU, 'relu'])
def test_act_layer(name, act_layer, agree):
    model = cm.build(name, act_layer=act_layer)
    assert all(type(block.mlp.act) is nn.ReLU for block in model.blocks)
    agree(cm.gradients(model, cm.images()), cm.gradients(cm.plain(name, act_layer=act_layer), cm.images()))


def test_init_values(name, agree):
    fresh = timm.create_model(name, init_values=1e-5, depth=2, img_size=64)
    assert all((scale.gamma == 1e-5).all() for block in fresh.blocks for scale in (block.ls1, block.ls2))
    model, x = cm.build(name, init_values=0.5), cm.images()
    assert cm.error(model(x), cm.build(name)(x)) > 1e-3
    found = cm.gradients(model, x)
    assert 'blocks.1.ls2.gamma' in found and cm.all_nonzero(found.values())
    agree(found, cm.gradients(cm.plain(name, init_values=0.5), x))


@pytest.mark.parametrize('qkv_bias', [False, True])
def test_qkv_bias(name, qkv_bias, agree):
    model = cm.build(name, qkv_bias=qkv_bias)
    assert all((block.attn.qkv.bias is not None) == qkv_bias for block in model.blocks)
    agree(cm.gradients(model, cm.images()), cm.gradients(cm.plain(name, qkv_bias=qkv_bias), cm.images()))


def test_patch_drop_rate(name, agree):
    """Half of the patches are dropped in training, never the class token; none in evaluation."""
    model, counts = cm.build(name, patch_drop_rate=0.5), []
    agree(model(cm.images()), cm.plain(name)(cm.images()))
    model.blocks[0].register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
    model.train()(cm.images())
    model.eval()(cm.images())
    assert counts == [1 + 8, 1 + 16]


@pytest.mark.parametrize('rate', ['drop_rate', 'pos_drop_rate', 'proj_drop_rate', 'attn_drop_rate', 'drop_path_rate'])
def test_drop_rates(name, rate):
    model, x = cm.build(name, **{rate: 0.5}), cm.images()
    assert cm.error(model(x), cm.build(name)(x)) < 1e-5  # nothing is dropped in evaluation
    for module in model.modules():  # the Performer's fixed dropout
        if getattr(module, 'p', 0) == 0.1:
            module.p = 0.0
    model.train()
    assert cm.error(model(x), model(x)) > 1e-3


@torch.no_grad()
def test_dynamic_img_size(name):
    model = cm.build(name, dynamic_img_size=True)
    assert model(cm.images(size=96)).isfinite().all()


@torch.no_grad()
def test_dtype(name):
    model = cm.build(name, dtype=torch.bfloat16)
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}
    found = model(cm.images().bfloat16())
    assert found.dtype == torch.bfloat16
    assert cm.error(found, model.float()(cm.images().bfloat16().float())) < 0.1


@torch.no_grad()
def test_default_dtype(name):
    """Everything built while bfloat16 is the default has it; rows of the position table and of `w` survive."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = cm.build(name)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}
    found = model(cm.images().bfloat16())
    assert found.dtype == torch.bfloat16
    assert cm.error(found, model.float()(cm.images().bfloat16().float())) < 0.1


def test_orthogonal_matrix_in_bfloat16():
    """Drawn in float32 and rounded once, so that its rows stay orthogonal to bfloat16's precision."""
    half = timm.create_model('t2t_vit_7', depth=1, dtype=torch.bfloat16)
    w = half.tokens_to_token.attention1.w
    assert w.dtype == torch.bfloat16
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32).bfloat16(), atol=0.3, rtol=0)


@pytest.mark.parametrize('unknown', ['img_siez', 'patch_norm'])
def test_unknown_arguments_are_refused(name, unknown):
    with pytest.raises(TypeError, match=unknown):
        timm.create_model(name, **{unknown: 1})


def test_none_means_the_default(name, agree):
    """timm's scripts pass None for what the command line leaves out."""
    empty = dict.fromkeys(['norm_layer', 'act_layer', 'init_values'])
    agree(cm.build(name, **empty)(cm.images()), cm.plain(name)(cm.images()))
