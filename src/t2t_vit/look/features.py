"""Measures of feature maps (local structure, dead channels), PCA colours of tokens, windows of soft splits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..models.t2t_vit import Split, TokensToToken
from .attention import Lattice
from .trace import Trace

DEAD = 0.01  # of the standard deviation of the layer's median channel
FLAT = 1e-6  # of a channel's largest value: the standard deviation that rounding causes
RICH = 0.3  # correlation with the image's edges; that of noise on a 7×7 grid has a standard deviation of 0.09
SIDE = 56  # points along the shorter side: T2T-ViT's first grid for 224×224 pixels


def dead_channels(maps: torch.Tensor, threshold: float = DEAD) -> torch.Tensor:
    """Find dead channels, those that are zero or constant over every image: (B, C, h, w) -> (C,), bool.

    A channel is dead if, in each image, it is constant up to rounding, or its standard deviation over positions is at
    most `threshold` times that of the median channel, of those that are not constant. The median is used because one
    channel with huge values, as large transformers have, would make all others seem dead.
    """
    values = maps.float().flatten(2)
    std = values.std(-1, correction=0)  # (B, C)
    flat = _flat(values, std)
    median = std.masked_fill(flat, torch.nan).nanmedian(1, keepdim=True).values  # NaN if all are flat
    return (flat | (std <= threshold * median)).all(0)


def _flat(values: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Find channels that are constant up to rounding: (B, C, N) and their std, (B, C) -> (B, C), bool."""
    return std <= FLAT * values.abs().amax(-1)


def edge_strength(maps: torch.Tensor) -> torch.Tensor:
    """Compute the length of the Sobel gradient: (B, C, h, w) -> (B, C, h - 2, w - 2)."""
    rows = (maps[..., :-2, :] + 2 * maps[..., 1:-1, :] + maps[..., 2:, :]) / 8
    cols = (maps[..., :-2] + 2 * maps[..., 1:-1] + maps[..., 2:]) / 8
    return torch.hypot(rows[..., 2:] - rows[..., :-2], cols[..., 2:, :] - cols[..., :-2, :])


def edge_agreement(maps: torch.Tensor, images: torch.Tensor, lattice: Lattice | None = None) -> torch.Tensor:
    """Correlate the edges of each channel with those of the image: (B, C, h, w) and (B, 3, H, W) -> (B, C), -1 to 1.

    An edge is the length of the Sobel gradient, of a channel and of the mean over the image's colours. Both are
    resampled to one grid first, SIDE points along the image's shorter side (or its pixels, if it has fewer), so that
    layers of all resolutions are compared with the same edges. `lattice` has the positions of the cells (by default
    they tile the image), and only points that cells cover are compared, so that a map shifted by padding does not
    score lower. Noise and constant channels have a correlation near 0.
    """
    height, width = images.shape[-2:]
    scale = min(SIDE / min(height, width), 1.0)
    size = (max(round(height * scale), 3), max(round(width * scale), 3))
    common = Lattice.over(size, (height, width))
    grid = (maps.shape[-2], maps.shape[-1])
    ours = _resampling(lattice or Lattice.over(grid, (height, width)), grid, common, size, maps.device)
    theirs = _resampling(Lattice(0.5, 0.5, 1.0, 1.0), (height, width), common, size, images.device)
    covered = ours.covered[1:-1, 1:-1].flatten()
    image = _centred_edges(theirs.apply(images.mean(1, keepdim=True)), covered)
    found = []
    for part in maps.split(128, dim=1):  # bounds memory for wide layers
        edges = _centred_edges(ours.apply(part), covered)
        norm = (edges.square().sum(-1) * image.square().sum(-1)).sqrt()
        found.append(torch.where(norm > 0, (edges * image).sum(-1) / norm.clamp(min=1e-30), 0.0))
    return torch.cat(found, 1)


