"""Half precision: finite and close to float32, forward and backward, where the published Performer gives NaN.

Models have their paper's widths and one block (two dense ones), since what is new is in front of the blocks.
float16 is slow on a CPU, so the token transformer's 3,136² attention is run in it once.
"""

import pytest
import timm
import torch
from reference import fill, relative_error

from t2t_vit import VARIANTS

TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # two units in the last place; measured 1e-3 and 1e-2

IMAGES = dict(
    noise=torch.randn,
    white=lambda *shape: torch.full(shape, 2.64),
    zero=torch.zeros,
    times_100=lambda *shape: 100 * torch.randn(shape),
    faint=lambda *shape: 1e-4 * torch.randn(shape),
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shallow(name):
    return fill(timm.create_model(name, depth=1 if isinstance(VARIANTS[name].depth, int) else (1, 1), num_classes=10))


def step(model, images, dtype):
    """Logits and all gradients, one vector each, of a forward pass under autocast and a backward pass."""
    model.eval().zero_grad()
    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
        logits = model(images)
    (logits.float() * torch.linspace(-1, 1, 10)).sum().backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def check_autocast(name, images, dtypes=TOLERANCES):
    model = shallow(name)
    expected = step(model, images, torch.float32)
    for dtype in dtypes:
        logits, gradients = step(model, images, dtype)
        assert logits.dtype == dtype
        assert logits.isfinite().all() and gradients.isfinite().all()
        assert relative_error(logits, expected[0]) < TOLERANCES[dtype]
        assert relative_error(gradients, expected[1]) < TOLERANCES[dtype]


@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_at_its_size(name):
    size = VARIANTS[name].img_size
    dtypes = [torch.bfloat16] if name in ('t2t_vit_t_19', 't2t_vit_t_24') else TOLERANCES
    check_autocast(name, torch.randn(1, 3, size, size), dtypes)


@pytest.mark.parametrize('name', [name for name, variant in VARIANTS.items() if variant.img_size == 224])
def test_every_variant_at_384(name):
    dtypes = TOLERANCES if name == 't2t_vit_7' else [torch.bfloat16]
    check_autocast(name, torch.randn(1, 3, 384, 384), dtypes)


@pytest.mark.parametrize('image', IMAGES)
@pytest.mark.parametrize('name, size', [
    ('t2t_vit_7', 224), ('t2t_vit_t_14', 112), ('t2t_vit_c_14', 224), ('t2t_vit_14_no_t2t', 224)])
def test_every_token_layer_with_hard_images(name, size, image):
    check_autocast(name, IMAGES[image](1, 3, size, size))


@pytest.mark.parametrize('image', IMAGES)
@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('name', ['t2t_vit_7', 't2t_vit_t_14', 't2t_vit_c_14', 't2t_vit_14_no_t2t'])
def test_weights_in_half_precision(name, dtype, image):
    model, images = shallow(name), IMAGES[image](1, 3, 112, 112)
    expected = step(model, images, torch.float32)
    logits, gradients = step(model.to(dtype), images.to(dtype), torch.float32)
    assert logits.dtype == gradients.dtype == dtype
    assert gradients.isfinite().all()
    print(image, relative_error(logits, expected[0]), relative_error(gradients, expected[1]))
    assert relative_error(logits, expected[0]) < 4 * TOLERANCES[dtype]
