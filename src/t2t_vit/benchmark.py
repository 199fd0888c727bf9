"""Compare the speed, memory and size of models in one process, with ratios to a baseline (`t2t-vit bench`).

Every round times each model once, and the report is the median of the rounds with its quartiles (timing.py says why).
"""

import csv
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .allocator import keep_freed_memory
from .console import console
from .models.listing import build, count_parameters
from .models.variants import VARIANTS
from .plots import plot_sizes, plot_speed
from .results import check_writable
from .settings import require
from .timing import device_name, interleave, spread, synchronize
from .trained import pick_device

Mode = Literal['infer', 'train']
Precision = Literal['float32', 'bf16', 'fp16', 'bf16_weights', 'fp16_weights']
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}
WEIGHTS = {f'{name}_weights': dtype for name, dtype in DTYPES.items()}  # the whole model, without autocast


@dataclass
class Row:
    """Hold the figures of one model under one set of conditions; speeds are medians over rounds, with quartiles."""

    model: str
    mode: Mode
    compiled: bool
    images_per_second: float
    low: float
    high: float
    ratio: float  # speed over the baseline's in the same round; above 1 is faster
    ratio_low: float
    ratio_high: float
    memory_mb: float | None
    memory_ratio: float | None
    parameters: int
    gmacs: float
    gmacs_weights: float
    batch_size: int
    img_size: int
    precision: Precision
    device: str
    threads: int
    rounds: int
    torch: str
    timm: str
    command: str


class AllTokens(nn.Module):
    """Make a model compute every token of the last block, as published counts assume; `forward` skips most of them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, num_classes)."""
        if not hasattr(self.model, 'forward_features'):  # a custom model
            return self.model(x)
        return self.model.forward_head(self.model.forward_features(x))  # type: ignore[operator]


def count_macs(model: nn.Module, img_size: int, in_chans: int = 3) -> tuple[float, float]:
    """Return the multiply-adds of one image: (all, only those with weights).

    The difference is the matmuls of attention (softmax and kernel), which the paper counts and most counters omit.
    """
    whole = AllTokens(model).to('meta').eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        whole(torch.empty(1, in_chans, img_size, img_size, device='meta'))
    flops = {name: {str(op): count for op, count in counts.items()} for name, counts in counter.flop_counts.items()}

    def of(name: str, *kinds: str) -> float:
        return sum(count for op, count in flops.get(name, {}).items() if any(kind in op for kind in kinds)) / 2

    total = of('Global', '')
    attention = of('Global', 'bmm', 'attention')
    for name, module in whole.named_modules():
        if hasattr(module, 'kqv'):  # a Performer: its features are a matmul with a fixed table
            path = f'{AllTokens.__name__}.{name}'
            weights = sum(of(f'{path}.{part}', 'mm') for part in ('kqv', 'proj', 'mlp'))
            attention += of(path, 'mm') - of(path, 'bmm') - weights
    return total, total - attention


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, DTYPES[precision]) if precision in DTYPES else nullcontext()


def work(
    model: nn.Module, mode: Mode, compiled: bool, images: torch.Tensor, precision: Precision
) -> Callable[[], None]:
    """Return the function to time: a forward pass, or a training step with AdamW."""
    device = images.device
    images = images.to(WEIGHTS.get(precision, images.dtype))
    model = model.to(device, images.dtype).train(mode == 'train')
    call = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    if mode == 'infer':

        def infer() -> None:
            with torch.inference_mode(not compiled), torch.no_grad(), _autocast(device, precision):
                call(images)

        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    labels = torch.zeros(len(images), dtype=torch.long, device=device)  # a class that every model has
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')

    def train() -> None:
        with _autocast(device, precision):
            loss = nn.functional.cross_entropy(call(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return train


def peak_memory_cpu(name: str, mode: Mode, batch_size: int, img_size: int, precision: Precision) -> float | None:
    """Return the peak resident memory that one step adds, in MB, measured in a new process; None except on Linux.

    The new process returns every freed tensor to the system at once, so the figure counts memory in use, as
    "allocated" does on an accelerator.
    """
    before = os.environ.get('MALLOC_MMAP_THRESHOLD_')
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '65536'  # glibc reads it when a process starts
    try:
        with multiprocessing.get_context('spawn').Pool(1) as pool:
            return pool.apply(_peak_memory_cpu, (name, mode, batch_size, img_size, precision, torch.get_num_threads()))
    finally:
        if before is None:
            del os.environ['MALLOC_MMAP_THRESHOLD_']
        else:
            os.environ['MALLOC_MMAP_THRESHOLD_'] = before


def _peak_memory_cpu(
    name: str, mode: Mode, batch_size: int, img_size: int, precision: Precision, threads: int
) -> float | None:
    torch.set_num_threads(threads)
    status, reset = Path('/proc/self/status'), Path('/proc/self/clear_refs')
    if not reset.exists():
        return None
    model = build(name, img_size)
    images = torch.randn(batch_size, 3, img_size, img_size)
    gc.collect()

    def kilobytes(field: str) -> int:
        lines = status.read_text(encoding='utf-8').splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])

    call = work(model, mode, False, images, precision)
    call()  # the first step allocates the optimizer's state
    before = kilobytes('VmRSS')
    reset.write_text('5', encoding='utf-8')  # resets the peak
    call()
    return (kilobytes('VmHWM') - before) / 1024


