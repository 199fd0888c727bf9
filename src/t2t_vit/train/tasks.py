"""What a training step minimises: the labels' loss, a teacher's scores too, or a label for every token.

A task holds all that is trained. Its random numbers are those of NumPy's and torch's own generators.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.models import group_parameters
from torch import nn

from ..data import Augment, Batch, Preprocessing
from ..models.init import init_weights
from .config import Config
from .teacher import Teacher, load_teacher
from .token_labels import DenseLabels, LabelFiles, mix_tokens, token_grid


class Task(nn.Module):
    """A student and its loss: called with a batch, gives a scalar.

    Args:
        net: The student, which is what is saved, averaged and validated.
    """

    net: Any  # a module with the attributes of timm's
    teacher: Teacher | None = None

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch, whose images may be changed in place."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """The student's, for timm's optimizers."""
        return {f'net.{name}' for name in self.net.no_weight_decay()} if hasattr(self.net, 'no_weight_decay') else set()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The student's layers, for timm's layer decay; what else is trained is of the last one, as the head is."""
        layers = group_parameters(self.net, self.net.group_matcher(coarse), reverse=True)
        return lambda name: layers.get(name.removeprefix('net.'), max(layers.values()))


class Classify(Task):
    """Cross-entropy with the labels, of images mixed as the augmentation says."""

    def __init__(self, net: nn.Module, augment: Augment, class_weights: torch.Tensor | None = None) -> None:
        super().__init__(net)
        self.mixup = (
            Mixup(
                augment.mixup,
                augment.cutmix,
                switch_prob=augment.mixup_switch_prob,
                label_smoothing=augment.smoothing,
                num_classes=self.net.num_classes,
            )
            if augment.mixup or augment.cutmix
            else None
        )
        if self.mixup and class_weights is None:
            self.loss: nn.Module = SoftTargetCrossEntropy()
        else:
            smoothing = 0.0 if self.mixup else augment.smoothing  # mixup's targets are smoothed already
            self.loss = nn.CrossEntropyLoss(class_weights, label_smoothing=smoothing)

    def mix(self, batch: Batch) -> Any:
        """Images and targets."""
        return self.mixup(batch.images, batch.labels) if self.mixup else (batch.images, batch.labels)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The loss; mixing is in place."""
        images, targets = self.mix(batch)
        return self.loss(self.net(images), targets)


class Distill(Classify):
    """Cross-entropy with the labels, and with what a teacher says of the same images, mixed or not.

    (1 - weight)·CE(labels) + weight·T²·KL(teacher's scores / T ‖ student's scores / T), Hinton et al. 2015; or, `hard`,
    the cross-entropy with the teacher's choice instead (DeiT, Touvron et al. 2021, Eq. 3). The student is the plain
    model: no token is added to learn from the teacher.

    Args:
        net: The student.
        augment: How images are mixed, and the labels smoothed.
        teacher: Gives its scores of the student's images.
        weight: The teacher's share, from 0 to 1.
        temperature: T; above 1, more of the classes that the teacher thinks unlikely counts.
        hard: The teacher's choice only.
    """

    def __init__(
        self,
        net: nn.Module,
        augment: Augment,
        teacher: Teacher,
        weight: float = 0.5,
        temperature: float = 1.0,
        hard: bool = False,
        class_weights: torch.Tensor | None = None,
    ) -> None:
        super().__init__(net, augment, class_weights)
        self.teacher: Teacher = teacher
        self.weight, self.temperature, self.hard = weight, temperature, hard

    def forward(self, batch: Batch) -> torch.Tensor:
        """The loss; mixing is in place."""
        images, targets = self.mix(batch)
        scores, lesson = self.net(images).float(), self.teacher(images)
        if self.hard:
            distance = F.cross_entropy(scores, lesson.argmax(1))
        else:
            ours, theirs = ((s / self.temperature).log_softmax(1) for s in (scores, lesson))
            distance = F.kl_div(ours, theirs, reduction='batchmean', log_target=True) * self.temperature**2
        return (1 - self.weight) * self.loss(scores, targets) + self.weight * distance


class TokenLabels(Task):
    """Token labeling: cross-entropy of the class token with the label, and of every other token with its own.

    CE(class token) + weight · mean over tokens of CE(aux_head(token), label of its place), Jiang et al. 2021, Eq. 3.

    Args:
        net: The student, a model of tokens.
        dense: Gives the tokens' labels.
        weight: Of the tokens' term.
        mixtoken: Alpha of MixToken, 0 for none. Labels are those of the unmixed images, mixed as their pixels are.
        smoothing: Of the class token's label.
    """

    def __init__(
        self, net: nn.Module, dense: DenseLabels, weight: float = 0.5, mixtoken: float = 1.0, smoothing: float = 0.1
    ) -> None:
        super().__init__(net)
        token_grid(net, *Preprocessing.of(self.net.pretrained_cfg).size)  # raises where there is none
        self.dense, self.weight, self.mixtoken, self.smoothing = dense, weight, mixtoken, smoothing
        self.aux_head = nn.Linear(self.net.num_features, self.net.num_classes)
        init_weights(self.aux_head)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The loss; the batch stays as it is."""
        images, share = batch.images, 1.0
        dense = self.dense(batch, token_grid(self.net, images.shape[-2], images.shape[-1]))  # (B, C, h, w)
        if self.mixtoken:
            stride = self.net.feature_info[-1]['reduction']
            images, dense, share = mix_tokens(images, dense, self.mixtoken, stride)
        targets = mixup_target(batch.labels, dense.shape[1], share, self.smoothing)  # with the same partner
        tokens = self.net.forward_features(images)  # (B, prefix + N, D)
        scores = self.net.forward_head(tokens).float()
        places = self.aux_head(tokens[:, self.net.num_prefix_tokens :]).float()  # (B, N, C)
        return F.cross_entropy(scores, targets) + self.weight * F.cross_entropy(
            places.transpose(1, 2), dense.flatten(2)
        )


def balanced_weights(labels: Sequence[int], classes: int) -> torch.Tensor:
    """Return a weight for each class, (classes,), inverse to its number of images and 1 on average over images."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes)
    return len(labels) / (classes * counts.clamp(min=1))


def make_task(config: Config, net: nn.Module, name: Callable[[int], str], labels: Sequence[int] | None = None) -> Task:
    """What config.objective says, for a student with its preprocessing and classes in its pretrained_cfg.

    Args:
        config: Without problems.
        net: The student.
        name: That of a training image by its index, as `Source.name`.

    Raises:
        UsageError: if the teacher cannot be loaded or does not fit, or the model has no tokens to label.
        DataError: if there are no labels for the tokens.
    """
    goal, augment = config.objective, config.augment
    cfg: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    weights = balanced_weights(labels, cfg['num_classes']) if goal.class_weights and labels is not None else None
    if goal.kind == 'labels':
        return Classify(net, augment, weights)
    if goal.labels:
        dense_labels: DenseLabels = LabelFiles(
            Path(goal.labels).expanduser(), Path(config.data.root).expanduser(), name, cfg['num_classes']
        )
        return TokenLabels(net, dense_labels, goal.weight, goal.mixtoken, augment.smoothing)
    dense = goal.kind == 'token_labels'
    teacher = load_teacher(str(goal.teacher), cfg, goal.teacher_size, dense)
    if dense:
        task = TokenLabels(net, teacher.label_tokens, goal.weight, goal.mixtoken, augment.smoothing)
        task.teacher = teacher
        return task
    return Distill(net, augment, teacher, goal.weight, goal.temperature, goal.hard, weights)
