"""Augmentation of batches: crops, padding and erasing; colours and shapes compared with timm's for single images."""

import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm_ops
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms

from t2t_vit.data import Augment, Preprocessing
from t2t_vit.data.augment import (
    OPERATIONS,
    BatchAugment,
    RandAugment,
    apply_drawn,
    crop_boxes,
    erase,
    in_batches,
    jitter,
    pad_and_crop,
    resample,
)
from t2t_vit.data.preprocessing import TrainTransform

PLAIN = dict(aa=None, mixup=0.0, cutmix=0.0)
STILL = Augment(**PLAIN, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, reprob=0.0)


def images_and_uniforms(count: int = 4, rows: int = 9, cols: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 2, rows, cols, generator=generator), torch.rand(count, 12, generator=generator)


def resampled(images: torch.Tensor, augment: Augment, uniforms: torch.Tensor) -> torch.Tensor:
    return resample(images, augment, crop_boxes(augment, uniforms), uniforms)


@pytest.mark.parametrize('rows, cols', [(9, 9), (8, 12)])
def test_identity_resampling_returns_the_image(rows, cols):
    images, uniforms = images_and_uniforms(rows=rows, cols=cols)
    torch.testing.assert_close(resampled(images, STILL, uniforms), images)


def test_mirroring():
    images, uniforms = images_and_uniforms()
    mirrored = resampled(images, Augment(**{**vars(STILL), 'hflip': 1.0}), uniforms)
    torch.testing.assert_close(mirrored, images.flip(-1))


def test_rotation_reaches_the_largest_angle_both_ways():
    images, uniforms = images_and_uniforms(2)
    uniforms[:, 2] = torch.tensor([0.0, 1.0])
    turned = resampled(images, Augment(**{**vars(STILL), 'rotate': 90.0}), uniforms)
    torch.testing.assert_close(turned[0], images[0].rot90(-1, (1, 2)))
    torch.testing.assert_close(turned[1], images[1].rot90(1, (1, 2)))


def test_crop_stays_inside_and_keeps_its_fraction():
    ramp = torch.linspace(0, 1, 64).expand(1000, 1, 64, 64)
    uniforms = torch.rand(1000, 12, generator=torch.Generator().manual_seed(0))
    cropped = resampled(ramp, Augment(**{**vars(STILL), 'scale': (0.25, 0.25)}), uniforms)
    widths = cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]
    torch.testing.assert_close(widths, torch.full_like(widths, 0.5), rtol=0, atol=0.01)
    assert cropped.min() < 0.02 and cropped.max() > 0.98


@pytest.mark.parametrize('mode', ['pixel', 'rand', 'const'])
def test_erased_fraction(mode):
    images, uniforms = torch.full((2000, 1, 32, 32), 7.0), images_and_uniforms(2000)[1]
    erased = erase(images, Augment(reprob=0.25, remode=mode), uniforms) != 7
    touched = erased.flatten(1).any(1)
    fractions = erased[touched].float().flatten(1).mean(1)
    assert abs(touched.float().mean() - 0.25) < 0.03
    assert fractions.min() > 0.01 and fractions.max() < 0.37 and abs(fractions.mean() - 0.175) < 0.02


def test_erasing_with_probability_zero_changes_nothing():
    images, uniforms = images_and_uniforms()
    assert erase(images, STILL, uniforms) is images


def test_boxes_match_the_visible_region():
    """The two channels of the image hold row and column."""
    size, augment = 64, Augment(**PLAIN, scale=(0.1, 0.5), pad=6, reprob=0.0)
    position = (torch.arange(size) + 0.5) / size
    images = torch.stack([position[:, None].expand(size, size), position.expand(size, size)]).expand(200, 2, size, size)
    u = torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    boxes = crop_boxes(augment, u)
    seen, boxes = pad_and_crop(resample(images, augment, boxes, u), augment.pad, boxes, u[:, 6:8])
    top, left, height, width, mirrored = boxes.unbind(1)
    across = torch.where(mirrored.bool()[:, None], 1 - position, position)
    rows, cols = top[:, None] + height[:, None] * position, left[:, None] + width[:, None] * across
    inner = slice(16, 48)  # out of the padding
    torch.testing.assert_close(seen[:, 0, inner, 32], rows[:, inner], rtol=0, atol=0.01)
    torch.testing.assert_close(seen[:, 1, 32, inner], cols[:, inner], rtol=0, atol=0.01)
    assert 0.3 < mirrored.mean() < 0.7


