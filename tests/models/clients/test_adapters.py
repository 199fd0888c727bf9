"""Clients that replace or reparametrise Linears: LoRA, offloading, quantisation, pruning, norms, Opacus."""

import copy

import accelerate
import client_models as cm
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

TOKEN_LINEARS = {'vit_tiny_patch16_224': ['qkv'], 't2t_vit_7': ['kqv', 'qkv'], 't2t_vit_t_14': ['qkv', 'proj']}


def add_lora(model, targets):
    """Return the model with an adapter on each target; adapters are random, so that none is the identity."""
    peft = pytest.importorskip('peft')
    torch.manual_seed(2)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()


@pytest.mark.parametrize('targets', ['all-linear', 'tokens'])
def test_lora_adapters_train_and_merge(name, targets, agree):
    targets = TOKEN_LINEARS[name] if targets == 'tokens' else targets
    model, reference = add_lora(cm.build(name), targets), add_lora(cm.plain(name), targets)
    reference.load_state_dict(model.state_dict())
    x = cm.images()
    before = model(x)
    assert cm.error(before, cm.plain(name)(x)) > 1e-2  # the adapters do something
    agree(before, reference(x))
    found = cm.gradients(model, x)
    assert all('lora' in key for key in found)
    assert len(found) == sum('lora_' in key for key, _ in model.named_parameters()) and cm.all_nonzero(found.values())
    agree(found, cm.gradients(reference, x))
    model, x = model.double(), x.double()  # rounding of float32 alone makes 1e-6
    before = model(x)
    agree(model.merge_and_unload()(x), before, 1e-6)


DESIGNS = {'t2t_vit_14_se': 2, 't2t_vit_16_ghost': 2, 't2t_vit_dense': (1, 1)}  # depth


@pytest.mark.parametrize('design', DESIGNS)
def test_lora_on_other_designs(design, agree):
    model = add_lora(cm.build(design, depth=DESIGNS[design]), 'all-linear')
    reference = add_lora(cm.plain(design, depth=DESIGNS[design]), 'all-linear')
    reference.load_state_dict(model.state_dict())
    found = cm.gradients(model, cm.images())
    assert len(found) == sum('lora_' in key for key, _ in model.named_parameters()) and cm.all_nonzero(found.values())
    agree(found, cm.gradients(reference, cm.images()))


def test_lora_after_merging_is_the_fast_model_again(t2t, agree):
    merged = add_lora(cm.build(t2t), 'all-linear').merge_and_unload()
    reference = cm.plain(t2t)
    reference.load_state_dict(merged.state_dict())
    agree(merged(cm.images()), reference(cm.images()))


@torch.no_grad()
def test_accelerate_cpu_offload(name, agree):
    model = accelerate.cpu_offload(cm.build(name), execution_device=torch.device('cpu'), offload_buffers=True)
    assert all(p.is_meta for p in model.parameters())
    for _ in range(2):
        agree(model(cm.images()), cm.plain(name)(cm.images()))


@pytest.mark.filterwarnings('ignore:The following device_map keys:UserWarning')  # class token, position table
@pytest.mark.parametrize('kept', ['nothing', 'blocks'])
@torch.no_grad()
def test_accelerate_dispatch_to_disk(name, kept, tmp_path, agree):
    model = cm.build(name)
    places = {child: 'disk' for child, _ in model.named_children()}
    if kept == 'blocks':
        places['blocks'] = 'cpu'
    places |= {part: 'cpu' for part in ('cls_token', 'pos_embed')}
    model = accelerate.dispatch_model(model, places, main_device='cpu', offload_dir=tmp_path, force_hooks=True)
    for _ in range(2):
        agree(model(cm.images()), cm.plain(name)(cm.images()))


def compare_quantised(found, reference, exact, agree):
    """Compare the token maps, then the logits.

    Blocks quantise activations anew, and fused attention's last bit may round them to the next step: logits may differ
    by as much as quantisation itself changes them.
    """
    x = cm.images()
    if hasattr(found, 'tokens_to_token'):
        agree(found.tokens_to_token(x), reference.tokens_to_token(x))
    agree(found(x), reference(x), cm.error(reference(x), exact(x)))
    assert 1e-4 < cm.error(found(x), exact(x)) < 0.2


@pytest.mark.filterwarnings('ignore:.*deprecated:DeprecationWarning', 'ignore:.*deprecated:UserWarning')
@torch.no_grad()
def test_quantize_dynamic(name, agree):
    model, reference = (
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        for model in (cm.build(name), cm.plain(name))
    )
    assert not cm.linears(model)
    compare_quantised(model, reference, cm.plain(name), agree)


