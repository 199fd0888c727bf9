"""The processes of one training: one, or several that torchrun or Slurm started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..settings import UsageError
from ..trained import pick_device
from .config import Config
from .state import remove_drafts

LOCK = '.lock'
LOCK_SECONDS = 5  # a process that was just killed may take a moment to end


def join_processes(config: Config) -> None:
    """Connect this process with the others of its training; must come before anything that they do together."""
    AcceleratorState._reset_state(reset_partial_state=True)  # global: an earlier run may have set another precision
    PartialState(cpu=use_device(config.device), **restarted_store())


def use_device(name: str) -> bool:
    """Make accelerate, which takes the current accelerator or the CPU, use a device. Return whether it is the CPU.

    Raises:
        UsageError: if there is no such device, or each of several processes should use the same one.
    """
    device, available = pick_device(name), torch.accelerator.current_accelerator()
    if device.type != 'cpu' and (available is None or device.type != available.type):
        raise UsageError(f'device is auto, cpu or {available.type if available else "an accelerator"}, got {name}')
    if ':' in name and device.type == 'cuda':
        if int(os.environ.get('WORLD_SIZE', 1)) > 1:
            raise UsageError(f'device {name} is for one process; under torchrun, --device auto gives each its own')
        torch.cuda.set_device(device)
    return device.type == 'cpu'


def build_accelerator(config: Config, folder: Path) -> Accelerator:
    """Build accelerate's view of device, precision, processes and trackers."""
    return Accelerator(
        mixed_precision=config.precision,
        cpu=use_device(config.device),
        log_with=config.trackers or None,
        project_dir=str(folder),
    )


@contextmanager
def hold_folder(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold a run folder while the context lasts, so that no other training writes into it; remove leftovers there.

    The operating system releases the lock when the process dies. Other hosts respect it if the file system supports
    locks, as NFS does.

    Raises:
        UsageError: in all processes, if another training holds it.
    """
    lock, free = FileLock(folder / LOCK), True
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
            remove_drafts(folder)
        except Timeout:
            free = False
    if not broadcast_object_list([free])[0]:
        raise UsageError(f'another process is training in {folder}: wait until it ends, or choose another output')
    try:
        yield
    finally:
        lock.release()


def restarted_store() -> dict[str, Any]:
    """Return arguments of `init_process_group` for processes that torchrun restarted; empty on a first start.

    torchrun's store keeps the addresses of processes that are gone, and restarted ones may read these and wait for
    them (pytorch issue 135712). A prefix for each restart avoids it. It needs one machine: several may count restarts
    differently, and there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun begin a new store.
    """
    environment = os.environ
    restarts = int(environment.get('TORCHELASTIC_RESTART_COUNT', 0))
    if not restarts or environment.get('LOCAL_WORLD_SIZE') != environment.get('WORLD_SIZE'):
        return {}
    store, rank, size = next(torch.distributed.rendezvous('env://'))
    return dict(store=torch.distributed.PrefixStore(f'start-{restarts}', store), rank=rank, world_size=size)
