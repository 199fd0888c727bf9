"""Write a model as a file for another runtime, and compare the file with it: the command `t2t-vit export`."""

import shlex
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from .. import __version__
from ..classifier import Classifier
from ..console import console
from ..data import DataError, Preprocessing
from ..models.listing import check_name
from ..results import check_writable
from ..settings import UsageError, require
from . import int8
from .check import TOLERANCES, Report, as_markdown, compare, measure_speed, save, versions
from .formats import OPSET, Dynamic, check_precision, export_model
from .images import Pictures, batches, open_images
from .metadata import Metadata, Pixels, Precision, files_of, is_exported, kind
from .runtime import Runtime, load_exported, need, reason

EXTRAS = {'onnx': ('onnx', 'onnxscript', 'onnxruntime'), 'openvino': ('openvino',), 'torch': ()}
PRIVATE = ('file', 'source', 'state_dict', 'url', 'hf_hub_id', 'hf_hub_filename', 'custom_load')  # of pretrained_cfg


class OutsideTolerance(ValueError):
    """The file was written, and its answers are not the model's."""

    code = 1  # the command's exit


def describe(
    model: nn.Module,
    class_names: list[str],
    preprocessing: Preprocessing,
    precision: Precision,
    pixels: Pixels,
    batch: int | None,
    dynamic: Dynamic,
) -> Metadata:
    """Return the metadata of the file to write."""
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    cfg = {key: value for key, value in cfg.items() if value is not None and key not in PRIVATE}
    cfg.update(preprocessing.as_cfg(), num_classes=len(class_names))
    return Metadata(
        str(cfg['architecture']),
        class_names,
        cfg,
        precision,
        pixels,
        None if dynamic != 'none' else batch,
        None if dynamic == 'all' else preprocessing.size,
        {'t2t_vit': __version__, 'torch': torch.__version__},
    )


def load(checkpoint: str | None, model: str | None, classes: str | None = None, ema: bool = True) -> Classifier:
    """Load the model to export; with random weights if only its name is given.

    Raises:
        UsageError: if neither is given, or the checkpoint is an exported file.
    """
    if checkpoint and is_exported(checkpoint):
        raise UsageError(f'{checkpoint} is an exported file already: export its PyTorch model instead')
    if checkpoint:
        return Classifier.load(checkpoint, model, 'cpu', classes=classes, ema=ema)
    if not model:
        raise UsageError('expected --checkpoint FOLDER, or --model NAME for a model with random weights')
    if not timm.models.is_model(model):
        check_name(model)
    torch.manual_seed(0)
    return Classifier.of(timm.create_model(model))


def resize(net: nn.Module, cfg: Preprocessing, img_size: int | tuple[int, int] | None) -> None:
    """Set a model and its preprocessing to another image size."""
    if img_size is not None:
        cfg.size = (img_size, img_size) if isinstance(img_size, int) else img_size
        if hasattr(net, 'set_input_size'):  # convolutional networks take any
            net.set_input_size(img_size=cfg.size)  # type: ignore[operator]


def quantizer(metadata: Metadata, form: str, images: list[Any], kept: list[str]) -> Callable[[Any], Any]:
    """Return the function that quantises the graph of a format; names of operations kept in float go to `kept`."""

    def quantize(model: Any) -> Any:
        graph = int8.onnx_graph(model) if form == 'onnx' else int8.openvino_graph(model)
        kept.extend(int8.kept_in_float(graph))
        try:
            return int8.quantize(model, graph, images)
        except Exception as error:  # of NNCF and of the runtimes that it calls
            raise UsageError(f'NNCF cannot quantise {metadata.model} to int8: {reason(error)}') from error

    return quantize


def filled(images: torch.Tensor, batch: int | None) -> torch.Tensor:
    """Repeat images (B, …) to the (batch, …) that a file takes; None for any number."""
    return images if batch is None else images[torch.arange(batch) % len(images)]


