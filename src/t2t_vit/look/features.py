"""What feature maps hold: local structure, dead channels, colours of tokens; and what a token is made of."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..models.soft_split import Split
from ..models.tokens import TokensToToken
from .attention import Lattice
from .trace import Trace

DEAD = 0.01  # of the spread of the layer's median channel
FLAT = 1e-6  # of a channel's largest value: a spread that rounding leaves
RICH = 0.3  # correlation with the image's edges; that of noise on a 7×7 grid has a deviation of 0.09
SIDE = 56  # places, T2T-ViT's first grid of a 224² image


def dead_channels(maps: torch.Tensor, threshold: float = DEAD) -> torch.Tensor:
    """Which channels are dead, that is zero or constant over every image: (B, C, h, w) -> (C,), bool.

    A channel is dead if, in each of the images, it is constant up to rounding, or its standard deviation over places is
    at most `threshold` times that of the layer's median channel, of those that are not constant. A median, since one
    channel with huge values, as large transformers have, is no reason to call the others dead.
    """
    values = maps.float().flatten(2)
    spread = values.std(-1, correction=0)  # (B, C)
    flat = _flat(values, spread)
    usual = spread.masked_fill(flat, torch.nan).nanmedian(1, keepdim=True).values  # NaN where all are flat
    return (flat | (spread <= threshold * usual)).all(0)


def _flat(values: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Which channels are constant up to rounding: (B, C, N) and their deviations, (B, C) -> (B, C)."""
    return spread <= FLAT * values.abs().amax(-1)


def edge_strength(maps: torch.Tensor) -> torch.Tensor:
    """Length of the Sobel gradient, (B, C, h, w) -> (B, C, h - 2, w - 2): the outermost places have no neighbours."""
    rows = (maps[..., :-2, :] + 2 * maps[..., 1:-1, :] + maps[..., 2:, :]) / 8
    cols = (maps[..., :-2] + 2 * maps[..., 1:-1] + maps[..., 2:]) / 8
    return torch.hypot(rows[..., 2:] - rows[..., :-2], cols[..., 2:, :] - cols[..., :-2, :])


def edge_agreement(maps: torch.Tensor, images: torch.Tensor, lattice: Lattice | None = None) -> torch.Tensor:
    """How far a channel's edges are the image's: (B, C, h, w) and (B, 3, H, W) -> (B, C), from -1 to 1.

    It is the correlation, over places, of the length of the Sobel gradient in the channel with that in the image's
    mean over colours. Both are brought to one grid first, SIDE places along the image's shorter side (or the image's
    own pixels, if it has fewer): so layers of all grids are measured by the same edges, and a coarse one can have no
    more of them than it holds. Every cell is taken to be where `lattice` says (by default the cells tile the image),
    and only the places that the map's cells cover are compared: padding moves a map, and that is no fault of its edges.
    Noise has many edges and an agreement of 0; a constant channel has 0 too.
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
    for part in maps.split(128, dim=1):  # of a wide layer all at once would be large
        edges = _centred_edges(ours.apply(part), covered)
        norm = (edges.square().sum(-1) * image.square().sum(-1)).sqrt()
        found.append(torch.where(norm > 0, (edges * image).sum(-1) / norm.clamp(min=1e-30), 0.0))
    return torch.cat(found, 1)


def _centred_edges(maps: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    edges = edge_strength(maps).flatten(2)[..., covered]
    return edges - edges.mean(-1, keepdim=True)


class _Resampling(NamedTuple):
    """From a map's cells to the places of another lattice, by triangles as wide as the coarser of the two's steps."""

    rows: torch.Tensor  # (H', h), each line with the sum 1
    cols: torch.Tensor  # (W', w)
    covered: torch.Tensor  # (H', W'), bool: places within half a step of a cell's centre

    def apply(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, H', W')."""
        return self.rows @ maps.float() @ self.cols.mT


