"""The Python interface returns what the commands write."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, SMALLER
from PIL import Image

from t2t_vit import Classifier, cli
from t2t_vit.classes import ClassError
from t2t_vit.data import DataError
from t2t_vit.hub import save_pretrained
from t2t_vit.settings import UsageError


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an untrained model for photos; read-only."""
    torch.manual_seed(0)
    net = timm.create_model('t2t_vit_4_16', num_classes=3, **SMALLER)
    torch.nn.init.normal_(net.head.weight)
    net.pretrained_cfg.update(label_names=CLASSES, num_classes=3)
    return save_pretrained(net, tmp_path_factory.mktemp('models') / 'small', model_args=SMALLER)


@pytest.fixture(scope='module')
def classifier(folder) -> Classifier:
    return Classifier.load(folder, device='cpu')


def test_predict_takes_paths_images_and_arrays(classifier, photos):
    path = sorted((photos / 'val' / 'sky').glob('*.png'))[0]
    image = Image.open(path)
    found = classifier.predict([path, str(path), image, np.asarray(image)], top_k=2)
    assert [one.label for one in found] == [found[0].label] * 4 and found[0].image == str(path)
    assert [one.probability for one in found] == pytest.approx([found[0].probability] * 4, abs=1e-6)
    assert found[0].top_k[0] == (found[0].label, found[0].probability) and len(found[0].top_k) == 2
    assert classifier.predict(path)[0].label == classifier.predict(image)[0].label == found[0].label
    assert len(classifier.predict(photos / 'val')) == 12  # a folder


def test_predict_turns_images_upright_and_puts_them_on_white(classifier):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 4), np.uint8)
    image = Image.fromarray(pixels)
    flat = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image).convert('RGB')
    turned = flat.transpose(Image.Transpose.ROTATE_180)
    turned.getexif()[0x0112] = 3
    first, *others = classifier.predict([flat, image, turned])
    for other in others:
        assert other.top_k == [(name, pytest.approx(value, abs=1e-6)) for name, value in first.top_k]


def test_one_unreadable_image_is_an_error_of_its_own(classifier, photos, tmp_path):
    (tmp_path / 'a.png').write_text('not an image')
    good = sorted((photos / 'val' / 'sky').glob('*.png'))[0]
    bad, found = classifier.predict([tmp_path / 'a.png', good])
    assert bad.label is None and bad.top_k == [] and bad.error.startswith('ImageError: not an image')
    assert found.error is None and found.label in CLASSES
    assert np.isnan(classifier.embed([tmp_path / 'a.png', good])).all(1).tolist() == [True, False]
    with pytest.raises(DataError, match='nowhere'):
        classifier.predict(['nowhere.png'])
    with pytest.raises(UsageError, match='image 0 is a int; expected a path, the bytes of a file, a PIL'):
        classifier.predict([3])


def test_predictions_count_damaged_images_and_files_left_out(classifier, photos, tmp_path):
    good = sorted((photos / 'val' / 'sky').glob('*.png'))[0]
    shutil.copy(good, tmp_path)
    (tmp_path / 'damaged.png').write_bytes(b'\x89PNG damaged')
    (tmp_path / 'notes.txt').write_text('no image')
    found = classifier.predict(tmp_path)
    assert [one.image for one in found.damaged] == [str(tmp_path / 'damaged.png')]
    assert found.skipped == {'files ending in .txt': 1}
    assert classifier.predict(good).damaged == [] and classifier.predict(good).skipped == {}


def test_predict_takes_the_bytes_of_a_file(classifier, photos):
    files = sorted((photos / 'val' / 'sky').glob('*'))[:2]
    found = classifier.predict([*(file.read_bytes() for file in files), b'no image'])
    assert [one.top_k for one in found[:2]] == [one.top_k for one in classifier.predict(files)]
    assert found[2].label is None and 'not an image' in found[2].error
    assert np.array_equal(classifier.embed(files[0].read_bytes()), classifier.embed(files[:1]))


def test_predict_says_what_it_expects(classifier):
    image = np.zeros((16, 16, 3), np.uint8)
    for call in (classifier.predict, classifier.embed):
        with pytest.raises(UsageError, match='batch_size must be at least 1, got 0\nworkers must be at least 0'):
            call(image, batch_size=0, workers=-1)
        for value in (None, 3):
            with pytest.raises(UsageError, match=f'images are a {type(value).__name__}; expected a path, the bytes'):
                call(value)
    with pytest.raises(UsageError, match='top_k must be at least 1, got 0'):
        classifier.predict(image, top_k=0)
    with pytest.raises(UsageError, match='batch_size must be at least 1, got 0'):
        classifier.evaluate('digits', batch_size=0)


def test_predict_takes_bytes_of_every_kind(classifier, photos):
    content = min((photos / 'val' / 'sky').glob('*.png')).read_bytes()
    found = classifier.predict([content, bytearray(content), memoryview(content)])
    assert [one.top_k for one in found] == [found[0].top_k] * 3 and classifier.predict(bytearray(content))[0].label


def test_predictions_as_a_table(classifier, photos):
    pandas = pytest.importorskip('pandas')
    table = classifier.predict(photos / 'val', top_k=3).to_pandas()
    assert isinstance(table, pandas.DataFrame) and len(table) == 12
    assert list(table.columns[:5]) == ['image', 'label', 'probability', 'error', 'class_1']
    assert (table.label == table.class_1).all() and (table.probability_1 >= table.probability_3).all()


