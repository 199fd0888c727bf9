"""Models as folders that explain themselves, here and on the Hub: weights, configuration, a model card."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from torch import nn

from . import __version__
from .console import console
from .models.listing import count_parameters
from .models.published import PUBLISHED
from .settings import UsageError, nest
from .trained import CARD, CONFIG, WEIGHTS, check_folder, from_pretrained, save_folder

__all__ = ['Card', 'from_pretrained', 'licence_of', 'push', 'save_pretrained']

RELEASE_LICENCE = 'bsd-3-clause-clear'
UNSTATED = 'Not stated by whoever made them: ask before you use them for anything but a look.'
HEADING = '## Licence of the weights'
INHERITED = re.compile(r' The weights that they started from, .*? holds on')  # what `Card` says of a licence
PLACE = 'USER/NAME'  # until it is pushed
PRIVATE = ('output', 'device', 'threads', 'trackers', 'save_minutes', 'keep', 'data.cache', 'data.download')


@dataclass
class Card:
    """What a model card says of a model, beside what the model says itself.

    Args:
        data: What it was trained and scored on, a sentence.
        dataset: The name of the data.
        recipe: The configuration of the training, as YAML.
        scores: Shares of right answers in [0, 1] and the loss, by name.
        note: How the scores came about.
        weights: The name of the weights that the training started from; from scratch by default.
        license: Of the weights, in the Hub's short form, as apache-2.0; None where nobody stated one.
    """

    data: str = 'Not recorded.'
    dataset: str | None = None
    recipe: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    note: str = ''
    weights: str | None = None
    license: str | None = None

    def text(self, model: nn.Module) -> str:
        """The card in Markdown, with the metadata that the Hub reads."""
        cfg: Any = model.pretrained_cfg
        name, size = cfg['architecture'], 'x'.join(map(str, cfg['input_size']))
        total, learned = count_parameters(model)
        results = (
            [
                EvalResult(
                    task_type='image-classification',
                    dataset_type=self.dataset,
                    dataset_name=self.dataset,
                    dataset_split='validation',
                    metric_type='accuracy',
                    metric_name='top-1',
                    metric_value=round(self.scores['top-1'], 4),
                )
            ]
            if self.dataset and 'top-1' in self.scores
            else None
        )
        data = ModelCardData(
            library_name='timm',
            pipeline_tag='image-classification',
            tags=['image-classification', 'timm', 't2t-vit'],
            license=self.license,
            model_name=name,
            eval_results=results,
            datasets=self.dataset.removeprefix('hfds/') if self.dataset and self.dataset.startswith('hfds/') else None,
        )
        title = f'# {name}, trained on {self.dataset}' if self.dataset else f'# {name}'
        lines = [
            '---',
            data.to_yaml(),
            '---',
            '',
            title,
            '',
            f'An image classifier of {model.num_classes} classes for images of {size}, {total:,} parameters, '
            f'{learned:,} of them learned. Made with t2t-vit {__version__}.',
            '',
            '## Data',
            '',
            self.data,
            '',
        ]
        if self.scores:
            lines += [
                '## Scores',
                '',
                '| | validation |',
                '|---|---|',
                *(
                    f'| {key} | {value:.4f} |' if key == 'loss' else f'| {key} | {100 * value:.2f} % |'
                    for key, value in self.scores.items()
                ),
                '',
                self.note,
                '',
            ]
        if self.recipe:
            start = f'the weights {self.weights}' if self.weights else 'scratch'
            lines += [
                '## Recipe',
                '',
                f'From {start}, by `t2t-vit train --config` with',
                '',
                '```yaml',
                self.recipe.rstrip(),
                '```',
                '',
            ]
        licence = f'{self.license}.' if self.license else UNSTATED
        if self.weights:
            licence += f' The weights that they started from, {self.weights}, have a licence that holds on.'
        lines += [
            HEADING,
            '',
            licence,
            '',
            '## Use',
            '',
            '```python',
            'import timm',
            'import t2t_vit  # registers the models',
            '',
            f"model = timm.create_model('hf-hub:{PLACE}', pretrained=True).eval()",
            '```',
            '',
            f'or `t2t-vit predict IMAGES --checkpoint hf-hub:{PLACE}`.',
        ]
        return '\n'.join(lines) + '\n'


def licence_of(weights: str | None) -> str | None:
    """The licence of weights to start from: the release's for its files, a run folder's own; None where unknown."""
    if weights is None:
        return None
    path = Path(weights)
    if path.is_dir() and (path / CONFIG).exists():
        return json.loads((path / CONFIG).read_text(encoding='utf-8'))['pretrained_cfg'].get('license')
    return RELEASE_LICENCE if path.name in {published.file for published in PUBLISHED.values()} else None


def relicense(text: str, license: str, before: str | None) -> str:
    """A card that states this licence; that of the weights which it started from stays, and is said on the screen."""
    head, heading, rest = text.partition(f'{HEADING}\n\n')
    old, gap, tail = rest.partition('\n\n## ')
    inherited = INHERITED.search(old)
    said = f'{license}.'
    if inherited:
        said += inherited[0] + (f': {before}.' if before else '.')
        console().print(f'the card says of the licence: {said}', soft_wrap=True)
    return f'{head}{heading}{said}{gap}{tail}' if heading else f'{text.rstrip()}\n\n{HEADING}\n\n{said}\n'


def public(settings: list[Any]) -> dict[str, Any]:
    """Settings of a run, as [(dotted key, value)], without what is of one machine: paths become names."""
    tree: dict[str, Any] = {}
    for key, value in settings:
        if key not in PRIVATE:
            path = isinstance(value, str) and os.sep in value and os.path.exists(os.path.expanduser(value))
            nest(tree, key, Path(value).name if path else value)
    return tree


def save_pretrained(
    model: nn.Module, folder: 'str | Path', card: Card | None = None, model_args: dict[str, Any] | None = None
) -> Path:
    """Write a model with its card into a folder, which `from_pretrained`, timm's `local-dir:` and `push` take.

    Args:
        model: Made by `timm.create_model`; its pretrained_cfg says the preprocessing and may name classes.
        folder: Where to; made where it is not there.
        card: What there is to say of it.
        model_args: What it was built with besides its name, as depth.

    Raises:
        UsageError: if its pretrained_cfg names another number of classes than it has.
    """
    cfg: Any = model.pretrained_cfg
    names = cfg.get('label_names')
    if names and len(names) != model.num_classes:
        raise UsageError(f'the model has {model.num_classes} classes, its pretrained_cfg names {len(names)}')
    cfg['num_classes'] = model.num_classes  # or timm leaves out the names
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_folder(model, folder, model_args or {}, (card or Card()).text(model))
    return folder


def push(
    run: str,
    repo: str,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str = 'Add model',
) -> str:
    """Publish a run on the Hub: weights, configuration and model card, nothing else of its folder. Gives the address.

    The account is that of `hf auth login`, or of the token in HF_TOKEN.

    Args:
        run: A run's folder.
        repo: USER/NAME; it is made where it is not there.
        license: Of the weights, in the Hub's short form, as apache-2.0; by default as the card says. The licence of
            weights that they started from holds on beside it, and the card goes on saying so.
        private: Make a new repository that only you see.
        revision: The branch; main by default.
        message: What to say of the change.
    """
    folder = Path(run)
    check_folder(folder)
    if not (folder / CARD).exists():
        (folder / CARD).write_text(Card().text(from_pretrained(run)), encoding='utf-8')
    card, config = ModelCard.load(folder / CARD), json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    if license:
        card.text = relicense(card.text, license, config['pretrained_cfg'].get('license'))
        card.data.license = config['pretrained_cfg']['license'] = license
    text = str(card).replace(PLACE, repo)
    api = HfApi(library_name='t2t-vit', library_version=__version__)
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        done = api.create_commit(
            repo,
            commit_message=message,
            revision=revision,
            operations=[
                CommitOperationAdd(CARD, text.encode()),
                CommitOperationAdd(CONFIG, json.dumps(config, indent=2).encode()),
                CommitOperationAdd(WEIGHTS, folder / WEIGHTS),
            ],
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, ValueError):  # which say what is wrong
        raise
    except Exception as error:  # of whichever HTTP client the Hub's library has
        raise OSError(f'cannot reach the Hub: {error}') from error
    if card.data.license is None:
        console().print('the card states no licence of the weights: --license names one', soft_wrap=True)
    console().print(f'{repo} is at {done.commit_url}; it loads as hf-hub:{repo}', soft_wrap=True)
    return done.commit_url
