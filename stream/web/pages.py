"""The dashboard's page and files, what it asks for at its start, and a session as a file."""

import asyncio
import mimetypes
from dataclasses import asdict
from importlib.resources import files as resources
from pathlib import Path
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stream.server import Desk, ServerSettings
from stream.web.body import Unread, read_json
from stream.web.exports import KINDS, export
from stream.web.gate import COOKIE, Gate

# Nothing from elsewhere, no inline script or style, no frame around us.
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; worker-src 'self'; font-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self)",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

_FOLDER: Final = Path(str(resources("stream.web") / "static"))
_YEAR_S: Final = 31_536_000


def files() -> ASGIApp:
    """The dashboard's own files; blocks."""
    mimetypes.init()  # reads files of the system: now, not at the first request
    return StaticFiles(directory=_FOLDER)


class Pages:
    """The endpoints."""

    def __init__(self, settings: ServerSettings, gate: Gate, desk: Desk) -> None:
        self._settings, self._gate, self._desk = settings, gate, desk

    async def dashboard(self, request: Request) -> Response:
        """The page; it shows nothing by itself, and asks for a token where one is needed."""
        del request
        return FileResponse(_FOLDER / "index.html")

    async def login(self, request: Request) -> Response:
        """``{"token": …}`` → a cookie that only this page's requests carry."""
        try:
            body = await read_json(request)
            token = body["token"]
        except Unread as unread:
            return unread.response()
        except (ValueError, KeyError, TypeError):
            token = None
        if not isinstance(token, str) or not self._gate.knows(token):
            return JSONResponse({"error": "this is not a token of this server"}, 401)
        response = JSONResponse({"ok": True})
        response.set_cookie(
            COOKIE,
            token,
            max_age=_YEAR_S,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    async def logout(self, request: Request) -> Response:
        """Forget the cookie."""
        del request
        response = JSONResponse({"ok": True})
        response.delete_cookie(COOKIE)
        return response

    async def status(self, request: Request) -> Response:
        """How the house is, for the dashboard's badge."""
        del request
        status = asdict(self._desk.status())
        return JSONResponse(status | {"guarded": self._gate.guarded})

    async def sessions(self, request: Request) -> Response:
        """Sessions that are open, and those that were; newest first."""
        del request
        entries = [
            asdict(entry) | {"speakers": entry.speakers}
            for entry in reversed(self._desk.feed.sessions)
        ]
        return JSONResponse({"sessions": entries})

    async def export(self, request: Request) -> Response:
        """A session as RTTM, WebVTT, SubRip, JSON or text, as far as it is kept.

        Where its beginning is not, ``X-Livesat-Kept-From`` says from which second on it is.
        """
        session, form = request.path_params["session"], request.path_params["form"]
        if form not in KINDS:
            return JSONResponse({"error": f"expected {', '.join(KINDS)}, got {form}"}, 404)
        lines = self._desk.feed.lines(session)
        if not lines:
            return JSONResponse({"error": "no such session is kept"}, 404)
        made = await asyncio.to_thread(export, form, lines)
        headers = {"Content-Disposition": f'attachment; filename="{lines[0].session}.{form}"'}
        if made.kept_from:
            headers["X-Livesat-Kept-From"] = f"{made.kept_from:.3f}"
        return Response(made.data, media_type=KINDS[form], headers=headers)


class SecurityHeaders:
    """An application whose every response carries our headers.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                have = Headers(raw=message.get("headers", []))
                extra = [
                    (k.lower().encode(), v.encode()) for k, v in HEADERS.items() if k not in have
                ]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        await self._app(scope, receive, sent)
