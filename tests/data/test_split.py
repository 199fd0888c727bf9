"""Dividing one folder of class folders: stratified, seeded, grouped, in folds, and the same again from names."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2t_vit.cli import main
from t2t_vit.data import SPLIT_FILE, DataError, Folder, Split, SplitOptions, open_train_val, split_source
from t2t_vit.data.split import choose_groups
from t2t_vit.inputs import open_own

COUNTS = {'cat': 30, 'dog': 20, 'emu': 10}


@pytest.fixture(scope='module')
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images of three classes, by four photographers."""
    root = tmp_path_factory.mktemp('pets')
    for name, count in COUNTS.items():
        (root / name).mkdir()
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 255, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f'p{i % 4}-{i:02}.png')
    return root


def divide(root: Path, **options: object) -> Split:
    return split_source(Folder(root), str(root), SplitOptions(**options))


def test_fraction_is_the_same_for_every_class(pets):
    split = divide(pets, val_fraction=0.2)
    assert Counter(name.partition('/')[0] for name in split.val) == {'cat': 6, 'dog': 4, 'emu': 2}
    assert sorted([*split.train, *split.val]) == sorted(
        path.relative_to(pets).as_posix() for path in pets.rglob('*.png')
    )


def test_split_depends_on_the_seed_and_not_on_the_order_of_files(pets):
    first, again, other = (divide(pets, val_fraction=0.2, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.val != other.val
    source = Folder(pets)
    order = np.random.default_rng(0).permutation(len(source.labels))
    source.files, source.labels = [source.files[i] for i in order], [source.labels[i] for i in order]
    assert split_source(source, str(pets), SplitOptions(0.2, 1)) == first


def test_folds_cover_every_image_once(pets):
    splits = [divide(pets, fold=fold, folds=5) for fold in range(5)]
    names = [name for split in splits for name in split.val]
    assert len(names) == len({*names}) == 60
    assert all(
        Counter(name.partition('/')[0] for name in split.val) == {'cat': 6, 'dog': 4, 'emu': 2} for split in splits
    )


@pytest.mark.parametrize('options', [dict(val_fraction=0.25), dict(fold=1, folds=4)])
def test_groups_stay_together(pets, options):
    split = divide(pets, group_by=r'/(p\d)-', **options)
    train, val = ({name.partition('/')[2][:2] for name in names} for names in (split.train, split.val))
    assert len(val) == 1 and len(train) == 3 and not train & val


@pytest.mark.parametrize('fraction', [0.1, 0.2, 0.3, 0.4, 0.7])
def test_groups_have_the_fraction_of_every_class(fraction):
    """Forty groups of very different size and of mixed classes."""
    chance = np.random.default_rng(0)
    keys = np.repeat(np.arange(40), chance.integers(1, 60, 40))
    labels = (chance.random(len(keys)) < 0.2 + 0.02 * (keys % 3)).astype(int)
    chosen = choose_groups(labels, keys, fraction, 0)
    taken = np.isin(keys, chosen)
    assert chosen == choose_groups(labels, keys, fraction, 0) != choose_groups(labels, keys, fraction, 1)
    assert abs(taken.mean() - fraction) < 0.01
    assert all(abs(taken[labels == label].mean() - fraction) < 0.02 for label in (0, 1))


def test_fraction_that_groups_do_not_allow_is_said(pets):
    options = SplitOptions(val_fraction=0.4, group_by=r'/(p\d)-')
    split = divide(pets, val_fraction=0.4, group_by=r'/(p\d)-')
    taken = len(split.val) / 60
    assert abs(taken - 0.4) < 0.11 and f'{taken:.0%} of the images are validated on, not 40%' in options.describe(split)
    assert SplitOptions(val_fraction=0.25, group_by='x').describe(divide(pets, val_fraction=0.25)) == ''
    assert len(divide(pets, val_fraction=0.01, group_by=r'/(p\d)-').val) > 0


def test_plan_says_the_fraction_that_groups_allow(pets, tmp_path, capsys):
    words = ['train', str(pets), '--dry-run', '--model', 't2t_vit_4_16', '--data.img_size', '16', '--batch_size', '2']
    words += ['--data.workers', '0', '--data.val_fraction', '0.4', '--data.group_by', r'/(p\d)-', '--device', 'cpu']
    assert main([*words, '--output', str(tmp_path / 'run')]) == 0
    assert 'images are validated on, not 40%: the groups by' in ' '.join(capsys.readouterr().out.split())


def test_groups_by_a_column_of_a_table(pets, tmp_path):
    rows = [f'{path},{path.parent.name},{path.name[:2]}' for path in sorted(pets.rglob('*.png'))]
    (tmp_path / 'all.csv').write_text('path,label,photographer\n' + '\n'.join(rows))
    options = SplitOptions(val_fraction=0.25, group_by='photographer')
    train, val, _ = open_train_val(str(tmp_path / 'all.csv'), options=options)
    assert len({val.name(i).rpartition('/')[2][:2] for i in range(len(val.labels))}) == 1
    with pytest.raises(DataError, match="has no column 'nobody'"):
        open_train_val(str(tmp_path / 'all.csv'), options=SplitOptions(val_fraction=0.25, group_by='nobody'))


def test_split_is_saved_and_applied_again(pets, tmp_path):
    train, val, split = open_train_val(str(pets), options=SplitOptions(val_fraction=0.2))
    assert train.classes == val.classes == [*COUNTS] and (len(train.labels), len(val.labels)) == (48, 12)
    split.save(tmp_path / 'split.json')
    loaded = Split.load(tmp_path / 'split.json')
    again, same, _ = open_train_val(str(pets), options=SplitOptions(val_fraction=0.5, seed=9), split=loaded)
    assert loaded == split and [again.name(i) for i in range(48)] == [train.name(i) for i in range(48)]
    assert [same.name(i) for i in range(12)] == [val.name(i) for i in range(12)]


def test_images_added_later_change_no_split(pets, tmp_path):
    split = divide(pets, val_fraction=0.2)
    for path in pets.rglob('*.png'):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        (tmp_path / path.parent.name / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'cat' / 'new.png').write_bytes(path.read_bytes())
    train, val = split.apply(Folder(tmp_path), str(tmp_path))
    assert (len(train.labels), len(val.labels)) == (48, 12)
    (tmp_path / split.val[0]).unlink()
    with pytest.raises(DataError, match=f'1 images of the split are not in .*, as {split.val[0]}'):
        split.apply(Folder(tmp_path), str(tmp_path))


def test_names_that_are_not_utf8_are_kept_in_a_split(tmp_path):
    split = Split([os.fsdecode(b'a/caf\xe9\n.png')], ['b/"\u732b".png'])
    split.save(tmp_path / 'split.json')
    assert Split.load(tmp_path / 'split.json') == split


def test_training_split_is_divided_if_there_is_one(pets, tmp_path):
    (tmp_path / 'train').symlink_to(pets)
    (tmp_path / 'test' / 'cat').mkdir(parents=True)
    (tmp_path / 'test' / 'cat' / 'x.png').write_bytes(next(pets.rglob('*.png')).read_bytes())
    train, val, _ = open_train_val(str(tmp_path), options=SplitOptions(val_fraction=0.2))
    assert (len(train.labels), len(val.labels)) == (48, 12) and 'test' not in val.name(0).split('/')


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(val_fraction=0.01), 'a fraction of 0.01 of 60 images is less than one image for each of 3 classes'),
        (dict(fold=0, folds=11), r'each class needs at least 11 images to be divided: emu \(10\)'),
        (dict(val_fraction=0.2, group_by='^([a-z]+)/'), r'each class needs at least 2 groups to be divided: cat \(1\)'),
        (
            dict(val_fraction=0.2, group_by='site'),
            "data.group_by 'site' is not found in 60 of 60 names, as cat/p0-00.png",
        ),
    ],
)
def test_impossible_splits_are_rejected(pets, options, message):
    with pytest.raises(DataError, match=message):
        divide(pets, **options)


