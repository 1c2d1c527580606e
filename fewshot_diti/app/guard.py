"""What keeps the page to its own user: requests of other pages, of what the page has no use for, and uploads without
end are refused."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fewshot_diti.reports import printable

HOSTS = ("127.0.0.1", "localhost")
AT_ONCE = 8  # people who are served: one is, the others wait
SESSIONS = 4 * AT_ONCE  # open pages whose lists of classes are kept, the last ones
KEPT_SECONDS = 3600  # of an upload

# what the page asks of gradio; no route that gets something from elsewhere, or that keeps what no schedule deletes
_GRADIO = "/gradio_api/"
_ROUTES = re.compile(
    r"upload|upload_progress|queue/(join|data)|run/\w+|heartbeat/\w+|startup-events|app_id|info|cancel|reset|theme\.css"
    r"|file=(?!\w+:).*"
)
_BODY_BYTES = 2**20  # of a request that is no upload
_BLOCK_BYTES = 4096  # that a file or a folder takes at least
_STEP_BYTES = 2**20  # of an upload, after which the folder is looked at again

_ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SHARE": "False"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of uploads.

    Attributes:
        request_bytes: of one request.
        files: in one request.
        folder_bytes: of all that lie in the page's folder.
    """

    request_bytes: int = 64 * 2**20
    files: int = 64
    folder_bytes: int = 2**30


class RefusedError(Exception):
    """A request that is not served.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Guard:
    """ASGI middleware: refuses requests that another page sends, and uploads beyond the limits.

    Args:
        folder: where uploads lie.
    """

    def __init__(self, app: Any, folder: Path, limits: Limits) -> None:
        self.app, self.folder, self.limits = app, folder, limits
        self._uploads = 0  # that are arriving

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import ClientDisconnect
        from starlette.responses import PlainTextResponse  # the browser shows the text as it is

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        upload = headers.get("content-type", "").lower().startswith("multipart/")
        self._uploads += upload
        try:
            self._check(scope["path"], headers, upload)
            await self.app(scope, self._counted(receive, headers, upload), send)
        except RefusedError as error:  # before the page has begun to answer: it reads the whole request first
            await PlainTextResponse(str(error), error.status)(scope, receive, send)
        except ClientDisconnect:  # nobody waits for an answer
            pass
        finally:
            self._uploads -= upload
            if upload and not self._uploads:
                self._remove_unfinished()

    def _check(self, path: str, headers: dict[str, str], upload: bool) -> None:
        """Raises RefusedError for what the headers give away."""
        if (origin := headers.get("origin")) is not None and origin != f"http://{headers.get('host')}":
            raise RefusedError(403, "This page answers only to itself.")
        if path.startswith(_GRADIO) and not _ROUTES.fullmatch(path.removeprefix(_GRADIO).rstrip("/")):
            raise RefusedError(404, "The page has nothing there.")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._most(upload):
            raise self._too_large(upload)
        if upload:
            self._check_room()

    def _check_room(self) -> None:
        """Raises RefusedError where uploads fill the folder; deletes those that are too old, whatever left them."""
        old, held = time.time() - KEPT_SECONDS, 0
        for path, status in list(_files(self.folder)):
            if status.st_ctime < old and not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                held += max(status.st_size, _BLOCK_BYTES)
        if held > self.limits.folder_bytes:
            raise RefusedError(507, "The page holds too many uploads; they are deleted after an hour. Try again later.")

    def _remove_unfinished(self) -> None:
        """Deletes what uploads that were refused or cut off have left: gradio moves whole ones into folders."""
        for path in self.folder.iterdir():
            if path.is_file():
                path.unlink(missing_ok=True)

    def _most(self, upload: bool) -> int:
        return self.limits.request_bytes if upload else min(_BODY_BYTES, self.limits.request_bytes)

    def _too_large(self, upload: bool) -> RefusedError:
        allowed = self._most(upload) / 2**20
        what = "upload takes" if upload else "request takes"
        return RefusedError(413, f"One {what} up to {allowed:.2g} MB; drop fewer or smaller pictures.")

    def _counted(self, receive: Any, headers: dict[str, str], upload: bool) -> Any:
        """`receive` that stops where a body is too long, holds too many files, or fills the folder."""
        found = re.search(r'boundary="?([^";]+)', headers.get("content-type", ""), re.IGNORECASE)
        boundary = b"--" + found[1].encode("latin-1") if upload and found else b""
        length, parts, end = 0, 0, b""

        async def counted() -> Any:
            nonlocal length, parts, end
            message = await receive()
            body = message.get("body", b"")
            before, length = length, length + len(body)
            if length > self._most(upload):
                raise self._too_large(upload)
            if upload and length // _STEP_BYTES > before // _STEP_BYTES:
                self._check_room()
            if boundary:
                parts += (end + body).count(boundary)
                end = (end + body)[1 - len(boundary) :]  # a boundary may lie across two messages
                if parts > self.limits.files + 1:  # the last closes the body
                    raise RefusedError(413, f"One upload takes up to {self.limits.files} files; drop fewer.")
            return message

        return counted


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for all that the page writes, gone when the page ends; gradio reads its name from the environment."""
    with TemporaryDirectory(prefix="fewshot-diti-app-") as folder:
        settings = _ENVIRONMENT | {"GRADIO_TEMP_DIR": folder}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield Path(folder)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def sentence(error: BaseException, folder: Path) -> str:
    """An error as the page shows it: on one line, uploads by their names alone."""
    text = re.sub(re.escape(str(folder)) + r"/(?:[^/\s]+/)*", "", str(error))
    return printable(" ".join(text.split()))


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All that lies in a folder, while others write to it and delete from it."""
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            yield path, path.lstat()
