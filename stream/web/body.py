"""Bodies of requests: short JSON, in time; also where no token was shown yet."""

import asyncio
import json
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

LONGEST: Final = 10_000
"""Bytes of a body."""

REQUEST_S: Final = 10.0
"""How long a connection may take to say what it wants, and again to send the body of that."""


class Unread(Exception):
    """A body was not read to its end, and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status

    def response(self) -> Response:
        """The answer; the connection ends with it, because the rest of the body may still come."""
        return JSONResponse({"error": str(self)}, self.status, {"Connection": "close"})


async def read_json(request: Request) -> Any:
    """The body of a request as JSON.

    Raises:
        Unread: it is too long or takes too long.
        ValueError: it is none.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(REQUEST_S):
            async for data in request.stream():
                body += data
                if len(body) > LONGEST:
                    raise Unread(413, f"expected a body of {LONGEST} bytes or less")
    except TimeoutError:
        raise Unread(408, f"the body took longer than {REQUEST_S:g} s") from None
    except ClientDisconnect:
        raise Unread(400, "the body was cut") from None
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("nested too deeply") from None