@pytest.mark.parametrize('config', ['Int8WeightOnlyConfig', 'Int8DynamicActivationInt8WeightConfig'])
@torch.no_grad()
def test_torchao(name, config, agree):
    quantization = pytest.importorskip('torchao.quantization')
    model, reference = cm.build(name), cm.plain(name)
    for net in (model, reference):
        quantization.quantize_(net, getattr(quantization, config)())
    assert all(type(linear.weight) is not nn.Parameter for linear in cm.linears(model))
    compare_quantised(model, reference, cm.plain(name), agree)


def train(model, x, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        cm.loss(model(x)).backward()
        optimizer.step()


def test_pruning_with_training(name, agree):
    model, reference, x = cm.build(name), cm.plain(name), cm.images()
    for net in (model, reference):
        for linear in cm.linears(net):
            prune.l1_unstructured(linear, 'weight', amount=0.3)
    assert cm.error(model(x), cm.plain(name)(x)) > 1e-2
    agree(model(x), reference(x))
    agree(cm.gradients(model, x), cm.gradients(reference, x))
    for net in (model, reference):
        train(net, x)
    agree(model(x), reference(x), 1e-4)
    for linear in cm.linears(model):
        prune.remove(linear, 'weight')
        assert (linear.weight == 0).float().mean() > 0.29
    agree(model(x), reference(x), 1e-4)


def test_global_pruning(name, agree):
    model, reference, x = cm.build(name), cm.plain(name), cm.images()
    for net in (model, reference):
        parts = [(linear, 'weight') for linear in cm.linears(net)]
        prune.global_unstructured(parts, prune.L1Unstructured, amount=0.5)
    agree(model(x), reference(x))


PARAMETRIZATIONS = {
    'spectral_norm': parametrizations.spectral_norm,
    'weight_norm': parametrizations.weight_norm,
    'spectral_norm by hook': nn.utils.spectral_norm,
    'weight_norm by hook': nn.utils.weight_norm,
}


@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
@pytest.mark.parametrize('kind', PARAMETRIZATIONS)
def test_parametrized_weights_train(name, kind, agree):
    # in float64: weights over a rough estimate of their norm are large, and the loss of digits in a ViT of them as well
    model, reference, x = cm.build(name).double(), cm.plain(name).double(), cm.images().double()
    for net in (model, reference):
        for linear in cm.linears(net):
            PARAMETRIZATIONS[kind](linear)
    reference.load_state_dict(model.state_dict())  # the power iteration's vectors too
    agree(model(x), reference(x))
    agree(cm.gradients(model, x), cm.gradients(reference, x))
    for net in (model, reference):
        train(cm.disable_dropout(net).train(), x)
        net.eval()
    agree(model(x), reference(x))


def private_model(net):
    """Freeze what belongs to no layer (class token, position table), which Opacus has no per-sample gradient for."""
    for parameter in net.parameters(recurse=False):
        parameter.requires_grad_(False)
    return cm.disable_dropout(net).train()


@pytest.mark.filterwarnings('ignore:Full backward hook:UserWarning')  # the images need no gradient
def test_opacus_per_sample_gradients(name, agree):
    opacus = pytest.importorskip('opacus')
    model, x = opacus.GradSampleModule(private_model(cm.build(name)), loss_reduction='sum'), cm.images(3)
    model(x).square().sum().backward()
    reference = private_model(cm.plain(name))
    for i in range(3):
        reference.zero_grad()
        reference(x[i : i + 1]).square().sum().backward()
        expected = {key: p.grad for key, p in reference.named_parameters() if p.requires_grad}
        found = {key: p.grad_sample[i] for key, p in model._module.named_parameters() if p.requires_grad}
        agree(found, expected)


@pytest.mark.filterwarnings('ignore::UserWarning')  # that its random numbers are not cryptographic
def test_opacus_private_training(name, agree):
    opacus = pytest.importorskip('opacus')
    model = private_model(cm.build(name))
    before = copy.deepcopy(model.state_dict())
    data = torch.utils.data.TensorDataset(cm.images(4), torch.arange(4))
    model, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=10.0),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    reference = private_model(cm.plain(name))
    total = {key: 0.0 for key, p in reference.named_parameters() if p.requires_grad}
    for x, y in data:
        reference.zero_grad()
        nn.functional.cross_entropy(reference(x[None]), y[None]).backward()
        norm = torch.stack([reference.get_parameter(key).grad.norm() for key in total]).norm()
        for key in total:
            total[key] = total[key] + reference.get_parameter(key).grad * min(1.0, (1 / (norm + 1e-6)).item())
    steps = {key: (before[key] - model._module.get_parameter(key).detach()) / 10 for key in total}
    agree(steps, {key: value / 4 for key, value in total.items()}, 1e-4)  # a difference of weights has fewer digits