def test_padding_is_black_and_every_window_occurs():
    images = torch.ones(4000, 1, 4, 4)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0]).expand(4000, 5)
    seen, found = pad_and_crop(images, 2, boxes, torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)))
    assert {tuple(box[:2].mul(4).tolist()) for box in found} == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    fractions = (1 - found[:, 0].abs()) * (1 - found[:, 1].abs())
    torch.testing.assert_close(seen.mean((1, 2, 3)), fractions)


# timm's operations

PICTURES = [
    Image.fromarray(photo[y : y + 200, x : x + 200]).resize((32, 32), Image.Resampling.BICUBIC)
    for photo in load_sample_images().images
    for y in (0, 200)
    for x in (0, 200, 400)
]
GREYS = [picture.convert('L') for picture in PICTURES]
FILL = (124, 116, 104)
SHAPES = ('Rotate', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel')


def tensor_of(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.stack([transforms.functional.pil_to_tensor(picture) for picture in pictures]).float()


def by_timm(name: str, pictures: list[Image.Image], magnitude: float, negate: bool, monkeypatch: Any) -> torch.Tensor:
    """timm's operation at one magnitude and sign, with bilinear resampling."""
    monkeypatch.setattr(random, 'random', lambda: 1.0 if negate else 0.0)  # what timm draws the sign by
    fill = FILL if pictures[0].mode == 'RGB' else FILL[:1]
    op = timm_ops.AugmentOp(
        name, prob=1.0, magnitude=magnitude, hparams=dict(img_mean=fill, interpolation=Image.Resampling.BILINEAR)
    )
    return tensor_of([op(picture) for picture in pictures])


def by_us(name: str, pictures: list[Image.Image], magnitude: float, negate: bool) -> torch.Tensor:
    images = tensor_of(pictures)
    operation, level = OPERATIONS[name]
    magnitudes, signs = (torch.full((len(images),), value).double() for value in (magnitude, -1.0 if negate else 1.0))
    argument = level(magnitudes, signs)
    fill = torch.tensor(FILL[: images.shape[1]]).view(-1, 1, 1).float()
    return apply_drawn(images, torch.zeros(len(images)).long(), argument, [operation], fill)


@pytest.mark.parametrize('pictures', [PICTURES, GREYS], ids=['colour', 'grey'])
@pytest.mark.parametrize('negate', [False, True])
@pytest.mark.parametrize('magnitude', [0.0, 3.0, 6.5, 10.0])
@pytest.mark.parametrize('name', sorted({*OPERATIONS} - {*SHAPES}))
def test_colour_operations_match_timm(name, magnitude, negate, pictures, monkeypatch):
    """On every pixel, to 1 in 255: Pillow computes in another order and precision."""
    expected = by_timm(name, pictures, magnitude, negate, monkeypatch)
    found = by_us(name, pictures, magnitude, negate)
    assert (found - expected).abs().max() <= 1
    assert (found != expected).float().mean() < 0.02
    assert torch.equal(found, found.round().clamp(0, 255))


@pytest.mark.parametrize('negate', [False, True])
@pytest.mark.parametrize('magnitude', [0.0, 3.0, 6.5, 10.0])
@pytest.mark.parametrize('name', SHAPES)
def test_geometric_operations_match_timm(name, magnitude, negate, monkeypatch):
    """To one shade, with bilinear resampling on both sides, on all but 0.5 % of the pixels.

    Those are at the border, where rounding decides whether a pixel is outside and takes the fill.
    """
    expected = by_timm(name, PICTURES, magnitude, negate, monkeypatch)
    found = by_us(name, PICTURES, magnitude, negate)
    assert ((found - expected).abs().amax(1) > 1).float().mean() < 0.005
    assert torch.equal(found, found.round().clamp(0, 255))


def test_geometric_operations_on_non_square_images(monkeypatch):
    wide = [picture.resize((48, 32)) for picture in PICTURES]
    for name in SHAPES:
        expected, found = by_timm(name, wide, 9.0, False, monkeypatch), by_us(name, wide, 9.0, False)
        assert ((found - expected).abs().amax(1) > 1).float().mean() < 0.005


@pytest.mark.parametrize('policy', ['rand-m9-mstd0.5-inc1', 'rand-m7-n3-p0.3', 'rand-m15-mmax20-mstd101-inc1'])
def test_policies_draw_as_timm_does(policy, monkeypatch):
    """Frequency and mean argument of each operation, over twenty thousand images."""
    calls: list[tuple[str, float]] = []
    theirs = rand_augment_transform(policy, {})
    for op in theirs.ops:
        op.aug_fn = lambda image, argument=0.0, *, op=op, **_: calls.append((op.name, float(argument))) or image
    random.seed(0)
    np.random.seed(0)
    for _ in range(20_000):
        theirs(None)
    ours, found = RandAugment(policy), []
    ours.operations = [
        lambda images, x, fill, op=op: found.extend((op.name, value) for value in x.flatten().tolist()) or images
        for op in theirs.ops
    ]
    uniforms = torch.rand(20_000, ours.columns, generator=torch.Generator().manual_seed(0))
    ours(torch.zeros(20_000, 1, 1, 1), uniforms, torch.zeros(1, 1, 1))
    for op in theirs.ops:
        one, other = ([value for name, value in draws if name == op.name] for draws in (calls, found))
        assert abs(len(one) - len(other)) < 5 * math.sqrt(len(one) + len(other))
        assert abs(np.mean(one) - np.mean(other)) <= 5 * (np.std(one) + np.std(other)) / math.sqrt(len(one)) + 1e-6
        assert np.std(one) == pytest.approx(np.std(other), rel=0.1, abs=1e-6)


def test_weighted_policies_draw_without_replacement():
    ours = RandAugment('rand-m9-n3-p1-tweights')
    drawn: list[torch.Tensor] = []
    ours.operations = [
        lambda images, x, fill, k=k: drawn.append((k, len(images))) or images for k in range(len(ours.operations))
    ]
    ours(torch.zeros(9000, 1, 1, 1), torch.rand(9000, ours.columns), torch.zeros(1, 1, 1))
    counts = [sum(n for k, n in drawn if k == number) for number in range(15)]
    assert sum(counts) == 27_000 and max(counts) == counts[0] <= 9000 and counts[0] > 3 * counts[5]


def test_colour_jitter_matches_torchvision():
    """Mean and spread over many images, and the order of the factors."""
    images = tensor_of(PICTURES[:1])
    uniforms = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0))
    found = jitter(images.repeat(2000, 1, 1, 1), 0.4, uniforms, torch.zeros(3, 1, 1))
    torch.manual_seed(0)
    theirs = transforms.ColorJitter(0.4, 0.4, 0.4)
    expected = tensor_of([theirs(PICTURES[0]) for _ in range(2000)])
    assert (found.mean(0) - expected.mean(0)).abs().mean() < 2
    assert found.std(0).mean().item() == pytest.approx(expected.std(0).mean().item(), rel=0.1)


