"""Traces, attention weights, measures of feature maps and Grad-CAM equal what the layers compute."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from t2t_vit.data import ImageError, Preprocessing
from t2t_vit.look.attention import Lattice, class_maps, mean_distance, query_maps, rollout, rollout_map
from t2t_vit.look.features import (
    dead_channels,
    edge_agreement,
    high_frequency,
    measure,
    principal_colours,
    splits_of,
    token_grids,
    windows,
)
from t2t_vit.look.gradients import grad_cam
from t2t_vit.look.opened import Photo, open_images, open_model, prepare
from t2t_vit.look.trace import Trace, stage_names, trace
from t2t_vit.settings import UsageError

SIZE = (80, 112)  # 20×28, 10×14, 5×7 tokens
SMALL = dict(embed_dim=32, num_heads=4, depth=2, token_dim=16, num_classes=5, img_size=SIZE)
MODELS = {
    'plain': ('t2t_vit_14', SMALL),
    'transformer': ('t2t_vit_t_14', SMALL),
    'se': ('t2t_vit_14_se', SMALL),
    'ghost': ('t2t_vit_16_ghost', SMALL),
    'dense': ('t2t_vit_dense', {**SMALL, 'depth': (1, 2), 'growth_rate': 16}),
    'vit': ('vit_tiny_patch16_224', dict(depth=2, embed_dim=48, num_classes=5, img_size=SIZE)),
    'deit': ('deit_tiny_distilled_patch16_224', dict(depth=2, embed_dim=48, num_classes=5, img_size=SIZE)),
    'gap': ('vit_little_patch16_reg1_gap_256', dict(depth=2, num_classes=5, img_size=SIZE)),
    'beit': ('beit_base_patch16_224', dict(depth=2, embed_dim=48, num_heads=4, num_classes=5, img_size=SIZE)),
    'resnet': ('resnet18', dict(num_classes=5)),
    'swin': ('swin_tiny_patch4_window7_224', dict(depths=(1, 1, 1, 1), embed_dim=24, num_classes=5)),
}


def sharpen(model: nn.Module) -> nn.Module:
    """Enlarge initial weights, with which attention is nearly uniform."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if 'qkv' in name or 'kqv' in name or 'attn.q' in name or 'attn.k' in name:
                weight.mul_(4)
            elif weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


@pytest.fixture(scope='module')
def opened() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    found = {}
    for key, (name, args) in MODELS.items():
        size = (224, 224) if key == 'swin' else SIZE
        found[key] = sharpen(timm.create_model(name, **args)), torch.randn(2, 3, *size)
    return found


@pytest.fixture(scope='module')
def traces(opened) -> dict[str, Trace]:
    return {key: trace(model, images) for key, (model, images) in opened.items()}


