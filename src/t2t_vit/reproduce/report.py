"""Write the tables and plots of a comparison's finished runs."""

import csv
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..console import console
from ..plots import plot_arms, plot_differences
from ..settings import UsageError
from .arms import ARMS
from .comparison import OPTIONS, Plan, failures, read_plan, results
from .structures import PRINTED
from .verdicts import (
    CONFIDENCE,
    MARGIN,
    MIN_FREEDOM,
    SIZE_TOLERANCE,
    Arm,
    Verdict,
    gather,
    half_width,
    overall,
    pooled_std,
    verdicts,
)

ARM_HEAD = [
    'arm',
    'top-1 %',
    f'± {100 * CONFIDENCE:.0f} %',
    'seeds',
    'parameters',
    'published ratio',
    'ratio',
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
    'p',
    'seeds',
    'size',
    'paper',
    'verdict',
]


def arm_cells(arm: Arm, arms: dict[str, Arm]) -> list[str]:
    """Format an arm."""
    printed, reference = PRINTED.get(arm.name), arms.get('t2t_vit_14')
    return [
        arm.name,
        f'{arm.mean:.2f}',
        f'{half_width([arm], list(arms.values())):.2f}',
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
    """Format a verdict."""
    pair = verdict.pair
    paper = '–' if math.isnan(pair.published) else f'{pair.published:+.1f}'
    if verdict.difference is None:
        return [pair.claim, pair.first, pair.relation, pair.second, '–', '–', '–', '–', '–', paper, verdict.text]
    return [
        pair.claim,
        pair.first,
        pair.relation,
        pair.second,
        f'{verdict.difference:+.2f}',
        f'{verdict.half:.2f}',
        '–' if verdict.p is None else '< 0.001' if verdict.p < 0.001 else f'{verdict.p:.3f}',
        verdict.seeds,
        f'{verdict.size:.2f}',
        paper,
        verdict.text,
    ]


def conditions(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    """Describe the conditions of all figures."""

    def all_of(key: str) -> str:
        return ', '.join(dict.fromkeys(str(row[key]) for row in rows))

    revisions = ', '.join(dict.fromkeys(str(row['revision'])[:10] for row in rows if row['revision']))
    return (
        f'{Path(plan.data).name if "/" in plan.data and not plan.data.startswith("torch/") else plan.data}, '
        f'{plan.img_size}² pixels, {plan.count:,} training and {plan.val_count:,} validation images, '
        f'{plan.images_seen:,} images seen a run ({plan.epochs} epochs, batch {plan.batch_size}), recipe '
        f'{" and ".join(Path(recipe).name for recipe in plan.recipes.values())}, precision {plan.precision}; '
        f'{all_of("device")}, {all_of("threads")} threads, '
        f'torch {all_of("torch")}, t2t-vit {all_of("version")}' + (f' ({revisions})' if revisions else '')
    )


def save_report(folder: Path) -> None:
    """Write README.md, CSV files and plots of a comparison's results, and print the tables.

    Files are written under another name and renamed, so that processes that do it together leave complete files. The
    text of notes.md in the folder becomes the last section of README.md.

    Raises:
        UsageError: if no run is finished.
    """
    plan, rows = read_plan(folder), results(folder)
    if not rows:
        raise UsageError(f'no run in {folder} is finished yet')
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
        plot_arms(
            [(arm.name, arm.parameters, arm.top1, half_width([arm], ranked), arm.custom) for arm in ranked],
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
        (draft / 'README.md').write_text(readme(plan, arms, ranked, judged, about, folder), encoding='utf-8')
        for file in [path for path in draft.rglob('*') if path.is_file()]:
            os.replace(file, folder / file.relative_to(draft))
    show(arms, ranked, judged, about)


def write_csv(file: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table as CSV."""
    with file.open('w', encoding='utf-8', newline='') as stream:
        writer = csv.writer(stream)
        writer.writerow(head)
        writer.writerows(rows)


def show(arms: dict[str, Arm], ranked: Sequence[Arm], judged: Sequence[Verdict], about: str) -> None:
    """Print both tables."""
    table = Table(*ARM_HEAD, title=about)
    for arm in ranked:
        table.add_row(*arm_cells(arm, arms))
    console().print(table)
    table = Table(*VERDICT_HEAD)
    for verdict in judged:
        table.add_row(*verdict_cells(verdict))
    console().print(table)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [
        '| ' + ' | '.join(head) + ' |',
        '|' + '---|' * len(head),
        *('| ' + ' | '.join(row) + ' |' for row in rows),
        '',
    ]


def readme(
    plan: Plan, arms: dict[str, Arm], ranked: Sequence[Arm], judged: Sequence[Verdict], about: str, folder: Path
) -> str:
    """Return the page of a comparison: tables first, then how to read them, then the notes."""
    std, freedom = pooled_std(ranked)
    test = (
        f't tests at 95 % with a standard deviation over seeds of {std:.2f} points, pooled over all arms ({freedom} '
        'degrees of freedom); TOST for `=`, which means within ±1 point. p is corrected for the number of judged pairs '
        "by Holm's method; the intervals are those of single pairs, without the correction."
        if freedom >= MIN_FREEDOM
        else 'none, because too few arms have two seeds: nothing is decided. The intervals are those of two '
        'proportions over the validation images, for orientation; they do not contain the variation over seeds.'
    )
    claims: dict[str, list[Verdict]] = {}
    for verdict in judged:
        claims.setdefault(verdict.pair.claim, []).append(verdict)
    notes, failed = folder / 'notes.md', failures(folder)
    given = ' '.join(f'--{key} {getattr(plan, key)}' for key in OPTIONS[1:] if getattr(plan, key) is not None)
    return '\n'.join(
        [
            "# The paper's claims at small scale",
            '',
            '| claim | verdict |',
            '|---|---|',
            *(
                f'| {claim} | **{overall(found)}** |'
                for claim, found in claims.items()
                if found[0].pair.relation != '?' and any(v.difference is not None for v in found)
            ),
            '',
            f'{about}.',
            '',
            f'`t2t-vit reproduce accuracy --data {plan.data} {given} --output {folder.resolve().name}`',
            '',
            '## Pairs',
            '',
            *markdown(VERDICT_HEAD, [verdict_cells(v) for v in judged if v.difference is not None]),
            *([f'Not run: {missing}.', ''] if (missing := not_run(judged)) else []),
            '![differences](claims.png)',
            '',
            '## Arms',
            '',
            *markdown(ARM_HEAD, [arm_cells(arm, arms) for arm in ranked]),
            '![arms](arms.png)',
            '',
            *(
                [f'Failed and left out: {"; ".join(f"{run} ({reason})" for run, reason in failed.items())}.', '']
                if failed
                else []
            ),
            '## How to read the tables',
            '',
            f'- Top-1 is that of the last epoch. Test: {test}',
            '- A claim holds if all its pairs do, and does not hold if one of them does not. A pair is not judged if '
            f'its ratio of parameters (`size`) differs from the published one by more than {100 * SIZE_TOLERANCE:.0f} '
            f'%, or if an arm is not above the fraction of the largest class, {100 * plan.chance:.1f} %.',
            "- `ratio`: parameters over T2T-ViT-14's, as published and here. MMAC: million multiply-adds of one image. "
            'images/s: training, median over epochs; other processes may have run at the same time.',
            '- A verdict is about these models, data and numbers of images, not about ImageNet: the paper trains 300 '
            'epochs of 1.28 million images. docs/reproduce.md describes scaling and tests. Every run: runs.csv.',
            '',
            *(['## Notes', '', notes.read_text(encoding='utf-8').strip(), ''] if notes.is_file() else []),
        ]
    )


def not_run(judged: Sequence[Verdict]) -> str:
    """List the pairs without runs."""
    pairs = [v.pair for v in judged if v.difference is None]
    return ', '.join(f'{pair.first} {pair.relation} {pair.second}' for pair in pairs)
