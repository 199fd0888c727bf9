"""What people upload, and reports: each file in a folder of its own, until it is looked at or left behind."""

import os
import re
import shutil
import time
import uuid
from pathlib import Path

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

OLD = 600  # seconds after which what was left behind is deleted


class Uploads:
    """A folder of uploads, and the route by which they come.

    Gradio's own route gives one place to all who send the same file, so that who is answered first deletes it for the
    others, and remembers every place for good; and its deletion by age may end for good.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, name: str) -> Path:
        """For a new file."""
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir()
        return folder / name

    async def receive(self, request: Request) -> Response:
        """Answers a form of one file as Gradio's route does: with a list of places."""
        async with request.form(max_files=1, max_fields=8) as form:
            file = form.get('files')
            if not isinstance(file, UploadFile):
                return PlainTextResponse('No file was sent.', 400)
            name = re.sub(r'[^\w.() -]', '_', Path(file.filename or '').name)[-60:].strip('. ') or 'image'
            place = self.place(name)
            place.write_bytes(await file.read())
        return JSONResponse([str(place)])

    async def progress(self, request: Request) -> Response:
        """What Gradio's upload asks for meanwhile: nothing is told of it but its end."""
        return PlainTextResponse('data: {"msg": "done"}\n\n', media_type='text/event-stream')

    def holds(self, place: str) -> bool:
        """Whether an upload is there, and has not been looked at."""
        file = Path(os.path.abspath(place))
        return file.parent.parent == self.folder and file.is_file()

    def remove(self, place: str) -> None:
        """One that is held."""
        shutil.rmtree(Path(place).parent)

    def sweep(self) -> None:
        """Delete what nobody has looked at for too long."""
        for place in self.folder.iterdir():
            try:
                if time.time() - place.stat().st_mtime > OLD:
                    shutil.rmtree(place)
            except FileNotFoundError:  # it was looked at just now
                pass
