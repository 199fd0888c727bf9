"""Build the page: an image, models, views of what they make of it, and a report to keep."""

import inspect
import tempfile
import traceback
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..data import DataError
from ..look.opened import Photo
from ..look.report import write_report
from ..look.visualize import Options, conditions, draw_models
from .api import Api
from .explorer import Explorer, Seen, check_numbers, explain
from .uploads import Uploads
from .views import CLASS_TOKEN, CROSS_TOKEN, VIEWS, Choice, gallery, layers_of, pages_of, preview, show

NONE = 'no other'
PREDICTED = -1  # the class of Grad-CAM
MAX_WAITING = 32  # requests; further ones are refused
MOVING, K, ACROSS, DOWN = 'Move over the image', 'Classes', 'Cross: left to right', 'Cross: top to bottom'
LAYER, HEAD, RESIDUAL = 'Layer', 'Head (0: mean)', 'Fraction kept by skip connections'
CLASS, STAGE, SHEET = 'Class of Grad-CAM', 'Layer', 'Page of channels'
REPORT = 't2t-vit-report.html'
CSS = """
.gradio-container { max-width: 1200px !important; margin: auto }
.models { display: grid; gap: 1.5rem; grid-template-columns: minmax(0, 1fr) }
.models.n2 { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr) }
.models h3 { margin: 0 0 .2rem; overflow-wrap: anywhere; font-weight: 600 }
.models.n1 h3 { display: none }
.models figure, .preview figure { margin: 0 0 1rem }
.models svg, .preview svg { display: block; width: 100%; max-width: 26rem; max-height: 26rem; height: auto;
  background: repeating-linear-gradient(45deg, #8884 0 4px, #8881 4px 8px); border-radius: 4px }
.models .wide svg { max-width: 46rem; max-height: none; background: none }
.models figcaption, .preview figcaption, .what, .card { font-size: .85rem; line-height: 1.35; margin-top: .3rem;
  color: var(--body-text-color); opacity: .82; max-width: 46rem; overflow-wrap: anywhere }
.what { margin: 0 0 .8rem }
.card { margin: 0 0 1rem; padding-left: .6rem; border-left: 3px solid #8886 }
.scale { display: flex; gap: .5rem; align-items: center; font-size: .85rem; max-width: 26rem; margin: .3rem 0 1rem }
.scale i { flex: 1; height: .7rem; border-radius: 2px }
.pair, .many { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)) }
.pair { grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); align-items: start; max-width: 46rem }
.small { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .6rem }
.bars { list-style: none; margin: 0; padding: 0; max-width: 34rem }
.bars li { display: grid; grid-template-columns: 1fr auto; margin: 0 0 .7rem }
.bars i { grid-column: 1 / -1; height: .6rem; min-width: 2px; background: #0072B2; border-radius: 2px }
.wrong { border-left: 4px solid #D55E00; padding: .5rem .8rem; margin: 0; background: #D55E0018 }
.preview svg { max-width: 100%; cursor: crosshair }
.drop label { display: block; border: 2px dashed var(--border-color-primary); border-radius: 6px; padding: 1.4rem .6rem;
  text-align: center; cursor: pointer }
.drop label:focus-within, .drop label.over { outline: 3px solid #56B4E9; outline-offset: 2px }
.drop input { position: absolute; opacity: 0; width: 1px; height: 1px }
.gallery { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .3rem }
.gallery button { padding: 0; border: 0; cursor: pointer; background: none; line-height: 0 }
.gallery img { width: 100%; aspect-ratio: 1; image-rendering: pixelated; border-radius: 4px; margin: 0 }
a.download { display: block; text-align: center; padding: .6rem; border-radius: 6px; background: #0072B2;
  color: white !important; text-decoration: none !important }
#first input, #second input { text-overflow: ellipsis; padding-right: 1.8rem }
#wrong:not(:has(.wrong)) { display: none }
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
DROP = '<label>Drop an image here, paste one, or choose a file<input type="file" accept="image/*"></label>'
SEND_FILE = """
const label = element.querySelector('label'), input = element.querySelector('input');
const send = async file => {
  if (!file) return;
  const form = new FormData();
  form.append('files', file);
  try {
    const answer = await fetch('gradio_api/upload', {method: 'POST', body: form});
    const text = await answer.text();
    trigger('upload', answer.ok ? {token: JSON.parse(text)[0]} : {refused: text});
  } catch { trigger('upload', {refused: 'The upload did not arrive. Please try again.'}); }
  input.value = '';
};
input.addEventListener('change', () => send(input.files[0]));
label.addEventListener('dragover', event => { event.preventDefault(); label.classList.add('over'); });
label.addEventListener('dragleave', () => label.classList.remove('over'));
label.addEventListener('drop', event => {
  event.preventDefault(); label.classList.remove('over'); send(event.dataTransfer.files[0]); });
