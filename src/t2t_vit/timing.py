"""Time several functions in interleaved rounds, and name the device that ran them.

Absolute times drift on a shared machine. The ratio of two functions timed in the same round drifts far less, so every
round times each function once.
"""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleave(
    works: dict[str, Callable[[], None]],
    batch_size: int,
    rounds: int,
    seconds: float,
    device: torch.device = torch.device('cpu'),
) -> dict[str, list[float]]:
    """Return images per second of each function in every round.

    Args:
        works: Functions that process one batch each; run them once before, so that caches are filled.
        batch_size: Images per call.
        rounds: Number of rounds; each function has one turn per round.
        seconds: Approximate duration of a turn.
        device: Device to wait for at the end of a turn.
    """
    speeds: dict[str, list[float]] = {name: [] for name in works}
    repeats = {name: max(1, round(seconds / duration(call, 1, device))) for name, call in works.items()}
    for _ in range(rounds):
        for name, call in works.items():
            speeds[name].append(repeats[name] * batch_size / duration(call, repeats[name], device))
    return speeds


def duration(call: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Return the seconds that `repeats` calls take, work queued on an accelerator included."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its queue; return at once on a CPU."""
    if device.type != 'cpu':
        torch.accelerator.synchronize()


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the lower and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
    return middle, low, high


def device_name(device: torch.device) -> str:
    """Return the name of the processor or graphics card."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    lines = info.read_text(encoding='utf-8').splitlines() if info.exists() else []
    name = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), platform.processor())
    return name if device.type == 'cpu' else device.type
