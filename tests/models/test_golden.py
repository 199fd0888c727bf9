"""The model computes what the published implementations computed: values, tokens of every stage, and gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from filled import fill, relative_error
from safetensors import safe_open

from t2t_vit import TimmT2TViT, optimize

GOLDEN = Path(__file__).parents[1] / 'golden'
INDEX = json.loads((GOLDEN / 'index.json').read_text())
TINY = sorted(path.stem for path in GOLDEN.glob('tiny_*.safetensors'))
BOUND = 1e-5  # of every relative error in float32


def stages(model, images):
    """Every stage by name as tokens (B, N, D), and the logits as `head`."""
    found = {name: x.flatten(2).transpose(1, 2) if x.ndim == 4 else x for name, x in model.named_intermediates(images)}
    return {**found, 'head': model(images)}


def results(model, images, loss_weights):
    """Every stage, and the gradients of sum(logits · loss_weights) by the input and by every parameter."""
    images = images.clone().requires_grad_()
    found = stages(model, images)
    (found['head'] * loss_weights).sum().backward()
    gradients = {f'gradient of {name}': p.grad for name, p in model.named_parameters()}
    return {**found, **gradients, 'gradient of the input': images.grad}


def check(found, expected, bound=BOUND):
    assert found.keys() == expected.keys()
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    too_far = {name: f'{error:.1e}' for name, error in errors.items() if not error <= bound}
    assert not too_far, f'further off than {bound:.0e}: {too_far}'


def read(name):
    with safe_open(GOLDEN / f'{name}.safetensors', 'pt') as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata()


def golden_model(config, kind):
    """Build the model that the metadata of a tiny file describes."""
    args = {key: config[key] for key in ('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'img_size', 'num_classes')}
    args.update(token_layer=config['tokens_type'], token_dim=config.get('token_dim', 64))
    block = kind.removeprefix('T2T_ViT').lstrip('_').lower() or 'plain'
    if block == 'dense':
        args.update(depth=config['block_config'], growth_rate=config['growth_rate'])
    return fill(TimmT2TViT(block=block, **args).eval())


def random_images(seed, size):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((2, 3, size, size))).float()


@pytest.mark.parametrize('fast', [False, True], ids=['plain', 'fast'])
@pytest.mark.parametrize('file', INDEX)
def test_published_figures_at_full_size(file, fast):
    row, (expected, _) = INDEX[file], read(Path(file).stem)
    model = fill(timm.create_model(row['model'], fast=fast).eval(), row['seed'])
    state = model.state_dict()
    assert sorted(state) == sorted(row['names'])
    assert sum(tensor.numel() for tensor in state.values()) == row['params']

    images = random_images(row['image_seed'], row['img_size'])
    with torch.no_grad():
        found = stages(model, images)
    tokens = [x.mean(-1) for name, x in found.items() if name.startswith('tokens_to_token')]
    names = 'tokens.stage1.mean', 'tokens.stage2.mean', 'tokens.final.mean'
    check({**dict(zip(names, tokens)), 'cls_features': found['norm'][:, 0], 'logits': found['head']}, expected)


# At token width 64 the rule's weights make |k|² and |q|² about 60, φ about exp(-30), and the input of `proj` nearly
# zero. Rounding in the exponent is enlarged, in the published figures too: these two are up to 1.1e-5 off a float64 run
# of the plain model, ours 5e-6.
NEARLY_ZERO = [f'grad_norm.tokens_to_token.attention{i}.proj.weight' for i in (1, 2)]


@pytest.mark.parametrize('form', [lambda model: model, optimize], ids=['plain', 'fast'])
@pytest.mark.parametrize('name', TINY)
def test_published_values_and_gradients_of_small_models(name, form):
    expected, metadata = read(name)
    model = form(golden_model(json.loads(metadata['config']), metadata['class']))
    found = results(model, expected.pop('input'), expected.pop('loss_weights'))
    renamed = {'logits': found['head'], 'norm': found['norm'], 'input.grad': found['gradient of the input']}
    tokens = [x for key, x in found.items() if key.startswith('tokens_to_token')]
    renamed.update(zip(('tokens.stage1', 'tokens.stage2', 'tokens.final'), tokens))
    for key in expected:
        kind, _, parameter = key.partition('.')
        if kind == 'grad':
            renamed[key] = found[f'gradient of {parameter}']
        elif kind == 'grad_norm':
            renamed[key] = found[f'gradient of {parameter}'].norm().view(1)
    assert sum('grad' in key for key in renamed) == 1 + len(list(model.parameters()))
    nearly_zero = {key: renamed.pop(key) for key in NEARLY_ZERO if key in renamed}
    check(nearly_zero, {key: expected.pop(key) for key in nearly_zero}, 2 * BOUND)
    check(renamed, expected)
