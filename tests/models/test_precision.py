"""Half precision is finite and close to float32, forward and backward; the published Performer gives NaN.

Models have their paper's widths and one block (two dense ones), since what is new is in front of the blocks.
float16 is slow on a CPU, so the token transformer's 3,136² attention is run in it once.
"""

import pytest
import timm
import torch
from filled import fill, relative_error

from t2t_vit import VARIANTS

TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2}  # four units in the last place; measured 2e-3 and 1e-2


def hard_images(size):
    """Return noise, white, zero, noise 100 times as strong and 10,000 times as faint."""
    noise = torch.randn(3, size, size)
    return torch.stack([noise, torch.full_like(noise, 2.64), torch.zeros_like(noise), 100 * noise, 1e-4 * noise])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shallow(name):
    return fill(timm.create_model(name, depth=1 if isinstance(VARIANTS[name].depth, int) else (1, 1), num_classes=10))


def step(model, images, dtype):
    """Return logits and all gradients, one vector each, of a forward pass under autocast and a backward pass."""
    model.eval().zero_grad()
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        logits = model(images)
    (logits.float() * torch.linspace(-1, 1, 10)).sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def check(logits, gradients, expected, tolerance):
    assert logits.isfinite().all() and gradients.isfinite().all()
    assert max(map(relative_error, logits, expected[0])) < tolerance
    assert relative_error(gradients, expected[1]) < tolerance


def check_autocast(name, images, dtypes=TOLERANCES):
    model = shallow(name)
    expected = step(model, images, torch.float32)
    for dtype in dtypes:
        logits, gradients = step(model, images, dtype)
        assert logits.dtype == dtype
        check(logits, gradients, expected, TOLERANCES[dtype])


@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_at_its_size(name):
    size = VARIANTS[name].img_size
    dtypes = [torch.bfloat16] if name in ('t2t_vit_t_19', 't2t_vit_t_24') else TOLERANCES
    check_autocast(name, torch.randn(1, 3, size, size), dtypes)


@pytest.mark.parametrize('name', [name for name, variant in VARIANTS.items() if variant.img_size == 224])
def test_every_variant_at_384(name):
    dtypes = TOLERANCES if name == 't2t_vit_7' else [torch.bfloat16]
    check_autocast(name, torch.randn(1, 3, 384, 384), dtypes)


@pytest.mark.parametrize(
    'name, size', [('t2t_vit_7', 224), ('t2t_vit_t_14', 112), ('t2t_vit_c_14', 224), ('t2t_vit_14_no_t2t', 224)]
)
def test_hard_images_with_every_token_layer(name, size):
    check_autocast(name, hard_images(size))


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_t_14', 't2t_vit_c_14', 't2t_vit_14_no_t2t'])
def test_weights_in_half_precision(name, dtype):
    model, images = shallow(name), hard_images(112)
    expected = step(model, images, torch.float32)
    logits, gradients = step(model.to(dtype), images.to(dtype), torch.float32)
    assert logits.dtype == gradients.dtype == dtype
    check(logits, gradients, expected, 2 * TOLERANCES[dtype])