def calibrate(name: str, split: str, cache: str | None) -> tuple[Pictures, str]:
    """Open the images for int8's ranges, the train split if there is one, and return their name."""
    try:
        return open_images(name, 'train', cache), f'{name} (train)' if name != 'samples' else name
    except DataError:
        return open_images(name, split, cache), f'{name} ({split})'


def export(
    output: str,
    checkpoint: str | None = None,
    model: str | None = None,
    classes: str | None = None,
    ema: bool = True,
    precision: Precision = 'float32',
    dynamic: Dynamic = 'batch',
    pixels: Pixels = 'float',
    opset: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    data: str = 'samples',
    split: Literal['train', 'val'] = 'val',
    labels: bool = True,
    max_images: int | None = None,
    calibration: str | None = None,
    calibration_images: int = 128,
    runtime: Runtime | None = None,
    threads: int | None = None,
    tolerance: float | None = None,
    rounds: int = 7,
    seconds: float = 0.5,
    cache: str | None = None,
) -> Report:
    """Write a model as one file for another runtime, and compare that file with the model.

    FILE.report.json and FILE.report.md stand beside the file. Exits with 1 if the file is outside tolerance beyond
    sampling error, or its logits are not finite.

    Args:
        output: The file: .onnx, .pt2 (torch.export) or .xml (OpenVINO, which writes a .bin beside it).
        checkpoint: A run folder, its model.safetensors, a training state (checkpoints/step-*.pt), hf-hub:USER/NAME, or
            a file in any published layout (then with --model).
        model: The registered name of the model in a file without a config.json; alone, that model with random weights,
            for timing.
        classes: A file with the class names in the order of the model's outputs, one a line.
        ema: Take the EMA weights of a training state, else the raw ones.
        precision: float32, fp16 (.xml: of the weights in the file), bf16 (.pt2), or int8 (.xml and .onnx).
        dynamic: Free sizes: none, the batch, or all (batch, height and width).
        pixels: The file's input: float (normalised images), uint8-nchw or uint8-nhwc (resized and cropped images from 0
            to 255, which it normalises), or image (.onnx only: one uint8 RGB image of any size, which it resizes, crops
            and normalises).
        opset: ONNX's operator set; by default 18.
        img_size: Another image size than the model's, one number or [H,W].
        batch_size: Images at once, in the comparison and the timing, and in the file with --dynamic none.
        data: Images to compare on: samples (crops of two photographs that scikit-learn ships), a folder of images, or
            labelled ones as for eval, which measure top-1 too.
        split: val or train, of labelled images.
        labels: Read the labels of --data; false for images of other classes than the model's.
        max_images: Compare on at most so many, evenly spread; by default on all.
        calibration: Images for int8's ranges, as for data; by default the train split of data, or data itself if it has
            none. No label is read.
        calibration_images: Number of these images.
        runtime: What runs the file in the comparison; by default its format's own. openvino runs .onnx too.
        threads: Threads for both; by default torch's own choice.
        tolerance: The largest relative difference of logits that is allowed, of the worst image; by default float32
            1e-3, fp16 2e-2, bf16 1e-1. In int8 of the mean over images, 0.2.
        rounds: Timing rounds; 0 for no timing.
        seconds: Length of each turn.
        cache: Folder of torch/ and hfds/ sets; by default ~/.cache/t2t-vit, and the Hub's own.
    """
    given = {key: value for key, value in locals().items() if value != signature(export).parameters[key].default}
    command = 't2t-vit export ' + shlex.join(f'--{key}={value}' for key, value in given.items())
    path = Path(output)
    form = kind(path)
    require(
        (
            (batch_size >= 1, f'batch_size must be at least 1, got {batch_size}'),
            (calibration_images >= 1, f'calibration_images must be at least 1, got {calibration_images}'),
            (max_images is None or max_images >= 1, f'max_images must be at least 1, got {max_images}'),
            (rounds >= 0, f'rounds must be at least 0, got {rounds}'),
            (opset is None or form == 'onnx', f'opset is for .onnx, not {path.suffix}'),
            (opset is None or opset >= OPSET, f'opset must be at least {OPSET}, got {opset}'),
            (pixels != 'image' or form == 'onnx', f'pixels image is for .onnx, not {path.suffix}'),
            (pixels != 'image' or dynamic != 'all', 'pixels image crops to one size: leave out --dynamic all'),
        )
    )
    check_precision(path, precision)
    check_writable(path.parent)
    need(*EXTRAS[form], *(('nncf',) if precision == 'int8' else ()), *((runtime,) if runtime else ()))
    if threads:
        torch.set_num_threads(threads)
    classifier = load(checkpoint, model, classes, ema)
    net, cfg = classifier.net, classifier.preprocessing
    resize(net, cfg, img_size)
    pictures = open_images(data, split, cache, classifier.match if labels and checkpoint else None)
    metadata = describe(net, classifier.outputs, cfg, precision, pixels, batch_size, dynamic)
    screen = console()
    for note in (*pictures.notes, classifier.note() if checkpoint else ''):
        if note:
            screen.print(f'note: {note}', soft_wrap=True)

    kept: list[str] = []
    quantize, calibrated = None, None
    if precision == 'int8':
        ranges, calibrated = calibrate(calibration or data, split, cache)
        for note in ranges.notes:
            screen.print(f'note: {note}', soft_wrap=True)
        parts = [part.images for part in batches(ranges, cfg, metadata.batch or 1, calibration_images, [])]
        images = [metadata.pixels_of(filled(part, metadata.batch)) for part in parts]
        calibrated = f'{sum(map(len, parts))} images of {calibrated}'
        screen.print(f'int8: calibrating on {calibrated}')
        quantize = quantizer(metadata, form, images, kept)
    export_model(net, path, metadata, dynamic, quantize, opset or OPSET)
    exported = load_exported(path, runtime, torch.get_num_threads())

    damaged: list[str] = []
    found, sizes = compare(net, exported, batches(pictures, cfg, batch_size, max_images, damaged))
    limit = TOLERANCES[precision]
    top1 = [right / found.labelled if found.labelled else None for right in found.right]
    first = next(batches(pictures, cfg, batch_size, batch_size, []))
    speed, latency = (
        measure_speed(net, exported, first, count, rounds, seconds)
        if rounds and metadata.batch in (None, count)
        else None
        for count in (batch_size, 1)
    )
    report = Report(
        file=path.name,
        bytes=sum(file.stat().st_size for file in files_of(path)),
        model=metadata.model,
        precision=precision,
        opset=(opset or OPSET) if form == 'onnx' else None,
        runtime=exported.runtime,
        pixels=pixels,
        dynamic=dynamic,
        batch=metadata.batch,
        size=metadata.size,
        data=data,
        images=found.images,
        max_difference=found.largest if found.relative else None,
        not_finite=found.broken,
        relative_difference=found.worst,
        mean_relative_difference=found.mean,
        top1_agreement=found.agreed / found.images,
        labelled=found.labelled,
        top1_pytorch=top1[0],
        top1_exported=top1[1],
        only_pytorch=found.only_first,
        only_exported=found.only_second,
        damaged=damaged,
        sizes_tried=sizes,
        kept_in_float=kept,
        calibration=calibrated,
        speed=speed,
        latency=latency,
        tolerance=limit if tolerance is None else limit._replace(difference=tolerance),
        versions=versions(metadata, exported.runtime),
        command=command,
    )
    files = save(report, path)
    screen.print(as_markdown(report), soft_wrap=True)
    screen.print(f'the file is {path}, its report {files[0].name} and {files[1].name}', soft_wrap=True)
    if report.problems:
        raise OutsideTolerance(f'{path} is outside tolerance: ' + '; '.join(report.problems))
    return report
