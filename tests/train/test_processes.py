"""The device of a training run, and how it is passed to accelerate."""

import pytest
import torch

from t2t_vit.settings import UsageError
from t2t_vit.train import processes


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Pretend that there are two GPUs; returns those that were made the current one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda: torch.device('cuda'))
    monkeypatch.setattr(processes, 'pick_device', torch.device)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    return chosen


def test_cpu_and_one_of_two_gpus_are_selected(two_gpus):
    assert processes.use_device('cpu') and not processes.use_device('cuda') and two_gpus == []
    assert not processes.use_device('cuda:1') and two_gpus == [torch.device('cuda:1')]


def test_numbered_device_is_refused_for_several_processes(two_gpus, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UsageError, match='cuda:1 is for one process'):
        processes.use_device('cuda:1')
    assert not processes.use_device('cuda') and two_gpus == []


@pytest.mark.parametrize('name', ['meta', 'abacus'])
def test_device_that_cannot_train_is_refused(name):
    with pytest.raises(UsageError, match=name):
        processes.use_device(name)
