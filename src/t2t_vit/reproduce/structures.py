"""Compare parameters and multiply-adds of every row of the paper's tables with our models, and explain differences."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from rich.table import Table

from ..benchmark import count_macs
from ..console import console
from ..models.listing import count_parameters

TOLERANCE = 0.01  # beyond it, a difference is explained
STEP = 0.05  # half of the last printed digit, in M and in G


class Printed(NamedTuple):
    """Hold a row of the paper: top-1 on ImageNet in percent, parameters in millions, multiply-adds in billions."""

    table: str
    name: str
    top1: float
    params: float
    gmacs: float
    img_size: int = 224
    note: str = ''  # what is known about a difference that neither rounding nor counting explains
    counted: str = ''  # why the printed parameters differ, if known


class Structure(NamedTuple):
    """Hold our counts: trainable parameters, all tensors of a checkpoint, multiply-adds in both conventions."""

    printed: Printed
    params: float
    params_all: float
    gmacs: float
    gmacs_weights: float

    def explanations(self) -> list[str]:
        """Return why parameters or multiply-adds differ by more than 1 % from the printed ones, as far as known."""
        row, found = self.printed, []
        if abs(self.params / row.params - 1) > TOLERANCE:
            if abs(self.params - row.params) <= STEP:
                found.append('parameters: rounding')
            elif abs(self.params_all - row.params) <= STEP:
                found.append(f'parameters: {self.params_all:.2f} M with the fixed tables, as printed')
            else:
                found.append(f'parameters: {row.counted or UNEXPLAINED}, {abs(self.params - row.params):.2f} M apart')
        if abs(self.gmacs / row.gmacs - 1) > TOLERANCE:
            if abs(self.gmacs - row.gmacs) <= STEP:
                found.append('MACs: rounding')
            elif abs(self.gmacs_weights - row.gmacs) <= STEP:
                found.append('MACs: printed without the matmuls of attention')
            else:
                found.append(
                    f'MACs: {UNEXPLAINED}, {abs(self.gmacs - row.gmacs):.2f} G apart'
                    + (f' ({row.note})' if row.note else '')
                )
        return found


UNEXPLAINED = 'unexplained'
VIT_S = 'ViT-B and DeiT-S, built the same way, agree'

ROWS = [
    Printed('Table 1', 't2t_vit_7', 71.7, 4.3, 1.1),
    Printed('Table 1', 't2t_vit_10', 75.2, 5.9, 1.5),
    Printed('Table 1', 't2t_vit_12', 76.5, 6.9, 1.8),
    Printed('Table 1', 't2t_vit_14', 81.5, 21.5, 4.8),
    Printed('Table 1', 't2t_vit_14', 83.3, 21.5, 17.1, 384, 'the same count agrees at 224²'),
    Printed('Table 1', 't2t_vit_19', 81.9, 39.2, 8.5),
    Printed('Table 1', 't2t_vit_24', 82.3, 64.1, 13.8),
    Printed('Table 1', 't2t_vit_t_14', 81.7, 21.5, 6.1),
    Printed('Table 1', 't2t_vit_t_19', 82.2, 39.2, 9.8),
    Printed('Table 1', 't2t_vit_t_24', 82.6, 64.1, 15.0),
    Printed('ViT', 'vit_s_16', 78.1, 48.6, 10.1, note=VIT_S),
    Printed('ViT', 'deit_small_patch16_224', 79.9, 22.1, 4.6),
    Printed('ViT', 'vit_base_patch16_224', 79.8, 86.4, 17.6),
    Printed('ViT', 'vit_large_patch16_224', 81.1, 304.3, 63.6, note='the same count gives ViT-B its printed 17.6'),
    Printed('ResNet', 'resnet50', 79.1, 25.5, 4.3),
    Printed('ResNet', 'resnet101', 79.9, 44.6, 7.9),
    Printed('ResNet', 'resnet152', 80.8, 60.2, 11.6),
    Printed('MobileNet', 'mobilenetv1_100', 70.8, 4.2, 0.6),
    Printed('MobileNet', 'mobilenetv2_100', 72.8, 3.5, 0.3),
    Printed(
        'MobileNet',
        'mobilenetv2_140',
        75.6,
        6.9,
        0.6,
        counted="printed as in MobileNetV2's own paper; ours is timm's network of that width",
    ),
    Printed(
        'MobileNet',
        'mobilenetv3_large_100',
        75.2,
        5.4,
        0.2,
        counted="printed as in MobileNetV3's own paper; ours is timm's network",
    ),
    Printed('Designs on ViT-S/16', 'vit_s_16_deep_narrow', 79.0, 24.5, 5.5, note=VIT_S),
    Printed('Designs on ViT-S/16', 'vit_s_16_shallow_wide', 69.9, 47.9, 9.9, note=VIT_S),
    Printed('Designs on ViT-S/16', 'vit_s_16_dense', 76.8, 46.7, 9.7),
    Printed('Designs on ViT-S/16', 'vit_s_16_se', 78.4, 49.2, 10.2, note=VIT_S),
    Printed('Designs on ViT-S/16', 'vit_s_16_resnext', 78.0, 48.6, 10.1, note=VIT_S),
    Printed('Designs on ViT-S/16', 'vit_s_16_ghost', 73.7, 32.1, 6.9, note=VIT_S),
    Printed('Designs on T2T-ViT-14', 't2t_vit_14_wide', 77.9, 25.1, 5.0),
    Printed('Designs on T2T-ViT-14', 't2t_vit_dense', 80.6, 23.7, 5.5, note='the parameters agree'),
    Printed(
        'Designs on T2T-ViT-14',
        't2t_vit_14_se',
        81.6,
        21.9,
        4.9,
        note='0.1 more is printed than without the gates, which work on one vector an image and cost 0.0003',
    ),
    Printed('Designs on T2T-ViT-14', 't2t_vit_14_resnext', 81.5, 21.5, 4.8),
    Printed(
        'Designs on T2T-ViT-14',
        't2t_vit_16_ghost',
        79.5,
        16.3,
        3.7,
        note='between our counts with and without the matmuls of attention',
    ),
    Printed(
        'T2T module',
        't2t_vit_14_no_t2t',
        79.5,
        21.1,
        4.2,
        note='near our count without the matmuls of attention; the row below, of the same backbone, has them',
        counted='printed is the backbone alone, without the embedding of patches',
    ),
    Printed('T2T module', 't2t_vit_c_14', 80.8, 21.3, 4.6),
    Printed('T2T module', 't2t_vit_14', 81.5, 21.5, 4.8),
    Printed('T2T module', 't2t_vit_t_14', 81.7, 21.5, 6.1),
    Printed(
        'T2T module', 't2t_vit_14_wide', 78.8, 25.0, 5.4, note='5.0 is printed for the same model among the designs'
    ),
]
PRINTED: dict[str, Printed] = {row.name: row for row in reversed(ROWS)}  # the first row of each model


def measure_structure(row: Printed) -> Structure:
    """Count a row's model, without allocating it."""
    with torch.device('meta'):
        model = timm.create_model(row.name)
    whole, learned = count_parameters(model)
    macs, macs_weights = count_macs(model, row.img_size)
    return Structure(row, learned / 1e6, whole / 1e6, macs / 1e9, macs_weights / 1e9)


