"""Token layers in half precision on a CPU against float64: values, gradients, and when they are used.

A processor without the instructions emulates them, with the same results.
"""

import copy

import pytest
import timm
import torch
from filled import HARD_WINDOWS, fill, hard_windows, relative_error

from t2t_vit.fast import attention, folded, optimize, plain
from t2t_vit.fast.folded import split_norm_linear, split_norm_linear_half
from t2t_vit.models import precision
from t2t_vit.models.t2t_vit import Split, TokenPerformer, TokenTransformer

FLOAT = torch.float32
UNITS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
FIRST, LATER = Split(7, 4, 2), Split(3, 2, 1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def capable(monkeypatch):
    """Let the layers take this processor for one that has the instructions."""
    monkeypatch.setattr(folded, 'cpu_has_matmuls', lambda kind: True)
    monkeypatch.setattr(attention, 'cpu_has_avx512_bf16_alone', lambda: True)


def filled(layer):
    """Fill a layer with weights whose random features are not all nearly zero."""
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            deviation = 0.3 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(torch.randn_like(weight) * deviation + ('norm' in name and name.endswith('weight')))
    return layer.eval()


def step(layer, images, weight, dtype=torch.float64, autocast=None):
    """Return map and gradients of a layer in `dtype`, under autocast to another type if one is given."""
    layer, images = layer.to(dtype), images.to(dtype).requires_grad_()
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        y = layer(images)
    grads = torch.autograd.grad(y, [images, *layer.parameters()], weight.to(y))
    return [value.detach().double() for value in (y, *grads)]


@pytest.mark.parametrize('dtype', UNITS)
@pytest.mark.parametrize('layer', [TokenPerformer, TokenTransformer])
@pytest.mark.parametrize(
    'chans, split, shape, dim, memory_format',
    [
        (3, FIRST, (29, 38), 64, torch.contiguous_format),
        (64, LATER, (25, 30), 64, torch.channels_last),
        (64, LATER, (16, 16), 32, torch.contiguous_format),
        (13, Split(5, 1, 2), (7, 9), 16, torch.channels_last),
    ],
)
def test_values_and_gradients(layer, chans, split, shape, dim, memory_format, dtype, capable, monkeypatch):
    layer = filled(optimize(layer(chans, dim, split)))
    images = torch.randn(2, chans, *shape).contiguous(memory_format=memory_format)
    weight = torch.randn(2, dim, *split.grid(*shape))
    expected = step(layer, images, weight)
    in_half, mixed = (step(plain(copy.deepcopy(layer)), images, weight, *kinds) for kinds in ((dtype,), (FLOAT, dtype)))
    found = step(layer, images, weight, FLOAT, dtype)
    names = ['map', 'image', *(name for name, _ in layer.named_parameters())]
    for name, ours, first, second, exact in zip(names, found, in_half, mixed, expected):
        bound = max(4 * UNITS[dtype], *(3 * relative_error(other, exact) for other in (first, second)))
        if name == 'proj.weight':  # of an attention that is next to nothing where features are: mostly cancels
            bound = max(bound, 0.3)
        assert relative_error(ours, exact) < bound, name


@pytest.mark.parametrize('dtype', UNITS)
@pytest.mark.parametrize('kind', HARD_WINDOWS)
def test_hard_windows(kind, dtype):
    """Where windows are flat, 1 / std is up to 316 and enlarges the rounding of what is normalised."""
    images, layer = hard_windows(kind), filled(TokenPerformer(3, 64, FIRST)).double()
    expected = split_norm_linear(images.double(), layer.norm1, layer.kqv, FIRST)
    layer = layer.float()
    found = split_norm_linear_half(images, layer.norm1, layer.kqv, FIRST, dtype)
    assert found.dtype == dtype and relative_error(found, expected) < 2 * UNITS[dtype]


@pytest.mark.parametrize('dtype', UNITS)
@pytest.mark.parametrize('offset', [0.0, 1.0, 10.0])
def test_maps_of_tokens_with_a_mean(offset, dtype):
    """The rounded weights of the convolution have row sums, which the mean of a window meets."""
    x = (torch.randn(2, 64, 20, 20) + offset).to(dtype).contiguous(memory_format=torch.channels_last)
    layer = filled(TokenPerformer(64, 64, LATER)).double()
    expected = split_norm_linear(x.double(), layer.norm1, layer.kqv, LATER)
    layer = layer.float()
    found = split_norm_linear_half(x, layer.norm1, layer.kqv, LATER, dtype)
    assert relative_error(found, expected) < 2 * UNITS[dtype]


@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_t_14'])
@pytest.mark.parametrize('dtype', UNITS)
def test_whole_model(name, dtype, capable):
    """Logits and gradients with the golden rule's weights, whose random features are about exp(-30)."""
    model = fill(timm.create_model(name, img_size=64, depth=1, num_classes=10).eval())
    images, results = torch.randn(2, 3, 64, 64), []
    for kind in (None, dtype):
        with torch.autocast('cpu', kind, enabled=kind is not None):
            logits = model(images)
        grads = torch.autograd.grad(logits.float().sum() * 1000, list(model.parameters()))
        results.append((logits.detach(), torch.cat([grad.flatten() for grad in grads])))
    for found, expected in zip(results[1], results[0]):
        assert relative_error(found, expected) < 8 * UNITS[dtype]
    half, expected = copy.deepcopy(model).to(dtype), results[0][0]
    assert relative_error(half(images.to(dtype)), expected) < 16 * UNITS[dtype]


@pytest.fixture
def halves(monkeypatch):
    """Return a list to which every call of the half-precision split adds the type that it computes in."""
    seen, function = [], folded.split_norm_linear_half
    monkeypatch.setattr(folded, 'split_norm_linear_half', lambda *args: seen.append(args[-1]) or function(*args))
    return seen


def test_used_where_the_processor_has_the_instructions(halves, monkeypatch):
    model, images = timm.create_model('t2t_vit_7', img_size=32, depth=1), torch.randn(1, 3, 32, 32)

    def run(autocast, dtype=FLOAT):
        halves.clear()
        with torch.autocast('cpu', autocast, enabled=autocast is not None):
            copy.deepcopy(model).to(dtype)(images.to(dtype))
        return halves

    monkeypatch.setattr(folded, 'cpu_has_matmuls', lambda kind: kind == torch.bfloat16)
    assert run(torch.bfloat16) == [torch.bfloat16] * 2
    assert run(None, dtype=torch.bfloat16) == [torch.bfloat16] * 2
    assert run(None) == run(torch.float16) == run(None, dtype=torch.float64) == []
    monkeypatch.setattr(folded, 'cpu_has_matmuls', lambda kind: False)
    assert run(torch.bfloat16) == []


@pytest.mark.parametrize('chans, split', [(3, FIRST), (32, LATER)])
def test_compiled_graph_has_no_breaks(chans, split, capable, halves):
    layer, images = filled(optimize(TokenPerformer(chans, 16, split))), torch.randn(2, chans, 16, 16)
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    with torch.autocast('cpu', torch.bfloat16):
        expected, found = layer(images), compiled(images)
        assert halves and relative_error(found, expected) < 4 * UNITS[torch.bfloat16]
        found.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in layer.parameters())


# the choice of a precision


def test_precision_is_chosen_by_measured_speed(monkeypatch):
    cpu = torch.device('cpu')
    for gain, expected in ((0.0, 'no'), (1.1, 'no'), (6.0, 'bf16')):
        monkeypatch.setattr(precision, 'cpu_gain', lambda kind, gain=gain: gain)
        chosen, reason = precision.choose_precision(cpu)
        assert chosen == expected
        assert ('no instructions' in reason) == (not gain) and (f'{gain:.1f} times' in reason) == bool(gain)


def test_a_processor_without_instructions_is_not_timed(monkeypatch):
    monkeypatch.setattr(precision, 'cpu_has_matmuls', lambda kind: False)
    monkeypatch.setattr(torch.nn.functional, 'linear', None)
    precision.cpu_gain.cache_clear()
    assert precision.cpu_gain(torch.bfloat16) == 0
    monkeypatch.undo()
    monkeypatch.setattr(precision, 'cpu_has_matmuls', lambda kind: True)
    precision.cpu_gain.cache_clear()
    assert precision.cpu_gain(torch.bfloat16) > 0
    precision.cpu_gain.cache_clear()
