"""Save models as folders with a model card, and publish them on the Hugging Face Hub."""

import json
import os
import re
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from torch import nn

from . import __version__
from .console import console
from .integrity import KEY, seal
from .models.listing import count_parameters
from .results import locked
from .settings import UsageError, nest
from .trained import CARD, CONFIG, WEIGHTS, check_folder, from_pretrained, read_config, save_folder

__all__ = ['Card', 'from_pretrained', 'push', 'save_pretrained']

RUN_LOCK = '.lock'  # training holds it too
UNSTATED = 'Not stated. Ask the authors before you use them.'
HEADING = '## Licence of the weights'
INHERITED = re.compile(
    r' The weights that they started from, .*? keep their licence'
)  # the sentence that `Card` writes about a licence
PLACEHOLDER = 'USER/NAME'  # until the model is pushed
PRIVATE = ('output', 'device', 'threads', 'trackers', 'save_minutes', 'keep', 'data.cache', 'data.download')


@dataclass
class Card:
    """The content of a model card that the model itself does not know.

    Args:
        data: A sentence about the training and validation data.
        dataset: The name of the data.
        recipe: The configuration of the training, as YAML.
        scores: Accuracies in [0, 1] and the loss, by name.
        note: A sentence about the scores.
        weights: The name of the weights that training started from; None for random ones.
        license: Of the weights, in the Hub's short form, such as apache-2.0; None if it is not stated.
    """

    data: str = 'Not recorded.'
    dataset: str | None = None
    recipe: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    note: str = ''
    weights: str | None = None
    license: str | None = None

    def text(self, model: nn.Module) -> str:
        """Return the card in Markdown, with the metadata that the Hub reads."""
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
            f'{learned:,} of them trainable. Made with t2t-vit {__version__}.',
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
            licence += f' The weights that they started from, {self.weights}, keep their licence.'
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
            f"model = timm.create_model('hf-hub:{PLACEHOLDER}', pretrained=True).eval()",
            '```',
            '',
            f'or `t2t-vit predict IMAGES --checkpoint hf-hub:{PLACEHOLDER}`.',
        ]
        return '\n'.join(lines) + '\n'


def relicense(text: str, license: str, before: str | None) -> str:
    """Return a card with this licence; the licence of the initial weights stays in it, and is printed."""
    head, heading, rest = text.partition(f'{HEADING}\n\n')
    old, gap, tail = rest.partition('\n\n## ')
    inherited = INHERITED.search(old)
    said = f'{license}.'
    if inherited:
        said += inherited[0] + (f': {before}.' if before else '.')
        console().print(f'the card says of the licence: {said}', soft_wrap=True)
    return f'{head}{heading}{said}{gap}{tail}' if heading else f'{text.rstrip()}\n\n{HEADING}\n\n{said}\n'


def public(settings: list[Any]) -> dict[str, Any]:
    """Return the settings of a run, [(dotted key, value)], without those of one machine; paths become names."""
    tree: dict[str, Any] = {}
    for key, value in settings:
        if key not in PRIVATE:
            path = isinstance(value, str) and os.sep in value and os.path.exists(os.path.expanduser(value))
            nest(tree, key, Path(value).name if path else value)
    return tree


def save_pretrained(
    model: nn.Module, folder: 'str | Path', card: Card | None = None, model_args: dict[str, Any] | None = None
) -> Path:
    """Write a model with its card into a folder for `from_pretrained`, timm's `local-dir:`, transformers and `push`.

    Args:
        model: Built by `timm.create_model`; its pretrained_cfg holds the preprocessing and may name classes.
        folder: The folder; it is created if it does not exist.
        card: The content of the model card.
        model_args: Arguments that it was built with besides its name, such as depth.

    Raises:
        UsageError: if its pretrained_cfg names another number of classes than the model has.
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
    """Publish a run on the Hub: weights, configuration and model card, nothing else of its folder.

    The account is that of `hf auth login`, or of the token in HF_TOKEN. Returns the address of the commit.

    Args:
        run: A run folder.
        repo: USER/NAME; it is created if it does not exist.
        license: Of the weights, in the Hub's short form, such as apache-2.0; by default the card's. The licence of the
            initial weights stays valid beside it, and the card keeps it.
        private: Create a new repository that only you can see.
        revision: The branch; main by default.
        message: The commit's message.
    """
    folder = Path(run)
    check_folder(folder)
    busy = f'another process is training in {folder} and may replace its weights: push when it has ended'
    with locked(folder / RUN_LOCK, busy) if os.access(folder, os.W_OK) else nullcontext():
        return upload(folder, repo, license, private, revision, message)


def upload(folder: Path, repo: str, license: str | None, private: bool, revision: str | None, message: str) -> str:
    """Upload the three files of a model folder, and return the address of the commit; see `push`."""
    if not (folder / CARD).exists():
        (folder / CARD).write_text(Card().text(from_pretrained(str(folder))), encoding='utf-8')
    card, config = ModelCard.load(folder / CARD), read_config(folder / CONFIG)
    if license:
        card.text = relicense(card.text, license, config['pretrained_cfg'].get('license'))
        card.data.license = config['pretrained_cfg']['license'] = license
        config = seal(config) if KEY in config else config
    api = HfApi(library_name='t2t-vit', library_version=__version__)
    try:
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id  # NAME alone gets the user's
        text = str(card).replace(PLACEHOLDER, repo)
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
    except (HfHubHTTPError, LocalTokenNotFoundError, ValueError):  # these have clear messages
        raise
    except Exception as error:  # the HTTP client's own kinds
        raise OSError(f'cannot reach the Hub: {error}') from error
    if card.data.license is None:
        console().print('the card states no licence of the weights; --license sets one', soft_wrap=True)
    console().print(f'{repo} is at {done.commit_url}; it loads as hf-hub:{repo}', soft_wrap=True)
    return done.commit_url
