"""Triton kernels against the eager form in float64: values, gradients, dropout, and when they are used.

On a CPU they run in Triton's interpreter, which has float16 and not bfloat16; on a GPU natively, in both.
"""

import numpy as np
import pytest
import timm
import torch
from filled import HARD_WINDOWS, fill, hard_windows, relative_error
from torch import nn

import t2t_vit  # noqa: F401
from t2t_vit.fast import fused, operators
from t2t_vit.fast.folded import split_norm_linear
from t2t_vit.models.t2t_vit import Split

pytestmark = pytest.mark.skipif(operators.kernels is None, reason='no Triton for this system')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
UNITS = {torch.float16: 2**-11, torch.bfloat16: 2**-8} if DEVICE == 'cuda' else {torch.float16: 2**-11}
LAYERS = [fused.FusedTokenPerformer, fused.FusedTokenTransformer]
FIRST, LATER = Split(7, 4, 2), Split(3, 2, 1)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(operators, 'interpreted', DEVICE == 'cpu')
    torch.manual_seed(0)


def filled(layer):
    """Fill a layer with weights whose random features are not all nearly zero."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            deviation = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(torch.randn_like(weight) * deviation + ('norm' in name and name.endswith('weight')))
    return layer


def images_of(chans, height, width, memory_format=torch.contiguous_format):
    return torch.randn(2, chans, height, width).contiguous(memory_format=memory_format)


def step(layer, images, weight, dtype=None):
    """Return map and gradients of a layer: under autocast to `dtype`, or in float64 on the CPU."""
    layer = layer.to(DEVICE if dtype else 'cpu', torch.float32 if dtype else torch.float64)
    images = images.to(layer.norm1.weight).requires_grad_()
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        y = layer(images)
    grads = torch.autograd.grad(y, [images, *layer.parameters()], weight.to(y))
    return [value.detach().cpu().double() for value in (y, *grads)]


@pytest.mark.parametrize('dtype', UNITS)
@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize(
    'chans, split, shape, dim, memory_format',
    [
        (3, FIRST, (29, 38), 64, torch.contiguous_format),
        (64, LATER, (25, 30), 64, torch.channels_last),
        (64, LATER, (16, 16), 32, torch.contiguous_format),
        (1, Split(4, 4, 0), (32, 33), 32, torch.contiguous_format),
        (13, Split(5, 1, 2), (7, 9), 64, torch.channels_last),
    ],
)
def test_values_and_gradients(layer, chans, split, shape, dim, memory_format, dtype, monkeypatch):
    layer = filled(layer(chans, dim, split)).eval()
    images = images_of(chans, *shape, memory_format)
    weight = torch.randn(2, dim, *split.grid(*shape))
    expected = step(layer, images, weight)
    found = step(layer, images, weight, dtype)
    monkeypatch.setattr(operators, 'kernels', None)
    eager = step(layer, images, weight, dtype)
    names = ['map', 'image', *(name for name, _ in layer.named_parameters())]
    for name, ours, other, exact in zip(names, found, eager, expected):
        bound = max(4 * UNITS[dtype], 3 * relative_error(other, exact))
        if name == 'proj.weight':  # of an attention that is next to nothing where features are: mostly cancels
            bound = max(bound, 0.3)
        assert relative_error(ours, exact) < bound, name


@pytest.mark.parametrize('dtype', UNITS)
@pytest.mark.parametrize('kind', HARD_WINDOWS)
def test_hard_windows(kind, dtype):
    """Where windows are flat 1 / deviation is up to 316, and rounding of what is under it shows."""
    images = hard_windows(kind)
    layer = filled(fused.FusedTokenPerformer(3, 64, FIRST)).double()
    with torch.no_grad():
        expected = split_norm_linear(images.double(), layer.norm1, layer.kqv, FIRST).flatten(2).transpose(1, 2)
        layer = layer.float().to(DEVICE)
        with torch.autocast(DEVICE, dtype):
            found = operators.split_norm_linear(images.to(DEVICE), layer.norm1, layer.kqv, FIRST, dtype)
    assert found.dtype == dtype and relative_error(found.cpu(), expected) < 2 * UNITS[dtype]


@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_t_14'])
def test_whole_model_in_half_precision(name):
    """Logits and gradients with the golden rule's weights, whose random features are about exp(-30)."""
    model = fill(timm.create_model(name, img_size=64, depth=1, num_classes=10).eval()).to(DEVICE)
    images = torch.randn(2, 3, 64, 64, device=DEVICE)
    results = []
    for dtype in (None, *UNITS):
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            logits = model(images)
        grads = torch.autograd.grad(logits.float().sum() * 1000, list(model.parameters()))
        results.append((logits.detach(), torch.cat([grad.flatten() for grad in grads])))
    for unit, result in zip(UNITS.values(), results[1:]):
        for found, expected in zip(result, results[0]):
            assert relative_error(found, expected) < 8 * unit


