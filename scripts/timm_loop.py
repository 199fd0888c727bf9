"""Train a timm model for some minutes with timm's own parts, as its train.py combines them, for comparisons.

    scripts/timm_loop.py FOLDER MODEL MINUTES [options]

FOLDER holds train/CLASS/IMAGE and validation/CLASS/IMAGE. The time of 50 steps decides how many steps fit; the learning
rate follows a cosine over them. All validation images are scored once, at the end, with the weights of the last step.
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torchmetrics.functional.classification import multiclass_accuracy

FIRST, TIMED = 10, 50  # steps that are left out, and then timed, to plan the rest
ENDING = 40.0  # seconds for the validation


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder')
    parser.add_argument('model')
    parser.add_argument('minutes', type=float)
    parser.add_argument('--model-kwargs', type=json.loads, default={})
    parser.add_argument('--img-size', type=int, default=64)
    parser.add_argument('--opt', default='sgd')
    parser.add_argument('--lr', type=float, default=0.1)
    parser.add_argument('--weight-decay', type=float, default=5e-4)
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--scale', type=float, default=0.5, help='smallest area of a crop')
    parser.add_argument('--color-jitter', type=float, default=0.4)
    parser.add_argument('--aa', help='RandAugment, such as rand-m6-mstd0.5-inc1')
    parser.add_argument('--reprob', type=float, default=0.0)
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--seed', type=int, default=42)
    return parser.parse_args()


def endless(loader: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches of one epoch after the other."""
    while True:
        yield from loader


def main() -> None:
    """Train, score and print the result with the options."""
    began, args = time.time(), options()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    train, val = (create_dataset('', args.folder, split=split) for split in ('train', 'validation'))
    shared = dict(
        input_size=(3, args.img_size, args.img_size), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        interpolation='bicubic', crop_pct=1.0, device=torch.device('cpu'), num_workers=args.workers,
        persistent_workers=args.workers > 0,
    )  # fmt: skip
    loader = create_loader(
        train, batch_size=args.batch_size, is_training=True, scale=(args.scale, 1.0), color_jitter=args.color_jitter,
        auto_augment=args.aa, re_prob=args.reprob, **shared,
    )  # fmt: skip
    scored = create_loader(val, batch_size=128, **shared)
    classes = len(train.reader.class_to_idx)
    model = timm.create_model(args.model, num_classes=classes, **args.model_kwargs)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    size = sum(parameter.numel() for parameter in model.parameters())
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=0.9)
    loss_fn, schedule, total = LabelSmoothingCrossEntropy(0.1), None, FIRST + TIMED + 1
    end, step, clock = began + 60 * args.minutes - ENDING, 0, 0.0
    model.train()
    for images, labels in endless(loader):
        if step == FIRST:
            clock = time.time()
        if step == FIRST + TIMED:
            seconds = (time.time() - clock) / TIMED
            total = step + int((end - time.time()) / seconds)
            schedule = CosineLRScheduler(
                optimizer, t_initial=total, warmup_t=total // 40, warmup_lr_init=1e-5, t_in_epochs=False
            )
            print(f'{args.model}, {size / 1e6:.2f} M parameters, {args.batch_size / seconds:.0f} images/s', flush=True)
        if schedule:
            schedule.step_update(step)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        loss = loss_fn(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 500 == 0:
            print(f'step {step} of {total}, {time.time() - began:.0f} s, loss {loss.item():.3f}', flush=True)
        if step >= total or time.time() > end:
            break
    model.eval()
    with torch.inference_mode():
        outputs, targets = zip(*((model(images), labels) for images, labels in scored))
    top1 = multiclass_accuracy(torch.cat(outputs), torch.cat(targets), num_classes=classes, average='micro')
    passes = step * args.batch_size / len(train)
    print(
        f'top-1 {100 * top1:.2f} % of {len(val):,} images after {step:,} steps, {passes:.1f} passes, '
        f'{time.time() - began:.0f} s in all; torch {torch.__version__}, timm {timm.__version__}; {vars(args)}'
    )


if __name__ == '__main__':
    main()