def inputs_of(model: nn.Module, names: list[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs of modules in a forward pass of all tokens."""
    found: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda module, args, name=name: found.update({name: args[0]}))
        for name in names
    ]
    with torch.no_grad():
        model.forward_head(model.forward_features(images))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize('key', ['plain', 'transformer', 'se', 'ghost', 'dense', 'vit', 'deit', 'gap', 'beit', 'swin'])
def test_weights_times_values_equals_the_output_of_attention(opened, traces, key):
    """For token transformer, Performer and every kind of block: the input of the projection after attention."""
    model, images = opened[key]
    names = {
        name: f'{name}.attn.proj' if f'{name}.attn.proj' in dict(model.named_modules()) else f'{name}.proj'
        for name in traces[key].attentions
    }
    given = inputs_of(model, list(names.values()), images)
    assert len(names) == sum(name.endswith('.proj') and 'patch' not in name for name, _ in model.named_modules())
    for name, attention in traces[key].attentions.items():
        weights = attention.weights()
        result = (weights @ attention.value).transpose(1, 2).flatten(2)
        assert (result - given[names[name]].reshape(result.shape)).abs().max() <= 1e-5
        if attention.eps is None:
            assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        else:  # eps is in the denominator
            sums = attention.query @ attention.key.sum(-2)[..., None]
            assert torch.allclose(weights.sum(-1, keepdim=True), sums / (sums + 1e-8), atol=1e-5)
        some = attention.weights([0, weights.shape[-2] - 1])
        assert torch.allclose(some, weights[:, :, [0, -1]], atol=1e-6)


@pytest.mark.parametrize('key', MODELS)
def test_trace_leaves_the_model_unchanged(opened, traces, key):
    model, images = opened[key]
    with torch.no_grad():
        assert torch.allclose(model(images), traces[key].logits, atol=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not model.training


def test_maps_equal_named_intermediates(opened, traces):
    model, images = opened['plain']
    with torch.no_grad():
        stages = dict(model.named_intermediates(images))
    maps = traces['plain'].maps
    assert list(maps) == [name for name in stages if name != 'norm']
    torch.testing.assert_close(maps['tokens_to_token.attention1'], stages['tokens_to_token.attention1'])
    tokens = maps['blocks.1'].flatten(2).mT  # by the plain layers, since they have hooks
    torch.testing.assert_close(tokens, stages['blocks.1'][:, 1:])
    torch.testing.assert_close(traces['plain'].prefixes['blocks.1'], stages['blocks.1'][:, :1])
    grids = [tuple(x.shape[-2:]) for x in token_grids(traces['plain']).values()]
    assert grids == [(20, 28), (10, 14), (5, 7), (5, 7)]


@pytest.mark.parametrize(
    'key, grids',
    [
        ('vit', [(5, 7)] * 3),
        ('deit', [(5, 7)] * 3),
        ('swin', [(56, 56), (56, 56), (28, 28), (14, 14), (7, 7)]),
        ('resnet', [(40, 56), *[(20, 28)] * 2, *[(10, 14)] * 2, *[(5, 7)] * 2, *[(3, 4)] * 2]),
    ],
)
def test_maps_of_other_models(opened, traces, key, grids):
    model, images = opened[key]
    maps = traces[key].maps
    assert list(maps) == stage_names(model) and [tuple(x.shape[-2:]) for x in maps.values()] == grids
    if key != 'swin':  # timm returns maps too
        theirs = model.forward_intermediates(images, intermediates_only=True, norm=False)
        ours = list(maps.values())
        ours = ours[1:] if key != 'resnet' else ours[:1] + ours[2::2]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs)) and len(ours) == len(theirs)


def test_trace_of_named_layers(opened):
    model, images = opened['vit']
    assert list(trace(model, images, ['blocks.1.mlp.fc1']).maps) == ['blocks.1.mlp.fc1']
    with pytest.raises(UsageError, match='no layer blokcs.1, did you mean blocks.1'):
        trace(model, images, ['blokcs.1', 'head'])


def test_class_and_query_maps(traces):
    for key, prefix, token in (('plain', 1, True), ('deit', 2, True), ('gap', 1, False), ('beit', 1, False)):
        attention = traces[key].backbone()[-1]
        assert (attention.grid, attention.prefix, attention.class_token) == ((5, 7), prefix, token)
        weights = attention.weights()
        expected = weights[:, :, 0] if token else weights.mean(2)
        assert torch.allclose(class_maps(attention).flatten(2), expected[..., prefix:], atol=1e-6)
        assert torch.equal(query_maps(attention, 3), attention.on_grid(attention.weights([3])[:, :, 0]))
    stage = traces['plain'].attentions['tokens_to_token.attention1']
    assert (stage.grid, stage.prefix, stage.eps) == ((20, 28), 0, 1e-8)
    assert not traces['resnet'].attentions
    with pytest.raises(ValueError, match='form no grid'):
        class_maps(next(iter(traces['swin'].attentions.values())))


def test_rollout(traces):
    first, second = traces['plain'].backbone()
    eye = torch.eye(36)
    one, two = (0.5 * a.weights().mean(1) + 0.5 * eye for a in (first, second))
    rows = rollout([first, second])
    assert torch.allclose(rows, two @ one, atol=1e-6) and torch.allclose(rows.sum(-1), torch.ones(2, 36), atol=1e-5)
    assert torch.equal(rollout_map([first, second]), rows[:, 0, 1:].unflatten(-1, (5, 7)))
    assert torch.allclose(rollout([first], residual=1), eye)
    with pytest.raises(ValueError, match='same tokens'):
        rollout(list(traces['plain'].attentions.values()))


def test_mean_distance(traces):
    attention = traces['plain'].backbone()[0]
    weights = attention.weights()[0, 1, 1:, 1:]
    at = torch.cartesian_prod(torch.arange(5.0), torch.arange(7.0))
    expected = (weights * torch.cdist(at, at)).sum(-1) / weights.sum(-1)
    assert mean_distance(attention)[0, 1] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_dead_channels():
    maps = torch.randn(2, 6, 9, 9)
    maps[:, 1] = 0
    maps[:, 2] = torch.tensor([3.0, -3.0])[:, None, None]  # constant over each image, not over both
    maps[0, 3] = 1  # of one image only
    maps[:, 4] = 5 + 1e-3 * torch.randn(2, 9, 9)
    assert dead_channels(maps).tolist() == [False, True, True, False, True, False]
    assert dead_channels(maps, threshold=0).tolist() == [False, True, True, False, False, False]
    assert dead_channels(torch.ones(1, 3, 4, 4)).all()
    maps = torch.randn(1, 6, 9, 9)
    maps[:, 0, 4, 4] = 1e5  # one channel with one huge token
    maps[:, 1] = 0
    assert dead_channels(maps).tolist() == [False, True, False, False, False, False]
    maps[:, 2:5] = 7  # most are constant
    assert dead_channels(maps).tolist() == [False, True, True, True, True, False]


def test_edge_agreement():
    photo = open_images(['samples'])[0].image.resize((112, 112))
    image = to_tensor(photo)[None]
    small = nn.functional.interpolate(image, (56, 56), mode='bilinear', antialias=True)
    torch.manual_seed(0)
    maps = torch.cat([small, -7 * small.mean(1, keepdim=True), torch.randn(1, 1, 56, 56), torch.ones(1, 1, 56, 56)], 1)
    found = edge_agreement(maps, image)[0]
    assert found[3] == pytest.approx(1, abs=1e-5) and found[:3].min() > 0.8 and found[4].abs() < 0.2 and found[5] == 0
    assert edge_agreement(small[..., ::4, ::4], image).max() < found[:3].min()  # a coarse grid has fewer edges


def test_edge_agreement_is_the_same_for_shifted_cells():
    image = to_tensor(open_images(['samples'])[0].image.resize((224, 224)))[None]
    even = nn.functional.avg_pool2d(image, 16)
    moved = nn.functional.avg_pool2d(nn.functional.pad(image, [8, 0, 8, 0], mode='replicate'), 16)
    scores = [
        edge_agreement(*given).mean().item()
        for given in ((even, image), (moved, image, Lattice(0.0, 0.0, 16.0, 16.0)), (moved, image))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=0.03) and scores[2] < scores[0] - 0.1


@pytest.mark.parametrize('name, first', [('resnet', 0.5), ('tf_mobilenetv3_small_minimal_100', 31.5), ('swin', 16.0)])
def test_positions_of_cells(traces, name, first):
    """With padding on all sides, at right and bottom only, and none."""
    found = traces[name] if name in traces else trace(timm.create_model(name), torch.randn(1, 3, 224, 224))
    assert list(found.lattices) == list(found.maps)
    assert list(found.lattices.values())[-1] == (first, first, 32.0, 32.0)


def test_queries_and_keys_on_different_grids():
    """Fewer keys, a class token alone, a latent query."""
    images = torch.randn(1, 3, 64, 96)
    pvt = trace(timm.create_model('pvt_v2_b0', depths=(1, 1, 1, 1)), images).attentions['stages.0.blocks.0.attn']
    assert (pvt.grid, pvt.query_grid, pvt.query_lattice) == ((2, 3), (16, 24), (0.5, 0.5, 4.0, 4.0))
    assert query_maps(pvt, 16 * 24 - 1).shape == (1, 1, 2, 3)
    cait = timm.create_model('cait_xxs24_224', depth=1, img_size=(64, 96))
    cait.num_prefix_tokens = 1  # missing in timm 1.0.29
    cait = trace(cait, images).attentions
    assert [(a.grid, a.query_grid) for a in cait.values()] == [((4, 6), None)] * 2
    pooled = trace(
        timm.create_model('vit_base_patch16_siglip_224', depth=1, embed_dim=24, num_heads=2, img_size=(64, 96)), images
    ).attentions
    assert [(a.grid, a.query_grid) for a in pooled.values()] == [((4, 6), (4, 6)), ((4, 6), None)]


def test_high_frequency():
    positions = torch.arange(32.0)
    waves = [torch.cos(2 * torch.pi * positions / period).expand(24, 32) for period in (16, 2.5)]
    checks = (-1.0) ** (positions[:24, None] + positions)
    found = high_frequency(torch.stack([*waves, checks, torch.full((24, 32), 7.0)])[None])[0]
    assert found[0] < 0.01 and found[1] > 0.99 and found[2] > 0.99 and found[3].isnan()
    torch.manual_seed(0)
    assert high_frequency(torch.randn(1, 8, 32, 32)).mean() == pytest.approx(
        0.75, abs=0.05
    )  # that fraction of all frequencies


def test_measure_of_a_model(opened, traces):
    rows = measure(traces['resnet'], opened['resnet'][1])
    assert [row.name for row in rows] == list(traces['resnet'].maps)
    assert [len(row.dead) for row in rows] == [maps.shape[1] for maps in traces['resnet'].maps.values()]
    assert all(row.edges.isfinite().all() and row.edges.abs().max() <= 1 for row in rows)
    assert torch.equal(rows[0].rich, (rows[0].edges >= 0.3) & ~rows[0].dead)


def test_principal_colours():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 4)).Q
    factors = torch.randn(2 * 5 * 6, 4) * torch.tensor([9.0, 5.0, 2.0, 0.01])
    maps = (factors @ basis.mT).view(2, 5, 6, 10).permute(0, 3, 1, 2) + 100
    colours = principal_colours(maps)
    assert colours.shape == (2, 5, 6, 3) and colours.min() == 0 and colours.max() == 1
    for i in range(3):
        assert torch.corrcoef(torch.stack([colours[..., i].flatten(), factors[:, i]]))[0, 1].abs() > 0.9
    assert principal_colours(maps[:, :1]).shape == (2, 5, 6, 3)
    wide = torch.cat([maps, torch.zeros(2, 90, 5, 6)], 1)  # more channels than tokens
    assert torch.allclose(principal_colours(wide), colours, atol=1e-3)


@pytest.mark.parametrize('key', ['plain', 'vit', 'resnet'])
def test_windows_equal_the_receptive_field(opened, traces, key):
    """Compared with the gradient of one token of the splits alone, without token layers."""
    splits = splits_of(opened[key][0])
    found = windows(splits, SIZE)
    assert len(found) == {'plain': 3, 'vit': 1, 'resnet': 0}[key]
    image = torch.ones(1, 1, *SIZE, requires_grad=True)
    x = image
    for split, seen in zip(splits, found):
        kernel, stride, padding = split
        x = nn.functional.conv2d(x, torch.ones(1, 1, kernel, kernel), stride=stride, padding=padding)
        assert seen.grid == tuple(x.shape[-2:])
        for row, col in ((0, 0), (2, 3), (seen.grid[0] - 1, seen.grid[1] - 1)):
            slope = torch.autograd.grad(x[0, 0, row, col], image, retain_graph=True)[0][0, 0] > 0
            top, left, bottom, right = seen.box(row, col)
            expected = torch.zeros(SIZE, dtype=torch.bool)
            expected[max(top, 0) : bottom, max(left, 0) : right] = True
            assert torch.equal(slope, expected)
        lattice = next(
            traces[key].lattices[name] for name, maps in traces[key].maps.items() if tuple(maps.shape[-2:]) == seen.grid
        )
        assert lattice == (seen.start + seen.size / 2,) * 2 + (seen.step,) * 2
        with pytest.raises(IndexError, match='no window'):
            seen.box(seen.grid[0], 0)


@pytest.mark.parametrize(
    'key, layer',
    [('plain', 'blocks.0'), ('vit', 'blocks.0'), ('gap', 'blocks.1'), ('resnet', 'layer4.1'), ('swin', 'layers.3')],
)
def test_grad_cam_equals_its_equation(opened, traces, key, layer):
    """At the deepest map that the score depends on."""
    model, images = opened[key]
    found = grad_cam(model, images, [3, 1])
    assert (found.layer, found.targets.tolist()) == (layer, [3, 1])
    assert not any(weight.grad is not None for weight in model.parameters())
    maps = traces[key].maps[layer]
    kept: list[torch.Tensor] = []
    hook = model.get_submodule(layer).register_full_backward_hook(lambda module, given, got: kept.append(got[0]))
    model(images.clone().requires_grad_())[[0, 1], [3, 1]].sum().backward()
    hook.remove()
    model.zero_grad(set_to_none=True)
    weights = {'resnet': lambda x: x.mean((2, 3)), 'swin': lambda x: x.mean((1, 2))}.get(
        key, lambda x: x[:, 1:].mean(1)
    )(kept[0])
    assert torch.allclose(found.maps, (weights[:, :, None, None] * maps).sum(1).relu(), atol=1e-5)
    assert found.maps.max() > 0 and found.lattice == traces[key].lattices[layer]


def test_grad_cam_rejects_unknown_layers_and_classes(opened):
    model, images = opened['plain']
    with pytest.raises(UsageError, match='no layer blocks.9'):
        grad_cam(model, images, layer='blocks.9')
    with pytest.raises(UsageError, match='layer head has none'):
        grad_cam(model, images, layer='head')
    with pytest.raises(UsageError, match='from 0 to 4'):
        grad_cam(model, images, [5, 0])
    at = grad_cam(model, images, layer='tokens_to_token.attention1')
    assert at.maps.shape == (2, 20, 28) and torch.equal(at.targets, model(images).argmax(-1))


def test_open_model(digits_run, tmp_path):
    random = open_model('resnet18')
    assert (random.name, random.weights, random.preprocessing.size) == ('resnet18', 'random weights', (224, 224))
    assert random.classes[1] == 'goldfish' and not random.model.training
    assert torch.equal(random.model.fc.weight, open_model('resnet18').model.fc.weight)
    trained = open_model(str(digits_run), img_size=(20, 24))
    photos = [Photo('a', open_images(['samples'])[0].image), open_images(['digits'])[0]]
    images, shown = prepare(photos, trained.preprocessing)
    assert trained.classes == [str(i) for i in range(10)] and trained.weights == str(digits_run)
    assert images.shape == (2, 1, 20, 24) and shown.shape == (2, 20, 24, 3)
    mean, std = trained.preprocessing.mean[0], trained.preprocessing.std[0]
    assert torch.allclose(images[:, 0] * std + mean, shown[..., 0], atol=1e-5)
    assert list(trace(trained.model, images).maps.values())[0].shape[-2:] == (10, 12)
    np.save(tmp_path / 'bands.npy', np.random.default_rng(0).uniform(0, 1, (20, 24, 4)).astype(np.float32))
    four = Preprocessing((16, 16), 4, (0.5,) * 4, (0.5,) * 4)
    images, shown = prepare(open_images([str(tmp_path / 'bands.npy')], channels=4), four)
    assert images.shape == (1, 4, 16, 16) and shown.shape == (1, 16, 16, 3) and (shown.min(), shown.max()) == (0, 1)
    with pytest.raises(ImageError, match='4'):
        prepare(open_images(['samples'], channels=4), four)
    release = timm.create_model('t2t_vit_4_16', num_classes=3).state_dict()
    torch.save({'state_dict_ema': release}, tmp_path / 'a.pth.tar')
    file = open_model(f't2t_vit_4_16={tmp_path}/a.pth.tar')
    assert (file.name, len(file.classes)) == ('t2t_vit_4_16', 3)
    assert torch.equal(file.model.head.weight, release['head.weight'])
    assert file.note.startswith('the checkpoint names no classes; numbers are')
    (tmp_path / 'names.txt').write_text('cat\ndog\nowl\n')
    named = open_model(f't2t_vit_4_16={tmp_path}/a.pth.tar', classes=str(tmp_path / 'names.txt'))
    assert (named.classes, named.note) == (['cat', 'dog', 'owl'], '')
    with pytest.raises(UsageError, match="unknown model 'resnet188', did you mean resnet18"):
        open_model('resnet188')


def test_open_model_reads_states_and_weights_of_a_run(digits_run):
    state = sorted((digits_run / 'checkpoints').glob('step-*.pt'))[-1]
    weights, ema, raw = (
        open_model(str(digits_run / 'model.safetensors')),
        open_model(str(state)),
        open_model(str(state), ema=False),
    )
    assert weights.name == digits_run.name and ema.name == f'{digits_run.name}/{state.stem}'
    assert weights.about and not ema.about  # the card has the score of the best weights
    assert all(one.classes == [str(i) for i in range(10)] and not one.note for one in (weights, ema, raw))
    assert not torch.equal(ema.model.head.weight, raw.model.head.weight)


def test_each_model_sees_transparency_on_its_own_background(tmp_path):
    Image.new('RGBA', (16, 16), (255, 0, 0, 0)).save(tmp_path / 'a.png')
    (photo,) = open_images([str(tmp_path / 'a.png')])
    for colour, expected in (('white', (1, 1, 1)), ('#0000ff', (0, 0, 1))):
        preprocessing = Preprocessing((16, 16), 3, (0.0,) * 3, (1.0,) * 3, background=colour)
        images, shown = prepare([photo], preprocessing)
        assert images[0, :, 8, 8].tolist() == shown[0, 8, 8].tolist() == list(expected)
