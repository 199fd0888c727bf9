"""The files of the official release."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .safe_load import PathLike, verify_file


class Published(NamedTuple):
    """A file of the official release and the preprocessing of its images.

    `size` (bytes) and `sha256` are checked after download if they are known. The release page names neither.
    """

    file: str
    img_size: int = 224
    crop_pct: float = 0.9
    num_classes: int = 1000
    interpolation: str = 'bicubic'
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    size: int | None = None
    sha256: str | None = None


RELEASE = 'https://github.com/yitu-opensource/T2T-ViT/releases/download/main/'
RELEASE_LICENCE = 'bsd-3-clause-clear'
# the release's transfer script: the whole image resized, CIFAR-10's mean and std for both sets
cifar = partial(
    Published, crop_pct=1.0, interpolation='bilinear', mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
)

PUBLISHED: dict[str, Published] = {
    't2t_vit_7.in1k': Published('71.7_T2T_ViT_7.pth.tar'),
    't2t_vit_10.in1k': Published('75.2_T2T_ViT_10.pth.tar'),
    't2t_vit_12.in1k': Published('76.5_T2T_ViT_12.pth.tar'),
    't2t_vit_14.in1k': Published('81.5_T2T_ViT_14.pth.tar'),
    't2t_vit_14.in1k_384': Published('83.3_T2T_ViT_14.pth.tar', img_size=384, crop_pct=1.0),
    't2t_vit_14.cifar10': cifar('cifar10_t2t-vit_14_98.3.pth', num_classes=10),
    't2t_vit_14.cifar100': cifar('cirfar100_t2t-vit-14_88.4.pth', num_classes=100),  # the release's spelling
    't2t_vit_19.in1k': Published('81.9_T2T_ViT_19.pth.tar'),
    't2t_vit_19.cifar10': cifar('cifar10_t2t-vit_19_98.4.pth', num_classes=10),
    't2t_vit_19.cifar100': cifar('cifar100_t2t-vit-19_89.0.pth', num_classes=100),
    't2t_vit_24.in1k': Published('82.3_T2T_ViT_24.pth.tar'),
    't2t_vit_24.token_labeling_in1k': Published('84.2_T2T_ViT_24.pth.tar'),
    't2t_vit_t_14.in1k': Published('81.7_T2T_ViTt_14.pth.tar'),
    't2t_vit_t_19.in1k': Published('82.4_T2T_ViTt_19.pth.tar'),
    't2t_vit_t_24.in1k': Published('82.6_T2T_ViTt_24.pth.tar'),
}


def verify_published(path: PathLike) -> None:
    """Check a downloaded file of the release against its recorded size and SHA-256, if they are known.

    Raises:
        CheckpointError: if it is another file.
    """
    for published in PUBLISHED.values():
        if published.file == Path(path).name:
            verify_file(path, published.size, published.sha256)
