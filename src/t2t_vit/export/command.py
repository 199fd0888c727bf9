"""`t2t-vit export`: a model as a file for another runtime, and the proof that it is the same model."""

import shlex
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from .. import __version__
from ..console import console
from ..data import DataError, Preprocessing
from ..models.listing import check_name
from ..settings import UsageError, require
from ..trained import load_model
from . import int8
from .check import TOLERANCES, Report, as_markdown, compare, measure_speed, save, versions
from .formats import Dynamic, check_precision, export_model
from .images import Pictures, batches, open_images
from .metadata import Metadata, Pixels, Precision, files_of, kind
from .runtime import Runtime, load_exported, need, reason

EXTRAS = {'onnx': ('onnx', 'onnxscript', 'onnxruntime'), 'openvino': ('openvino',), 'torch': ()}
PRIVATE = ('file', 'source', 'state_dict', 'url', 'hf_hub_id', 'hf_hub_filename', 'custom_load')  # of pretrained_cfg


class OutsideTolerance(ValueError):
    """The file was written, and does not give the model's answers."""

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
    """What the exported file will say of itself."""
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


def load(checkpoint: str | None, model: str | None) -> tuple[nn.Module, Preprocessing, list[str]]:
    """The model to export; untrained where only its name is given."""
    if checkpoint:
        return load_model(checkpoint, model)
    if not model:
        raise UsageError('say what to export: --checkpoint FOLDER, or --model NAME for one with random weights')
    if not timm.models.is_model(model):
        check_name(model)
    torch.manual_seed(0)
    net = timm.create_model(model).eval()
    return net, Preprocessing.of(net.pretrained_cfg), [str(i) for i in range(net.num_classes)]


def resize(net: nn.Module, cfg: Preprocessing, img_size: int | tuple[int, int] | None) -> None:
    """Set a model and its preprocessing to another image size."""
    if img_size is not None:
        cfg.size = (img_size, img_size) if isinstance(img_size, int) else img_size
        if hasattr(net, 'set_input_size'):  # convolutional networks take any
            net.set_input_size(img_size=cfg.size)  # type: ignore[operator]


def quantizer(metadata: Metadata, form: str, images: list[Any], kept: list[str]) -> Callable[[Any], Any]:
    """What makes the graph of a format int8; the names of the operations that stay in float go to `kept`."""

    def quantize(model: Any) -> Any:
        graph = int8.onnx_graph(model) if form == 'onnx' else int8.openvino_graph(model)
        kept.extend(int8.kept_in_float(graph))
        try:
            return int8.quantize(model, graph, images)
        except Exception as error:  # of NNCF and of the runtimes that it calls
            raise UsageError(f'NNCF cannot quantise {metadata.model} to int8: {reason(error)}') from error

    return quantize


def filled(images: torch.Tensor, batch: int | None) -> torch.Tensor:
    """(B, …) as the (batch, …) that a file takes, the images repeated where there are fewer."""
    return images if batch is None else images[torch.arange(batch) % len(images)]


def calibrate(name: str, split: str, given: str | None, cache: str | None) -> tuple[Pictures, str]:
    """Where int8's ranges come from, and what it is called: the train split where there is one."""
    try:
        return open_images(name, 'train', cache), f'{name} (train)' if name != 'samples' else name
    except DataError:
        return open_images(name, split, cache), f'{name} ({split})'


