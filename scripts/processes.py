"""Measure how much of the all-reduce a training step hides when processes on one machine train together, under gloo.

    torchrun --standalone --nproc_per_node 2 scripts/processes.py t2t_vit_7 [BATCH] [ROUNDS]

Each process keeps to a core of its own where there are enough. A round times three things, after a barrier each: the
all-reduce of all gradients in one piece, a step whose gradients stay in the process, and a step that sends them
(DistributedDataParallel). The difference of the two steps is what communication adds. Times are seconds of the clock of
the slowest process, so run it with nothing else on the machine.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import timm
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import t2t_vit  # noqa: F401  (registers the models)
from t2t_vit.allocator import keep_freed_memory
from t2t_vit.timing import device_name


def slowest(work: Callable[[], object]) -> float:
    """Return the milliseconds that the slowest process takes."""
    distributed.barrier()
    start = time.perf_counter()
    work()
    elapsed = torch.tensor((time.perf_counter() - start) * 1000)
    distributed.all_reduce(elapsed, distributed.ReduceOp.MAX)
    return elapsed.item()


def main(name: str, batch_size: int = 4, rounds: int = 15) -> None:
    """Print the medians, ranges and the part of the all-reduce that is hidden."""
    keep_freed_memory()
    torch.set_num_threads(1)
    distributed.init_process_group('gloo')
    rank, count = distributed.get_rank(), distributed.get_world_size()
    if hasattr(os, 'sched_setaffinity') and (os.cpu_count() or 1) >= count:
        os.sched_setaffinity(0, {rank})
    torch.manual_seed(0)
    model = timm.create_model(name)
    images, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(model.num_classes, (batch_size,))
    gradients = torch.randn(sum(p.numel() for p in model.parameters() if p.requires_grad))
    parallel = DistributedDataParallel(model)

    def step(context: AbstractContextManager[None]) -> None:
        model.zero_grad()
        with context:
            nn.functional.cross_entropy(parallel(images), labels).backward()

    works: dict[str, Callable[[], object]] = {
        'all-reduce': lambda: distributed.all_reduce(gradients),
        'step alone': lambda: step(parallel.no_sync()),
        'step together': lambda: step(nullcontext()),
    }
    times: dict[str, list[float]] = {key: [] for key in works}
    for turn in range(rounds + 2):  # the first two are not counted
        for key, work in works.items():
            elapsed = slowest(work)
            if turn > 1:
                times[key].append(elapsed)
    if rank == 0:
        medians = {key: statistics.median(values) for key, values in times.items()}
        print(f'{name}, {count} processes, batch {batch_size} each, {gradients.numel() * 4 / 1e6:.0f} MB of gradients')
        print(f'{device_name(torch.device("cpu"))}, torch {torch.__version__}, one thread each, {rounds} rounds')
        for key, values in times.items():
            print(f'{key}: {medians[key]:.0f} ms ({min(values):.0f} to {max(values):.0f})')
        added = [after - before for before, after in zip(times['step alone'], times['step together'])]
        print(f'added by communication: {statistics.median(added):.0f} ms ({min(added):.0f} to {max(added):.0f})')
    distributed.destroy_process_group()


if __name__ == '__main__':
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], *(int(value) for value in sys.argv[2:]))
