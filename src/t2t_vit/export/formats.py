"""Trace a model to one graph, and write the graph as a file: ONNX, torch.export's .pt2, OpenVINO's IR.

Letters: B images, C channels, H x W the image, D the width of the head's input.
"""

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..fast.export import prepare_for_export
from ..integrity import BLANK, stamp
from ..settings import UsageError
from .metadata import CHANNELS_LAST, KEY, OUTPUTS, Metadata, files_of, kind
from .preprocess import prepend_preprocessing
from .runtime import need

Dynamic = Literal['none', 'batch', 'all']
EXAMPLES = 2  # images to trace a model with: one would become a constant
OPSET = 18  # of ONNX: the dynamo exporter's own, and the first with antialiased Resize

# the precisions of each format; which are missing, and why
PRECISIONS = {
    'onnx': ('float32', 'fp16', 'int8'),
    'torch': ('float32', 'fp16', 'bf16'),
    'openvino': ('float32', 'fp16', 'int8'),
}
MISSING = {
    ('onnx', 'bf16'): "onnxruntime's kernels for the CPU have no bf16",
    ('torch', 'int8'): 'torch has no fast int8 kernels of its own; write .xml or .onnx',
    ('openvino', 'bf16'): 'OpenVINO computes a float32 or fp16 file in bf16 where the chip has it, if the hint '
    'INFERENCE_PRECISION_HINT asks for it',
}


class Exportable(nn.Module):
    """The computation of an exported file: normalised (B, C, H, W), or uint8 pixels -> logits and features, float32."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: nn.Module, metadata: Metadata, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        cfg = metadata.preprocessing
        self.pixels, self.dtype = metadata.pixels, dtype
        body: Any = prepare_for_export(copy.deepcopy(model).eval().to(dtype))
        self.head = body.get_classifier()
        body.reset_classifier(0)
        self.model: nn.Module = body
        self.register_buffer('mean', torch.tensor(cfg.mean).view(1, -1, 1, 1) * 255)
        self.register_buffer('std', torch.tensor(cfg.std).view(1, -1, 1, 1) * 255)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, classes) and features (B, D) of images (B, C, H, W), or uint8 (B, H, W, C)."""
        if self.pixels in CHANNELS_LAST:
            images = images.permute(0, 3, 1, 2)
        if self.pixels != 'float':
            images = (images.float() - self.mean) / self.std
        features = self.model(images.to(self.dtype))
        return self.head(features).float(), features.float()


def check_precision(path: Path, precision: str) -> None:
    """Raise UsageError if a format is not written in this precision, with the reason."""
    if precision not in PRECISIONS[kind(path)]:
        raise UsageError(
            f'{path.suffix} is not written in {precision}: {MISSING[kind(path), precision]}; '
            f'{path.suffix} has {", ".join(PRECISIONS[kind(path)])}'
        )


@contextmanager
def explained(problem: str) -> Iterator[None]:
    """Turn every exception into a UsageError: the problem, and the exception's first line."""
    try:
        yield
    except Exception as error:  # of many kinds, which differ between versions of torch and OpenVINO
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f'{problem}: {reason[0]}') from error


def trace(model: nn.Module, metadata: Metadata, path: Path, dynamic: Dynamic) -> torch.export.ExportedProgram:
    """Trace a model to the graph that the file `path` will have.

    Raises:
        UsageError: if the model cannot be traced so.
    """
    half = {'fp16': torch.float16, 'bf16': torch.bfloat16}
    # OpenVINO stores the weights in half precision and chooses for itself what it computes in
    dtype = torch.float32 if kind(path) == 'openvino' else half.get(metadata.precision, torch.float32)
    cfg = metadata.preprocessing
    images = torch.zeros(metadata.batch or EXAMPLES, cfg.channels, *cfg.size)
    images = images if metadata.pixels == 'float' else images.to(torch.uint8)
    rows, columns = (1, 2) if metadata.pixels in CHANNELS_LAST else (2, 3)
    if rows == 1:
        images = images.permute(0, 2, 3, 1).contiguous()
    free = torch.export.Dim.DYNAMIC
    dims: dict[int, Any] = {'none': {}, 'batch': {0: free}, 'all': {0: free, rows: free, columns: free}}[dynamic]
    with explained(f'{metadata.model} cannot be traced with --dynamic {dynamic}'), torch.no_grad():
        return torch.export.export(Exportable(model, metadata, dtype), (images,), dynamic_shapes=(dims,))


