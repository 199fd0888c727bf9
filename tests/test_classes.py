"""Classes of data and model are matched by name, and an order is never assumed."""

import json

import pytest

from t2t_vit.classes import ClassError, match_classes, read_classes

TEXT, NATURAL = ['1', '10', '2'], ['1', '2', '10']


def test_subset_of_classes_is_matched_by_name():
    outputs, note = match_classes(['a', 'b', 'c'], ['a', 'c'], 3, 'test')
    assert outputs == [0, 2] and note == "test has no images of 1 of 3 classes: 'b'"
    assert match_classes(['a', 'b'], ['a', 'b'], 2, 'test') == ([0, 1], '')


@pytest.mark.parametrize(
    'classes, message',
    [
        (['a', 'x'], "the model has 3 classes, test has 2: 'x' is in the data and not in the model; 'b', 'c'"),
        (['a', 'b', 'c', 'd'], "'d' is in the data and not in the model"),
        (['b', 'a', 'c'], "number 1 is 'b' in the data and 'a' in the model; .* --classes by-name"),
        (['c', 'a'], 'another order'),
    ],
)
def test_other_classes_or_order_are_refused(classes, message):
    with pytest.raises(ClassError, match=message):
        match_classes(['a', 'b', 'c'], classes, 3, 'test')


def test_order_is_matched_by_name_on_request():
    assert match_classes(['a', 'b', 'c'], ['c', 'a', 'b'], 3, 'test', 'by-name')[0] == [2, 0, 1]


def test_checkpoint_without_names_needs_an_order_if_there_are_two():
    with pytest.raises(ClassError, match='say which with --classes text or --classes natural'):
        match_classes(None, TEXT, 3, 'test')
    for choice, outputs in (('text', [0, 1, 2]), ('natural', [0, 2, 1])):
        found, note = match_classes(None, TEXT, 3, 'test', choice)
        assert found == outputs and 'names no classes' in note
    assert match_classes(None, TEXT, 3, 'test', natural=True)[0] == [0, 2, 1]  # of timm's train.py
    assert match_classes(None, ['ant', 'bee'], 2, 'test')[0] == [0, 1]  # one order only
    assert match_classes(None, ['bee', 'ant'], 2, 'torch/x')[0] == [0, 1]  # no folders: the data's own order
    with pytest.raises(ClassError, match='the model has 3 classes and no names for them, test has 2'):
        match_classes(None, ['a', 'b'], 3, 'test')


def test_matching_by_name_needs_names():
    for classes in (TEXT, ['a', 'b', 'c']):
        with pytest.raises(ClassError, match='the checkpoint names no classes that --classes by-name could match'):
            match_classes(None, classes, 3, 'test', 'by-name')


@pytest.mark.parametrize('tree', [{'0': 'dog', '1': 'cat'}, {'cat': 1, 'dog': 0}, ['dog', 'cat']])
def test_class_names_in_json(tmp_path, tree):
    (tmp_path / 'a.json').write_text(json.dumps(tree))
    assert read_classes(str(tmp_path / 'a.json'), 2) == ['dog', 'cat']


@pytest.mark.parametrize(
    'tree',
    [{'a': 1, 'b': 2}, {'a': 0, 'b': 0}, {'a': 0.5, 'b': 1}, {'a': True, 'b': False}, {'1': 'a', '2': 'b'}]
    + [{'a': 0, 'b': 'x'}, {'a': 'x', 'b': 'y'}, [0, 1], [['a'], ['b']], 'ab', 2, None],
)
def test_other_json_is_refused_as_class_names(tmp_path, tree):
    (tmp_path / 'a.json').write_text(json.dumps(tree))
    with pytest.raises(ClassError, match=r'a.json: cannot be read \(JSON must be a list of names, {name: index}, or'):
        read_classes(str(tmp_path / 'a.json'), 2)


def test_class_files(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xef\xbb\xbf\xc3\xa9\r\nb b\r\n\r\n')
    (tmp_path / 'a.json').write_text(json.dumps({'b': 1, 'a': 0}))
    (tmp_path / 'b.json').write_text('["x", "y"]')
    assert read_classes(str(tmp_path / 'a.txt'), 2) == ['é', 'b b']
    assert read_classes(str(tmp_path / 'a.json'), 2) == ['a', 'b']
    assert read_classes(str(tmp_path / 'b.json'), 2) == ['x', 'y'] and read_classes('text', 2) is None
    (tmp_path / 'c.txt').write_text('a\na\n')
    (tmp_path / 'd.txt').write_bytes(b'\xe9\n')
    for name, message in (
        ('c.txt', "'a' stand there more than once"),
        ('d.txt', 'cannot be read'),
        ('none', 'cannot be read'),
        ('a.txt', 'the file has 2 names, the model has 3 classes'),
    ):
        with pytest.raises(ClassError, match=message):
            read_classes(str(tmp_path / name), 3)