document.addEventListener('paste', event => send([...event.clipboardData.files][0]));
"""
CHOOSE_EXAMPLE = """
element.addEventListener('click', event => {
  const button = event.target.closest('[data-index]');
  if (button) trigger('select', {index: Number(button.dataset.index)});
});
"""
MOVE_CROSS = """
element.addEventListener('click', event => {
  const picture = event.target.closest('svg');
  if (!picture) return;
  const box = picture.getBoundingClientRect();
  trigger('click', {x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height});
});
"""


class Page:
    """Functions of the controls."""

    def __init__(self, explorer: Explorer, photos: Sequence[Photo], uploads: Uploads) -> None:
        self.explorer, self.photos, self.uploads = explorer, photos, uploads

    def guarded(self, function: Callable[..., Any], outputs: int) -> Callable[..., Any]:
        """Wrap a function so that it has sole use of the models, and an error becomes its last, additional output."""

        def handler(*args: Any) -> tuple[Any, ...]:
            try:
                with self.explorer.request():
                    found = function(*args)
                return (*(found if isinstance(found, tuple) else (found,)), '')
            except Exception as error:  # the page must survive any request
                return (*[gr.skip() for _ in range(outputs)], wrong(error))

        handler.__name__ = function.__name__
        return handler

    def answering(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap an endpoint of the API likewise; an error is sent to the client as a sentence."""

        def endpoint(*args: Any) -> Any:
            try:
                with self.explorer.request():
                    return function(*args)
            except Exception as error:
                raise gr.Error(sentence(error), print_exception=False) from None

        endpoint.__name__, endpoint.__doc__ = function.__name__, function.__doc__
        endpoint.__annotations__ = function.__annotations__
        endpoint.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return endpoint

    def seen(self, photo: Photo | None, first: str, second: str) -> list[Seen]:
        """Run the one or two chosen models on a photo."""
        if photo is None:
            raise DataError('Choose an image first.')
        return [self.explorer.see(name, photo) for name in ([first] if second in (NONE, first) else [first, second])]

    def draw(self, photo: Photo | None, first: str, second: str, view: str, *values: Any) -> tuple[str, str]:
        """Draw the image with its cross, and the view."""
        if view not in list(VIEWS):
            raise DataError(f'There is no view {view!r}; choose one of {", ".join(VIEWS)}.')
        seen = self.seen(photo, first, second)
        choice = self.choice(seen[0], *values)
        assert photo is not None  # checked by `seen`
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
        """Convert the values of the controls; layers become depths.

        Raises:
            DataError: naming all sliders that are empty or have no number.
        """
        numbers = {K: top_k, ACROSS: across, DOWN: down, LAYER: layer, HEAD: head, RESIDUAL: residual}
        target = PREDICTED if target is None else target
        check_numbers({**numbers, CLASS: target, STAGE: stage, SHEET: page})

        def depth(chosen: float, count: int) -> float:
            return clip((chosen - 1) / max(count - 1, 1))

        return Choice(
            max(int(top_k), 1),
            clip(across),
            clip(down),
            bool(moving),
            depth(layer, len(layers_of(seen))),
            max(int(head), 0),
            reader,
            clip(residual),
            None if target == PREDICTED else max(int(target), 0),
            depth(stage, len(seen.measures)),
            max(int(page), 1),
        )

    def upload(self, sent: dict[str, Any], *rest: Any) -> tuple[Any, ...]:
        """Read and delete an uploaded image, and draw it."""
        token = str(sent.get('token'))
        file = self.uploads.find(token)
        if file is None:
            raise DataError(str(sent.get('refused') or 'The upload did not arrive. Please try again.')[:200])
        try:
            photo = self.explorer.read(file, *map(str, rest[:2]))
        finally:
            self.uploads.remove(token)
        return (photo, *self.draw(photo, *rest))

    def example(self, sent: dict[str, Any], *rest: Any) -> tuple[Any, ...]:
        """Draw one of the examples."""
        index = sent.get('index')
        if not isinstance(index, int) or not 0 <= index < len(self.photos):
            raise DataError('There is no such example.')
        return (self.photos[index], *self.draw(self.photos[index], *rest))

    def ranges(self, photo: Photo, first: str, second: str) -> tuple[dict[str, Any], ...]:
        """Return the settings of the controls for these models: k, layer, head, class, stage, page."""
        seen = self.seen(photo, first, second)
        layers = max(len(layers_of(seen[0])), 2)
        heads = max((a.query.shape[1] for one in seen for a in layers_of(one)), default=1)
        pages = max(pages_of(maps.shape[1]) for one in seen for maps in one.trace.maps.values())
        classes = seen[0].one.classes
        named = [('the predicted one', PREDICTED), *((name, i) for i, name in enumerate(classes))]
        return (
            dict(maximum=max(min(10, len(classes)), 2)),
            dict(maximum=layers, value=layers),
            dict(maximum=heads, value=0),
            dict(choices=named, value=PREDICTED),
            dict(maximum=max(len(seen[0].measures), 2), value=1),
            dict(maximum=max(pages, 2), value=1),
        )

    def report(self, photo: Photo, first: str, second: str, *values: Any) -> str:
        """Write every picture of the chosen models to one HTML file; returns a link to it."""
        seen = self.seen(photo, first, second)
        choice = self.choice(seen[0], *values)
        opened = [one.one for one in seen]
        options = Options(query=(choice.down, choice.across), target=choice.target)
        token, file = self.uploads.create(REPORT)
        with tempfile.TemporaryDirectory(prefix='t2t-vit-report-') as drafts:
            sections = draw_models(opened, {'image': photo}, Path(drafts), self.explorer.device, options)
            title = f'What the models see in {photo.name}'
            write_report(file, title, conditions(opened, self.explorer.device), sections)
        size = file.stat().st_size / 1e6
        link = f'href="gradio_api/file={token}" download="{REPORT}"'
        return f'<a class="download" id="download" {link}>Download the report ({size:.1f} MB)</a>'


