"""The model family: the table of variants, sizes, arguments, features, and what timm and torch do with a model."""

from contextlib import nullcontext

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from t2t_vit import VARIANTS, T2TViT, TimmT2TViT, optimize
from t2t_vit.models.checks import token_grids
from t2t_vit.models.t2t_vit import Split

TOKEN_LAYERS = ('performer', 'transformer', 'convolution', 'residual')
BLOCKS = ('plain', 'se', 'ghost', 'dense')

TINY = dict(img_size=64, num_classes=10, token_dim=16, embed_dim=32, depth=2, num_heads=2, mlp_ratio=3)

COUNTS = {  # all parameters, fixed position table and Performer features included; learnable ones
    't2t_vit_7': (4_310_222, 4_255_694),
    't2t_vit_10': (5_889_230, 5_834_702),
    't2t_vit_12': (6_941_902, 6_887_374),
    't2t_vit_14': (21_545_550, 21_465_806),
    't2t_vit_19': (39_177_422, 39_085_070),
    't2t_vit_24': (64_105_934, 64_000_974),
    't2t_vit_t_14': (21_541_070, 21_465_422),
    't2t_vit_t_19': (39_172_942, 39_084_686),
    't2t_vit_t_24': (64_101_454, 64_000_590),
    't2t_vit_14_wide': (25_156_302, 25_000_910),
    't2t_vit_dense': (23_647_062, 23_617_750),
    't2t_vit_14_se': (21_803_598, 21_723_854),
    't2t_vit_14_resnext': (21_545_550, 21_465_806),
    't2t_vit_16_ghost': (16_253_262, 16_173_518),
    'vit_s_16': (48_754_408, 48_603_112),
    'vit_s_16_deep_narrow': (24_405_352, 24_329_704),
    'vit_s_16_shallow_wide': (48_193_512, 47_991_784),
    'vit_s_16_dense': (46_632_264, 46_607_048),
    'vit_s_16_se': (49_344_232, 49_192_936),
    'vit_s_16_resnext': (48_754_408, 48_603_112),
    'vit_s_16_ghost': (32_248_552, 32_097_256),
    't2t_vit_14_no_t2t': (21_449_320, 21_373_672),
    't2t_vit_c_14': (21_421_992, 21_346_344),
    't2t_vit_4_16': (880_478, 874_206),
    't2t_vit_c_6_32': (588_392, 582_152),
    't2t_vit_c_6_64': (592_232, 585_992),
    't2t_vit_r_4_32': (570_252, 563_496),
    't2t_vit_r_4_64': (577_932, 571_176),
    't2t_vit_6_64': (628_558, 621_294),
    'vit_6_64': (611_900, 605_400),
    't2t_vit_7_32': (4_253_150, 4_232_414),
    't2t_vit_14_32': (21_471_582, 21_442_526),
    't2t_vit_7_64': (4_253_150, 4_232_414),
    't2t_vit_14_64': (21_471_582, 21_442_526),
}
PRINTED = {  # millions, the paper's Tables 1 and 3
    't2t_vit_7': 4.3,
    't2t_vit_10': 5.9,
    't2t_vit_12': 6.9,
    't2t_vit_14': 21.5,
    't2t_vit_19': 39.2,
    't2t_vit_24': 64.1,
    't2t_vit_t_14': 21.5,
    't2t_vit_t_19': 39.2,
    't2t_vit_t_24': 64.1,
    't2t_vit_dense': 23.6,
    't2t_vit_14_se': 21.8,
    't2t_vit_14_resnext': 21.5,
    't2t_vit_16_ghost': 16.3,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(**args):
    return optimize(TimmT2TViT(**{**TINY, **args}).eval())


def shallow(name, **args):
    return timm.create_model(name, depth=1 if isinstance(VARIANTS[name].depth, int) else (1, 1), **args).eval()


KINDS = [  # every token layer with every block
    pytest.param(
        dict(
            token_layer=token_layer,
            splits=((16, 16, 0),) if token_layer == 'none' else ((7, 4, 2), (3, 2, 1), (3, 2, 1)),
            block=block,
            depth=(1, 1) if block == 'dense' else 1,
        ),
        id=f'{token_layer}-{block}',
    )
    for token_layer in (*TOKEN_LAYERS, 'none')
    for block in BLOCKS
]


# the table


def test_every_variant_is_counted():
    assert COUNTS.keys() == VARIANTS.keys()


@pytest.mark.parametrize('name', VARIANTS)
def test_parameter_counts(name):
    model = timm.create_model(name, device='meta', num_classes=1000)
    assert COUNTS[name] == (
        sum(tensor.numel() for tensor in model.state_dict().values()),
        sum(p.numel() for p in model.parameters()),
    )


@pytest.mark.parametrize('name', PRINTED)
def test_parameter_counts_match_the_paper(name):
    assert round(COUNTS[name][0] / 1e6, 1) == PRINTED[name]


@pytest.mark.parametrize('name', VARIANTS)
def test_output_shape(name):
    model = timm.create_model(name, device='meta', num_classes=7)
    assert model(torch.empty(2, 3, *model.img_size, device='meta')).shape == (2, 7)


@pytest.mark.parametrize('name', VARIANTS)
def test_every_parameter_has_a_gradient(name):
    model = shallow(name).train()
    size = min(64, VARIANTS[name].img_size)
    model(torch.randn(2, 3, size, size)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


# sizes


def test_grid_follows_the_formula_and_unfold():
    for kernel, stride, padding, height, width in torch.randint(1, 40, (200, 5)).tolist():
        split = Split(kernel, stride, padding)
        rows, cols = split.grid(height, width)
        if rows < 1 or cols < 1:
            continue
        assert F.unfold(torch.empty(1, 1, height, width), *split[:1], 1, padding, stride).shape[-1] == rows * cols
        overlap = kernel - stride
        assert rows == int((height + 2 * padding - kernel) / (kernel - overlap) + 1)


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('size', [(64, 64), (128, 128), (32, 96), (97, 45), (16, 16), (3, 3)])
@pytest.mark.parametrize('token_layer', TOKEN_LAYERS)
def test_any_size(token_layer, size, train):
    model = tiny(token_layer=token_layer).train(train)
    grid = token_grids(model.tokens_to_token.splits, *size)[-1]
    images = torch.randn(2, 3, *size)
    assert model.forward_features(images).shape == (2, 1 + grid[0] * grid[1], 32)
    assert model(images).isfinite().all()


def test_non_square_model():
    model = tiny(img_size=(32, 96))
    assert model.grid_size == (2, 6)
    assert model.pos_embed.shape == (1, 13, 32)
    assert model(torch.randn(1, 3, 32, 96)).shape == (1, 10)


def test_set_input_size_equals_resizing_at_run_time():
    images = torch.randn(2, 3, 96, 32)
    model = tiny()
    expected = model(images)
    model.set_input_size((96, 32))
    assert model.pos_embed.shape == (1, 1 + 6 * 2, 32)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)


def test_image_too_small():
    with pytest.raises(ValueError, match='an image of 1×64 is too small: no token is left after the splits'):
        tiny()(torch.randn(1, 3, 1, 64))
    with pytest.raises(ValueError, match='an image of 8×8 is too small'):
        tiny(token_layer='none', splits=((16, 16, 0),), img_size=8)


@pytest.mark.parametrize('shape', [(1, 1, 64, 64), (3, 64, 64), (1, 64, 64, 3)])
def test_wrong_channels(shape):
    with pytest.raises(ValueError, match=r'expected images of shape \(B, 3, H, W\), got .*in_chans'):
        tiny()(torch.randn(shape))


# arguments


def test_all_wrong_arguments_in_one_message():
    with pytest.raises(ValueError) as error:
        tiny(splits=((0, 1, 0), (3, 2, 1)), token_layer='none', embed_dim=33, num_classes=-1, drop_rate=1)
    for part in (
        'kernel and stride',
        'single split',
        '33 is not a multiple of num_heads 2',
        'must be even',
        'num_classes is at least 0',
        'drop_rate is at least 0 and below 1, got 1',
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    'argument, name, meant',
    [
        ('token_layer', 'preformer', 'performer'),
        ('token_layer', 'convolutions', 'convolution'),
        ('block', 'gost', 'ghost'),
    ],
)
def test_unknown_name_suggests_the_nearest(argument, name, meant):
    with pytest.raises(ValueError, match=f"unknown {argument} '{name}', did you mean '{meant}'.*choices: "):
        tiny(**{argument: name})


@pytest.mark.parametrize(
    'wrong, sentence',
    [
        (dict(splits=()), 'splits are .kernel, stride, padding., at least one'),
        (dict(splits=((3, 2),)), 'splits are .kernel, stride, padding.'),
        (dict(depth=0), 'depth is at least 1'),
        (dict(depth=()), 'depth is at least 1'),
        (dict(num_heads=0), 'num_heads is a whole number from 1, got 0'),
        (dict(num_heads=-2), 'num_heads is a whole number from 1'),
        (dict(token_dim=1), 'token_dim is at least 2 with Performer tokens'),
        (dict(token_dim=0), 'token_dim is a whole number from 1'),
        (dict(embed_dim=0), 'embed_dim is a whole number from 1'),
        (dict(mlp_ratio=0), 'mlp_ratio is above 0'),
        (dict(img_size='64'), "img_size is one whole number or two, .H, W., got '64'"),
        (dict(img_size=(64, 64, 3)), 'img_size is one whole number or two'),
        (dict(block='dense', depth=(1, 1), growth_rate=7), 'a block of width .* cannot be split into num_heads'),
    ],
)
def test_wrong_argument_is_named(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(**wrong)


def test_set_input_size_rejects_small_sizes_unchanged():
    model = tiny()
    with pytest.raises(ValueError, match='too small'):
        model.set_input_size(1)
    assert model.img_size == (64, 64) and model.grid_size == (4, 4)


def test_set_input_size_takes_the_arguments_of_timm():
    model = tiny()
    model.set_input_size()
    model.set_input_size(None, 16)
    assert model.img_size == (64, 64)
    model.set_input_size(img_size=96, patch_size=(16, 16))
    assert model.img_size == (96, 96) and model.grid_size == (6, 6)
    with pytest.raises(ValueError, match=r'the splits fix patch_size at \(16, 16\), got 8'):
        model.set_input_size(32, patch_size=8)
    assert model.img_size == (96, 96)


def test_ghost_requires_mlp_ratio_3():
    with pytest.raises(ValueError, match='mlp_ratio must be 3, got 2'):
        tiny(block='ghost', mlp_ratio=2)


def test_global_pool_must_exist():
    with pytest.raises(ValueError, match="global_pool is one of .* got 'max'"):
        tiny(global_pool='max')


def test_plain_class_has_the_paper_and_nothing_of_timm():
    model = T2TViT(**TINY).eval()
    images = torch.randn(2, 3, 64, 64)
    twin = tiny()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images), twin(images))
    assert not hasattr(model, 'forward_intermediates')


