"""Provide `t2t-vit reproduce`: sizes of the paper's models, its comparisons at small scale, and their report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..settings import UsageError
from ..train.signals import RESTART
from .comparison import failures, results
from .prepare import prepare
from .report import save_report
from .runs import train_all
from .structures import ROWS, measure_structure, save_structures, show_structures


def reproduce(
    what: Literal['structures', 'accuracy', 'report'],
    output: str | None = None,
    data: str | None = None,
    arms: Sequence[str] = (),
    blocks: Sequence[str] = (),
    token_layers: Sequence[str] = (),
    seeds: int = 3,
    parameters: int | None = None,
    img_size: int | None = None,
    reduction: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    train_images: int | None = None,
    val_images: int | None = None,
    recipe: str | None = None,
    cnn_recipe: str | None = None,
    precision: Literal['no', 'bf16', 'fp16'] | None = None,
    device: str = 'auto',
    threads: int | None = None,
    minutes: float | None = None,
) -> None:
    """Reproduce the paper's tables and comparisons.

    `structures` counts the parameters and multiply-adds of every model in the paper's tables. `accuracy` trains the
    compared models ("arms") from scratch at one budget and judges each claim; several processes can share a folder, and
    the same command resumes an interrupted comparison. `report` writes the tables of the finished runs.

    Args:
        what: structures, accuracy or report.
        output: Folder of the comparison; `structures` only prints without it.
        data: Dataset, as train's data.root. A comparison keeps its values of this option and of those from `parameters`
            to `precision`.
        arms: Models to train, all by default: t2t_vit_14, t2t_vit_14_no_t2t, t2t_vit_c_14, t2t_vit_t_14, vit_s_16,
            vit_s_16_deep_narrow, vit_s_16_shallow_wide, t2t_vit_14_se, t2t_vit_dense, t2t_vit_16_ghost, resnet50,
            t2t_vit_12, mobilenetv2_140, t2t_vit_14_wide, t2t_vit_14_resnext, vit_s_16_se, vit_s_16_dense,
            vit_s_16_ghost, vit_s_16_resnext, t2t_vit_7, mobilenetv1_100, t2t_vit_19, resnet101, t2t_vit_24, resnet152.
        blocks: Custom blocks to compare with T2T-ViT-14's, each FILE.py:CLASS.
        token_layers: Custom token layers to compare with T2T-ViT-14's Performer, each FILE.py:CLASS.
        seeds: Runs per arm, with seeds from 0.
        parameters: Trainable parameters of the scaled T2T-ViT-14, 500000 by default; other arms keep the paper's ratio.
        img_size: Image size in pixels, 32 by default.
        reduction: Image size divided by token grid size: 4, 8 (default) or 16.
        epochs: Passes over the training images, 30 by default.
        batch_size: Images per step, 128 by default.
        train_images: Train on this many images, the same fraction of every class.
        val_images: Evaluate on this many images.
        recipe: A shipped recipe or a YAML file with the other settings; `reproduce` by default.
        cnn_recipe: The same for ResNets and MobileNets, if they need other settings, such as a learning rate.
        precision: no (float32), bf16 or fp16.
        device: cpu, or auto for the best available.
        threads: CPU threads of each run.
        minutes: Save and stop after this time with exit code 75; the same command resumes. Failed runs give code 1.
    """
    if what == 'structures':
        rows = [measure_structure(row) for row in ROWS]
        show_structures(rows)
        if output:
            save_structures(rows, Path(output))
        return
    if not output:
        raise UsageError(f'reproduce {what} needs --output, the folder of the comparison')
    folder = Path(output)
    if what == 'accuracy':
        given = dict(
            data=data,
            parameters=parameters,
            img_size=img_size,
            reduction=reduction,
            epochs=epochs,
            batch_size=batch_size,
            train_images=train_images,
            val_images=val_images,
            recipe=recipe,
            cnn_recipe=cnn_recipe,
            precision=precision,
        )
        names = prepare(folder, given, arms, blocks, token_layers, seeds, threads, minutes)
        finished = train_all(folder, names, seeds, device, threads, minutes)
        if results(folder):
            save_report(folder)
        failed = failures(folder)
        for run, reason in failed.items():
            print(f'failed: {run}: {reason} (skipped until {folder / run}/failed.txt is removed)')
        if not finished:
            print('some runs are left: the same command resumes')
            raise SystemExit(RESTART)
        if failed:
            raise SystemExit(1)
        return
    save_report(folder)