def write(path: Path, *files: tuple[str, Callable[[str], Any]]) -> None:
    """Write files beside `path`, each with the function of its suffix, all of them or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.') as draft:
        for suffix, save in files:
            save(str(Path(draft) / f'{path.stem}{suffix}'))
        if kind(path) != 'torch':
            stamp(files_of(Path(draft) / path.name))
        for file in sorted(Path(draft).iterdir()):
            os.replace(file, path.with_suffix(file.suffix))


def save_torch(program: torch.export.ExportedProgram, path: Path, metadata: Metadata) -> None:
    """Write a .pt2 of the graph alone, without example inputs, guards and the origin of its lines."""
    program.example_inputs = None
    program._guards_code = []  # `Metadata` says which images it takes
    for node in program.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key in ('val', 'unbacked_bindings')}
    write(path, ('.pt2', lambda file: torch.export.save(program, file, extra_files={KEY: metadata.to_text()})))


def to_onnx(program: torch.export.ExportedProgram, metadata: Metadata, opset: int = OPSET) -> Any:
    """Convert the graph to an onnx.ModelProto, by torch's dynamo exporter.

    Raises:
        UsageError: if the exporter cannot write this graph, or this opset.
    """
    need('onnx', 'onnxscript')
    with explained(f'{metadata.model} cannot be written as ONNX'), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of the exporter, about its own parts
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            input_names=['images'],
            output_names=list(OUTPUTS),
            opset_version=opset,
            verbose=False,
            external_data=False,
        )
    assert exported is not None
    proto = exported.model_proto
    if (found := next(entry.version for entry in proto.opset_import if not entry.domain)) != opset:
        raise UsageError(f'the ONNX exporter wrote opset {found} instead of {opset}: try another --opset')
    return proto


def save_onnx(proto: Any, path: Path, metadata: Metadata) -> None:
    """Write an .onnx, one file of up to ONNX's 2 GB."""
    import onnx

    onnx.helper.set_model_props(proto, {KEY: replace(metadata, digest=BLANK).to_text()})
    write(path, ('.onnx', lambda file: onnx.save(proto, file)))


def to_openvino(program: torch.export.ExportedProgram, metadata: Metadata) -> Any:
    """Convert the graph to an openvino.Model, directly from torch's operators, which keeps attention one operation.

    Raises:
        UsageError: if OpenVINO lacks an operator of the graph.
    """
    need('openvino')
    import openvino

    with explained(f'{metadata.model} cannot be written for OpenVINO'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = openvino.convert_model(program)
    cfg = metadata.preprocessing
    size = list(metadata.size or (-1, -1))
    shape = [*size, cfg.channels] if metadata.pixels in CHANNELS_LAST else [cfg.channels, *size]
    model.reshape([metadata.batch or -1, *shape])
    model.inputs[0].get_tensor().set_names({'images'})
    for output, name in zip(model.outputs, OUTPUTS):
        output.get_tensor().set_names({name})
    return model


def save_openvino(model: Any, path: Path, metadata: Metadata) -> None:
    """Write an .xml and its .bin."""
    import openvino

    model.set_rt_info(replace(metadata, digest=BLANK).to_text(), [KEY])
    write(path, ('.xml', lambda file: openvino.save_model(model, file, compress_to_fp16=metadata.precision == 'fp16')))


def export_model(
    model: nn.Module,
    path: Path,
    metadata: Metadata,
    dynamic: Dynamic,
    quantize: Callable[[Any], Any] | None = None,
    opset: int = OPSET,
) -> None:
    """Write a model as one file, with OpenVINO's weights beside it.

    Args:
        model: Any of timm's, in any mode.
        path: The file; its suffix says the format.
        metadata: The description of the file.
        dynamic: Free sizes: none, the batch, or all (batch, height and width).
        quantize: For int8: turns an onnx.ModelProto or an openvino.Model into one of int8.
        opset: ONNX's operator set.
    """
    check_precision(path, metadata.precision)
    program = trace(model, metadata, path, dynamic)
    form = kind(path)
    if form == 'torch':
        save_torch(program, path, metadata)
        return
    graph = to_onnx(program, metadata, opset) if form == 'onnx' else to_openvino(program, metadata)
    graph = quantize(graph) if quantize else graph
    if metadata.pixels == 'image':
        graph = prepend_preprocessing(graph, metadata.preprocessing)
    save = save_onnx if form == 'onnx' else save_openvino
    save(graph, path, metadata)