@pytest.mark.parametrize('text', ['', '[]', '{"train": []}', '{"train": [1], "val": []}', '\xff'])
def test_damaged_split_file_is_rejected(text, tmp_path):
    (tmp_path / 'split.json').write_text(text, encoding='latin-1')
    with pytest.raises(DataError, match='split.json is not a split'):
        Split.load(tmp_path / 'split.json')


def test_all_problems_of_split_options_are_named():
    problems = SplitOptions(val_fraction=1.5, seed=-1, group_by='(', fold=7, folds=1).problems()
    assert len(problems) == 5 and all(problem.startswith('data.') for problem in problems)
    assert SplitOptions(group_by='x').problems() == ["data.group_by 'x' needs data.val_fraction or data.fold"]
    assert not SplitOptions().problems() and not SplitOptions(0.2).problems()


def test_evaluation_of_a_run_uses_its_split(pets, tmp_path):
    _, val, split = open_train_val(str(pets), options=SplitOptions(val_fraction=0.2))
    split.save(tmp_path / SPLIT_FILE)
    (tmp_path / 'config.yaml').write_text(f'data: {{root: "{pets}"}}', encoding='utf-8')
    source, name = open_own(str(tmp_path), 'val', None, 3)
    assert name == str(pets) and [source.name(i) for i in range(12)] == [val.name(i) for i in range(12)]
    assert len(open_own(str(tmp_path), 'train', None, 3)[0].labels) == 48
