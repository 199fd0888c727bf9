"""The tables and plots of a comparison, of whatever is done so far."""

import csv
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..console import console
from ..plots import plot_arms, plot_differences
from ..settings import UsageError
from .arms import ARMS
from .runs import OPTIONS, RESULT, Plan, failures, read_plan, results
from .structures import PRINTED
from .verdicts import (
    CLOSE,
    CONFIDENCE,
    MARGIN,
    MIN_FREEDOM,
    Arm,
    Verdict,
    gather,
    half_width,
    overall,
    pooled,
    verdicts,
)

ARM_HEAD = [
    'arm',
    'top-1 %',
    f'± {100 * CONFIDENCE:.0f} %',
    'seeds',
    'parameters',
    'published share',
    'share',
    'MMAC',
    'weights only',
    'images/s',
    'published top-1 %',
]
VERDICT_HEAD = [
    'claim',
    'first',
    '',
    'second',
    'difference',
    f'± {100 * CONFIDENCE:.0f} %',
    'seeds',
    'size',
    'paper',
    'verdict',
]


def arm_cells(arm: Arm, arms: dict[str, Arm]) -> list[str]:
    """An arm as it is shown."""
    printed, reference = PRINTED.get(arm.name), arms.get('t2t_vit_14')
    return [
        arm.name,
        f'{arm.mean:.2f}',
        f'{half_width(arm, None, list(arms.values())):.2f}',
        str(len(arm.top1)),
        f'{arm.parameters:,}',
        f'{printed.params / PRINTED["t2t_vit_14"].params:.2f}' if printed else '–',
        f'{arm.parameters / reference.parameters:.2f}' if reference else '–',
        f'{arm.macs / 1e6:.2f}',
        f'{arm.macs_weights / 1e6:.2f}',
        f'{arm.images_per_second:.0f}',
        f'{printed.top1:.1f}' if printed else '–',
    ]


def verdict_cells(verdict: Verdict) -> list[str]:
    """A verdict as it is shown."""
    pair = verdict.pair
    paper = '–' if math.isnan(pair.published) else f'{pair.published:+.1f}'
    if verdict.difference is None:
        return [pair.claim, pair.first, pair.relation, pair.second, '–', '–', '–', '–', paper, verdict.text]
    return [
        pair.claim,
        pair.first,
        pair.relation,
        pair.second,
        f'{verdict.difference:+.2f}',
        f'{verdict.half:.2f}',
        verdict.seeds,
        f'{verdict.size:.2f}',
        paper,
        verdict.text,
    ]


