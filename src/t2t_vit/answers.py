"""The answers of a classifier as plain data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .settings import UsageError

if TYPE_CHECKING:
    import pandas

    from .metrics import Measures


@dataclass
class Prediction:
    """A model's answer for one image; `label` and `probability` are None where `error` says why."""

    image: str
    label: str | None = None
    probability: float | None = None
    top_k: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None


class Predictions(list[Prediction]):
    """A list of predictions, in the order of the images.

    Attributes:
        skipped: How many files in folders and tars are no images and were left out, by reason.
    """

    def __init__(self, predictions: Iterable[Prediction] = (), skipped: Mapping[str, int] | None = None) -> None:
        super().__init__(predictions)
        self.skipped = dict(skipped or {})

    @property
    def damaged(self) -> list[Prediction]:
        """The predictions of images that have an error instead of a label."""
        return [one for one in self if one.error is not None]

    def to_pandas(self) -> 'pandas.DataFrame':
        """Return a table: image, label, probability, error, and class_1, probability_1, class_2, …

        Raises:
            UsageError: if pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise UsageError('to_pandas needs pandas, which is not installed: pip install pandas') from None
        rows = [
            {
                'image': one.image,
                'label': one.label,
                'probability': one.probability,
                'error': one.error,
                **{f'class_{i}': name for i, (name, _) in enumerate(one.top_k, 1)},
                **{f'probability_{i}': value for i, (_, value) in enumerate(one.top_k, 1)},
            }
            for one in self
        ]
        return pandas.DataFrame(rows)


class Scored(NamedTuple):
    """A labelled image and the model's answer; probabilities of the predicted class and of the label."""

    position: int
    image: str
    label: str
    predicted: str
    probability: float
    probability_of_label: float


@dataclass
class Evaluation:
    """The scores of a model on labelled images.

    `classes` are the model's, in the order of its outputs; `measures` has the numbers; `rows` has every image.
    """

    checkpoint: str
    data: str
    split: str
    augmentation: str
    classes: list[str]
    measures: 'Measures'
    rows: list[Scored]
    damaged: list[str]
    not_finite: int
    seconds: float
    notes: list[str]

    def mistakes(self) -> list[Scored]:
        """Return the images that were classified wrongly, the most confident mistakes first."""
        wrong = [row for row in self.rows if row.predicted != row.label]
        return sorted(wrong, key=lambda row: -row.probability)

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers as plain values for scores.json; None if a number is undefined."""
        found, names = self.measures, self.classes
        plain = {key: value for key, value in vars(found).items() if key not in ('per_class', 'confusion')}
        return dict(
            checkpoint=self.checkpoint,
            data=self.data,
            split=self.split,
            augmentation=self.augmentation,
            **plain,
            per_class=dict(zip(names, found.per_class['recall'])),
            classes={
                name: dict(images=int(count), **{key: values[i] for key, values in found.per_class.items()})
                for i, (name, count) in enumerate(zip(names, found.confusion.sum(1)))
            },
            damaged=self.damaged,
            not_finite=self.not_finite,
            notes=self.notes,
        )