def test_commands_write_what_the_interface_returns(classifier, folder, photos, tmp_path):
    words = [str(photos / 'val'), '--checkpoint', str(folder), '--device', 'cpu', '--workers', '0']
    assert cli.main(['predict', *words, '--output', str(tmp_path / 'a.jsonl')]) == 0
    rows = [json.loads(line) for line in (tmp_path / 'a.jsonl').read_text().splitlines()]
    found = classifier.predict(photos / 'val')
    assert [row['classes'][0] for row in rows] == [one.label for one in found]
    assert [row['probabilities'][0] for row in rows] == pytest.approx([one.probability for one in found], abs=1e-6)
    assert cli.main(['embed', *words, '--output', str(tmp_path / 'a.npy')]) == 0
    assert np.allclose(np.load(tmp_path / 'a.npy'), classifier.embed(photos / 'val'), atol=1e-6)
    words = ['--data', str(photos), '--checkpoint', str(folder), '--device', 'cpu', '--output', str(tmp_path)]
    assert cli.main(['eval', *words]) == 0
    scores = json.loads((tmp_path / 'scores.json').read_text())
    measures = classifier.evaluate(str(photos)).measures
    assert (scores['top1'], scores['f1'], scores['images']) == (measures.top1, measures.f1, 12)


def test_evaluate_uses_the_runs_own_data(digits_run):
    found = Classifier.load(digits_run, device='cpu').evaluate()
    assert (found.data, found.measures.images) == ('digits', 360)
    state = max((digits_run / 'checkpoints').glob('step-*.pt'))
    assert Classifier.load(state, device='cpu').evaluate(split='train').measures.images == 1437


def test_evaluate_without_data_or_run_is_refused(classifier, photos, tmp_path):
    with pytest.raises(UsageError, match='is not in a run folder, which would know its data'):
        classifier.evaluate()
    for name in ('flower', 'moon'):
        shutil.copytree(photos / 'val' / 'flower', tmp_path / name)
    with pytest.raises(ClassError, match="'moon' is in the data and not in the model"):
        classifier.evaluate(str(tmp_path))


def test_test_time_augmentation_averages_probabilities(classifier):
    images = torch.randn(2, 3, 16, 16)
    flipped = classifier.averaged(images, 'flip').exp()
    both = classifier.logits(images).softmax(1) + classifier.logits(images.flip(3)).softmax(1)
    assert torch.allclose(flipped, both / 2, atol=1e-6)
    crops = classifier.averaged(images, 'crops').exp()
    assert torch.allclose(crops.sum(1), torch.ones(2), atol=1e-5) and not torch.allclose(crops, flipped, atol=1e-6)


def test_train_returns_a_classifier_and_prints_nothing(tmp_path, capsys):
    found = Classifier.train(
        'digits',
        recipe='digits',
        output=tmp_path / 'run',
        epochs=1,
        batch_size=256,
        optimizer={'warmup_epochs': 0},
        model_args=SMALLER,
        device='cpu',
    )
    assert capsys.readouterr().out == ''
    assert [record['epoch'] for record in found.history] == [0] and found.checkpoint == str(tmp_path / 'run')
    assert found.predict('digits')[0].label in found.classes == [str(i) for i in range(10)]
    with pytest.raises(UsageError, match='optimizer.lr'):
        Classifier.train('digits', output=tmp_path / 'other', optimizer={'lr': -1.0})
    with pytest.raises(UsageError, match="unknown recipe 'digit', did you mean digits"):
        Classifier.train('digits', recipe='digit')


def test_train_chooses_settings_and_takes_options_of_the_data(photos, tmp_path, capsys):
    small = dict(model='t2t_vit_4_16', model_args=SMALLER, epochs=1, device='cpu')
    data = {'img_size': 16, 'workers': 0}
    found = Classifier.train(photos, output=tmp_path / 'run', verbose=True, data=data, **small)
    assert 'chosen    batch_size 8' in capsys.readouterr().out
    assert found.preprocessing.size == (16, 16) and found.classes == CLASSES
    tuned = Classifier.train(photos, 'finetune', tmp_path / 'tuned', weights=found.checkpoint, epochs=1, device='cpu')
    assert tuned.preprocessing.size == (16, 16)


def test_class_file_names_a_foreign_checkpoint(photos, tmp_path):
    """A checkpoint without names: numbers and a note; with a file its names and order, in every result."""
    torch.manual_seed(0)
    net = timm.create_model('t2t_vit_4_16', num_classes=3)
    torch.save({'state_dict': net.state_dict()}, tmp_path / 'old.pth')
    plain = Classifier.load(tmp_path / 'old.pth', 't2t_vit_4_16', device='cpu')
    assert plain.classes == ['0', '1', '2'] and 'names no classes' in plain.note()
    (tmp_path / 'names.txt').write_text('sky\nroof\nflower\n')
    named = Classifier.load(tmp_path / 'old.pth', 't2t_vit_4_16', device='cpu', classes=str(tmp_path / 'names.txt'))
    assert named.classes == ['sky', 'roof', 'flower'] and named.note() == ''
    with pytest.raises(ClassError, match='in another order'):
        named.evaluate(str(photos))
    choice = 'by-name'
    named.choice = choice
    found = named.evaluate(str(photos))
    by_hand = [{'sky': 0, 'roof': 1, 'flower': 2}[Path(row.image).parent.name] for row in found.rows]
    assert [found.classes.index(row.label) for row in found.rows] == by_hand


def test_import_is_lazy():
    code = 'import sys, t2t_vit; assert "t2t_vit.classifier" not in sys.modules; t2t_vit.Classifier.load'
    subprocess.run([sys.executable, '-c', code], check=True)