def conditions(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    """What all figures hold for."""

    def all_of(key: str) -> str:
        return ', '.join(dict.fromkeys(str(row[key]) for row in rows))

    revisions = ', '.join(dict.fromkeys(str(row['revision'])[:10] for row in rows if row['revision']))
    return (
        f'{Path(plan.data).name if "/" in plan.data and not plan.data.startswith("torch/") else plan.data}, '
        f'{plan.img_size}² pixels, {plan.count:,} training and {plan.val_count:,} validation images, '
        f'{plan.images_seen:,} images seen a run ({plan.epochs} epochs, batch {plan.batch_size}), recipe '
        f'{Path(plan.recipe).name}, precision {plan.precision}; {all_of("device")}, {all_of("threads")} threads, '
        f'torch {all_of("torch")}, t2t-vit {all_of("version")}' + (f' ({revisions})' if revisions else '')
    )


def save_report(folder: Path) -> None:
    """README.md, CSV files, configs/ and plots of a comparison's results, and the same on the screen.

    Files are written beside and renamed: of processes that do it at once each leaves whole ones. notes.md in the
    folder, what a person has to say about the runs, becomes part of README.md.

    Raises:
        UsageError: if none of its runs is done.
    """
    plan, rows = read_plan(folder), results(folder)
    if not rows:
        raise UsageError(f'no run in {folder} is done yet')
    arms = gather(rows)
    ranked = sorted(arms.values(), key=lambda arm: (ARMS.index(arm.name) if arm.name in ARMS else len(ARMS), arm.name))
    judged = verdicts(arms, 100 * plan.chance)
    done = [verdict for verdict in judged if verdict.difference is not None]
    about = conditions(plan, rows)

    with tempfile.TemporaryDirectory(dir=folder, prefix='.') as name:
        draft = Path(name)
        write_csv(draft / 'runs.csv', list(rows[0]), [list(row.values()) for row in rows])
        write_csv(draft / 'arms.csv', ARM_HEAD, [arm_cells(arm, arms) for arm in ranked])
        write_csv(draft / 'verdicts.csv', VERDICT_HEAD, [verdict_cells(verdict) for verdict in judged])
        (draft / 'configs').mkdir()
        for file in folder.glob(f'runs/*/seed-*/{RESULT}'):
            shutil.copyfile(
                file.parent / 'config.yaml', draft / 'configs' / f'{file.parent.parent.name}-{file.parent.name}.yaml'
            )
        plot_arms(
            [(arm.name, arm.parameters, arm.top1, half_width(arm, None, ranked), arm.own) for arm in ranked],
            about,
            draft / 'arms.png',
        )
        if done:
            plot_differences(
                [
                    (
                        f'{v.pair.first} {v.pair.relation} {v.pair.second}',
                        v.difference or 0.0,
                        v.half or 0.0,
                        v.pair.published,
                        v.text,
                    )
                    for v in done
                ],
                MARGIN,
                about,
                draft / 'claims.png',
            )
        (draft / 'README.md').write_text(readme(plan, arms, ranked, judged, about, folder))
        (folder / 'configs').mkdir(exist_ok=True)
        for file in [path for path in draft.rglob('*') if path.is_file()]:
            os.replace(file, folder / file.relative_to(draft))
    show(arms, ranked, judged, about)


def write_csv(file: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table as CSV."""
    with file.open('w', newline='') as stream:
        writer = csv.writer(stream)
        writer.writerow(head)
        writer.writerows(rows)


def show(arms: dict[str, Arm], ranked: Sequence[Arm], judged: Sequence[Verdict], about: str) -> None:
    """Both tables on the screen."""
    table = Table(*ARM_HEAD, title=about)
    for arm in ranked:
        table.add_row(*arm_cells(arm, arms))
    console().print(table)
    table = Table(*VERDICT_HEAD)
    for verdict in judged:
        table.add_row(*verdict_cells(verdict))
    console().print(table)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines."""
    return [
        '| ' + ' | '.join(head) + ' |',
        '|' + '---|' * len(head),
        *('| ' + ' | '.join(row) + ' |' for row in rows),
        '',
    ]


def readme(
    plan: Plan, arms: dict[str, Arm], ranked: Sequence[Arm], judged: Sequence[Verdict], about: str, folder: Path
) -> str:
    """The page of a comparison."""
    deviation, freedom = pooled(ranked)
    test = (
        f'a t interval of the difference of means over seeds, with one standard deviation of {deviation:.2f} '
        f'points for all arms, pooled within them ({freedom} degrees of freedom)'
        if freedom >= MIN_FREEDOM
        else 'none, since too few arms have two seeds: nothing is decided. The intervals are those of two proportions '
        'over the validation images, for orientation; they know nothing of seeds'
    )
    far = f'A pair whose ratio of parameters is more than {100 * CLOSE:.0f} % off the published one is not judged.'
    claims: dict[str, list[Verdict]] = {}
    for verdict in judged:
        claims.setdefault(verdict.pair.claim, []).append(verdict)
    notes = folder / 'notes.md'
    failed = failures(folder)
    given = ' '.join(f'--{key} {getattr(plan, key)}' for key in OPTIONS[1:] if getattr(plan, key) is not None)
    return '\n'.join(
        [
            "# The paper's claims at small scale",
            '',
            f'{about}.',
            '',
            f'`t2t-vit reproduce accuracy --data {plan.data} {given} --output {folder.resolve().name}`',
            '',
            *([notes.read_text().strip(), ''] if notes.is_file() else []),
            f'Test, at 95 %, claim by claim: {test}. "As good" (=) means within ±{MARGIN:g} point. Top-1 is that of '
            'the last epoch. A verdict is about these models, data and numbers of images, not about ImageNet: the '
            'paper trains 300 epochs of 1.28 million images. docs/reproduce.md says how models are scaled and '
            'claims tested.',
            '',
            '## Claims',
            '',
            *(
                f'- {claim}: **{overall(found)}**'
                for claim, found in claims.items()
                if found[0].pair.relation != '?' and any(v.difference is not None for v in found)
            ),
            '',
            f'A claim holds where all its pairs do, and does not hold where one of them does not. {far} `size`: '
            "parameters of the first over the second's. An arm that is not above the share of the largest class, "
            f'{100 * plan.chance:.1f} %, decides nothing.',
            '',
            *markdown(VERDICT_HEAD, [verdict_cells(v) for v in judged]),
            '![differences](claims.png)',
            '',
            '## Arms',
            '',
            "`share`: parameters over T2T-ViT-14's, as published and here. MMAC: million multiply-adds of "
            'one image. images/s: training, median of the epochs; other processes may have run beside.',
            '',
            *markdown(ARM_HEAD, [arm_cells(arm, arms) for arm in ranked]),
            '![arms](arms.png)',
            '',
            *(
                [f'Failed and left out: {"; ".join(f"{run} ({reason})" for run, reason in failed.items())}.', '']
                if failed
                else []
            ),
            'Exact configurations: configs/. Every run: runs.csv.',
            '',
        ]
    )
