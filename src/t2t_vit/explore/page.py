"""The page: an image, models, views of what they make of it, and a report to take along."""

import math
import tempfile
import traceback
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ..data import DataError
from ..look.features import DEAD
from ..look.opened import Photo
from ..look.report import write_report
from ..look.visualize import look
from .seen import Explorer, Seen, read_photo, sentence
from .uploads import Uploads
from .views import CLASS_TOKEN, PLACE, VIEWS, Choice, layers_of, pages_of, preview, show

NONE = 'no other'
ANSWER = -1  # the class of Grad-CAM
WAITING = 32  # requests; more are told to come back
MOVING, K, ACROSS, DOWN = 'Move over the image', 'Classes', 'Cross: left to right', 'Cross: top to bottom'
LAYER, HEAD, RESIDUAL = 'Layer', 'Head (0: mean)', 'Share that skips keep'
CLASS, STAGE, SHEET = 'Class of Grad-CAM', 'Layer of maps', 'Page of channels'
CSS = """
.gradio-container { max-width: 1200px !important; margin: auto }
.models { display: grid; gap: 1.5rem; grid-template-columns: minmax(0, 1fr) }
.models.n2 { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr) }
.models h3 { margin: 0 0 .5rem; overflow-wrap: anywhere; font-weight: 600 }
.models.n1 h3:not(:has(small)) { display: none }
.models h3 small { font-weight: 400; opacity: .82 }
.models figure, .preview figure { margin: 0 0 1rem }
.models svg, .preview svg { display: block; width: 100%; max-width: 26rem; max-height: 26rem; height: auto;
  background: repeating-linear-gradient(45deg, #8884 0 4px, #8881 4px 8px); border-radius: 4px }
.models .wide svg { max-width: 46rem; max-height: none; background: none }
.models figcaption, .preview figcaption, .what { font-size: .85rem; line-height: 1.35; margin-top: .3rem;
  color: var(--body-text-color); opacity: .82; max-width: 46rem; overflow-wrap: anywhere }
.what { margin: 0 0 .8rem }
.pair, .many { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)) }
.pair { grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); align-items: start; max-width: 46rem }
.small { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .6rem }
.bars { list-style: none; margin: 0; padding: 0; max-width: 34rem }
.bars li { display: grid; grid-template-columns: 1fr auto; margin: 0 0 .7rem }
.bars i { grid-column: 1 / -1; height: .6rem; min-width: 2px; background: #0072B2; border-radius: 2px }
.wrong { border-left: 4px solid #D55E00; padding: .5rem .8rem; margin: 0; background: #D55E0018 }
.preview svg { max-width: 100% }
#first input, #second input { text-overflow: ellipsis; padding-right: 1.8rem }
#wrong:not(:has(.wrong)) { display: none }
#examples .grid-container { grid-template-columns: repeat(6, minmax(0, 1fr)); grid-template-rows: none !important;
  grid-auto-rows: auto !important; height: auto; padding: .3rem; align-content: start }
#examples .gallery-item { height: auto }
#examples .grid-wrap { min-height: 0 }
#examples .thumbnail-item { height: auto; aspect-ratio: 1 }
#examples .caption-label { display: none }
input[type=radio]:checked { background: var(--radio-circle) center/100% var(--checkbox-background-color-selected)
  !important }
button:focus-visible, input:focus-visible, [role=button]:focus-visible, a:focus-visible {
  outline: 3px solid #56B4E9 !important; outline-offset: 2px }
@media (max-width: 640px) { .side { display: contents !important }
  .sides { flex-direction: column !important; flex-wrap: nowrap !important; align-items: stretch }
  .of-view { order: 1 } .late, .form:has(.late) { order: 2 } .preview svg { max-width: 11rem } .models.n2 { gap: .8rem }
  .small { grid-template-columns: repeat(3, 1fr) } .models.n2 .small { grid-template-columns: repeat(2, 1fr) }
  .models.n2 .pair { grid-template-columns: minmax(0, 1fr) } .gradio-container { padding: .6rem !important } }
"""