def _centred_edges(maps: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    edges = edge_strength(maps).flatten(2)[..., covered]
    return edges - edges.mean(-1, keepdim=True)


class _Resampling(NamedTuple):
    """Linear interpolation from the cells of a map to another lattice, with antialiasing."""

    rows: torch.Tensor  # (H', h), each row sums to 1
    cols: torch.Tensor  # (W', w)
    covered: torch.Tensor  # (H', W'), bool: points within half a step of a cell's centre

    def apply(self, maps: torch.Tensor) -> torch.Tensor:
        """Resample maps: (B, C, h, w) -> (B, C, H', W')."""
        return self.rows @ maps.float() @ self.cols.mT


def _resampling(
    lattice: Lattice, grid: tuple[int, int], common: Lattice, size: tuple[int, int], device: torch.device
) -> _Resampling:
    def axis(start: float, step: float, cells: int, first: float, spacing: float, points: int) -> list[torch.Tensor]:
        at = (first + spacing * torch.arange(points, device=device) - start) / step  # in cells
        clamped = at.clamp(0, cells - 1)  # the outermost cell is extrapolated
        distance = clamped[:, None] - torch.arange(cells, device=device)
        weights = (1 - distance.abs() / max(spacing / step, 1.0)).clamp(min=0)
        return [weights / weights.sum(1, keepdim=True), (at - clamped).abs() <= 0.5]

    rows, covered_rows = axis(lattice.y, lattice.down, grid[0], common.y, common.down, size[0])
    cols, covered_cols = axis(lattice.x, lattice.right, grid[1], common.x, common.right, size[1])
    return _Resampling(rows, cols, covered_rows[:, None] & covered_cols)


def high_frequency(maps: torch.Tensor) -> torch.Tensor:
    """Compute the fraction of a channel's variance at high frequencies: (B, C, h, w) -> (B, C), NaN if constant.

    High frequencies have a period below four cells of the layer's grid in either direction. The mean is subtracted and
    a Hann window applied, because the map is not periodic.
    """
    height, width = maps.shape[-2:]
    window = torch.outer(*(torch.hann_window(n + 2, periodic=False, device=maps.device)[1:-1] for n in (height, width)))
    maps = maps.float()
    centred = (maps - (maps * window).sum((-2, -1), keepdim=True) / window.sum()) * window
    power = torch.fft.fft2(centred).abs().square()
    rows, cols = (torch.fft.fftfreq(n, device=maps.device).abs() for n in (height, width))
    fine = (rows[:, None] > 0.25) | (cols > 0.25)
    total = power.sum((-2, -1))
    values = maps.flatten(2)
    return torch.where(_flat(values, values.std(-1, correction=0)), torch.nan, power[..., fine].sum(-1) / total)


class LayerMeasure(NamedTuple):
    """Measures of one stage, per channel; `edges` and `fine` are means over images."""

    name: str
    grid: tuple[int, int]
    edges: torch.Tensor  # (C,), see `edge_agreement`
    fine: torch.Tensor  # (C,), see `high_frequency`
    dead: torch.Tensor  # (C,), bool, see `dead_channels`

    @property
    def rich(self) -> torch.Tensor:
        """Return which channels are rich in structure, (C,): not dead, with an edge agreement of at least RICH."""
        return (self.edges >= RICH) & ~self.dead


def measure(trace: Trace, images: torch.Tensor, dead: float = DEAD) -> list[LayerMeasure]:
    """Measure local structure and dead channels of every stage; `images` are the model's input, (B, C, H, W)."""
    return [
        LayerMeasure(
            name,
            (maps.shape[-2], maps.shape[-1]),
            edge_agreement(maps, images, trace.lattices.get(name)).mean(0),
            high_frequency(maps).nanmean(0),
            dead_channels(maps, dead),
        )
        for name, maps in trace.maps.items()
    ]


def principal_colours(maps: torch.Tensor) -> torch.Tensor:
    """Map tokens to colours by their first three principal components: (B, C, h, w) -> (B, h, w, 3), 0 to 1, on CPU.

    The components are those of all images together, so that a colour means the same in each. A component is stretched
    between its 2nd and 98th percentile; its sign makes its largest weight positive.
    """
    batch, channels, height, width = maps.shape
    tokens = maps.float().cpu().permute(0, 2, 3, 1).reshape(-1, channels)
    tokens = tokens - tokens.mean(0)
    few = len(tokens) < channels  # then the Gram matrix is smaller and has the same components
    vectors = torch.linalg.eigh((tokens @ tokens.mT if few else tokens.mT @ tokens).double()).eigenvectors
    vectors = vectors.flip(-1)[:, :3].to(tokens)
    vectors = F.normalize(tokens.mT @ vectors, dim=0) if few else vectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    parts = tokens @ (vectors * largest.sign())
    low, high = torch.quantile(parts, torch.tensor([0.02, 0.98]), dim=0)
    shown = ((parts - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    shown = F.pad(shown, (0, 3 - shown.shape[1]))  # of fewer than three channels
    return shown.reshape(batch, height, width, 3)


class Windows(NamedTuple):
    """Pixels of the image that each token of one split is made from; window (row, col) begins at start + row · step."""

    name: str
    grid: tuple[int, int]  # (h, w)
    start: int  # first pixel of the first window, in both directions; negative in the padding
    step: int  # pixels between neighbouring windows
    size: int  # pixels a side

    def box(self, row: int, col: int) -> tuple[int, int, int, int]:
        """Return top, left, bottom, right of a window, the last two exclusive; it may extend outside the image.

        Raises:
            IndexError: if the window is outside the grid.
        """
        if not (0 <= row < self.grid[0] and 0 <= col < self.grid[1]):
            raise IndexError(f'no window ({row}, {col}): {self.name} has {self.grid[0]}×{self.grid[1]}')
        top, left = self.start + row * self.step, self.start + col * self.step
        return top, left, top + self.size, left + self.size


def windows(splits: Sequence[Sequence[int]], size: tuple[int, int]) -> list[Windows]:
    """Compute the windows of each soft split in an H×W image (Sec. 3.1), in pixels of the image.

    A token of a later split joins k×k tokens of the split before. The token layers in between also mix information
    from the whole image, which windows do not show.
    """
    found: list[Windows] = []
    grid, start, step, extent = size, 0, 1, 1
    for i, split in enumerate(Split(*split) for split in splits):
        grid = split.grid(*grid)
        start -= split.padding * step
        extent += (split.kernel - 1) * step
        step *= split.stride
        found.append(
            Windows(
                f'soft split {i + 1}' if split.kernel > split.stride else f'hard split {i + 1}',
                grid,
                start,
                step,
                extent,
            )
        )
    return found


def splits_of(model: nn.Module) -> list[Split]:
    """Return the soft splits of a model, or the one split of its patch embedding; an empty list if it has neither."""
    tokens = getattr(model, 'tokens_to_token', None)
    if isinstance(tokens, TokensToToken):
        return list(tokens.splits)
    conv = getattr(getattr(model, 'patch_embed', None), 'proj', None)
    if isinstance(conv, nn.Conv2d) and isinstance(conv.padding, tuple):
        return [Split(conv.kernel_size[0], conv.stride[0], conv.padding[0])]
    return []


def token_grids(trace: Trace) -> dict[str, torch.Tensor]:
    """Select the maps of a trace after which the grid changes, and the last: 56², 28², 14² tokens."""
    names = list(trace.maps)
    sizes = [tuple(trace.maps[name].shape[-2:]) for name in names]
    firsts = [i for i in range(len(names)) if i == 0 or sizes[i] != sizes[i - 1]]
    return {names[i]: trace.maps[names[i]] for i in dict.fromkeys([*firsts, len(names) - 1])}
