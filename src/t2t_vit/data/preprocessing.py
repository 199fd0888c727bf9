"""Turn a read image into the tensor that a model is given, for evaluation and for training."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms.v2.functional import resize as resize_tensor

from .augment import Augment, shift_box
from .decode import Decoded, Raw, convert_image, image_size, is_color
from .errors import DataError

build_transform = lru_cache(create_transform)
NOTE = 'background: '  # the start of a note in a pretrained_cfg: timm has no field for it, and keeps notes


@dataclass
class Preprocessing:
    """The size, bands, crop and normalisation that a model expects; saved with a model in its pretrained_cfg.

    Args:
        size: Height and width in pixels.
        channels: 1 for grey, 3 for RGB, any other number for bands as they are stored (see `decode_image`).
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        interpolation: timm's name of the filter to resize with.
        crop_pct: Fraction of the resized image that the centre crop keeps.
        crop_mode: center, squash or border, as timm has them.
        background: The colour that shows through transparent pixels, a name or #rrggbb.
    """

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = 'bicubic'
    crop_pct: float = 0.9
    crop_mode: str = 'center'
    background: str = 'white'

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise DataError(f'channels must be at least 1, got {self.channels}')
        if self.crop_mode == 'border' and not self.displayable:
            raise DataError(f'crop_mode border needs 1 or 3 channels, got {self.channels}: use center or squash')

    @property
    def displayable(self) -> bool:
        """Return true if images are grey or RGB in 8 bits, false if they are other bands, as floats."""
        return self.channels in (1, 3)

    @classmethod
    def of(cls, cfg: dict[str, Any]) -> 'Preprocessing':
        """Read the preprocessing from a model's pretrained_cfg."""
        channels, height, width = cfg['input_size']
        mean, std = tuple(cfg['mean']), tuple(cfg['std'])
        if len(mean) != channels:  # an RGB model rebuilt for another number of channels
            mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
        colors = [note.removeprefix(NOTE) for note in cfg.get('notes') or () if str(note).startswith(NOTE)]
        return cls(
            (height, width),
            channels,
            mean,
            std,
            cfg['interpolation'],
            cfg['crop_pct'],
            cfg.get('crop_mode') or 'center',
            next((color for color in colors if is_color(color)), 'white'),
        )

    def as_cfg(self) -> dict[str, Any]:
        """Return the same as entries of a pretrained_cfg; the background is a note, if it is not white."""
        return dict(
            input_size=(self.channels, *self.size),
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            crop_mode=self.crop_mode,
            **({'notes': (f'{NOTE}{self.background}',)} if self.background != 'white' else {}),
        )

    def convert(self, image: Raw) -> Decoded:
        """Convert a read image to the model's channels: mode L for 1, RGB for 3, else a float tensor of the bands."""
        return convert_image(image, self.channels, self.background)

    def pixels(self, image: Raw) -> torch.Tensor:
        """Convert a read image to a tensor of the model's channels, (C, H, W): uint8 for grey and RGB, else floats."""
        if isinstance(image, np.ndarray) and self.channels == 3 and image.dtype == np.uint8 and image.shape[2:] == (3,):
            return torch.from_numpy(np.require(image, requirements=['C', 'W'])).permute(2, 0, 1)
        shown = self.convert(image)
        return shown if isinstance(shown, torch.Tensor) else TF.pil_to_tensor(shown)

    def evaluate(self, image: Raw | torch.Tensor) -> torch.Tensor:
        """Resize and crop an image as `transform` does, without normalising: (C, H, W), uint8 for grey and RGB."""
        return self.transform(normalize=False)(image if isinstance(image, torch.Tensor) else self.convert(image))

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images (B, C, H, W) from `evaluate`, as `transform` does."""
        images = images.float().div_(255) if images.dtype == torch.uint8 else images.clone()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return images.sub_(mean).div_(std)

    def transform(self, normalize: bool = True) -> Callable[[Decoded], torch.Tensor]:
        """Return timm's evaluation transform: resize, crop, normalise; without the last, uint8 for L and RGB."""
        return build_transform(
            (self.channels, *self.size),
            mean=tuple(self.mean),
            std=tuple(self.std),
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            normalize=normalize,
        )

    def resized(self, image: 'Raw | Decoded') -> tuple[int, int]:
        """Return the height and width that `transform` resizes an image to before it crops it."""
        width, height = image_size(image)
        factors = [size / self.crop_pct / side for size, side in zip(self.size, (height, width))]
        if self.crop_mode != 'squash':
            factors = [min(factors) if self.crop_mode == 'border' else max(factors)] * 2
        return int(height * factors[0]), int(width * factors[1])

    def kept(self, image: 'Raw | Decoded') -> tuple[float, ...]:
        """Return the box that `transform` keeps of an image, to within a pixel; see `Batch`.

        With crop_mode border the box extends beyond the image.
        """
        width, height = image_size(image)
        ratios = [side * self.crop_pct / size for side, size in zip((height, width), self.size)]
        ratio = max(ratios) if self.crop_mode == 'border' else min(ratios)
        squash = self.crop_mode == 'squash'
        rows, cols = (self.crop_pct if squash else self.crop_pct * ratio / other for other in ratios)
        return (1 - rows) / 2, (1 - cols) / 2, rows, cols, 0.0