def measure(
    names: Sequence[str],
    baseline: str,
    mode: Mode,
    compiled: bool,
    precision: Precision,
    batch_size: int,
    img_size: int,
    device: torch.device,
    rounds: int,
    seconds: float = 1.0,
    memory: bool = True,
) -> list[Row]:
    """Time all models in turn, `rounds` times; each turn takes about `seconds`."""
    torch.compiler.reset()  # or torch takes all models for one that changes, and gives up
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    works: dict[str, Callable[[], None]] = {}
    sizes: dict[str, tuple[int, float, float]] = {}
    peaks: dict[str, float | None] = {}
    for name in names:
        sizes[name] = count_parameters(build(name, img_size))[1], *count_macs(build(name, img_size), img_size)
        call = work(build(name, img_size), mode, compiled, images, precision)
        try:
            call()
            synchronize(device)
        except torch.OutOfMemoryError:
            console().print(f'{name}: {mode} at batch size {batch_size} does not fit on the device: skipped')
            continue
        works[name] = call
        peaks[name] = None
        if memory and device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            works[name]()
            peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
        elif memory and device.type == 'cpu' and not compiled:
            peaks[name] = peak_memory_cpu(name, mode, batch_size, img_size, precision)

    require(
        [
            (
                baseline in works,
                f'the baseline {baseline} does not fit on the device at batch size {batch_size}; choose a smaller one',
            )
        ]
    )
    speeds = interleave(works, batch_size, rounds, seconds, device)

    rows = []
    for name in works:
        ratios = [a / b for a, b in zip(speeds[name], speeds[baseline])]
        peak, base_peak = peaks[name], peaks[baseline]
        parameters, macs, macs_weights = sizes[name]
        rows.append(
            Row(
                name,
                mode,
                compiled,
                *spread(speeds[name]),
                *spread(ratios),
                peak,
                peak / base_peak if peak and base_peak else None,
                parameters,
                macs / 1e9,
                macs_weights / 1e9,
                batch_size,
                img_size,
                precision,
                device_name(device),
                torch.get_num_threads(),
                rounds,
                torch.__version__,
                timm.__version__,
                ' '.join(['t2t-vit', *sys.argv[1:]]),
            )
        )
    return rows


TOP1 = {  # ImageNet top-1 at 224² without other data: T2T-ViT, resnet50 and mobilenetv2 as its authors trained them
    't2t_vit_7': 71.7,
    't2t_vit_10': 75.2,
    't2t_vit_12': 76.5,
    't2t_vit_14': 81.5,
    't2t_vit_19': 81.9,
    't2t_vit_24': 82.3,
    't2t_vit_t_14': 81.7,
    't2t_vit_t_19': 82.4,
    't2t_vit_t_24': 82.6,
    'deit_tiny_patch16_224': 72.2,
    'deit_small_patch16_224': 79.9,  # Touvron et al. 2021, Table 5
    'resnet50': 79.1,
    'resnet101': 79.9,
    'mobilenetv2_100': 72.8,  # the paper, Table 2
}
PEERS = [  # our models, and those that users would choose instead
    't2t_vit_7',
    't2t_vit_14',
    't2t_vit_t_14',
    'vit_tiny_patch16_224',
    'deit_small_patch16_224',
    'vit_little_patch16_reg1_gap_256',
    'resnet50',
    'mobilenetv2_100',
]