def test_policies_without_batch_operations_are_recognised():
    assert [
        in_batches(Augment(aa=policy))
        for policy in (None, 'rand-m9-mstd0.5-inc1', 'rand-m9-tweights', 'rand-m9-t3a', 'v0', 'augmix-m3')
    ] == [True, True, True, False, False, False]


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('changes', [{}, dict(aa=None, color_jitter=0.4, pad=4)], ids=['rand', 'jitter'])
def test_image_does_not_depend_on_its_batch(channels, changes):
    images = tensor_of(PICTURES if channels == 3 else GREYS).byte()
    mean, std = torch.full((2, 1, channels, 1, 1), 99.0)
    augment = BatchAugment(Augment(**changes), mean, std)
    uniforms = augment.draw(len(images), [torch.Generator().manual_seed(i) for i in range(2)])
    together, boxes = augment(images, uniforms)
    alone, one_box = augment(images[3:4], uniforms[3:4])
    torch.testing.assert_close(alone[0], together[3])
    assert torch.equal(one_box[0], boxes[3])
    assert together.isfinite().all() and together.shape == images.shape


def test_augmentation_travels_to_a_process_that_is_not_forked():
    images = tensor_of(PICTURES).byte()
    augment = BatchAugment(Augment(), *torch.full((2, 1, 3, 1, 1), 99.0))
    uniforms = augment.draw(len(images), [torch.Generator().manual_seed(i) for i in range(2)])
    copy = pickle.loads(pickle.dumps(augment))
    assert all(torch.equal(one, other) for one, other in zip(copy(images, uniforms), augment(images, uniforms)))


def test_several_erased_rectangles_are_for_images_from_disk():
    assert in_batches(Augment()) and not in_batches(Augment(recount=3))
    transform = TrainTransform(Preprocessing((16, 16), 3, (0.5,) * 3, (0.5,) * 3), Augment(reprob=1.0, recount=3))
    assert transform.final.transforms[-1].max_count == 3
