"""Load exported files as one kind of callable, each run by its own runtime."""

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..data import Preprocessing
from ..integrity import check_stamp
from ..models.safe_load import CheckpointError, PathLike
from ..settings import UsageError
from .archive import read_archive
from .metadata import KEY, OUTPUTS, Metadata, files_of, kind
from .signal_stack import keep_signal_stack

Runtime = Literal['onnxruntime', 'openvino', 'torch']
RUNTIMES = {'onnx': 'onnxruntime', 'torch': 'torch', 'openvino': 'openvino'}
# a file's own guards are code; torch before 2.9 has none of them
GUARDS = {'check_guards': False} if 'check_guards' in signature(torch.export.ExportedProgram.module).parameters else {}
Run = Callable[[np.ndarray], Sequence[np.ndarray | torch.Tensor]]


def need(*packages: str) -> None:
    """Raise UsageError if one of these packages of the extra `export` is not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(f"this needs {' and '.join(missing)}, not installed here: pip install 't2t-vit[export]'")


def reason(error: Exception) -> str:
    """Return the message of a library's error, in a line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]


class ExportedModel:
    """A loaded exported file: call it on normalised images like the model."""

    def __init__(self, path: PathLike, metadata: Metadata, run: Run, runtime: str) -> None:
        self.path, self.metadata, self.runtime = Path(path), metadata, runtime
        self.run = run

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes a tensor; `preprocessing.transform()` returns the callable's input."""
        return self.metadata.preprocessing

    @property
    def class_names(self) -> list[str]:
        """The class names, in the order of the logits."""
        return self.metadata.class_names

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, classes), float32 on the CPU, of normalised float images (B, C, H, W)."""
        return self.both(images)[0]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the head's input (B, D), the class token after the last norm or the tokens' mean, of images."""
        return self.both(images)[1]

    def both(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, classes) and features (B, D) of normalised images (B, C, H, W).

        A file for a fixed number of images gets them in parts of that number, the last one filled up.

        Raises:
            ValueError: if the images' shape is not the file's.
            CheckpointError: if the runtime cannot run the file.
        """
        self.check(images)
        batch = self.metadata.batch
        try:
            parts = [self.metadata.pixels_of(part) for part in images.split(batch or max(len(images), 1))]
            if batch and len(parts[-1]) < batch:
                fill = np.zeros((batch - len(parts[-1]), *parts[-1].shape[1:]), parts[-1].dtype)
                parts[-1] = np.concatenate([parts[-1], fill])
            found = [[torch.as_tensor(array) for array in self.run(part)] for part in parts]
            logits, features = (torch.cat(tensors)[: len(images)] for tensors in zip(*found))
        except Exception as error:  # every runtime raises its own kinds
            raise CheckpointError(
                f'{self.path} cannot be run on images of shape {tuple(images.shape)}: {reason(error)}'
            ) from error
        return logits, features

    def classify(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (1, classes) and features (1, D) of one decoded image, uint8 (H, W, C).

        For a file that has its own preprocessing (`--pixels image`).

        Raises:
            ValueError: if the file has none, or the array is not such an image.
            CheckpointError: if the runtime cannot run the file.
        """
        channels = self.preprocessing.channels
        if self.metadata.pixels != 'image':
            raise ValueError(f'{self.path} takes preprocessed images; export it with --pixels image')
        if pixels.ndim != 3 or pixels.shape[2] != channels or pixels.dtype != np.uint8:
            raise ValueError(f'expected uint8 (H, W, {channels}), got {pixels.dtype} {pixels.shape}')
        try:
            logits, features = (torch.as_tensor(array) for array in self.run(pixels[None]))
        except Exception as error:  # every runtime raises its own kinds
            raise CheckpointError(f'{self.path} cannot be run on an image {pixels.shape}: {reason(error)}') from error
        return logits, features

    def check(self, images: torch.Tensor) -> None:
        """Raise ValueError if the file does not take images of this shape."""
        if self.metadata.pixels == 'image':
            raise ValueError(f'{self.path} resizes and crops by itself: call classify(pixels) with a decoded image')
        channels, size = self.preprocessing.channels, self.metadata.size
        if images.ndim != 4 or images.shape[1] != channels or (size and tuple(images.shape[2:]) != size):
            wanted = f'(B, {channels}, {f"{size[0]}, {size[1]}" if size else "H, W"})'
            raise ValueError(
                f'{self.path} takes images of shape {wanted}, got {tuple(images.shape)}; '
                'another size needs another export, or one with --dynamic all'
            )