HEAD = [
    'model',
    'image',
    'top-1 %',
    'M params',
    'printed',
    'difference',
    'GMAC',
    'weights only',
    'printed',
    'difference',
    'why, beyond 1 %',
]


def cells(row: Structure) -> list[str]:
    """Format a row."""
    printed = row.printed
    return [
        printed.name,
        f'{printed.img_size}²',
        f'{printed.top1:.1f}',
        f'{row.params:.2f}',
        f'{printed.params:.1f}',
        f'{100 * (row.params / printed.params - 1):+.1f} %',
        f'{row.gmacs:.2f}',
        f'{row.gmacs_weights:.2f}',
        f'{printed.gmacs:.1f}',
        f'{100 * (row.gmacs / printed.gmacs - 1):+.1f} %',
        '; '.join(row.explanations()),
    ]


def show_structures(rows: Sequence[Structure]) -> None:
    """Print the table."""
    table = Table(*HEAD[:-1], title='Trainable parameters and multiply-adds of one image; top-1 as published')
    for row in rows:
        table.add_row(*cells(row)[:-1])
    console().print(table)
    for row in rows:
        for text in row.explanations():
            console().print(f'{row.printed.name} at {row.printed.img_size}²: {text}')


def save_structures(rows: Sequence[Structure], folder: Path) -> None:
    """Write structures.csv, and README.md with a table for each table of the paper."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'structures.csv').open('w', encoding='utf-8', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                'table',
                'model',
                'img_size',
                'top1_printed',
                'params',
                'params_all',
                'params_printed',
                'gmacs',
                'gmacs_weights',
                'gmacs_printed',
                'why',
            ]
        )
        for row in rows:
            printed = row.printed
            writer.writerow(
                [
                    printed.table,
                    printed.name,
                    printed.img_size,
                    printed.top1,
                    f'{row.params:.6f}',
                    f'{row.params_all:.6f}',
                    printed.params,
                    f'{row.gmacs:.6f}',
                    f'{row.gmacs_weights:.6f}',
                    printed.gmacs,
                    '; '.join(row.explanations()),
                ]
            )
    lines = [
        "# Sizes of the paper's models: printed and counted",
        '',
        'Trainable parameters in millions. Multiply-adds of one image in billions, with the matmuls of attention, as '
        'the paper counts, and without ("weights only"). Top-1 on ImageNet as published.',
        '',
    ]
    for table in dict.fromkeys(row.printed.table for row in rows):
        lines += [f'## {table}', '', '| ' + ' | '.join(HEAD) + ' |', '|' + '---|' * len(HEAD)]
        lines += ['| ' + ' | '.join(cells(row)) + ' |' for row in rows if row.printed.table == table] + ['']
    (folder / 'README.md').write_text('\n'.join(lines), encoding='utf-8')