def export(
    output: str,
    checkpoint: str | None = None,
    model: str | None = None,
    precision: Precision = 'float32',
    dynamic: Dynamic = 'batch',
    pixels: Pixels = 'float',
    img_size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    data: str = 'samples',
    split: Literal['train', 'val'] = 'val',
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

    Beside the file stand FILE.report.json and FILE.report.md. The exit is 1 where the file is outside tolerance.

    Args:
        output: The file: .onnx, .pt2 (torch.export) or .xml (OpenVINO, which puts a .bin beside it).
        checkpoint: A run's folder, hf-hub:USER/NAME, or a file in any published layout (then with --model).
        model: The registered name of the model in a file; alone, that model with random weights, for timing.
        precision: float32, fp16 (.xml: of the weights in the file), bf16 (.pt2), or int8 (.xml and .onnx).
        dynamic: What stays open: none, the batch, or all (batch, height and width).
        pixels: What the file takes: normalised float images, or uint8 from 0 to 255 as NCHW or NHWC, which it
            normalises itself. Resizing and cropping stay outside.
        img_size: Another image size than the model's own, one number or [H,W].
        batch_size: Images at once, in the comparison and the timing, and in the file with --dynamic none.
        data: Images to compare on: samples (windows of two photographs that scikit-learn has), a folder of images, or
            labelled ones as eval takes them, which give top-1 too.
        split: val or train, of labelled images.
        max_images: Compare on at most so many, evenly spread; by default on all.
        calibration: Images for int8's ranges, as for data; by default the train split of data, or data itself where
            it has none. No label is read.
        calibration_images: How many of them.
        runtime: What runs the file in the comparison; by default its own. openvino runs .onnx too.
        threads: Threads for both; by default torch's own choice.
        tolerance: The largest relative difference of logits that is allowed, of the worst image; by default float32
            1e-3, fp16 2e-2, bf16 1e-1. In int8 of the images' mean, 0.2.
        rounds: How often both are timed; 0 for not at all.
        seconds: How long each turn takes.
        cache: Where torch/ and hfds/ sets are kept; by default ~/.cache/t2t-vit, and the Hub's own.
    """
    given = {key: value for key, value in locals().items() if value != signature(export).parameters[key].default}
    command = 't2t-vit export ' + shlex.join(f'--{key}={value}' for key, value in given.items())
    path = Path(output)
    require(
        (
            (batch_size >= 1, f'batch_size is at least 1, got {batch_size}'),
            (calibration_images >= 1, f'calibration_images is at least 1, got {calibration_images}'),
            (max_images is None or max_images >= 1, f'max_images is at least 1, got {max_images}'),
            (rounds >= 0, f'rounds is at least 0, got {rounds}'),
        )
    )
    form = kind(path)
    check_precision(path, precision)
    need(*EXTRAS[form], *(('nncf',) if precision == 'int8' else ()), *((runtime,) if runtime else ()))
    if threads:
        torch.set_num_threads(threads)
    net, cfg, class_names = load(checkpoint, model)
    resize(net, cfg, img_size)
    pictures = open_images(data, split, cache, net)
    metadata = describe(net, class_names, cfg, precision, pixels, batch_size, dynamic)
    screen = console()
    if pictures.note:
        screen.print(pictures.note, soft_wrap=True)

    kept: list[str] = []
    quantize, calibrated = None, None
    if precision == 'int8':
        ranges, calibrated = calibrate(calibration or data, split, calibration, cache)
        parts = [part.images for part in batches(ranges, cfg, metadata.batch or 1, calibration_images, [])]
        images = [metadata.pixels_of(filled(part, metadata.batch)) for part in parts]
        calibrated = f'{sum(map(len, parts))} images of {calibrated}'
        screen.print(f'int8: calibrating on {calibrated}')
        quantize = quantizer(metadata, form, images, kept)
    export_model(net, path, metadata, dynamic, quantize)
    exported = load_exported(path, runtime, torch.get_num_threads())

    damaged: list[str] = []
    found, sizes = compare(net, exported, batches(pictures, cfg, batch_size, max_images, damaged))
    limit = TOLERANCES[precision]
    top1 = [right / found.labelled if found.labelled else None for right in found.right]
    first = filled(next(batches(pictures, cfg, batch_size, batch_size, [])).images, batch_size)
    report = Report(
        path.name,
        sum(file.stat().st_size for file in files_of(path)),
        metadata.model,
        precision,
        exported.runtime,
        pixels,
        dynamic,
        metadata.batch,
        metadata.size,
        data + (' (labels not read)' if pictures.note else ''),
        found.images,
        found.largest,
        found.broken,
        found.worst,
        sum(found.relative) / len(found.relative) if found.relative else found.worst,
        found.agreed / found.images,
        top1[0],
        top1[1],
        damaged,
        sizes,
        kept,
        calibrated,
        measure_speed(net, exported, first, rounds, seconds) if rounds else None,
        limit if tolerance is None else limit._replace(difference=tolerance),
        versions(metadata, exported.runtime),
        command,
    )
    files = save(report, path)
    screen.print(as_markdown(report), soft_wrap=True)
    screen.print(f'the file is {path}, its report {files[0].name} and {files[1].name}', soft_wrap=True)
    if report.problems:
        raise OutsideTolerance(f'{path} is outside tolerance: ' + '; '.join(report.problems))
    return report