def guarded(function: Callable[..., Any], explorer: Explorer, count: int) -> Callable[..., Any]:
    """A handler whose last output is the line for errors; they leave its other `count` outputs as they are."""

    def handler(*args: Any) -> Any:
        try:
            with explorer.request():
                made = function(*args)
            return (*(made if isinstance(made, tuple) else (made,)), '')
        except Exception as error:  # whatever happens, a person is told of it and the page goes on
            text = sentence(error, explorer.limits)
            if not text:
                traceback.print_exc()
                text = f'Something went wrong inside ({type(error).__name__}); the terminal says more.'
            return (*[gr.skip() for _ in range(count)], f'<p class="wrong" role="alert">{escape(text)}</p>')

    handler.__name__ = function.__name__
    return handler


class Page:
    """What the page's controls do."""

    def __init__(self, explorer: Explorer, photos: Sequence[Photo], uploads: Uploads) -> None:
        self.explorer, self.photos, self.uploads = explorer, photos, uploads

    def seen(self, photo: Photo | None, first: str, second: str) -> list[Seen]:
        """Passes of the one or two models that are chosen."""
        if photo is None:
            raise DataError('Choose an image first.')
        return [self.explorer.see(name, photo) for name in ([first] if second in (NONE, first) else [first, second])]

    def draw(self, photo: Photo | None, first: str, second: str, view: str, *values: Any) -> tuple[str, str]:
        """The image with its cross, and the view."""
        if view not in list(VIEWS):
            raise DataError(f'There is no view {view!r}; there are {", ".join(VIEWS)}.')
        seen = self.seen(photo, first, second)
        choice = self.choice(seen[0], *values)
        assert photo is not None  # or `seen` has said so
        return preview(seen[0], choice, photo.name), show(view, seen, choice)

    def choice(
        self,
        seen: Seen,
        top_k: float,
        across: float,
        down: float,
        moving: bool,
        layer: float,
        head: float,
        reader: str,
        residual: float,
        target: int | None,
        stage: float,
        page: float,
    ) -> Choice:
        """From what stands on the controls; layers become depths.

        Raises:
            DataError: naming each slider whose box was left empty, or holds what is no number.
        """
        check_numbers(
            {
                K: top_k,
                ACROSS: across,
                DOWN: down,
                LAYER: layer,
                HEAD: head,
                RESIDUAL: residual,
                CLASS: ANSWER if target is None else target,
                STAGE: stage,
                SHEET: page,
            }
        )

        def depth(chosen: float, count: int) -> float:
            return min(max((chosen - 1) / max(count - 1, 1), 0), 1)

        def share(value: float) -> float:
            return min(max(value, 0), 1)

        return Choice(
            max(int(top_k), 1),
            share(across),
            share(down),
            bool(moving),
            depth(layer, len(layers_of(seen))),
            max(int(head), 0),
            reader,
            share(residual),
            None if target is None or target == ANSWER else max(int(target), 0),
            depth(stage, len(seen.measures)),
            max(int(page), 1),
        )

    def take(self, upload: dict[str, Any] | None, *rest: Any) -> tuple[Any, ...]:
        """An uploaded image, which is read and deleted: the image, and what is drawn."""
        place = str((upload or {}).get('path'))
        if not self.uploads.holds(place):
            raise DataError('The upload did not arrive. Please try again.')
        try:
            photo = read_photo(Path(place), self.explorer.limits)
        finally:
            self.uploads.remove(place)
        return (photo, *self.draw(photo, *rest))

    def example(self, index: int, *rest: Any) -> tuple[Any, ...]:
        """One of the examples."""
        photo = self.photos[index]
        return (photo, *self.draw(photo, *rest))

    def bounds(self, photo: Photo, first: str, second: str) -> tuple[Any, ...]:
        """How far the controls go for these models: k, layer, head, class, stage, page."""
        seen = self.seen(photo, first, second)
        layers = layers_of(seen[0])
        heads = max((a.query.shape[1] for one in seen for a in layers_of(one)), default=1)
        pages = max(pages_of(maps.shape[1]) for one in seen for maps in one.trace.maps.values())
        classes = seen[0].one.classes
        return (
            dict(maximum=max(min(10, len(classes)), 2)),
            dict(maximum=max(len(layers), 2), value=max(len(layers), 2)),
            dict(maximum=max(heads, 1), value=0),
            dict(choices=[('the answer', ANSWER), *((name, i) for i, name in enumerate(classes))], value=ANSWER),
            dict(maximum=max(len(seen[0].measures), 2), value=1),
            dict(maximum=max(pages, 2), value=1),
        )

    def report(self, photo: Photo, first: str, second: str, *values: Any) -> Any:
        """Every picture of the models that are chosen, in one HTML file."""
        seen = self.seen(photo, first, second)
        choice = self.choice(seen[0], *values)
        file = self.uploads.place('t2t-vit-report.html')
        opened = [one.one for one in seen]
        with tempfile.TemporaryDirectory(dir=self.uploads.folder) as drafts:
            shown = Photo(Path(photo.name).name, photo.image)
            sections = look(
                opened,
                {'image': shown},
                Path(drafts),
                self.explorer.device,
                (choice.down, choice.across),
                choice.target,
                None,
                DEAD,
            )
            named = ', '.join(f'{one.name}: {one.weights}' for one in opened)
            write_report(
                file,
                f'What the models see in {shown.name}',
                f'{named}. {self.explorer.device.type}, torch {torch.__version__}.',
                sections,
            )
        size = file.stat().st_size / 1e6
        return gr.DownloadButton(
            f'Download the report ({size:.1f} MB)', value=str(file), visible=True, variant='primary'
        )