def _resampling(
    lattice: Lattice, grid: tuple[int, int], common: Lattice, size: tuple[int, int], device: torch.device
) -> _Resampling:
    def axis(start: float, step: float, cells: int, first: float, apart: float, places: int) -> list[torch.Tensor]:
        at = (first + apart * torch.arange(places, device=device) - start) / step  # in cells
        held = at.clamp(0, cells - 1)  # beyond the outermost cell its value goes on
        away = held[:, None] - torch.arange(cells, device=device)
        weights = (1 - away.abs() / max(apart / step, 1.0)).clamp(min=0)
        return [weights / weights.sum(1, keepdim=True), (at - held).abs() <= 0.5]

    rows, above = axis(lattice.y, lattice.down, grid[0], common.y, common.down, size[0])
    cols, beside = axis(lattice.x, lattice.right, grid[1], common.x, common.right, size[1])
    return _Resampling(rows, cols, above[:, None] & beside)


def high_frequency(maps: torch.Tensor) -> torch.Tensor:
    """Share of a channel's variance in its fine half of frequencies: (B, C, h, w) -> (B, C), 0 to 1, NaN if constant.

    Fine is a period below four places of the layer's own grid, in either direction. The mean is taken off, and a Hann
    window goes over the map, since its borders do not meet.
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
    """One stage in figures; the two of structure are means over images, a channel each."""

    name: str
    grid: tuple[int, int]
    edges: torch.Tensor  # (C,), see `edge_agreement`
    fine: torch.Tensor  # (C,), see `high_frequency`
    dead: torch.Tensor  # (C,), bool, see `dead_channels`

    @property
    def rich(self) -> torch.Tensor:
        """Which channels are rich in structure, (C,): alive, with an edge agreement of RICH or more."""
        return (self.edges >= RICH) & ~self.dead


def measure(trace: Trace, images: torch.Tensor, dead: float = DEAD) -> list[LayerMeasure]:
    """Local structure and dead channels of every stage; `images` as the model saw them, (B, C, H, W)."""
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
    """Tokens as colours: their first three principal components, (B, C, h, w) -> (B, h, w, 3), 0 to 1, on the CPU.

    The components are those of all images together, so that one colour means one thing; each is stretched between its
    2nd and 98th percentile, and its sign is the one that has the largest weight positive.
    """
    batch, channels, height, width = maps.shape
    tokens = maps.float().cpu().permute(0, 2, 3, 1).reshape(-1, channels)
    tokens = tokens - tokens.mean(0)
    few = len(tokens) < channels  # then their products are the smaller matrix, with the same components
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
    """The image's pixels under the tokens of one split: window (row, col) covers rows top + row·step and so on."""

    name: str
    grid: tuple[int, int]  # (h, w)
    start: int  # first pixel of the first window, in both directions; below 0 where it begins in the padding
    step: int  # pixels from a window to the next
    size: int  # pixels a side

    def box(self, row: int, col: int) -> tuple[int, int, int, int]:
        """Top, left, bottom, right of a window, the last two exclusive; it may reach out of the image.

        Raises:
            IndexError: if the grid has no such window.
        """
        if not (0 <= row < self.grid[0] and 0 <= col < self.grid[1]):
            raise IndexError(f'no window ({row}, {col}): {self.name} has {self.grid[0]}×{self.grid[1]}')
        top, left = self.start + row * self.step, self.start + col * self.step
        return top, left, top + self.size, left + self.size


def windows(splits: Sequence[Sequence[int]], size: tuple[int, int]) -> list[Windows]:
    """What each soft split sees of an H×W image, split after split (Sec. 3.1).

    A token of a later split is made of k×k tokens of the one before; its pixels are all those under them. (The token
    layers between two splits mix tokens from everywhere: this is what a window is cut from, not all that it may know.)
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
    """A model's soft splits, or the one split of its patch embedding; none where a model has neither."""
    tokens = getattr(model, 'tokens_to_token', None)
    if isinstance(tokens, TokensToToken):
        return list(tokens.splits)
    conv = getattr(getattr(model, 'patch_embed', None), 'proj', None)
    if isinstance(conv, nn.Conv2d) and isinstance(conv.padding, tuple):
        return [Split(conv.kernel_size[0], conv.stride[0], conv.padding[0])]
    return []


def token_grids(trace: Trace) -> dict[str, torch.Tensor]:
    """The maps of a trace behind which the grid is another, and the last: 56² -> 28² -> 14² tokens, and the end."""
    names = list(trace.maps)
    sizes = [tuple(trace.maps[name].shape[-2:]) for name in names]
    firsts = [i for i in range(len(names)) if i == 0 or sizes[i] != sizes[i - 1]]
    return {names[i]: trace.maps[names[i]] for i in dict.fromkeys([*firsts, len(names) - 1])}