def test_create_model_builds_the_fast_or_the_plain_form():
    fast, plain = (timm.create_model('t2t_vit_4_16', fast=form, depth=1) for form in (True, False))
    assert type(plain) is TimmT2TViT and type(fast) is not TimmT2TViT
    assert [*plain.state_dict()] == [*fast.state_dict()]
    assert type(timm.create_model('t2t_vit_4_16', scriptable=True, depth=1)) is TimmT2TViT


# arguments of timm's ViT


@pytest.mark.parametrize(
    'args, part, kind',
    [
        (dict(norm_layer='rmsnorm'), 'blocks.0.norm2', 'RmsNorm'),
        (dict(norm_layer=torch.nn.RMSNorm), 'norm', 'RMSNorm'),
        (dict(act_layer='relu'), 'blocks.1.mlp.act', 'ReLU'),
        (dict(init_values=1e-4), 'blocks.0.ls1', 'LayerScale'),
    ],
)
def test_arguments_of_timm_exchange_parts(args, part, kind):
    model = tiny(**args)
    assert type(model.get_submodule(part)).__name__ == kind
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_qkv_bias_and_patch_drop_rate():
    model = tiny(qkv_bias=True, patch_drop_rate=0.5, dynamic_img_size=True)
    assert model.blocks[0].attn.qkv.bias is not None
    images = torch.randn(2, 3, 64, 64)
    assert model.forward_features(images).shape == (2, 17, 32)
    assert model.train().forward_features(images).shape == (2, 9, 32)


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match='foo'):
        tiny(foo=1)