def build(explorer: Explorer, photos: Sequence[Photo], start: int, uploads: Uploads) -> gr.Blocks:
    """The page, with the image that it begins with."""
    page = Page(explorer, photos, uploads)
    names = list(explorer.openers)
    k, depth, heads, classes, stages, pages = page.bounds(photos[start], names[0], NONE)
    with gr.Blocks(title='t2t-vit: what models see', analytics_enabled=False) as blocks:
        photo = gr.State(photos[start], time_to_live=3600)
        gr.Markdown(
            '# What models see\nChoose an image and a view. An image of yours is read, deleted, and forgotten '
            'with this page.'
        )
        with gr.Row(elem_classes='sides'):
            with gr.Column(scale=2, min_width=290, elem_classes='side'):
                drop = gr.Image(
                    label='Your image',
                    type='filepath',
                    sources=['upload', 'clipboard'],
                    height=170,
                    elem_id='drop',
                    buttons=[],
                )
                gallery = gr.Gallery(
                    [(one.image, one.name) for one in photos],
                    label='Examples',
                    columns=6,
                    height='auto',
                    allow_preview=False,
                    elem_id='examples',
                    buttons=[],
                    object_fit='cover',
                    show_label=False,
                )
                shown = gr.HTML(elem_classes=['preview', 'late'], elem_id='preview')
                across = gr.Slider(
                    0, 1, 0.5, step=0.01, label=ACROSS, elem_id='across', buttons=[], elem_classes='late'
                )
                down = gr.Slider(0, 1, 0.5, step=0.01, label=DOWN, elem_id='down', buttons=[], elem_classes='late')
            with gr.Column(scale=5, min_width=320, elem_classes='side'):
                with gr.Row():
                    first = gr.Dropdown(names, value=names[0], label='Model', elem_id='first', min_width=140)
                    second = gr.Dropdown([NONE, *names], value=NONE, label='Beside it', elem_id='second', min_width=140)
                wrong = gr.HTML(elem_id='wrong')
                view = gr.Radio(list(VIEWS), value='Answer', label='View', elem_id='view')
                with gr.Row(visible=True, elem_classes='of-view') as of_answer:
                    top_k = gr.Slider(1, value=5, step=1, label=K, elem_id='top_k', buttons=[], **k)
                with gr.Row(visible=False, elem_classes='of-view') as of_windows:
                    moving = gr.Checkbox(label=MOVING, elem_id='moving')
                with gr.Row(visible=False, elem_classes='of-view') as of_attention:
                    layer = gr.Slider(1, step=1, label=LAYER, elem_id='layer', buttons=[], **depth)
                    head = gr.Slider(0, step=1, label=HEAD, elem_id='head', buttons=[], **heads)
                    reader = gr.Radio(
                        [CLASS_TOKEN, PLACE], value=CLASS_TOKEN, label='Whose attention', elem_id='reader'
                    )
                with gr.Row(visible=False, elem_classes='of-view') as of_evidence:
                    residual = gr.Slider(0, 1, 0.5, step=0.05, label=RESIDUAL, elem_id='residual', buttons=[])
                    target = gr.Dropdown(label=CLASS, elem_id='target', **classes)
                with gr.Row(visible=False, elem_classes='of-view') as of_features:
                    stage = gr.Slider(1, step=1, label=STAGE, elem_id='stage', buttons=[], **stages)
                    sheet = gr.Slider(1, step=1, label=SHEET, elem_id='sheet', buttons=[], **pages)
                picture = gr.HTML(elem_id='picture')
                make = gr.Button('Make a report of all views', elem_id='make', elem_classes='late')
                download = gr.DownloadButton(
                    'Download the report', visible=False, elem_id='download', elem_classes='late'
                )
        groups = {
            'Answer': of_answer,
            'Windows': of_windows,
            'Attention': of_attention,
            'Evidence': of_evidence,
            'Feature maps': of_features,
        }
        controls = [top_k, across, down, moving, layer, head, reader, residual, target, stage, sheet]
        chosen = [first, second, view, *controls]
        drawn = [shown, picture, wrong]
        # values come as the browser sends them: what Gradio makes of wrong ones is no sentence, and `take` is to read
        # the file within limits
        alone: Any = dict(concurrency_id='models', concurrency_limit=1, preprocess=False)
        inside: Any = dict(**alone, show_progress='hidden', api_visibility='private')
        redraw = guarded(page.draw, explorer, 2)
        drop.async_move_resource_to_block_cache = as_it_is
        drop.upload(
            guarded(page.take, explorer, 3),
            [drop, *chosen],
            [photo, *drawn],
            api_name='look',
            show_progress_on=[picture],
            **alone,
        ).then(lambda: None, None, drop, api_visibility='private', show_progress='hidden')

        def choose(event: gr.SelectData, *rest: Any) -> Any:
            return guarded(page.example, explorer, 3)(event.index, *rest)

        gallery.select(choose, chosen, [photo, *drawn], **inside)
        view.change(
            lambda name: [gr.update(visible=name == of) for of in groups],
            view,
            list(groups.values()),
            api_visibility='private',
            show_progress='hidden',
            queue=False,
        )

        def fit(*args: Any) -> tuple[Any, ...]:
            return tuple(gr.update(**how) for how in page.bounds(*args))

        gr.on(
            [first.change, second.change],
            guarded(fit, explorer, 6),
            [photo, first, second],
            [top_k, layer, head, target, stage, sheet, wrong],
            **inside,
        ).then(redraw, [photo, *chosen], drawn, **inside)
        gr.on(
            [view.change, *(control.change for control in controls)],
            redraw,
            [photo, *chosen],
            drawn,
            trigger_mode='always_last',
            **inside,
        )
        blocks.load(redraw, [photo, *chosen], drawn, **inside)
        make.click(
            guarded(page.report, explorer, 1),
            [photo, first, second, *controls],
            [download, wrong],
            api_name='report',
            show_progress_on=[make],
            **alone,
        )
    blocks.queue(max_size=WAITING, default_concurrency_limit=1)
    return blocks


def check_numbers(given: dict[str, Any]) -> None:
    """Raises DataError, naming all controls of which a number is missing."""
    wrong = [name for name, value in given.items() if not isinstance(value, (int, float)) or not math.isfinite(value)]
    if wrong:
        raise DataError(f'A number is missing: {", ".join(wrong)}.')


async def as_it_is(place: str) -> str:
    """In the place of a component's own, which remembers every file for good."""
    return place


async def fetch_nothing(*args: Any, **kwargs: Any) -> str:
    """In the place of Gradio's downloads, which any address in a request may start."""
    raise gr.Error('Only uploaded files can be opened.', print_exception=False)
