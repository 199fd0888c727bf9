"""Recomputation in the backward pass: what is not stored, and that gradients stay the same."""

import pytest
import torch
from filled import fill, relative_error
from test_forms import BLOCKS, MODEL, TOKEN_LAYERS

from t2t_vit import TimmT2TViT, optimize
from t2t_vit.fast import memory
from t2t_vit.fast.memory import Recompute

pytestmark = pytest.mark.skipif(not memory.find_top, reason='needs to know which saved-tensor hooks are active')


@pytest.fixture
def packed(monkeypatch):
    """Tensors that autograd did not store: a list of shapes, filled as it goes."""
    torch.manual_seed(0)
    shapes, call = [], Recompute.__call__

    def note(self, tensor):
        result = call(self, tensor)
        shapes.extend([] if isinstance(result, torch.Tensor) else [result])
        return result

    monkeypatch.setattr(Recompute, '__call__', note)
    return shapes


def build(**args):
    return optimize(fill(TimmT2TViT(**{**MODEL, **args})))


@pytest.mark.parametrize('block', BLOCKS)
def test_recomputed_gradients_are_the_same_to_the_last_bit(block, packed, monkeypatch):
    """LayerNorm's and GELU's results and, reckoned back from its successor, the split's convolution."""
    model, images = build(**BLOCKS[block]).eval(), torch.randn(2, 3, 48, 48)

    def gradients():
        model.zero_grad()
        model(images).square().sum().backward()
        return [p.grad for p in model.parameters()]

    ours = gradients()
    depth = sum(hasattr(entry, 'attn') for entry in model.blocks)
    assert len(packed) >= (2 if block == 'ghost' else 3) * depth  # both norms, and GELU before a Linear
    monkeypatch.setattr(memory, 'saves_as_usual', lambda: False)
    for (name, _), a, b in zip(model.named_parameters(), ours, gradients()):
        if name.startswith('tokens_to_token'):  # the convolution's output is computed back from the result
            assert relative_error(a, b) <= 1e-6, name
        else:
            assert torch.equal(a, b), name


def test_no_hook_is_called_in_the_backward_pass(packed):
    model, images, called = build(), torch.randn(2, 3, 48, 48), []
    for name, module in model.named_modules():
        if not any(name.endswith(part) for part in ('norm1', 'norm2', 'act')):
            module.register_forward_hook(lambda module, args, output, name=name: called.append(name))
    loss = model(images).sum()
    seen = len(called)
    loss.backward()
    assert packed and len(called) == seen > 0


def test_nothing_is_recomputed_under_other_saved_tensor_hooks(packed):
    model, images = build(**TOKEN_LAYERS['none']), torch.randn(2, 3, 48, 48)
    model.set_grad_checkpointing()
    model(images).sum().backward()
    model.set_grad_checkpointing(False)
    parameters = dict(model.named_parameters())
    torch.func.grad(lambda values: torch.func.functional_call(model, values, images).sum())(parameters)
    with torch.no_grad():
        model(images)
    assert not packed
