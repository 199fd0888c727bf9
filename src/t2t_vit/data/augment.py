"""Augment whole batches on their device, by the policies and definitions that timm has for single images.

Images are floats (B, C, H, W) with whole values from 0 to 255. Random numbers in [0, 1) come from the caller, a row for
each image, and each operation is applied to the images of a batch that drew it, without a loop over images.

Two things differ from timm: rotation, shear and translation are always bilinear, and a set held in memory is cropped
from the images at the model's size.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform


@dataclass
class Augment:
    """Augmentation of training images.

    Args:
        scale: Smallest and largest fraction of the image's area that the random crop keeps; 1 and 1 for no crop.
        ratio: Smallest and largest aspect ratio of the crop.
        pad: Black pixels added around the image at the model's size before a window of that size is cut.
        hflip: Probability of a horizontal flip; 0 for digits and letters.
        rotate: Largest random rotation in degrees, either way (only for small sets held in memory).
        color_jitter: Strength of brightness, contrast and saturation jitter (not with aa).
        aa: timm's auto-augment policy, as rand-m9-mstd0.5-inc1.
        interpolation: bilinear, bicubic or random; always bilinear for sets held in memory.
        reprob: Probability that random rectangles are erased.
        recount: Largest number of rectangles; above 1 only from disk.
        remode: pixel (noise), rand (one colour) or const (black).
        mixup: Alpha of mixup, 0 for none.
        cutmix: Alpha of cutmix, 0 for none.
        mixup_switch_prob: Probability of cutmix if mixup is on too.
        smoothing: Label smoothing.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    pad: int = 0
    hflip: float = 0.5
    rotate: float = 0.0
    color_jitter: float = 0.0
    aa: str | None = 'rand-m9-mstd0.5-inc1'
    interpolation: str = 'random'
    reprob: float = 0.25
    recount: int = 1
    remode: str = 'pixel'
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_switch_prob: float = 0.5
    smoothing: float = 0.1


# Operations take images, an argument for each (B, 1, 1, 1), and the colour of pixels from outside the image (C, 1, 1).

Operation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def grey(images: torch.Tensor) -> torch.Tensor:
    """Return the luminance, (B, 1, H, W), in Pillow's integer arithmetic."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().split(1, dim=1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).float()


def blend(start: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Interpolate from `start` (factor 0) to the images (1), and extrapolate beyond."""
    return (start + factor * (images - start)).clamp(0, 255).floor()