def load_exported(path: PathLike, runtime: Runtime | None = None, threads: int | None = None) -> ExportedModel:
    """Load a file that `t2t-vit export` wrote, to run on the CPU.

    Args:
        path: FILE.onnx, FILE.pt2 (torch.export) or FILE.xml (OpenVINO, with FILE.bin beside it). An .onnx with external
            data is refused, and a .pt2 with anything but the operators of exported models.
        runtime: What runs it: by default the format's own; OpenVINO runs .onnx too.
        threads: Number of threads; by default the runtime's own choice.

    Raises:
        CheckpointError: if there is no such file, or it is damaged, or was written by something else.
        UsageError: if the runtime is not installed, or does not run this format.
    """
    found = kind(path)
    runtime = runtime or RUNTIMES[found]  # type: ignore[assignment]
    if runtime != RUNTIMES[found] and (found, runtime) != ('onnx', 'openvino'):
        raise UsageError(f'{runtime} does not run {path}; {RUNTIMES[found]} does')
    if not os.path.isfile(path):
        raise CheckpointError(f'there is no file {path}')
    if found == 'onnx':
        refuse_external_data(path)
    load = {'onnxruntime': load_onnxruntime, 'openvino': load_openvino, 'torch': load_torch}[str(runtime)]
    if runtime != 'torch':
        need(str(runtime))
    try:
        if found != 'torch':  # whose zip has checksums
            check_stamp(files_of(path))
        text, run = load(path, threads)
    except (UsageError, CheckpointError):
        raise
    except Exception as error:  # every runtime raises its own kinds
        raise CheckpointError(f'{path} is damaged, or of a kind that {runtime} cannot run: {reason(error)}') from error
    return ExportedModel(path, Metadata.of_text(text, path), run, str(runtime))


def refuse_external_data(path: PathLike) -> None:
    """Raise CheckpointError for an ONNX file whose tensors stand in other files, which its author chooses.

    `t2t-vit export` writes none; runtimes open whatever the file names, and OpenVINO crashes over an address.
    """
    need('onnx')
    import onnx
    from google.protobuf.message import DecodeError, Message

    def tensors(message: Message) -> Iterator[Any]:
        for field, value in message.ListFields():
            if field.message_type is not None:
                for part in value if isinstance(value, Sequence) else (value,):
                    if isinstance(part, onnx.TensorProto):
                        yield part
                    elif isinstance(part, Message):
                        yield from tensors(part)

    try:
        proto = onnx.load(path, load_external_data=False)
        outside = [t for t in tensors(proto) if t.external_data or t.data_location == onnx.TensorProto.EXTERNAL]
    except (DecodeError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f'{path} is damaged, or no ONNX file: {reason(error)}') from None
    if outside:
        places = {entry.value for tensor in outside for entry in tensor.external_data if entry.key == 'location'}
        raise CheckpointError(
            f'{path} keeps {len(outside)} tensors in other files ({", ".join(sorted(places))[:80]}); such a file is '
            'refused, and nothing was opened: save it as one file'
        )


def load_onnxruntime(path: PathLike, threads: int | None) -> tuple[str, Run]:
    """Return the metadata and the call of an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return (
        session.get_modelmeta().custom_metadata_map.get(KEY, ''),
        lambda images: session.run(list(OUTPUTS), {'images': images}),
    )


@keep_signal_stack()
def load_openvino(path: PathLike, threads: int | None) -> tuple[str, Run]:
    """Return the metadata and the call of an OpenVINO IR, or of an ONNX file.

    Operations that are not int8 run in float32: OpenVINO's own choice on some processors is bf16.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    place: list[str] = [KEY] if model.has_rt_info([KEY]) else ['framework', KEY]  # where OpenVINO's ONNX reader puts it
    text = model.get_rt_info(place).astype(str) if model.has_rt_info(place) else ''
    settings = {'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY'}
    compiled = core.compile_model(model, 'CPU', {**settings, **({'INFERENCE_NUM_THREADS': threads} if threads else {})})
    return text, lambda images: list(compiled(images, share_inputs=True).values())


def load_torch(path: PathLike, threads: int | None) -> tuple[str, Run]:
    """Return the metadata and the call of a torch.export file; it runs on torch's own threads."""
    extra = {KEY: ''}
    program = torch.export.load(read_archive(path), extra_files=extra)
    module = program.module(**GUARDS)

    def run(images: np.ndarray) -> Sequence[torch.Tensor]:
        with torch.inference_mode():
            return module(torch.from_numpy(images))

    text = extra[KEY]
    return text.decode() if isinstance(text, bytes) else text, run