def bench(
    models: Sequence[str] = (),
    baseline: str = 'vit_small_patch16_224',
    modes: Sequence[Mode] = ('infer', 'train'),
    compiled: Sequence[bool] = (False,),
    precision: Precision = 'float32',
    batch_size: int = 8,
    img_sizes: Sequence[int] = (224,),
    device: str = 'auto',
    threads: int | None = None,
    rounds: int = 10,
    seconds: float = 1.0,
    memory: bool = True,
    output: str | None = None,
) -> list[Row]:
    """Compare the speed, memory and size of models, as ratios to a baseline.

    Args:
        models: timm model names, or FILE.py:FUNCTION, a function of img_size that returns a model; by default three
            T2T-ViTs and the models that users would choose instead.
        baseline: Model that the ratios refer to; it is timed too.
        modes: infer (forward), train (forward, backward, AdamW), or both.
        compiled: Use torch.compile; [false,true] measures both.
        precision: float32; bf16 or fp16 by autocast; or bf16_weights or fp16_weights, the whole model in it.
        batch_size: Images per batch.
        img_sizes: Image sizes in pixels; several give a curve.
        device: cpu, cuda, mps or auto.
        threads: CPU threads; PyTorch chooses by default.
        rounds: Number of times that every model is timed.
        seconds: Duration of one turn.
        memory: Measure peak memory too; on a CPU in a new process for each model.
        output: Folder for bench.csv, README.md and plots; nothing is written by default.

    Raises:
        UsageError: if a number is out of range, or nothing can be written to the folder.
        ValueError: if no model has such a name.
    """
    names = [baseline, *(name for name in models or PEERS if name != baseline)]
    numbers = dict(batch_size=batch_size, rounds=rounds, threads=1 if threads is None else threads)
    require(
        [(value >= 1, f'{name} must be at least 1, got {value}') for name, value in numbers.items()]
        + [(size >= 1, f'img_sizes must be at least 1, got {size}') for size in img_sizes]
        + [(seconds > 0, f'seconds must be above 0, got {seconds}')]
    )
    if output:
        check_writable(Path(output))
    for name in names:
        build(name, img_sizes[0])  # reports an unknown model before any is timed
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    target, rows = pick_device(device), []
    screen = console()
    for img_size in img_sizes:
        for mode in modes:
            for is_compiled in compiled:
                found = measure(
                    names, baseline, mode, is_compiled, precision, batch_size, img_size, target, rounds, seconds, memory
                )
                screen.print(as_table(found))
                rows += found
                if output:
                    save(rows, Path(output))
    return rows


def as_table(rows: list[Row]) -> Table:
    """Return a table for the terminal of rows with the same conditions."""
    first = rows[0]
    table = Table(title=conditions(first))
    for name in ('model', 'images/s', 'ratio', 'quartiles', 'memory MB', 'ratio', 'M params', 'GMAC', 'weights only'):
        table.add_column(name, justify='left' if name == 'model' else 'right', no_wrap=name == 'model')
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: Row) -> list[str]:
    """Format the figures of a row."""
    return [
        row.model,
        f'{row.images_per_second:.1f}',
        f'{row.ratio:.3f}',
        f'{row.ratio_low:.3f}–{row.ratio_high:.3f}',
        '–' if row.memory_mb is None else f'{row.memory_mb:.0f}',
        '–' if row.memory_ratio is None else f'{row.memory_ratio:.2f}',
        f'{row.parameters / 1e6:.1f}',
        f'{row.gmacs:.2f}',
        f'{row.gmacs_weights:.2f}',
    ]


def conditions(row: Row) -> str:
    """Describe the conditions of a row."""
    return (
        f'{"training step" if row.mode == "train" else "inference"}, {"compiled" if row.compiled else "eager"}, '
        f'{row.precision}, batch {row.batch_size}, {row.img_size}², {row.device}, {row.threads} threads, '
        f'torch {row.torch}, {row.rounds} rounds'
    )


def save(rows: list[Row], folder: Path) -> None:
    """Write bench.csv with all figures, README.md with a table per set of conditions, and a plot.

    Several image sizes give curves of inference (sizes.png); one size gives speed against published top-1 (speed.png).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'bench.csv').open('w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [f'# Benchmark, {date.today()}', '']
    for title in dict.fromkeys(map(conditions, rows)):
        lines += [
            f'## {title}',
            '',
            '| model | images/s | ratio | quartiles | memory MB | ratio | M params | GMAC | weights only |',
            '|---|---|---|---|---|---|---|---|---|',
        ]
        lines += ['| ' + ' | '.join(cells(row)) + ' |' for row in rows if conditions(row) == title] + ['']
    (folder / 'README.md').write_text('\n'.join(lines), encoding='utf-8')
    first = next((row for row in rows if row.mode == 'infer'), None)
    if first is None:
        return
    alike = [row for row in rows if row.mode == first.mode and row.compiled == first.compiled]
    curves = {
        row.model: [(r.img_size, 1000 / r.images_per_second, r.memory_mb) for r in alike if r.model == row.model]
        for row in alike
    }
    if len(curves[first.model]) > 1:
        (folder / 'speed.png').unlink(missing_ok=True)  # drawn when only the first size was done
        plot_sizes(curves, conditions(first).replace(f', {first.img_size}²', ''), folder / 'sizes.png')
    elif known := {row.model: (row.images_per_second, TOP1[row.model]) for row in alike if row.model in TOP1}:
        plot_speed(known, list(VARIANTS), conditions(first), folder / 'speed.png')
