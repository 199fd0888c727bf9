"""Keep uploaded images until they are read, and reports until they are downloaded, within limits."""

import re
import shutil
import time
import uuid
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

MAX_AGE = 600  # seconds until a file that nobody asked for is deleted
MAX_FILES = 256
TOKEN = re.compile(r'upload/([0-9a-f]{32})/([^/]+)')  # by which clients name a file; they learn no path


class Uploads:
    """Files in a folder of their own, each in a subfolder, and the routes to send and fetch them.

    They replace Gradio's routes, which answer with paths, give two people who send the same file the same path, keep a
    record of every file, and have no limit on all files together.
    """

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.arriving = 0  # bytes of requests that are being read
        folder.mkdir(parents=True, exist_ok=True)

    def create(self, name: str) -> tuple[str, Path]:
        """Choose the token and the path of a new file."""
        key = uuid.uuid4().hex
        (self.folder / key).mkdir()
        return f'upload/{key}/{name}', self.folder / key / name

    def find(self, token: object) -> Path | None:
        """Return the path of a file, None if there is no such file."""
        match = TOKEN.fullmatch(token) if isinstance(token, str) else None
        file = self.folder / match[1] / match[2] if match else None
        return file if file is not None and match and match[2] not in ('.', '..') and file.is_file() else None

    def is_full(self, size: int) -> bool:
        """Return true if there is no room for another file of so many bytes."""
        sizes = [file.stat().st_size for file in self.folder.glob('*/*') if file.is_file()]
        return len(sizes) >= MAX_FILES or sum(sizes) + self.arriving + size > self.max_bytes

    async def receive(self, request: Request) -> Response:
        """Store the one file of a form; answers with a list of its token, as Gradio's route does with a path."""
        size = int(request.headers.get('content-length', 0))
        if self.is_full(size):
            async for _ in request.stream():  # most clients read the answer only after they have sent everything
                pass
            return PlainTextResponse('Too many uploads are waiting. Please try again in a minute.', 503)
        self.arriving += size
        try:
            async with request.form(max_files=1, max_fields=8) as form:
                file = form.get('files')
                if not isinstance(file, UploadFile):
                    return PlainTextResponse('No file was sent.', 400)
                name = re.sub(r'[^\w.() -]', '_', Path(file.filename or '').name)[-60:].strip('. ') or 'image'
                token, path = self.create(name)
                path.write_bytes(await file.read())
        finally:
            self.arriving -= size
        return JSONResponse([token])

    async def send(self, request: Request) -> Response:
        """Answer with a file, by its token."""
        file = self.find(request.path_params['token'])
        if file is None:
            return PlainTextResponse('There is no such file.', 404)
        return FileResponse(file, filename=file.name, content_disposition_type='attachment')

    def remove(self, token: str) -> None:
        """Delete a file."""
        if file := self.find(token):
            shutil.rmtree(file.parent)

    def sweep(self) -> None:
        """Delete files older than MAX_AGE."""
        for folder in self.folder.iterdir():
            try:
                if time.time() - folder.stat().st_mtime > MAX_AGE:
                    shutil.rmtree(folder)
            except FileNotFoundError:  # read meanwhile
                pass
