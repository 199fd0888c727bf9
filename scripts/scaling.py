"""How long the 310 epochs of the ImageNet recipe take on 1 to 512 GPUs: a model of compute and communication.

    python scripts/scaling.py                          # from an assumed share of the chip's peak
    python scripts/scaling.py --speed t2t_vit_14=2900  # from images/s of a training step measured on one GPU

Prints the tables of docs/scaling.md. What goes in, and where it ends to hold, is said there.
"""

import argparse
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'src'))

from t2t_vit.benchmark import count_macs  # noqa: E402
from t2t_vit.models.listing import build, count_parameters  # noqa: E402

IMAGES, EPOCHS, BATCH = 1_281_167, 310, 512
MODELS = ('t2t_vit_7', 't2t_vit_14', 't2t_vit_19', 't2t_vit_24', 't2t_vit_t_14', 't2t_vit_t_24')
GPUS = (1, 8, 64, 512)


class Machine(NamedTuple):
    """One GPU and its wires; the defaults are data sheet values of an H100 node, times what is usually reached."""

    peak: float = 989e12  # FLOP/s, bf16, dense
    reached: float = 0.10  # share of it in a training step at full batches: an assumption until measured
    half: float = 64  # images a GPU and step at which half the full speed is reached (launching kernels takes the
    # rest): an assumption until measured
    inside: float = 450e9 * 0.8  # bytes/s a GPU sends within a node (NVLink)
    outside: float = 50e9 * 0.8  # bytes/s a GPU sends between nodes (400 Gb/s each)
    latency: float = 10e-6  # seconds for each of a ring's messages
    node: int = 8  # GPUs
    hidden: float = 0.6  # share of the compute under which gradients travel: most of the backward pass


H100 = Machine()


class Estimate(NamedTuple):
    """Of one model on a number of GPUs."""

    local: int  # images a GPU and step
    compute: float  # seconds
    reduce: float
    exposed: float  # what of it is not hidden
    hours: float
    input: float  # images/s that each node's input side must deliver


def all_reduce(size: float, gpus: int, machine: Machine) -> float:
    """Seconds for a ring to sum `size` bytes over all GPUs: each sends 2(n-1)/n of them, in 2(n-1) messages."""
    if gpus == 1:
        return 0.0
    wire = machine.inside if gpus <= machine.node else machine.outside
    return 2 * (gpus - 1) / gpus * size / wire + 2 * (gpus - 1) * machine.latency


def estimate(speed: float, size: float, gpus: int, machine: Machine = H100) -> Estimate:
    """For a model of `speed` images/s on one GPU at full batches, and `size` bytes of gradients."""
    local = BATCH // gpus
    compute = (local + machine.half) / speed
    reduce = all_reduce(size, gpus, machine)
    exposed = max(0.0, reduce - machine.hidden * compute)
    step = compute + exposed
    hours = EPOCHS * (IMAGES // BATCH) * step / 3600
    return Estimate(local, compute, reduce, exposed, hours, min(gpus, machine.node) * local / step)


def tables(speeds: Dict[str, float], machine: Machine = H100) -> List[str]:
    """Markdown lines: the models, then times."""
    lines = ['| model | learned | all-reduce MB | GMAC forward | images/s on one GPU |', '|---|---|---|---|---|']
    rows = []
    for name in MODELS:
        with torch.device('meta'):
            model = build(name, 224)
        learned, macs = count_parameters(model)[1], count_macs(model, 224)[0]
        speed = speeds.get(name) or machine.peak * machine.reached / (6 * macs)  # 2 FLOP a MAC, backward is twice
        lines.append(f'| {name} | {learned:,} | {4 * learned / 1e6:.0f} | {macs / 1e9:.2f} | {speed:,.0f}'
                     f'{"" if name in speeds else " (assumed)"} |')
        rows += [(name, gpus, estimate(speed, 4 * learned, gpus, machine)) for gpus in GPUS]
    lines += ['', '| model | GPUs | images each | compute ms | all-reduce ms | of it exposed | hours | GPU-hours '
              '| input, images/s a node |', '|---|---|---|---|---|---|---|---|---|']
    for name, gpus, e in rows:
        lines.append(
            f'| {name} | {gpus} | {e.local} | {1e3 * e.compute:.1f} | {1e3 * e.reduce:.1f} | {1e3 * e.exposed:.1f} '
            f'| {e.hours:.1f} | {e.hours * gpus:,.0f} | {e.input:,.0f} |')
    return lines


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--speed', action='append', default=[], metavar='MODEL=IMAGES_PER_SECOND')
    given = dict(word.split('=') for word in parser.parse_args().speed)
    print('\n'.join(tables({name: float(value) for name, value in given.items()})))
