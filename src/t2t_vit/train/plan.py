"""What a run is about to do, before it does it."""

from collections.abc import Iterable

import torch

from ..data import Batch, MemoryBatches
from .log import FIRST
from .trainer import Trainer


def plan(run: Trainer) -> list[str]:
    """Lines for a `Run` of the loop's: model, data, schedule, optimizer, average, memory, place; and warnings."""
    config, data, parts = run.config, run.data, run.parts
    steps, world = len(data.train), run.accelerator.num_processes
    count = sum(parameter.numel() for parameter in run.parameters)
    size = 'x'.join(map(str, (data.preprocessing.channels, *data.preprocessing.size)))
    start = f'epoch {run.position.epoch + 1}, step {run.position.step + 1}' if run.done else config.weights or 'scratch'
    share = config.batch_size // world // config.grad_accum_steps
    tuning, rule = config.optimizer, ''
    if tuning.lr_base_size:
        rule = f' = {tuning.lr:g} x {config.batch_size} / {tuning.lr_base_size}'
    lines = [
        f'model     {config.model}, {count:,} learnable parameters, images of {size} on {run.accelerator.device}',
        f'data      {config.data.root}: {data.counts[0]:,} training and {data.counts[1]:,} validation images, '
        f'{len(data.classes)} classes, {"in memory" if isinstance(data.train, MemoryBatches) else "from disk"}',
        f'schedule  {config.epochs} epochs of {steps:,} steps, {run.total_steps:,} in all, from {start}',
        f'batch     {config.batch_size} images = {world} processes x {config.grad_accum_steps} parts x {share}',
        f'optimizer {tuning.name}, lr {config.lr:g}{rule}, weight decay {tuning.weight_decay:g} on '
        f'{sum(p.numel() for g in parts.groups if g["weight_decay"] for p in g["params"]):,} of them',
    ]
    if parts.ema:
        whole, last = (1 / (1 - decay) for decay in (config.ema_decay, parts.ema.get_decay(run.total_steps)))
        lines.append(f'average   of the weights, at the end over the last {last:,.0f} steps, {last / steps:.1f} epochs')
        if whole > run.total_steps:
            advice = 1 - float(f'{10 / run.total_steps:.1g}')  # which keeps the digits that count
            lines.append(
                f'warning   ema_decay {config.ema_decay:g} averages {whole:,.0f} steps, more than the run has, and is '
                'not reached' + (f'; {advice:.9g} averages a tenth of the run' if advice > 0 else '')
            )
    if run.input_alone:
        lines.append(
            f'input     {run.input_alone:,.0f} images/s by itself; what the model takes is said after '
            f'{FIRST} steps and every epoch'
        )
    held, per_image = memory(run)
    lines += [
        f'memory    about {(sum(held.values()) + share * per_image) / 2**20:,.0f} MB a process: '
        f'{", ".join(f"{size / 2**20:,.0f} for {what}" for what, size in held.items() if size)}, '
        f'{per_image / 2**20:,.1f} for each image of a part',
        f'run       {run.folder}',
    ]
    return lines


def size_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory(run: Trainer) -> tuple[dict[str, int], float]:
    """Estimated bytes: what is held all the time, and for what; and what a step keeps of an image to go backward.

    The second is measured: the sum of what autograd saves in a forward pass of two images, which leaves the running
    statistics of the model as they are. It is an upper bound where models/recompute.py would keep less; what an
    operator needs within itself, and what the allocator wastes, is not in it.
    """
    data, parts = run.data, run.parts
    learned, whole = size_of(run.parameters), size_of(parts.task.state_dict().values())
    slots = 1 if run.config.optimizer.name in ('sgd', 'momentum') else 2  # of the optimizer, for each weight
    sets = [part for part in (data.train, data.val) if isinstance(part, MemoryBatches)]
    held = {
        'weights, gradients, optimizer and average': whole
        + (1 + slots) * learned
        + (whole if run.config.ema_decay else 0),
        'the teacher': size_of(parts.task.teacher.model.state_dict().values()) if parts.task.teacher else 0,
        'the images in memory': size_of(part.images for part in sets),
    }
    known = {t.untyped_storage().data_ptr() for t in parts.task.state_dict().values()}
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    pair, device = 2, run.accelerator.device
    buffers = {name: buffer.clone() for name, buffer in parts.task.named_buffers()}
    images = torch.zeros(pair, data.preprocessing.channels, *data.preprocessing.size, device=device)
    labels = torch.zeros(pair, dtype=torch.long, device=device)
    batch = Batch(images, labels, labels, torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]] * pair, device=device))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), run.accelerator.autocast():
        torch.func.functional_call(parts.task, buffers, (batch,))
    return held, sum(saved.values()) / pair
