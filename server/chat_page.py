"""The chat page at `/` and its files: static, complete in themselves, open to whoever reaches the server.

The page holds no secret; what it asks of the server needs a key like everything else.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

router = APIRouter()

_FOLDER = Path(__file__).with_name("web")
# Looked up by name, so that no path of a request ever reaches the file system.
_FILES = {path.relative_to(_FOLDER).as_posix(): path for path in sorted(_FOLDER.rglob("*")) if path.is_file()}
PAGE_PATHS = ("/", *(f"/web/{name}" for name in _FILES))

_HEADERS = {
    # Nothing from elsewhere, nothing inline, in nobody's frame.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # A browser with the page of an older version would talk to a newer server.
    "Cache-Control": "no-store",
}


@router.get("/")
async def show_page() -> FileResponse:
    """The page."""
    return _file("index.html")


@router.get("/web/{name:path}")
async def show_file(name: str) -> FileResponse:
    """A script, style sheet or image of the page."""
    return _file(name)


def _file(name: str) -> FileResponse:
    if name not in _FILES:
        raise HTTPException(404)
    return FileResponse(_FILES[name], headers=_HEADERS)
