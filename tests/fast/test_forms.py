"""Every fast form computes what its plain layer does: values and gradients, in every mode and size."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from filled import fill, relative_error
from timm.layers import Mlp
from torch import nn

from t2t_vit import T2TViT, TimmT2TViT, optimize, plain
from t2t_vit.fast import FORMS, folded, rule
from t2t_vit.fast.backbone import ClassTokenTimmT2TViT
from t2t_vit.models.designs import DenseBlock, GhostAttention, GhostBlock, SEBlock
from t2t_vit.models.t2t_vit import Attention, Block, Split, TokenLayer, TokenPerformer, TokensToToken, TokenTransformer

BOUND = 1e-5  # relative, float32 against the plain form in float64
MODEL = dict(img_size=48, num_classes=10, token_dim=16, embed_dim=32, depth=2, num_heads=2, mlp_ratio=3)
TOKEN_LAYERS = dict(
    performer=dict(token_layer='performer'),
    transformer=dict(token_layer='transformer'),
    convolution=dict(token_layer='convolution'),
    residual=dict(token_layer='residual'),
    none=dict(token_layer='none', splits=((16, 16, 0),)),
)
BLOCKS = dict(
    plain={}, se=dict(block='se'), ghost=dict(block='ghost'), dense=dict(block='dense', depth=(2, 1), growth_rate=16)
)
BLOCK = dict(dim=32, num_heads=2, mlp_ratio=3)
LAYERS = {  # how each plain layer of the table is built, and the shape of its input
    TokenTransformer: (lambda: TokenTransformer(5, 16, Split(3, 2, 1)), (2, 5, 21, 30)),
    TokenPerformer: (lambda: TokenPerformer(5, 16, Split(7, 4, 2)), (2, 5, 21, 30)),
    TokensToToken: (lambda: TokensToToken([(3, 2, 1), (3, 2, 1)], TokenPerformer, 3, 16, 32), (2, 3, 21, 30)),
    Attention: (lambda: Attention(32, 2), (2, 17, 32)),
    GhostAttention: (lambda: GhostAttention(32, 2), (2, 17, 32)),
    Mlp: (lambda: Mlp(32, 96), (2, 17, 32)),
    Block: (lambda: Block(**BLOCK), (2, 17, 32)),
    SEBlock: (lambda: SEBlock(**BLOCK), (2, 17, 32)),
    GhostBlock: (lambda: GhostBlock(**BLOCK), (2, 17, 32)),
    DenseBlock: (lambda: DenseBlock(**BLOCK), (2, 17, 32)),
    T2TViT: (lambda: T2TViT(**MODEL), (2, 3, 48, 48)),
    TimmT2TViT: (lambda: TimmT2TViT(**MODEL), (2, 3, 48, 48)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def results(model, x, dtype):
    """Output and gradients of a weighted sum of it, by the input and by every parameter."""
    model = copy.deepcopy(model).to(dtype)
    x = x.to(dtype, copy=True).requires_grad_()
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights.to(dtype)).sum().backward()
    gradients = {f'gradient of {name}': p.grad for name, p in model.named_parameters()}
    return {'output': y, **gradients, 'gradient of the input': x.grad}


def check(found, expected, bound=BOUND):
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    too_far = {name: f'{error:.1e}' for name, error in errors.items() if not error <= bound}
    assert not too_far, f'further off than {bound:.0e}: {too_far}'


def compare(model, x, bound=BOUND, dtype=torch.float32):
    """Check the fast form of a model in `dtype` against its plain form in float64."""
    check(results(optimize(copy.deepcopy(model)), x, dtype), results(model, x, torch.float64), bound)


def test_every_form_of_the_table_is_tested():
    assert LAYERS.keys() == FORMS.keys()


@pytest.mark.parametrize('kind', FORMS, ids=lambda kind: kind.__name__)
def test_fast_form_equals_plain_layer(kind):
    build, shape = LAYERS[kind]
    layer = fill(build().eval())
    fast = optimize(copy.deepcopy(layer))
    assert type(fast) is FORMS[kind] and isinstance(fast, kind)
    assert fast.runs_fast(torch.randn(shape))
    compare(layer, torch.randn(shape))


@pytest.mark.parametrize('kind', FORMS, ids=lambda kind: kind.__name__)
def test_optimize_and_plain_keep_tensors_and_names(kind):
    layer = LAYERS[kind][0]()
    before = {name: id(t) for name, t in layer.state_dict(keep_vars=True).items()}
    assert {name: id(t) for name, t in optimize(layer).state_dict(keep_vars=True).items()} == before
    assert {name: id(t) for name, t in plain(layer).state_dict(keep_vars=True).items()} == before
    assert type(layer) is kind


@pytest.mark.parametrize('kind', FORMS, ids=lambda kind: kind.__name__)
def test_forms_survive_pickling(kind):
    build, shape = LAYERS[kind]
    layer, x = optimize(build().eval()), torch.randn(shape)
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is FORMS[kind]
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


# whole models


def model(**args):
    return fill(TimmT2TViT(**{**MODEL, **args}).eval())


@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('token_layer', TOKEN_LAYERS)
def test_every_token_layer_with_every_block(token_layer, block):
    compare(model(**TOKEN_LAYERS[token_layer], **BLOCKS[block]), torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize(
    'args',
    [
        dict(img_size=(32, 80)),
        dict(img_size=(61, 83)),
        dict(in_chans=1),
        dict(in_chans=5),
        dict(splits=((5, 3, 1), (4, 2, 2), (2, 2, 0), (3, 1, 1))),
        dict(splits=((3, 1, 1), (3, 2, 1), (3, 1, 1)), img_size=(16, 16)),
    ],
    ids=str,
)
@pytest.mark.parametrize('token_layer', ['performer', 'transformer', 'convolution', 'residual'])
def test_sizes_channels_and_splits(token_layer, args):
    args = {'in_chans': 3, 'img_size': (48, 48), **args}
    compare(model(token_layer=token_layer, **args), torch.randn(2, args['in_chans'], *args['img_size']))


@pytest.mark.parametrize('size', [(64, 64), (32, 80), (61, 83)])
@pytest.mark.parametrize('token_layer', TOKEN_LAYERS)
def test_other_sizes_than_built_for(token_layer, size):
    compare(model(**TOKEN_LAYERS[token_layer]), torch.randn(2, 3, *size))


@pytest.mark.parametrize('form', [plain, optimize])
@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('token_layer', TOKEN_LAYERS)
def test_empty_batch(token_layer, block, form):
    layer = form(model(**TOKEN_LAYERS[token_layer], **BLOCKS[block]))
    logits = layer(torch.randn(0, 3, 48, 48))
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert not any(p.grad.any() for p in layer.parameters())


WHITE, BLACK, GREY_LEVEL = 2.64, -2.118, 1 / 255 / 0.225
HARD_IMAGES = dict(
    zero=lambda shape: torch.zeros(shape),
    white=lambda shape: torch.full(shape, WHITE),
    black=lambda shape: torch.full(shape, BLACK),
    bright_and_nearly_flat=lambda shape: 2.2 + GREY_LEVEL * torch.randint(0, 2, shape),
    times_100=lambda shape: 100 * torch.randn(shape),
    half_white_half_black=lambda shape: torch.where(torch.arange(shape[-1]) < 32, WHITE, BLACK).expand(shape),
)


@pytest.mark.parametrize('image', HARD_IMAGES)
@pytest.mark.parametrize('token_layer', ['performer', 'transformer'])
def test_images_that_are_hard_to_normalise(token_layer, image):
    """Flat and nearly flat windows, whose std LayerNorm divides by, down to eps^1/2 = 1/316.

    Half white, half black is the worst: with the image's mean subtracted, each half is still flat and far from zero, so
    W'·p is the rounding error of (W'·1)·p, and `split_norm_linear` enlarges it 316 times. Measured: logits 6e-4, tokens
    7e-4, gradients 2e-3; the plain form in float32 has 1e-6 and, in norm1, 5e-5.
    """
    images = HARD_IMAGES[image]((2, 3, 64, 64))
    compare(model(token_layer=token_layer, img_size=64), images, 5e-3 if image == 'half_white_half_black' else BOUND)


@pytest.mark.parametrize('image', HARD_IMAGES)
@pytest.mark.parametrize('token_layer', ['performer', 'transformer'])
def test_forms_are_equal_to_eleven_digits_in_float64(token_layer, image):
    images = HARD_IMAGES[image]((2, 3, 64, 64))
    compare(model(token_layer=token_layer, img_size=64), images, 1e-11, torch.float64)


def rounded_as_by_an_accelerator(x):
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize('image', HARD_IMAGES)
def test_short_mantissa_of_accelerators(image, monkeypatch):
    """Convolutions whose factors are rounded to TF32's ten bits, as accelerators do by default.

    Measured: noise 5e-4; half white, half black 3e-4, and 0.3 if the weights are not rounded before their row sums.
    """
    images, layer = HARD_IMAGES[image]((2, 3, 64, 64)), model(img_size=64)
    with torch.no_grad():
        expected = copy.deepcopy(layer).double()(images.double())
        conv2d, rounded = F.conv2d, rounded_as_by_an_accelerator
        monkeypatch.setattr(
            F, 'conv2d', lambda x, weight, *args, **kwargs: conv2d(rounded(x), rounded(weight), *args, **kwargs)
        )
        monkeypatch.setattr(folded, 'rounds_to_tf32', lambda x: True)
        assert relative_error(optimize(layer)(images).double(), expected) <= 5e-3


@pytest.mark.parametrize('kernel, stride', [(7, 4), (3, 2), (3, 1), (2, 2), (16, 16), (1, 1)])
def test_window_mean_var(kernel, stride):
    x = torch.randn(2, 5, 23, 37, dtype=torch.float64)
    var, mean = torch.var_mean(F.unfold(x, kernel, stride=stride), dim=1, correction=0)
    found_mean, found_var = folded.window_mean_var(x, kernel, stride)
    torch.testing.assert_close(found_mean.flatten(1), mean)
    torch.testing.assert_close(found_var.flatten(1), var)


@pytest.mark.filterwarnings('ignore:.torch.jit.script:FutureWarning')  # forward-mode gradients of torch use it
def test_gradients_of_channel_mean_var():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert folded.channel_mean_var(x)[1].grad_fn.name() == 'ChannelMeanVarBackward'
    assert torch.autograd.gradcheck(folded.channel_mean_var, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(folded.channel_mean_var, x)

    def product(x):
        mean, var = folded.channel_mean_var(x)
        return (mean * var).sum()

    each = torch.func.vmap(torch.func.grad(product))(x.detach().unsqueeze(1))
    torch.testing.assert_close(each.squeeze(1), torch.autograd.grad(product(x), x)[0])


@torch.no_grad()
@pytest.mark.filterwarnings('ignore:There is a performance drop:UserWarning')  # no fused attention for vmap
@pytest.mark.parametrize('names', [('norm1.bias', 'kqv.bias', 'attn.qkv.weight'), ('',)], ids=['some', 'all'])
@pytest.mark.parametrize('token_layer', ['performer', 'transformer'])
def test_vmap_over_parameters_without_gradients(token_layer, names):
    """As ensembles of models are computed by torch.func: nothing works in place there."""
    net, images = optimize(model(token_layer=token_layer)), torch.randn(2, 3, 48, 48)
    chosen = {name: torch.stack([p, 1.1 * p]) for name, p in net.named_parameters() if name.endswith(names)}
    logits = torch.func.vmap(lambda weights: torch.func.functional_call(net, weights, (images,)))(chosen)
    expected = [torch.func.functional_call(net, {k: p[i] for k, p in chosen.items()}, (images,)) for i in range(2)]
    assert relative_error(logits, torch.stack(expected)) <= BOUND


# training


@pytest.mark.parametrize('token_layer', TOKEN_LAYERS)
def test_dropout_is_where_the_plain_form_has_it(token_layer, monkeypatch):
    monkeypatch.setattr(folded, 'fast_dropout', F.dropout)  # the fast one draws other numbers
    layer, images = model(**TOKEN_LAYERS[token_layer]).train(), torch.randn(2, 3, 48, 48)
    logits = [torch.random.manual_seed(1) and form(layer)(images) for form in (plain, optimize)]
    assert relative_error(*logits) <= BOUND


def test_fast_dropout():
    x = torch.randn(3, 1000, 67, requires_grad=True)
    out = folded.fast_dropout(x, 0.1)
    kept = out != 0
    assert kept.float().mean() == pytest.approx(0.9, abs=3e-3)
    assert kept.float().mean((0, 1)).std() < 0.01 and kept.float().mean((0, 2)).std() < 0.03
    torch.testing.assert_close(out, torch.where(kept, x / 0.9, 0))
    out.sum().backward()
    torch.testing.assert_close(x.grad, kept / 0.9)
    assert not torch.equal(folded.fast_dropout(x, 0.1), out)
    assert torch.equal(folded.fast_dropout(x, 0.0), x)
    assert not folded.fast_dropout(x, 1.0).any()
    with torch.device('meta'):  # of new tensors; x stays on the CPU
        assert folded.fast_dropout(x, 0.1).device.type == 'cpu'
    rows = torch.func.vmap(lambda row: folded.fast_dropout(row, 0.5), randomness='different')(torch.ones(2, 1000))
    assert not torch.equal(*rows)


DROPPING = dict(pos_drop_rate=0.2, proj_drop_rate=0.2, attn_drop_rate=0.2)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('block', BLOCKS)
@pytest.mark.parametrize('token_layer', ['performer', 'transformer'])
def test_dropout_has_its_own_mode_and_rate(token_layer, block, whole, monkeypatch):
    """Active in a model in evaluation mode (Monte Carlo dropout), and inactive in one that trains."""
    monkeypatch.setattr(folded, 'fast_dropout', F.dropout)
    layer = model(token_layer=token_layer, **BLOCKS[block], **DROPPING).train(not whole)
    images = torch.randn(2, 3, 48, 48)
    for part in layer.modules():
        if isinstance(part, nn.Dropout):
            part.train(whole)
    if token_layer == 'performer':
        layer.tokens_to_token.attention1.mlp[3].p = 0.4
    tokens = [torch.random.manual_seed(1) and form(layer).forward_features(images) for form in (plain, optimize)]
    assert relative_error(*tokens) <= BOUND


@pytest.mark.parametrize('block', BLOCKS)
def test_class_token_alone_equals_all_tokens(block):
    """`forward`, whose last block computes the class token only, is the head on `forward_features`."""
    fast, images = optimize(model(**BLOCKS[block])), torch.randn(2, 3, 48, 48)
    loss_weights = torch.randn(2, 10)

    def gradients(logits):
        fast.zero_grad()
        (logits * loss_weights).sum().backward()
        return {'logits': logits, **{name: p.grad.clone() for name, p in fast.named_parameters()}}

    expected = gradients(fast.forward_head(fast.forward_features(images)))
    assert fast.runs_fast(images)
    check(gradients(fast(images)), expected)


# the rule


PARTS = [
    'tokens_to_token.attention1.norm1',
    'tokens_to_token.attention1.kqv',
    'tokens_to_token.attention2.mlp.1',
    'tokens_to_token.project',
    'blocks.0.norm1',
    'blocks.0.attn.attn_drop',
    'blocks.0.mlp.act',
    'blocks.1.attn.qkv',
    'blocks.1',
    'norm',
]


@pytest.mark.parametrize('name', PARTS)
def test_hooks_fire_once_and_see_all_tokens(name):
    fast, seen, images = optimize(model()), [], torch.randn(2, 3, 48, 48)
    expected = fast(images)
    hook = fast.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(fast(images), expected)
    assert len(seen) == 1
    if seen[0].ndim == 3:
        assert seen[0].shape[1] in (1 + 9, 9, 36, 144)
    hook.remove()
    fast(images)
    assert len(seen) == 1


def test_global_hooks_see_every_module():
    fast, seen = optimize(model()), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    fast(torch.randn(2, 3, 48, 48))
    handle.remove()
    containers = {module for module in fast.modules() if isinstance(module, nn.ModuleList)}
    assert seen == {*fast.modules()} - containers


@pytest.mark.parametrize('kind', ['full_backward', 'full_backward_pre'])
def test_global_backward_hooks_see_every_module(kind):
    register = getattr(nn.modules.module, f'register_module_{kind}_hook')
    counts = []
    for form in (optimize, plain):
        net, seen = form(model()), []
        handle = register(lambda module, *_, seen=seen: seen.append(type(module)))
        net(torch.randn(2, 3, 48, 48, requires_grad=True)).sum().backward()
        handle.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


def test_backward_hook_on_the_blocks_fires():
    fast, seen = optimize(model()), []
    fast.blocks.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    fast(torch.randn(2, 3, 48, 48)).sum().backward()
    assert seen == [(2, 1 + 9, 32)]


@pytest.mark.parametrize('method', ['forward_features', 'forward_head'])
def test_replaced_method_of_a_model_is_called(method):
    fast, images = optimize(model()), torch.randn(2, 3, 48, 48)
    original, seen = getattr(fast, method), []
    setattr(fast, method, lambda x: seen.append(x.shape) or original(x))
    fast(images)
    assert len(seen) == 1 and not fast.runs_fast(images)


@pytest.mark.parametrize('token_layer', ['performer', 'transformer'])
@pytest.mark.parametrize('norm', ['norm1', 'norm2'])
@pytest.mark.parametrize('args', [dict(bias=False), dict(elementwise_affine=False)], ids=str)
def test_norm_without_weight_or_bias_runs_plain(token_layer, norm, args):
    layer = model(token_layer=token_layer)
    for stage in (layer.tokens_to_token.attention1, layer.blocks[0]):
        setattr(stage, norm, nn.LayerNorm(getattr(stage, norm).normalized_shape, **args))
    compare(layer, torch.randn(2, 3, 48, 48))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('name', [name for name in PARTS if type(model().get_submodule(name)) is nn.Linear])
def test_another_module_as_a_part_is_called(name):
    fast, images = optimize(model()), torch.randn(2, 3, 48, 48)
    linear = fast.get_submodule(name)
    linear.__class__ = Doubled
    found = fast(images)
    linear.__class__ = nn.Linear
    with torch.no_grad():
        linear.weight.mul_(2)
        if linear.bias is not None:
            linear.bias.mul_(2)
    torch.testing.assert_close(found, fast(images))


def test_custom_layers_stay_as_they_are():
    class Pooled(TokenLayer):
        def __init__(self, in_chans, token_dim, split):
            super().__init__(in_chans, token_dim, split)
            self.proj = nn.Conv2d(in_chans, token_dim, 1)

        def forward(self, x):
            return self.proj(F.avg_pool2d(x, self.kernel, self.stride, self.padding))

    class Half(Block):
        def forward(self, x):
            return 0.5 * super().forward(x)

    custom = optimize(model(token_layer=Pooled, block=Half))
    assert type(custom) is ClassTokenTimmT2TViT and type(custom.blocks[0]) is Half
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(custom(images), custom.forward_head(custom.forward_features(images)))
    assert not custom.runs_fast(images)


def test_plain_twin_shares_tensors_and_leaves_the_model_fast():
    fast = optimize(model())
    twin = rule.plain_twin(fast)
    assert type(twin) is TimmT2TViT and type(fast) is ClassTokenTimmT2TViT
    assert all(a is b for a, b in zip(twin.parameters(), fast.parameters()))
