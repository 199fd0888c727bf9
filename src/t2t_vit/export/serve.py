"""Serve predictions of an exported ONNX file over HTTP, without torch: onnxruntime, Pillow and FastAPI.

Run it as `python serve.py photos.onnx`; it imports nothing of the package, and may be copied alone. The ONNX file has
to carry its preprocessing: `t2t-vit export --pixels image`.

    curl -F image=@a.jpg http://127.0.0.1:8000/predict

answers {"label": …, "probability": …, "top_k": [{"label": …, "probability": …}, …]}.
"""

import argparse
import io
import json
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from fastapi import FastAPI, HTTPException, Request
from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool

KEY = 't2t_vit'  # of the model's description in the file
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF', 'PPM', 'AVIF')
MAX_BYTES, MAX_PIXELS, MAX_WAITING = 20_000_000, 50_000_000, 8


class Model:
    """An ONNX file with its own preprocessing and its class names."""

    def __init__(self, path: str, threads: int = 0) -> None:
        Image.init()  # loads Pillow's decoders
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        about = json.loads(self.session.get_modelmeta().custom_metadata_map.get(KEY, '{}'))
        if about.get('pixels') != 'image':
            raise SystemExit(f'{path} has no preprocessing of its own: export it with --pixels image')
        self.classes: list[str] = about['class_names']
        self.mode = {1: 'L', 3: 'RGB'}[about['pretrained_cfg']['input_size'][0]]

    def decode(self, content: bytes) -> np.ndarray:
        """Return the pixels of an image file, uint8 (1, H, W, C), upright and on white.

        Raises:
            ValueError: if it is not an image, or too large.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                image: Image.Image = Image.open(
                    io.BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN]
                )
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f'{image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are decoded')
            image = ImageOps.exif_transpose(image)
            if image.mode in ('LA', 'PA', 'RGBA', 'La', 'RGBa') or 'transparency' in image.info:
                layer = image.convert('RGBA')
                image = Image.alpha_composite(Image.new('RGBA', layer.size, 'white'), layer)
            pixels = np.asarray(image.convert(self.mode))
        except ValueError:
            raise
        except Exception:  # decoders raise nearly anything on damaged bytes
            raise ValueError('not an image, or a damaged one') from None
        return pixels.reshape(1, *pixels.shape[:2], -1)

    def predict(self, content: bytes, top_k: int) -> dict[str, Any]:
        """Return the most probable classes of an image file; see `decode` for errors."""
        logits = self.session.run(['logits'], {'images': self.decode(content)})[0][0]
        if not np.isfinite(logits).all():
            raise ValueError('the model computed NaN or infinity for this image')
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        best = [
            {'label': self.classes[i], 'probability': round(float(scores[i]), 6)}
            for i in np.argsort(-scores)[: min(top_k, len(scores))]
        ]
        return {**best[0], 'top_k': best}


def create_app(model: Model) -> FastAPI:
    """Make the application: POST /predict with an image, GET /classes, GET /health."""
    app = FastAPI(title='t2t-vit')
    waiting, lock = threading.BoundedSemaphore(MAX_WAITING), threading.Lock()

    def classify(content: bytes, top_k: int) -> dict[str, Any]:
        with lock:  # one image at a time: memory stays bounded, and onnxruntime uses all threads for it
            return model.predict(content, top_k)

    @app.get('/health')
    def health() -> dict[str, str]:
        """Answer while the server runs."""
        return {'status': 'ok'}

    @app.get('/classes')
    def classes() -> list[str]:
        """Return the class names in the order of the model's outputs."""
        return model.classes

    @app.post('/predict')
    async def predict(request: Request, top_k: int = 5) -> dict[str, Any]:
        """Classify the image in the body, or in the field `image` of a form."""
        if top_k < 1:
            raise HTTPException(422, 'top_k must be at least 1')
        if not waiting.acquire(blocking=False):
            raise HTTPException(503, 'too many images are waiting; try again', {'Retry-After': '1'})
        try:
            content = await read_image(request)
            return await run_in_threadpool(classify, content, top_k)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        finally:
            waiting.release()

    return app


async def read_image(request: Request) -> bytes:
    """Return the bytes of the image in a request.

    Raises:
        HTTPException: with 413 for more than MAX_BYTES, 422 without an image.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f'at most {MAX_BYTES:,} bytes are read')
    if not request.headers.get('content-type', '').startswith('multipart/form-data'):
        return bytes(body)

    async def again() -> Any:
        return {'type': 'http.request', 'body': bytes(body), 'more_body': False}

    async with Request(request.scope, again).form(max_files=1, max_fields=1) as form:
        image = form.get('image')
        if image is None or isinstance(image, str):
            raise HTTPException(422, 'expected the image in the field image')
        return await image.read()


def main(argv: list[str] | None = None) -> None:
    """Run the server."""
    parser = argparse.ArgumentParser(description='Serve predictions of an ONNX file that carries its preprocessing.')
    parser.add_argument('file', help='written by t2t-vit export --pixels image')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: this machine only)')
    parser.add_argument('--port', type=int, default=8000)
    parser.add_argument('--threads', type=int, default=0, help='of onnxruntime; 0 for its own choice')
    given = parser.parse_args(argv)
    if not Path(given.file).is_file():
        raise SystemExit(f'there is no file {given.file}')
    import uvicorn

    app = create_app(Model(given.file, given.threads))
    uvicorn.run(app, host=given.host, port=given.port, limit_concurrency=100, timeout_keep_alive=5)


if __name__ == '__main__':
    main()