def resize_pixels(pixels: torch.Tensor, size: Sequence[int], mode: TF.InterpolationMode) -> torch.Tensor:
    """Resize a tensor (C, H, W) with antialiasing; uint8 values differ from Pillow's by at most 2."""
    if pixels.stride(0) == 1 and pixels.dtype == torch.uint8 and mode.value in ('bilinear', 'bicubic'):
        # part of a decoded image: as a batch of one in channels_last memory, torch resizes it without repacking
        height, width, channels = (packed := pixels.permute(1, 2, 0).contiguous()).shape
        batch = packed.as_strided((1, channels, height, width), (packed.numel(), 1, width * channels, channels))
        return F.interpolate(batch, list(size), mode=mode.value, antialias=True)[0]
    return resize_tensor(pixels, list(size), mode, antialias=True)


class TrainCrop:
    """timm's random crop of one image; draws random numbers in timm's order."""

    def __init__(self, preprocessing: Preprocessing, augment: Augment) -> None:
        self.size = preprocessing.size
        self.crop = RandomResizedCropAndInterpolation(self.size, augment.scale, augment.ratio, augment.interpolation)

    def draw(self, image: Decoded) -> tuple[tuple[int, int, int, int], TF.InterpolationMode, torch.Tensor]:
        """Draw top, left, height and width in pixels, and the filter; return the box as fractions too, see `Batch`."""
        width, height = image_size(image)
        where = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = random.choice(modes) if isinstance(modes, (tuple, list)) else modes
        top, left, rows, cols = where
        return where, mode, torch.tensor([top / height, left / width, rows / height, cols / width, 0])

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a crop of an image (C, H, W) at the model's size, and its box, (5,)."""
        (top, left, height, width), mode, box = self.draw(pixels)
        return resize_pixels(pixels[:, top : top + height, left : left + width], self.size, mode), box


class TrainTransform:
    """timm's training transform of one image, which also returns the crop; draws random numbers in timm's order."""

    def __init__(self, preprocessing: Preprocessing, augment: Augment) -> None:
        _, self.secondary, self.final = create_transform(
            (preprocessing.channels, *preprocessing.size),
            is_training=True,
            mean=preprocessing.mean,
            std=preprocessing.std,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.aa,
            interpolation=augment.interpolation,
            re_prob=augment.reprob,
            re_mode=augment.remode,
            re_count=augment.recount,
            separate=True,
        )
        self.crop, self.size = TrainCrop(preprocessing, augment), preprocessing.size
        self.pad, self.hflip = augment.pad, augment.hflip

    def __call__(self, image: Decoded) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the augmented image (C, H, W), and the box of the original that it shows, (5,); see `Batch`."""
        where, mode, box = self.crop.draw(image)
        image = TF.resized_crop(image, *where, list(self.size), mode)
        if self.pad:
            image = TF.pad(image, [self.pad])
            row, col, *_ = transforms.RandomCrop.get_params(image, self.size)
            image = TF.crop(image, row, col, *self.size)
            rows, cols = torch.tensor([row - self.pad]), torch.tensor([col - self.pad])
            box = shift_box(box[None], rows, cols, self.size)[0]
        if self.hflip and torch.rand(1) < self.hflip:
            image = TF.hflip(image)
            box[4] = 1
        return self.final(self.secondary(image)), box