def auto_contrast(images: torch.Tensor, _: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
    """Stretch each channel from its darkest and brightest value to 0 and 255."""
    low, high = (value[..., None] for value in images.flatten(2).aminmax(dim=2, keepdim=True))
    return torch.where(high > low, ((images - low) * 255 / (high - low).clamp(min=1)).floor(), images)


def equalize(images: torch.Tensor, _: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
    """Equalise the histogram of each channel."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, device=images.device)
    counts.scatter_add_(2, flat, torch.ones(1, device=images.device).expand(flat.shape))
    shades = torch.arange(256, device=images.device)
    brightest = flat.amax(2, keepdim=True)
    step = ((flat.shape[2] - counts.gather(2, brightest)) / 255).floor()
    below = counts.cumsum(2) - counts
    table = (((step / 2).floor() + below) / step.clamp(min=1)).floor().clamp(max=255)
    return torch.where(step > 0, table, shades).gather(2, flat).view_as(images)


def invert(images: torch.Tensor, _: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
    """Invert the images."""
    return 255 - images


def posterize(images: torch.Tensor, bits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Keep only the highest bits of each value."""
    width = 2 ** (8 - bits.clamp(max=8))
    return (images / width).floor() * width


def solarize(images: torch.Tensor, threshold: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Invert the pixels that are at least as bright as the threshold."""
    return torch.where(images < threshold, images, 255 - images)


def solarize_add(images: torch.Tensor, add: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Brighten the pixels below 128."""
    return torch.where(images < 128, (images + add).clamp(max=255), images)


def color(images: torch.Tensor, factor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Change the saturation: 0 is grey, 1 the image."""
    return blend(grey(images), images, factor)


def contrast(images: torch.Tensor, factor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Change the contrast: 0 is the mean luminance, 1 the image."""
    return blend((grey(images).double().mean((1, 2, 3), keepdim=True) + 0.5).floor().float(), images, factor)


def brightness(images: torch.Tensor, factor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Change the brightness: 0 is black, 1 the image."""
    return blend(torch.zeros_like(images), images, factor)


def sharpness(images: torch.Tensor, factor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Change the sharpness: 0 is the image after Pillow's 3×3 smoothing, which skips the border; 1 the image."""
    if min(images.shape[2:]) < 3:
        return images
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * images[:, :, 1:-1, 1:-1]
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = (sums / 13 + 0.5).floor()
    return blend(smooth, images, factor)


def warp(images: torch.Tensor, theta: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Resample by theta (B, 2, 3), from output to input positions, both in [-1, 1]; outside pixels are `fill`."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    found = F.grid_sample(images, grid, mode='bilinear', padding_mode='border', align_corners=False).round()
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    return torch.where(inside, found, fill)


def plane(rows: Sequence[Sequence['float | torch.Tensor']], like: torch.Tensor) -> torch.Tensor:
    """Build an affine matrix (B, 2, 3) from six numbers for each image."""
    flat = like.flatten()
    return torch.stack([torch.stack([value + torch.zeros_like(flat) for value in row], 1) for row in rows], 1)


def shear_x(images: torch.Tensor, factor: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Shear horizontally: each row moves left in proportion to its distance from the top."""
    slope = factor.flatten() * images.shape[2] / images.shape[3]
    return warp(images, plane([[1, slope, slope], [0, 1, 0]], factor), fill)


def shear_y(images: torch.Tensor, factor: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Shear vertically: each column moves up in proportion to its distance from the left."""
    slope = factor.flatten() * images.shape[3] / images.shape[2]
    return warp(images, plane([[1, 0, 0], [slope, 1, slope]], factor), fill)


def translate_x(images: torch.Tensor, fraction: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Move left by a fraction of the width."""
    return warp(images, plane([[1, 0, 2 * fraction.flatten()], [0, 1, 0]], fraction), fill)


def translate_y(images: torch.Tensor, fraction: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Move up by a fraction of the height."""
    return warp(images, plane([[1, 0, 0], [0, 1, 2 * fraction.flatten()]], fraction), fill)


def rotate(images: torch.Tensor, degrees: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Rotate counterclockwise about the centre."""
    angle, aspect = degrees.flatten().deg2rad(), images.shape[2] / images.shape[3]
    theta = plane([[angle.cos(), -aspect * angle.sin(), 0], [angle.sin() / aspect, angle.cos(), 0]], degrees)
    return warp(images, theta, fill)


# Levels turn timm's magnitude of each image (B,), from 0 to 10 and more, and a random sign into an argument.

Level = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def signed(most: float) -> Level:
    """Scale to `most` at magnitude 10, with a random sign."""
    return lambda magnitude, sign: sign * magnitude / 10 * most


def whole(most: int, limit: int) -> Level:
    """Scale to `most` at magnitude 10, in whole steps up to `limit`."""
    return lambda magnitude, _: (magnitude / 10 * most).floor().clamp(max=limit)


def falling(most: int, limit: int) -> Level:
    """Fall from `most` at magnitude 0 to 0 at magnitude 10."""
    return lambda magnitude, sign: most - whole(most, limit)(magnitude, sign)


def enhance(magnitude: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Scale from 0.1 to 1.9."""
    return magnitude / 10 * 1.8 + 0.1


def enhance_away(magnitude: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Scale from 1 (no change) to 0.1 or 1.9."""
    return (1 + sign * magnitude / 10 * 0.9).clamp(min=0.1)


OPERATIONS: dict[str, tuple[Operation, Level]] = {  # by timm's names; those that end in Increasing are its `inc1`
    'AutoContrast': (auto_contrast, signed(0)),
    'Equalize': (equalize, signed(0)),
    'Invert': (invert, signed(0)),
    'Rotate': (rotate, signed(30)),
    'Posterize': (posterize, whole(4, 8)),
    'PosterizeIncreasing': (posterize, falling(4, 8)),
    'PosterizeOriginal': (posterize, lambda magnitude, sign: 4 + whole(4, 8)(magnitude, sign)),
    'Solarize': (solarize, whole(256, 256)),
    'SolarizeIncreasing': (solarize, falling(256, 256)),
    'SolarizeAdd': (solarize_add, whole(110, 128)),
    'Color': (color, enhance),
    'ColorIncreasing': (color, enhance_away),
    'Contrast': (contrast, enhance),
    'ContrastIncreasing': (contrast, enhance_away),
    'Brightness': (brightness, enhance),
    'BrightnessIncreasing': (brightness, enhance_away),
    'Sharpness': (sharpness, enhance),
    'SharpnessIncreasing': (sharpness, enhance_away),
    'ShearX': (shear_x, signed(0.3)),
    'ShearY': (shear_y, signed(0.3)),
    'TranslateXRel': (translate_x, signed(0.45)),
    'TranslateYRel': (translate_y, signed(0.45)),
}


def apply_drawn(
    images: torch.Tensor,
    drawn: torch.Tensor,
    arguments: torch.Tensor,
    operations: Sequence[Operation],
    fill: torch.Tensor,
) -> torch.Tensor:
    """Apply to each image, in place, the operation whose index it drew, (B,), with its argument, (B,); -1 for none.

    `drawn` is on the CPU, so that looking up the indices does not synchronise with an accelerator.
    """
    for k in drawn[drawn >= 0].unique().tolist():
        chosen = (drawn == k).nonzero()[:, 0]
        argument = arguments[chosen].view(-1, 1, 1, 1).to(images.device, images.dtype)
        chosen = chosen.to(images.device)
        images[chosen] = operations[k](images[chosen], argument, fill)
    return images


class RandAugment:
    """timm's RandAugment for batches, configured by timm's policy string."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        parsed = rand_augment_transform(policy, {'translate_pct': 0.45})  # or old versions change their defaults
        names = [op.name for op in parsed.ops]
        self.missing = [name for name in names if name not in OPERATIONS]
        self.operations, self.levels = zip(*(OPERATIONS[name] for name in names if name in OPERATIONS))
        first = parsed.ops[0]
        self.prob, self.magnitude, self.spread = first.prob, first.magnitude, first.magnitude_std
        self.most = first.magnitude_max or 10
        self.layers, self.weights = parsed.num_layers, parsed.choice_weights
        self.columns = 4 * self.layers

    def __reduce__(self) -> tuple[type['RandAugment'], tuple[str]]:
        """Travel by the policy to a process that is not forked: levels cannot be pickled."""
        return RandAugment, (self.policy,)

    def __call__(self, images: torch.Tensor, uniforms: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
        """Augment images by random numbers, (B, columns), on the CPU."""
        weights = torch.ones(len(self.operations)) if self.weights is None else torch.tensor(self.weights)
        weights = weights.double().repeat(len(images), 1)
        for u in uniforms.double().split(4, dim=1):
            below = weights.cumsum(1) <= u[:, :1] * weights.sum(1, keepdim=True)
            drawn = below.sum(1).clamp(max=len(self.operations) - 1)
            if self.weights is not None:  # then timm draws without replacement
                weights.scatter_(1, drawn[:, None], 0)
            arguments = self.arguments(drawn, u[:, 2], 1 - 2 * (u[:, 3] < 0.5).double())
            apply_drawn(images, drawn.where(u[:, 1] < self.prob, -1), arguments, self.operations, fill)
        return images

    def arguments(self, drawn: torch.Tensor, u: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
        """Return the argument of each drawn operation, (B,)."""
        if self.spread == math.inf:
            magnitude = self.magnitude * u
        else:
            magnitude = (
                self.magnitude + self.spread * torch.special.ndtri(u)
                if self.spread
                else torch.full_like(u, self.magnitude)
            )
        magnitude = magnitude.clamp(0, self.most)
        table = torch.stack([level(magnitude, sign) for level in self.levels], 1)
        return table.gather(1, drawn[:, None])[:, 0]


JITTERS = (brightness, contrast, color)
ORDERS = torch.tensor(list(itertools.permutations(range(3))))


def jitter(images: torch.Tensor, strength: float, uniforms: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Apply torchvision's ColorJitter without hue, by random numbers (B, 4) on the CPU."""
    order = ORDERS[(uniforms[:, 0] * len(ORDERS)).long()]
    low = max(0.0, 1 - strength)
    factors = low + (1 + strength - low) * uniforms[:, 1:]
    for drawn in order.unbind(1):
        apply_drawn(images, drawn, factors.gather(1, drawn[:, None])[:, 0], JITTERS, fill)
    return images


# Crop, mirror, rotation, padding, erasing.


def _box(area: torch.Tensor, log_ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return height and width, as fractions of the image, of a box with this fraction of its area."""
    return (area * (-log_ratio).exp()).sqrt().clamp(max=1), (area * log_ratio.exp()).sqrt().clamp(max=1)


def crop_boxes(augment: Augment, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw boxes, (B, 5): top, left, height and width of each crop as fractions of the image, then 1 if mirrored.

    The first six random numbers of each image, (B, ≥ 6), are used.
    """
    u = uniforms.unbind(1)
    low, high = augment.scale
    log_low, log_high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    height, width = _box(low + (high - low) * u[0], log_low + (log_high - log_low) * u[1])
    if low == 1:
        height = width = torch.ones_like(u[0])
    return torch.stack([u[5] * (1 - height), u[4] * (1 - width), height, width, (u[3] < augment.hflip).float()], 1)


def mirror(images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Mirror the images, (B, C, H, W), whose number in (B,) is 1."""
    return torch.where(mirrored.bool()[:, None, None, None], images.flip(-1), images)


def resample(images: torch.Tensor, augment: Augment, boxes: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Crop, mirror and rotate each image in one resampling, (B, C, H, W)."""
    top, left, height, width, mirrored = boxes.unbind(1)
    if augment.scale[0] == 1 and augment.rotate == 0:  # nothing to interpolate
        return mirror(images, mirrored)
    angle = (2 * uniforms[:, 2] - 1) * math.radians(augment.rotate)
    side, aspect = 1 - 2 * mirrored, images.shape[-2] / images.shape[-1]
    theta = torch.stack(
        [
            torch.stack([width * side * angle.cos(), -height * aspect * angle.sin(), 2 * left + width - 1], 1),
            torch.stack([width * side * angle.sin() / aspect, height * angle.cos(), 2 * top + height - 1], 1),
        ],
        1,
    )  # output position -> input position, both in [-1, 1]: (B, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode='bilinear', padding_mode='border', align_corners=False)


def shift_box(boxes: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Move boxes, (B, 5), down and right by (rows, cols) pixels of the result, (B,).

    They may extend beyond the image, where it is black.
    """
    top, left, height, width, mirrored = boxes.unbind(1)
    across = cols * (1 - 2 * mirrored)
    return torch.stack([top + height * rows / size[0], left + width * across / size[1], height, width, mirrored], 1)


def pad_and_crop(
    images: torch.Tensor, pad: int, boxes: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a random window of each image with `pad` black pixels around it; return the windows and their boxes."""
    size = images.shape[-2:]
    rows, cols = (uniforms * (2 * pad + 1)).long().unbind(1)
    windows = F.pad(images, (pad,) * 4).unfold(2, size[0], 1).unfold(3, size[1], 1)  # a view: (B, C, y, x, H, W)
    seen = windows[torch.arange(len(images), device=images.device), :, rows, cols]
    return seen, shift_box(boxes, rows - pad, cols - pad, size)


@lru_cache(maxsize=4)
def noise_bank(length: int, device: torch.device) -> torch.Tensor:
    """Return one long row of noise, of which each sample uses a window."""
    return torch.randn(4096 + length, generator=torch.Generator().manual_seed(0)).to(device)


def erase(images: torch.Tensor, augment: Augment, uniforms: torch.Tensor) -> torch.Tensor:
    """Fill a random rectangle, 2 to 33 % of the area, of some normalised images, (B, C, H, W), in place.

    The last six random numbers of each image, (B, ≥ 6), on the CPU, are used.
    """
    chosen = (uniforms[:, -6] < augment.reprob).nonzero()[:, 0]
    if not len(chosen):
        return images
    _, *u = uniforms[chosen, -6:].to(images.device).unbind(1)
    chosen, (rows, cols) = chosen.to(images.device), images.shape[-2:]
    height, width = _box(0.02 + 0.31 * u[0], math.log(10 / 3) * (2 * u[1] - 1))
    y, x = torch.arange(rows, device=images.device) / rows, torch.arange(cols, device=images.device) / cols
    top, left = (u[2] * (1 - height))[:, None], (u[3] * (1 - width))[:, None]
    in_rows, in_cols = (y >= top) & (y < top + height[:, None]), (x >= left) & (x < left + width[:, None])
    if augment.remode == 'const':
        noise = torch.zeros(1, device=images.device)
    else:
        shape = (images.shape[1], 1, 1) if augment.remode == 'rand' else images.shape[1:]
        windows = noise_bank(images[0].numel(), images.device).unfold(0, math.prod(shape), 1)  # a view
        noise = windows[(u[4] * 4096).long()].view(-1, *shape)
    images[chosen] = torch.where((in_rows[:, :, None] & in_cols[:, None])[:, None], noise, images[chosen])
    return images


def in_batches(augment: Augment) -> bool:
    """Return true if `BatchAugment` has all operations of an augmentation."""
    policy = augment.aa
    return augment.recount == 1 and (not policy or (policy.startswith('rand') and not RandAugment(policy).missing))


def as_floats(images: torch.Tensor) -> torch.Tensor:
    """Convert to float32, plane by plane in memory."""
    return images.to(torch.float32, memory_format=torch.contiguous_format)


class BatchAugment:
    """The whole augmentation of a batch of training images, in timm's order.

    That is: crop, mirror and rotation, padding, RandAugment or else colour jitter, normalisation, erasing.

    Args:
        augment: The augmentation.
        mean: Of the values from 0 to 255, (1, C, 1, 1).
        std: Of the values from 0 to 255, (1, C, 1, 1).
    """

    def __init__(self, augment: Augment, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.augment, self.mean, self.std = augment, mean, std
        self.fill = mean[0].round()
        self.policy = RandAugment(augment.aa) if augment.aa else None
        self.widths = [12, 2, self.policy.columns if self.policy else 4]  # crop and erasing, padding, colours

    def draw(self, count: int, generators: list[torch.Generator]) -> torch.Tensor:
        """Draw random numbers, (count, columns): by one generator for crop and erasing, by the other for the rest."""
        first, *rest = self.widths
        return torch.cat(
            [torch.rand(count, first, generator=generators[0]), torch.rand(count, sum(rest), generator=generators[1])],
            1,
        )

    def __call__(
        self, images: torch.Tensor, uniforms: torch.Tensor, boxes: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment and normalise images, (B, C, H, W); return them and the boxes, (B, 5), that they show.

        Args:
            images: Values from 0 to 255.
            uniforms: Random numbers, (B, columns), on the CPU; see `draw`.
            boxes: Where images that are crops already were cut, (B, 5); without them the images are cropped.
        """
        crops, shifts, colors = uniforms.split(self.widths, dim=1)
        on_device = crops.to(images.device)
        drawn = crop_boxes(self.augment, on_device)
        if boxes is None:
            images, boxes = resample(as_floats(images), self.augment, drawn, on_device), drawn
        else:
            images = mirror(as_floats(images), drawn[:, 4])
            boxes = torch.cat([boxes[:, :4], drawn[:, 4:]], 1)
        if self.augment.pad:
            images, boxes = pad_and_crop(images, self.augment.pad, boxes, shifts.to(images.device))
        if self.policy:
            images = self.policy(images.round_(), colors, self.fill)
        elif self.augment.color_jitter:
            images = jitter(images.round_(), self.augment.color_jitter, colors, self.fill)
        return erase((images - self.mean) / self.std, self.augment, crops), boxes