@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_t_14'])
def test_compiled_graph_uses_the_kernels(name):
    model = timm.create_model(name, img_size=32, depth=1)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if 't2t_vit.' in str(node.target))
        return graph

    compiled = torch.compile(model.to(DEVICE), fullgraph=True, backend=backend)
    with torch.autocast(DEVICE, torch.float16):
        for batch in (2, 3, 4):  # the second makes the batch dynamic
            images = torch.randn(batch, 3, 32, 32, device=DEVICE)
            assert compiled(images).shape == (batch, 1000)
    layer = ['layer_output', 'performer'][name == 't2t_vit_7']
    assert {f't2t_vit.{op}.default' for op in ('pack', 'split_norm_linear', layer)} == set(seen)
    if DEVICE == 'cpu':  # with gradients through the compiler's own graphs
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
        with torch.autocast('cpu', torch.float16):
            compiled(images).sum().backward()
        assert all(weight.grad.isfinite().all() for weight in model.parameters())


def test_dropout_draws_one_in_ten_and_the_backward_pass_the_same():
    """With v zero, the projection and the second Linear of the MLP show the two masks."""
    dim, rows, chance = 64, 1024, 0.1
    y = torch.ones(2, rows, dim, dtype=torch.float16, device=DEVICE, requires_grad=True)
    v = torch.zeros(2, rows, dim, dtype=torch.float16, device=DEVICE)
    seeds = torch.tensor([5, 77, 123456789, 2**31 - 1], device=DEVICE)
    eye, zero = torch.eye(dim, device=DEVICE), torch.zeros(dim, dim, device=DEVICE)
    none, one = torch.zeros(dim, device=DEVICE), torch.ones(dim, device=DEVICE)

    def call(matrices, biases, seeds=seeds):
        return operators._layer_output_op(y, v, torch.stack(matrices), torch.stack(biases), seeds, chance, 1e-5)

    first = call([eye, zero, zero], [none, none, none])
    second = call([zero, zero, zero], [none, none, one])
    masks = [mask.detach().float().cpu().numpy() for mask in (first, second)]
    for mask in masks:
        assert set(np.unique(mask)) == {0, np.float32(np.float16(1 / 0.9))}
        kept = (mask > 0).mean((0, 1))
        deviation = (chance * (1 - chance) / (2 * rows)) ** 0.5
        assert abs((mask > 0).mean() - 0.9) < 5 * deviation / dim**0.5 and np.abs(kept - 0.9).max() < 5 * deviation
        neighbours = np.corrcoef((mask[0, 1:] > 0).ravel(), (mask[0, :-1] > 0).ravel())[0, 1]
        images = np.corrcoef((mask[0] > 0).ravel(), (mask[1] > 0).ravel())[0, 1]
        assert max(abs(neighbours), abs(images)) < 5 / (rows * dim) ** 0.5
    assert abs(np.corrcoef((masks[0] > 0).ravel(), (masks[1] > 0).ravel())[0, 1]) < 5 / (2 * rows * dim) ** 0.5
    other = call([eye, zero, zero], [none, none, none], seeds + 1).detach().float().cpu().numpy()
    assert abs(np.corrcoef((masks[0] > 0).ravel(), (other > 0).ravel())[0, 1]) < 5 / (2 * rows * dim) ** 0.5
    weight = torch.randn(y.shape, device=DEVICE).half()
    (grad,) = torch.autograd.grad(first, y, weight)
    assert relative_error(grad, weight * first.detach()) < 2**-10
    biases = torch.stack([none, none, one]).requires_grad_()
    out = operators._layer_output_op(y, v, torch.stack([zero, zero, zero]), biases, seeds, chance, 1e-5)
    (found,) = torch.autograd.grad(out, biases, weight)
    expected = (weight.double() * torch.from_numpy(masks[1]).to(DEVICE)).sum((0, 1))
    assert relative_error(found[2], expected) < 2**-9


def test_dropout_follows_torchs_seed():
    layer = fused.FusedTokenPerformer(3, 32, LATER).to(DEVICE).train()
    images = torch.randn(2, 3, 16, 16, device=DEVICE)
    maps = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with torch.autocast(DEVICE, torch.float16):
            maps.append(layer(images))
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


def used(layer, images, dtype=torch.float16):
    """Return True if a forward pass uses the kernels."""
    calls = []
    wrapped = operators.split_norm_linear

    def spy(*args):
        calls.append(1)
        return wrapped(*args)

    with pytest.MonkeyPatch.context() as patch, torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=bool(dtype)):
        patch.setattr(operators, 'split_norm_linear', spy)
        layer(images)
    return bool(calls)


