"""Losses of a training step: cross-entropy, distillation, or a label for every token.

A task holds all trainable parameters. It draws random numbers from NumPy's and torch's global generators.
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
    """A model and its loss: maps a batch to a scalar.

    Args:
        net: The model, which is saved, averaged and validated.
    """

    net: Any  # a module with the attributes of timm's
    teacher: Teacher | None = None

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch; its images may be changed in place."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Return the model's parameters without weight decay, for timm's optimizers."""
        return {f'net.{name}' for name in self.net.no_weight_decay()} if hasattr(self.net, 'no_weight_decay') else set()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the model's layers, for timm's layer decay; other parameters belong to the last one, like the head."""
        layers = group_parameters(self.net, self.net.group_matcher(coarse), reverse=True)
        return lambda name: layers.get(name.removeprefix('net.'), max(layers.values()))


class Classify(Task):
    """Cross-entropy with the labels, of images mixed by mixup and cutmix."""

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
        """Return mixed images and their targets."""
        return self.mixup(batch.images, batch.labels) if self.mixup else (batch.images, batch.labels)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the loss; images are mixed in place."""
        images, targets = self.mix(batch)
        return self.loss(self.net(images), targets)


class Distill(Classify):
    """Cross-entropy with the labels, and a distance to a teacher's scores of the same images.

    (1 - weight)·CE(labels) + weight·T²·KL(teacher's logits / T ‖ student's logits / T), Hinton et al. 2015; or, with
    `hard`, the cross-entropy with the teacher's predicted class instead (DeiT, Touvron et al. 2021, Eq. 3). No
    distillation token is added. timm's LogitDistillationTask has neither `hard` nor a teacher of another image size;
    a test compares the two.

    Args:
        net: The student.
        augment: Mixup, cutmix and label smoothing.
        teacher: Returns its logits of the student's images.
        weight: Weight of the teacher's loss, from 0 to 1.
        temperature: T; above 1, unlikely classes count more.
        hard: Use the teacher's predicted class.
        class_weights: Weight of each class in the cross-entropy with the labels, (classes,).
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
        """Return the loss; images are mixed in place."""
        images, targets = self.mix(batch)
        logits, target = self.net(images).float(), self.teacher(images)
        if self.hard:
            distance = F.cross_entropy(logits, target.argmax(1))
        else:
            ours, theirs = ((s / self.temperature).log_softmax(1) for s in (logits, target))
            distance = F.kl_div(ours, theirs, reduction='batchmean', log_target=True) * self.temperature**2
        return (1 - self.weight) * self.loss(logits, targets) + self.weight * distance


class TokenLabels(Task):
    """Token labeling: cross-entropy of the class token with the label, and of every other token with its own label.

    CE(class token) + weight · mean over tokens of CE(aux_head(token), label of its position), Jiang et al. 2021, Eq. 3.

    Args:
        net: The student, a model with a token grid.
        dense: Returns the tokens' labels.
        weight: Weight of the tokens' term.
        mixtoken: Alpha of MixToken, 0 to turn it off. The labels of the unmixed images are mixed as their pixels are.
        smoothing: Label smoothing of the class token's label.
    """

    def __init__(
        self, net: nn.Module, dense: DenseLabels, weight: float = 0.5, mixtoken: float = 1.0, smoothing: float = 0.1
    ) -> None:
        super().__init__(net)
        token_grid(net, *Preprocessing.of(self.net.pretrained_cfg).size)  # raises if it has none
        self.dense, self.weight, self.mixtoken, self.smoothing = dense, weight, mixtoken, smoothing
        self.aux_head = nn.Linear(self.net.num_features, self.net.num_classes)
        init_weights(self.aux_head)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the loss; the batch is not changed."""
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
    """Build the task that config.objective describes.

    Args:
        config: A valid configuration.
        net: The student, with preprocessing and classes in its pretrained_cfg.
        name: Returns the name of a training image by its index, see `Source.name`.
        labels: Labels of the training images, for class weights.

    Raises:
        UsageError: if the teacher cannot be loaded or does not fit, or the model has no token grid.
        DataError: if the labels of the tokens are missing.
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
