"""Initial values: the size of tokens and of gradients at every width and depth."""

import pytest
import timm
import torch

import t2t_vit  # noqa: F401  registers the models
from t2t_vit.models.positions import grid_table, sinusoid_table

SHAPES = [(64, 14), (128, 4), (256, 24), (768, 4)]  # width and depth


def sizes(width, depth, weight_init, layer='performer', **args):
    """Return the std of tokens after some stages, and the norms of their gradients relative to the last block's."""
    torch.manual_seed(0)
    model = timm.create_model(
        't2t_vit_7_32',
        embed_dim=width,
        depth=depth,
        token_dim=32,
        num_classes=0,
        token_layer=layer,
        weight_init=weight_init,
        fast=False,
        **args,
    ).train(layer == 'residual')  # batch norm has no statistics of images yet
    stages = []

    def keep(_, __, out):
        out.retain_grad()
        stages.append(out)

    tokens = model.tokens_to_token
    for stage in (tokens.attention1, tokens.attention2, tokens, model.blocks[0], model.blocks[-1]):
        stage.register_forward_hook(keep)
    coarse = torch.randn(4, 3, 8, 8)
    out = model(torch.nn.functional.interpolate(coarse, size=32, mode='bicubic'))
    (out * torch.randn_like(out)).sum().backward()
    last = stages[-1].grad.norm()
    return [stage.std().item() for stage in stages], [(stage.grad.norm() / last).item() for stage in stages]


@pytest.mark.parametrize('layer', ['performer', 'transformer', 'convolution', 'residual'])
def test_scaled_tokens_and_gradients_have_one_size_at_every_width_and_depth(layer):
    forward, backward = zip(*(sizes(width, depth, 'scaled', layer) for width, depth in SHAPES))
    for stage in (*zip(*forward), *zip(*backward)):
        assert max(stage) < 2 * min(stage)
    for stage in zip(*forward):
        assert min(stage) > 0.5 and max(stage) < 2


def test_published_gradients_fade_in_narrow_models():
    (_, narrow), (_, wide) = sizes(64, 4, 'published'), sizes(768, 4, 'published')
    assert wide[0] > 4 * narrow[0]


@pytest.mark.parametrize('name', ['t2t_vit_7_32', 't2t_vit_14_se', 't2t_vit_16_ghost', 't2t_vit_dense'])
def test_scaled_head_starts_at_equal_probabilities(name):
    model = timm.create_model(name, weight_init='scaled', num_classes=7, img_size=32).eval()
    assert torch.equal(model(torch.randn(2, 3, 32, 32)), torch.zeros(2, 7))
    model.init_weights()  # draws them by the same rules
    assert model.head.weight.abs().max() == 0
    assert model.tokens_to_token.project.weight.std() > 0.035  # published: 0.02


@pytest.mark.parametrize('weight_init', ['published', 'scaled'])
@pytest.mark.parametrize(
    'args',
    [
        {'block': 'ghost'},
        {'block': 'dense', 'depth': (1, 1)},
        {'block': 'se', 'token_layer': 'transformer'},
        {'init_values': 1e-3, 'token_layer': 'residual', 'norm_layer': 'rmsnorm'},
        {'token_layer': 'convolution'},
    ],
    ids=str,
)
def test_model_from_the_meta_device_is_initialised_completely(args, weight_init):
    torch.manual_seed(0)
    args = {'depth': 1, 'mlp_ratio': 3, 'weight_init': weight_init, **args}
    expected = timm.create_model('t2t_vit_7_32', **args)
    with torch.device('meta'):
        found = timm.create_model('t2t_vit_7_32', **args)
    found.to_empty(device='cpu')
    for tensor in found.state_dict().values():
        tensor.fill_(77)
    found.init_weights()
    for (name, a), b in zip(found.state_dict().items(), expected.state_dict().values()):
        spread, expected_spread = (tensor.double().std(correction=0).item() for tensor in (a, b))
        assert spread == pytest.approx(expected_spread, rel=0.35), name
        assert a.double().mean().item() == pytest.approx(b.double().mean().item(), abs=0.3), name
    assert torch.equal(found.pos_embed, expected.pos_embed)


def test_weights_are_drawn_without_a_reset_as_at_construction():
    model = timm.create_model('t2t_vit_7_32', depth=1)
    norm = model.norm.weight.data.fill_(2)
    model.init_weights(needs_reset=False)
    assert (norm == 2).all()


def test_new_head_of_a_scaled_model_starts_at_zero():
    model = timm.create_model('t2t_vit_7_32', depth=1, weight_init='scaled')
    model.reset_classifier(3)
    assert not model.head.weight.any() and not model.head.bias.any()


def test_unknown_weight_init_is_refused():
    with pytest.raises(ValueError, match=r"weight_init is one of \('published', 'scaled'\), got 'jax'"):
        timm.create_model('t2t_vit_7', weight_init='jax')


@pytest.mark.parametrize('grid', [(8, 8), (4, 6), (1, 5)], ids=str)
def test_grid_table_tells_positions_apart_by_rows_and_columns(grid):
    table = grid_table(*grid, 96)[0].unflatten(0, grid)
    assert table.shape == (*grid, 96) and table.dtype == torch.get_default_dtype()
    distances = torch.cdist(table.flatten(0, 1), table.flatten(0, 1)) + 100 * torch.eye(grid[0] * grid[1])
    assert distances.min() > 0.5
    if min(grid) > 1:  # a step along a row changes as much as one along a column, in a square
        down, right = (table[1, 0] - table[0, 0]).norm(), (table[0, 1] - table[0, 0]).norm()
        assert 0.8 < down / right < 1.25
    rows = table[..., :48]
    assert torch.equal(rows, rows[:, :1].expand_as(rows))  # the first half does not depend on the column


def test_scaled_models_of_another_size_keep_their_neighbours():
    model = timm.create_model('t2t_vit_7_32', weight_init='scaled')
    assert torch.equal(model.pos_embed[:, 1:], grid_table(*model.grid_size, model.embed_dim))
    assert model.pos_embed[:, 1:].std() == pytest.approx(0.7, abs=0.1)  # beside tokens of 1.1
    published = timm.create_model('t2t_vit_7_32')
    assert torch.equal(published.pos_embed, sinusoid_table(*published.pos_embed.shape[1:]))