def test_kernels_are_used_in_half_precision_on_intact_layers(monkeypatch):
    images = torch.randn(1, 3, 16, 16, device=DEVICE)
    layers = [layer(3, 32, LATER).to(DEVICE).eval() for layer in LAYERS]
    for layer in layers:
        assert used(layer, images)
        assert not used(layer, images, dtype=None)
        assert used(layer.half(), images.half(), dtype=None)
        layer.float()
        for name in ('norm2', 'attn.proj' if hasattr(layer, 'attn') else 'proj'):
            part, heard = layer.get_submodule(name), []
            handle = part.register_forward_hook(lambda *_, heard=heard: heard.append(1))
            assert not used(layer, images) and heard
            handle.remove()
    assert not used(fused.FusedTokenPerformer(3, 48, LATER).to(DEVICE), images)  # no power of two
    assert not used(fused.FusedTokenPerformer(3, 128, LATER).to(DEVICE), images)
    layers[0].proj = nn.Sequential(layers[0].proj)  # as an adapter
    assert not used(layers[0], images)
    monkeypatch.setattr(operators, 'kernels', None)
    assert not used(layers[1], images)


def dropping(p):
    return nn.Dropout(p).train()


CHANGES = {  # of layers in evaluation mode: the kernels compute none of these
    'transformer: another MLP': lambda layer: setattr(layer, 'mlp', nn.Sequential(layer.mlp)),
    'transformer: hook on the MLP': lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
    'transformer: norm in the MLP': lambda layer: setattr(layer.mlp, 'norm', nn.LayerNorm(32)),
    'transformer: tanh GELU': lambda layer: setattr(layer.mlp, 'act', nn.GELU('tanh')),
    'transformer: another activation': lambda layer: setattr(layer.mlp, 'act', nn.ReLU()),
    'transformer: dropout in the MLP': lambda layer: setattr(layer.mlp, 'drop1', dropping(0.1)),
    'transformer: dropout after the MLP': lambda layer: setattr(layer.mlp, 'drop2', dropping(0.1)),
    'transformer: no bias': lambda layer: setattr(layer.attn.proj, 'bias', None),
    'performer: tanh GELU': lambda layer: setattr(layer.mlp, '1', nn.GELU('tanh')),
    'performer: no bias': lambda layer: setattr(layer.mlp[2], 'bias', None),
    'performer: dropouts of two modes': lambda layer: layer.proj_drop.train(),
    'performer: dropouts of two rates': lambda layer: (layer.train(), setattr(layer.mlp[3], 'p', 0.2)),
    'performer: everything is dropped': lambda layer: (
        (layer.train(), setattr(layer.mlp[3], 'p', 1.0)) and setattr(layer.proj_drop, 'p', 1.0)
    ),
}


@pytest.mark.parametrize('change', CHANGES)
def test_kernels_leave_other_layers_to_the_folded_form(change):
    images = torch.randn(1, 3, 16, 16, device=DEVICE)
    layer = LAYERS['transformer' in change](3, 32, LATER).eval()
    assert used(layer.to(DEVICE), images)
    CHANGES[change](layer)
    assert not used(layer.to(DEVICE), images)


def test_dropout_in_evaluation_mode_is_that_of_the_dropouts():
    """Monte Carlo dropout; and frozen dropout in a layer that trains."""
    images = torch.randn(1, 3, 16, 16, device=DEVICE)
    performer, transformer = (filled(layer(3, 32, LATER)).to(DEVICE) for layer in LAYERS)
    transformer.attn.attn_drop.p = 0.5
    for layer in (performer, transformer):
        for active in (True, False):
            layer.train(not active)
            for part in layer.modules():
                if isinstance(part, nn.Dropout):
                    part.train(active)
            assert used(layer, images)
            with torch.autocast(DEVICE, torch.float16):
                assert torch.equal(layer(images), layer(images)) is not active


def test_rows_of_tokens_are_exact():
    """`_corners` divides by multiplication; the kernels' formula, in numpy."""
    token = np.arange(2**22)
    for cols in (1, 2, 3, 7, 14, 28, 55, 56, 57, 96, 113, 255, 1000, 1023, 2047):
        some = token[: 4 * cols * cols]
        row = ((some.astype(np.float32) + np.float32(0.5)) * np.float32(1 / cols)).astype(np.int32)
        assert (row == some // cols).all()


def test_gpus_with_the_needed_instructions(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', {0: (8, 0), 1: (7, 5), 2: (12, 0)}.get)
    assert [operators.capable(device) for device in range(3)] == [True, False, True]
    compiled = torch.compile(lambda x: x + operators.capable(0), fullgraph=True, backend='eager')
    assert compiled(torch.zeros(1)) == 1
    monkeypatch.setattr(torch.version, 'hip', '6.4')
    assert not operators.capable(0)


def test_empty_batch():
    layer = fused.FusedTokenPerformer(3, 32, LATER).to(DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        assert layer(torch.zeros(0, 3, 16, 16, device=DEVICE)).shape == (0, 32, 8, 8)