@pytest.mark.parametrize('token_layer', TOKEN_LAYERS)
def test_model_in_bfloat16(token_layer):
    """By `dtype`, by the default dtype, and by conversion; then every tensor but counters has that type."""
    expected = tiny(token_layer=token_layer)
    torch.set_default_dtype(torch.bfloat16)
    try:
        by_default = tiny(token_layer=token_layer)
    finally:
        torch.set_default_dtype(torch.float32)
    for model in (tiny(token_layer=token_layer, dtype=torch.bfloat16), by_default):
        whole = [name for name, t in model.state_dict().items() if t.dtype != torch.bfloat16]
        assert all(name.endswith('num_batches_tracked') for name in whole)
        model.load_state_dict(expected.state_dict())
        images = torch.randn(2, 3, 64, 64)
        found = model(images.bfloat16()).float()
        torch.testing.assert_close(found, expected(images), rtol=0.1, atol=0.02)


def test_stochastic_depth_grows_linearly():
    rates = [block.drop_path.drop_prob for block in tiny(depth=5, drop_path_rate=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_stochastic_depth_skips_transitions():
    first, second, _, third = tiny(block='dense', depth=(2, 1), drop_path_rate=0.2).blocks
    assert [block.drop_path.drop_prob for block in (first, second, third)] == pytest.approx([0, 0.1, 0.2])


# optimisers


@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_dense', 'vit_s_16'])
def test_layer_decay_puts_every_parameter_in_one_group(name):
    model = timm.create_model(name, device='meta')
    optimizer = create_optimizer_v2(model, 'adamw', lr=1.0, weight_decay=0.05, layer_decay=0.9)
    grouped = [id(p) for group in optimizer.param_groups for p in group['params']]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())

    scale = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    steps = [model.cls_token, *(next(block.parameters()) for block in model.blocks), model.head.weight]
    assert [scale[id(p)] for p in steps] == pytest.approx([0.9**n for n in reversed(range(len(steps)))])
    assert scale[id(model.tokens_to_token.project.weight)] == scale[id(model.cls_token)]
    assert scale[id(model.norm.weight)] == scale[id(next(model.blocks[-1].parameters()))]


def test_class_token_is_not_decayed():
    model = tiny()
    groups = create_optimizer_v2(model, 'adamw', weight_decay=0.05).param_groups
    undecayed = {id(p) for group in groups for p in group['params'] if group['weight_decay'] == 0}
    assert undecayed == {id(p) for name, p in model.named_parameters() if p.ndim == 1 or name == 'cls_token'}


# features


def test_named_intermediates():
    model = tiny()
    shapes = {name: tuple(x.shape) for name, x in model.named_intermediates(torch.randn(2, 3, 64, 96))}
    assert shapes == {
        'tokens_to_token.attention1': (2, 16, 16, 24),
        'tokens_to_token.attention2': (2, 16, 8, 12),
        'tokens_to_token.project': (2, 32, 4, 6),
        'blocks.0': (2, 25, 32),
        'blocks.1': (2, 25, 32),
        'norm': (2, 25, 32),
    }


def test_features_only():
    model = timm.create_model('t2t_vit_14', features_only=True, device='meta')
    assert model.feature_info.reduction() == [4, 8, 16]
    assert model.feature_info.channels() == [64, 64, 384]
    features = model(torch.empty(2, 3, 224, 160, device='meta'))
    assert [tuple(x.shape) for x in features] == [(2, 64, 56, 40), (2, 64, 28, 20), (2, 384, 14, 10)]


@pytest.mark.parametrize(
    'indices, channels, blocks',
    [((0, 1), [64, 64], 0), ((1, 2, 5), [64, 384, 384], 4), ((-1,), [384], 14), (2, [384, 384], 14)],
)
def test_features_only_of_chosen_layers(indices, channels, blocks):
    model = timm.create_model(
        't2t_vit_14', features_only=True, feature_cls='getter', out_indices=indices, device='meta'
    )
    assert model.feature_info.channels() == channels
    assert [x.shape[1] for x in model(torch.empty(1, 3, 64, 64, device='meta'))] == channels
    assert sum(name.endswith('attn.qkv') for name, _ in model.named_modules()) == blocks


@pytest.mark.parametrize('prune_norm', [True, False])
def test_pruned_dense_model_has_the_width_of_its_last_block(prune_norm):
    images = torch.randn(1, 3, 64, 64)
    for layer, width in ((0, 32), (2, 32 + 4), (4, (32 + 8) // 2), (5, 20 + 4)):
        model = tiny(block='dense', depth=(2, 1), growth_rate=4)
        stages = model.forward_intermediates(images, intermediates_only=True)
        with pytest.raises(ValueError, match='the head is for tokens of width 24') if layer < 5 else nullcontext():
            model.prune_intermediate_layers([layer], prune_head=False)
        model.prune_intermediate_layers([layer], prune_norm)
        features = model.forward_features(images)
        assert model.num_features == model.head_hidden_size == features.shape[2] == width
        assert torch.equal(model.forward_intermediates(images, [layer], intermediates_only=True)[0], stages[layer])
        model.reset_classifier(3, 'token')
        assert model(images).shape == (1, 3)


def test_forward_intermediates():
    model, images = tiny(), torch.randn(2, 3, 64, 96)
    final, features = model.forward_intermediates(images)
    stages = dict(model.named_intermediates(images))
    torch.testing.assert_close(final, model.forward_features(images), rtol=0, atol=0)
    assert [tuple(x.shape) for x in features] == [(2, 16, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6), (2, 32, 4, 6)]
    torch.testing.assert_close(features[1], stages['tokens_to_token.attention2'], rtol=0, atol=0)
    torch.testing.assert_close(features[3].flatten(2).transpose(1, 2), stages['blocks.1'][:, 1:], rtol=0, atol=0)


def test_forward_intermediates_as_tokens():
    model, images = tiny(), torch.randn(2, 3, 64, 96)
    maps = model.forward_intermediates(images, intermediates_only=True)
    tokens = model.forward_intermediates(images, intermediates_only=True, output_fmt='NLC')
    assert [tuple(x.shape) for x in tokens] == [(2, 384, 16), (2, 96, 16), (2, 24, 32), (2, 24, 32)]
    for x, y in zip(maps, tokens):
        torch.testing.assert_close(x.flatten(2).transpose(1, 2), y, rtol=0, atol=0)
    with pytest.raises(ValueError, match="'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(images, output_fmt='NHWC')


def test_forward_intermediates_with_norm():
    model, images = tiny(), torch.randn(2, 3, 64, 64)
    final, features = model.forward_intermediates(images, [-1], norm=True, output_fmt='NLC')
    torch.testing.assert_close(features[0], final[:, 1:], rtol=0, atol=0)


def test_forward_intermediates_with_prefix():
    model, images = tiny(), torch.randn(2, 3, 64, 64)
    pairs = model.forward_intermediates(images, return_prefix_tokens=True, intermediates_only=True, output_fmt='NLC')
    stages = dict(model.named_intermediates(images))
    assert [tuple(prefix.shape) for _, prefix in pairs] == [(2, 0, 16), (2, 0, 16), (2, 1, 32), (2, 1, 32)]
    torch.testing.assert_close(torch.cat(pairs[2][::-1], dim=1), stages['blocks.0'], rtol=0, atol=0)


def test_forward_intermediates_as_dict():
    model, images = tiny(), torch.randn(2, 3, 64, 64)
    result = model.forward_intermediates(images, [0, 3], output_dict=True, return_prefix_tokens=True)
    assert result.keys() == {'image_features', 'image_intermediates', 'image_intermediates_prefix'}
    assert len(result['image_intermediates']) == len(result['image_intermediates_prefix']) == 2
    result = model.forward_intermediates(images, output_dict=True, intermediates_only=True)
    assert result.keys() == {'image_intermediates'}


@pytest.mark.parametrize('indices, last', [([0], 'attention1'), ([1], 'attention2'), ([0, 2], 'blocks.0')])
def test_stop_early_computes_nothing_after(indices, last):
    model, called = tiny(depth=3), []
    layers = {
        name: module
        for name, module in model.named_modules()
        if name.split('.')[-1] in ('attention1', 'attention2', 'project', 'norm') or name.startswith('blocks.')
    }
    for name, module in layers.items():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model.forward_intermediates(torch.randn(1, 3, 64, 64), indices, stop_early=True, intermediates_only=True)
    assert called[-1].endswith(last)


@pytest.mark.parametrize('indices', [[4], [-5], [], 0, 5])
def test_unknown_layers_are_refused(indices):
    with pytest.raises(ValueError, match='layers are counted from -4 to 3'):
        tiny().forward_intermediates(torch.randn(1, 3, 64, 64), indices)


# heads


def test_reset_classifier():
    model, images = tiny(), torch.randn(2, 3, 64, 64)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert model.get_classifier() is model.head
    model.reset_classifier(0)
    assert model(images).shape == (2, 32)
    with pytest.raises(ValueError, match='global_pool is one of'):
        model.reset_classifier(3, 'max')


def test_global_pool():
    model, images = tiny(), torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(images)
    for pool, read in dict(token=tokens[:, 0], avg=tokens[:, 1:].mean(1)).items():
        model.global_pool = pool
        torch.testing.assert_close(model(images), model.head(read))
    model.reset_classifier(0, '')
    torch.testing.assert_close(model(images), tokens, rtol=0, atol=0)


# what torch does with a model


@pytest.mark.parametrize('block', BLOCKS)
def test_grad_checkpointing(block):
    model, images = tiny(block=block, depth=(2, 1) if block == 'dense' else 3).train(), torch.randn(2, 3, 64, 64)

    def step(enable):
        torch.manual_seed(1)
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        logits = model(images)
        logits.square().sum().backward()
        return [logits, *(p.grad.clone() for p in model.parameters())]

    for kept, recomputed in zip(step(False), step(True)):
        torch.testing.assert_close(recomputed, kept, rtol=0, atol=0)


@pytest.mark.parametrize('name', VARIANTS)
def test_compiles_to_one_graph_for_every_batch_size(name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, size = shallow(name), min(64, VARIANTS[name].img_size)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (2, 3, 5):
        images = torch.randn(batch, 3, size, size)
        torch._dynamo.mark_dynamic(images, 0)
        torch.testing.assert_close(compiled(images), model(images))
    assert len(graphs) == 1


@pytest.mark.timeout(900)  # it runs a compiler
def test_compiles_with_inductor():
    torch.compiler.reset()  # or numbers that differed between models of other tests are unknowns to it
    model, images = shallow('t2t_vit_4_16'), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images))


@pytest.mark.parametrize('args', KINDS)
def test_exports_with_dynamic_batch(args):
    model = tiny(**args)
    program = torch.export.export(
        model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim('batch', max=64)},)
    )
    images = torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.filterwarnings('ignore:.torch.jit.* is deprecated')
@pytest.mark.parametrize('args', KINDS)
def test_torchscript(args):
    model = tiny(**args)
    scripted = torch.jit.script(model)
    for shape in (2, 3, 64, 64), (1, 3, 96, 48):
        images = torch.randn(shape)
        torch.testing.assert_close(scripted(images), model(images))


@pytest.mark.parametrize('args', KINDS)
def test_fx(args):
    model, images = tiny(**args), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), model(images))
    train, evaluate = (nodes[-1] for nodes in get_graph_node_names(model))
    traced = create_feature_extractor(model, train_return_nodes=[train], eval_return_nodes=[evaluate])
    torch.testing.assert_close(traced.eval()(images)[evaluate], model(images))