def clip(value: float) -> float:
    """Limit a number to 0 to 1."""
    return min(max(value, 0), 1)


def sentence(error: Exception) -> str:
    """Explain an error; a defect of the program is printed in full on the terminal."""
    text = explain(error)
    if not text:
        traceback.print_exception(error)
        text = f'Something went wrong inside ({type(error).__name__}); the terminal says more.'
    return text


def wrong(error: Exception) -> str:
    """Return an error as HTML."""
    return f'<p class="wrong" role="alert">{escape(sentence(error))}</p>'


def moved(event: gr.EventData) -> tuple[Any, Any]:
    """Return the position of a click on the image for the sliders of the cross."""
    values = [event._data.get(name) for name in 'xy'] if isinstance(event._data, dict) else [None, None]
    x, y = (round(clip(value), 2) if isinstance(value, (int, float)) else gr.skip() for value in values)
    return x, y


def build(explorer: Explorer, photos: Sequence[Photo], uploads: Uploads) -> gr.Blocks:
    """Build the page, with the first photo and the first model."""
    page, names = Page(explorer, photos, uploads), explorer.names
    k, depth, heads, classes, stages, pages = page.ranges(photos[0], names[0], NONE)
    slider: Any = dict(buttons=[])
    with gr.Blocks(title='t2t-vit: what models see', analytics_enabled=False) as blocks:
        photo = gr.State(photos[0], time_to_live=3600)
        gr.Markdown(
            '# What models see\nChoose an image and a view. Your image is read, deleted, and forgotten when you leave.'
        )
        with gr.Row(elem_classes='sides'):
            with gr.Column(scale=2, min_width=290, elem_classes='side'):
                drop = gr.HTML(DROP, js_on_load=SEND_FILE, elem_id='drop', elem_classes='drop')
                examples = gr.HTML(
                    gallery(photos, explorer.open(explorer.names[0]).preprocessing),
                    js_on_load=CHOOSE_EXAMPLE,
                    elem_id='examples',
                )
                shown = gr.HTML(js_on_load=MOVE_CROSS, elem_classes=['preview', 'late'], elem_id='preview')
                across = gr.Slider(0, 1, 0.5, step=0.01, label=ACROSS, elem_id='across', elem_classes='late', **slider)
                down = gr.Slider(0, 1, 0.5, step=0.01, label=DOWN, elem_id='down', elem_classes='late', **slider)
            with gr.Column(scale=5, min_width=320, elem_classes='side'):
                with gr.Row():
                    first = gr.Dropdown(names, value=names[0], label='Model', elem_id='first', min_width=140)
                    second = gr.Dropdown([NONE, *names], value=NONE, label='Beside it', elem_id='second', min_width=140)
                error = gr.HTML(elem_id='wrong')
                view = gr.Radio(list(VIEWS), value='Answer', label='View', elem_id='view')
                with gr.Row(visible=True, elem_classes='of-view') as of_answer:
                    top_k = gr.Slider(1, value=5, step=1, label=K, elem_id='top_k', **slider, **k)
                with gr.Row(visible=False, elem_classes='of-view') as of_windows:
                    moving = gr.Checkbox(label=MOVING, elem_id='moving')
                with gr.Row(visible=False, elem_classes='of-view') as of_attention:
                    layer = gr.Slider(1, step=1, label=LAYER, elem_id='layer', **slider, **depth)
                    head = gr.Slider(0, step=1, label=HEAD, elem_id='head', **slider, **heads)
                    reader = gr.Radio(
                        [CLASS_TOKEN, CROSS_TOKEN], value=CLASS_TOKEN, label='Attention of', elem_id='reader'
                    )
                with gr.Row(visible=False, elem_classes='of-view') as of_evidence:
                    residual = gr.Slider(0, 1, 0.5, step=0.05, label=RESIDUAL, elem_id='residual', **slider)
                    target = gr.Dropdown(label=CLASS, elem_id='target', **classes)
                with gr.Row(visible=False, elem_classes='of-view') as of_features:
                    stage = gr.Slider(1, step=1, label=STAGE, elem_id='stage', **slider, **stages)
                    sheet = gr.Slider(1, step=1, label=SHEET, elem_id='sheet', **slider, **pages)
                picture = gr.HTML(elem_id='picture')
                make = gr.Button('Make a report of all views', elem_id='make', elem_classes='late')
                download = gr.HTML(elem_classes='late')
        groups = {
            'Answer': of_answer,
            'Windows': of_windows,
            'Attention': of_attention,
            'Evidence': of_evidence,
            'Feature maps': of_features,
        }
        controls = [top_k, across, down, moving, layer, head, reader, residual, target, stage, sheet]
        chosen, drawn = [first, second, view, *controls], [shown, picture, error]
        queued: Any = dict(concurrency_id='models', concurrency_limit=1)
        # values are checked by `choice`: Gradio's own checks would answer wrong ones with an internal error
        visible: Any = dict(**queued, preprocess=False, api_visibility='private')
        inside: Any = dict(**visible, show_progress='hidden')
        direct: Any = dict(queue=False, api_visibility='private', show_progress='hidden')
        redraw = page.guarded(page.draw, 2)

        def uploaded(event: gr.EventData, *rest: Any) -> Any:
            return page.guarded(page.upload, 3)(event._data, *rest)

        def example_chosen(event: gr.EventData, *rest: Any) -> Any:
            return page.guarded(page.example, 3)(event._data, *rest)

        def fit(*args: Any) -> tuple[Any, ...]:
            return tuple(gr.update(**settings) for settings in page.ranges(*args))

        drop.upload(uploaded, chosen, [photo, *drawn], show_progress_on=[picture], **visible)
        examples.select(example_chosen, chosen, [photo, *drawn], **inside)
        shown.click(moved, None, [across, down], **direct)
        view.change(
            lambda name: [gr.update(visible=name == of) for of in groups], view, list(groups.values()), **direct
        )
        gr.on(
            [first.change, second.change],
            page.guarded(fit, 6),
            [photo, first, second],
            [top_k, layer, head, target, stage, sheet, error],
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
            page.guarded(page.report, 1),
            [photo, first, second, *controls],
            [download, error],
            show_progress_on=[make],
            **visible,
        )
        api = Api(explorer, uploads)
        for function in (api.models, api.classify, api.attention, api.evidence, api.layers):
            gr.api(page.answering(function), api_name=function.__name__, **queued)
    blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return blocks
