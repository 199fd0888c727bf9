"""Clients that shard or replicate a model, in one process on the CPU."""

import copy
from functools import partial

import client_models as cm
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(not dist.is_available(), reason='torch without torch.distributed')


@pytest.fixture(autouse=True)
def group():
    """Start a process group of one."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def full(gradients):
    """Return whole tensors for shards."""
    return {key: g.full_tensor() if isinstance(g, DTensor) else g for key, g in gradients.items()}


@pytest.mark.filterwarnings('ignore:FSDP2-wrapped module .* returned a view:UserWarning')
@pytest.mark.parametrize('every', ['linear', 'block', 'model'])
def test_fsdp2(name, every, agree):
    model, x = cm.build(name), cm.images()
    mesh = dist.device_mesh.init_device_mesh('cpu', (1,))
    for part in {'linear': cm.linears(model), 'block': model.blocks, 'model': []}[every]:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    reference = cm.plain(name)
    found = full(cm.gradients(model, x))
    agree(found, cm.gradients(reference, x))
    with torch.no_grad():
        agree(model(x), reference(x))


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('parameters', [1000, 100_000])
def test_fsdp1_by_size(name, parameters, agree):
    model, x, reference = cm.build(name), cm.images(), cm.plain(name)
    model = FullyShardedDataParallel(
        model,
        auto_wrap_policy=partial(size_based_auto_wrap_policy, min_num_params=parameters),
        device_id=torch.device('cpu'),
        use_orig_params=True,
    )
    found = {key.replace('_fsdp_wrapped_module.', ''): g for key, g in cm.gradients(model, x).items()}
    expected = cm.gradients(reference, x)
    agree({key: g.view_as(expected[key]) for key, g in found.items()}, expected)
    with torch.no_grad():
        agree(model(x), reference(x))


@pytest.mark.parametrize('static', [False, True])
def test_ddp(name, static, agree):
    model, x, reference = cm.build(name), cm.images(), cm.plain(name)
    replica = DistributedDataParallel(copy.deepcopy(model), static_graph=static)
    found = {key.removeprefix('module.'): g for key, g in cm.gradients(replica, x).items()}
    agree(found, cm.gradients(reference, x))
