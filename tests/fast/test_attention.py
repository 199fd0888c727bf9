"""Attention by matmuls against torch's own: values and gradients, and when each is used."""

import pytest
import timm
import torch
import torch.nn.functional as F
from filled import relative_error

from t2t_vit.fast import attention as module
from t2t_vit.fast.attention import attention, by_matmuls
from t2t_vit.models import precision

SCALE = 0.2
SHAPES = [(2, 3, 7, 7, 8), (5, 1, 33, 33, 16), (3, 2, 1, 19, 4), (0, 2, 5, 5, 4)]  # B, heads, M, N, D


def tensors(shape, dtype=torch.float64, scale=1.0):
    """Return q, k and v as they come from one Linear: views of one tensor, tokens before heads."""
    images, heads, queries, tokens, dim = shape
    qkv = (torch.randn(images, tokens, 3, heads, dim, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return qkv, q[:, :, :queries], k, v


@pytest.fixture
def uses(monkeypatch):
    """Take this processor for one with AVX512-BF16 and without AMX; return the calls of `by_matmuls`."""
    calls = []
    monkeypatch.setattr(module, 'cpu_has_avx512_bf16_alone', lambda: True)
    monkeypatch.setattr(module, 'by_matmuls', lambda *args: calls.append(args) or by_matmuls(*args))
    return calls


@pytest.mark.parametrize('shape', SHAPES)
def test_values_and_gradients_in_float64(shape):
    qkv, q, k, v = tensors(shape)
    found, expected = by_matmuls(q, k, v, SCALE), F.scaled_dot_product_attention(q, k, v, scale=SCALE)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(y, qkv, weight)[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('spread', [0.5, 3.0])
def test_error_in_bfloat16_is_that_of_the_plain_form(shape, spread, uses):
    _, q, k, v = tensors(shape, torch.bfloat16, spread)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=SCALE)
    plain = (q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v
    assert relative_error(attention(q, k, v, 0.0, SCALE), exact) < 2 * relative_error(plain, exact) + 2**-8
    assert uses


def test_weights_are_computed_for_some_images_at_a_time(uses, monkeypatch):
    _, q, k, v = tensors((5, 2, 9, 9, 4), torch.bfloat16)
    whole = attention(q, k, v, 0.0, SCALE)
    monkeypatch.setattr(module, 'WEIGHTS', 2 * 2 * 2 * 9 * 9)  # of two images
    assert torch.equal(attention(q, k, v, 0.0, SCALE), whole)
    assert [len(args[0]) for args in uses] == [5, 2, 2, 1]
    monkeypatch.setattr(module, 'WEIGHTS', 2 * 2 * 9 * 9 - 1)  # too few for one
    assert relative_error(attention(q, k, v, 0.0, SCALE), whole) < 2**-7 and len(uses) == 4


def test_used_in_bfloat16_without_tiles_only(uses, monkeypatch):
    _, q, k, v = tensors(SHAPES[0], torch.float32)
    half = [t.detach().bfloat16() for t in (q, k, v)]
    attention(q, k, v, 0.0, SCALE)
    attention(*half, 0.1, SCALE)  # with dropout
    with torch.autocast('cpu', torch.float16):
        attention(q, k, v, 0.0, SCALE)
    assert not uses
    attention(*half, 0.0, SCALE)
    with torch.autocast('cpu', torch.bfloat16):
        attention(q, k, v, 0.0, SCALE)
    assert len(uses) == 2
    monkeypatch.setattr(module, 'cpu_has_avx512_bf16_alone', lambda: False)
    attention(*half, 0.0, SCALE)
    assert len(uses) == 2


@pytest.mark.parametrize('vectors, tiles', [(False, False), (True, False), (True, True), (False, True)])
def test_processor_is_known_by_its_instructions(vectors, tiles, monkeypatch):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: vectors, raising=False)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: tiles, raising=False)
    assert precision.cpu_has_avx512_bf16_alone() == (vectors and not tiles)


def test_compiled_graphs_have_matmuls_and_exported_ones_the_kernel(uses):
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, 0.0, SCALE)

    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    half = [t.detach().bfloat16() for t in tensors(SHAPES[0])[1:]]
    torch.compile(Attend(), backend=backend, fullgraph=True, dynamic=True)(*half)
    assert 'baddbmm' in graphs[0] and 'scaled_dot_product' not in graphs[0]
    exported = str(torch.export.export(Attend(), tuple(half)).graph)
    assert 'baddbmm' not in exported and 'scaled_dot_product' in exported


def test_every_attention_of_a_model_uses_it(uses):
    model = timm.create_model('t2t_vit_t_14', img_size=32, depth=2).eval()
    with torch.autocast('cpu', torch.bfloat16):
        model(torch.randn(1, 3, 32, 32))
    assert [args[0].shape[2] for args in uses] == [64, 16, 5, 1]  # two token layers, a block, the class token
