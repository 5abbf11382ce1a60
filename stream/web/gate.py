"""Who may come in: host, origin, rate and token of a connection, before anything else of it."""

from collections import Counter, OrderedDict
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from time import monotonic
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stream.calls import CALLER, same
from stream.server import ServerSettings

COOKIE: Final = "livesat_token"
"""Where a page of ours keeps the token: a browser sends no header of ours when it opens a page."""

POLICY: Final = 1008
TOO_BIG: Final = 1009
LATER: Final = 1013
"""WebSocket close codes (RFC 6455, section 7.4.1, and IANA's registry)."""

_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_REMEMBERED: Final = 4096
"""Addresses whose rate is known; the one that was seen longest ago is forgotten."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection is not served.

    Attributes:
        code: For a WebSocket.
        status: For HTTP.
        reason: One line, without a secret; up to 123 bytes fit into a close frame.
    """

    code: int
    status: int
    reason: str


_CROWDED: Final = Refusal(LATER, 503, "too many connections; try again later")


class Allowance:
    """A bucket of tokens that fills with time: ``rate`` a second, up to ``burst``."""

    def __init__(self, rate: float, burst: float, now: float | None = None) -> None:
        self._rate, self._burst = rate, burst
        self._left = burst
        self._at = monotonic() if now is None else now

    def take(self, earned: float = 0.0, now: float | None = None) -> bool:
        """Take one, after ``earned`` more; False when there is none."""
        now = monotonic() if now is None else now
        grown = self._left + (now - self._at) * self._rate + earned
        self._left, self._at = min(grown, self._burst), now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Gate:
    """Decides about a connection by what its request says.

    Without a token in the settings, only this machine can connect; then a page of another site must
    be kept out all the same, also one whose name was made to point here (DNS rebinding): the
    request must name a host of this machine.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._secrets = settings.secrets
        self._origins = {origin.rstrip("/").lower() for origin in settings.origins}
        self._rates: OrderedDict[str, Allowance] = OrderedDict()
        self._open: Counter[str] = Counter()  # by address; bounded by `max_connections`

    def refusal(self, connection: HTTPConnection, *, token: bool = True) -> Refusal | None:
        """Why not, or None.

        Args:
            connection: A request or a WebSocket's.
            token: Whether it must show one.
        """
        if not self._rated(address(connection)):
            return Refusal(LATER, 429, "too many connections from this address; try again later")
        host = connection.headers.get("host", "")
        if not self._secrets and _name(host) not in _LOCAL:
            return Refusal(POLICY, 403, "expected a Host of this machine, as localhost")
        origin = connection.headers.get("origin")
        if origin is not None and not self._known(origin, host):
            return Refusal(POLICY, 403, "this origin is not allowed; server.origins lists others")
        if token and self._secrets and not self.knows(shown(connection)):
            return Refusal(POLICY, 401, "expected a token: Authorization: Bearer …")
        return None

    @contextmanager
    def place(self, ip: str) -> Generator[bool]:
        """A connection of an address, for as long as it is served; False when there is no room."""
        limits = self._settings
        free = (
            self._open.total() < limits.max_connections
            and self._open[ip] < limits.max_connections_per_ip
        )
        if not free:
            yield False
            return
        self._open[ip] += 1
        try:
            yield True
        finally:
            self._open[ip] -= 1
            if not self._open[ip]:
                del self._open[ip]

    def knows(self, token: str | None) -> bool:
        """Whether it is one of ours; takes the same time for every token of a length."""
        return any([same(token or "", secret) for secret in self._secrets])  # noqa: C419 - all of them

    @property
    def guarded(self) -> bool:
        """Whether a token is asked for at all."""
        return bool(self._secrets)

    def _known(self, origin: str, host: str) -> bool:
        origin = origin.rstrip("/").lower()
        if origin in self._origins:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in {"http", "https"} and bool(host) and parts.netloc == host.lower()

    def _rated(self, ip: str) -> bool:
        rate = self._rates.get(ip)
        if rate is None:
            a_minute = self._settings.connects_per_minute
            rate = self._rates[ip] = Allowance(a_minute / 60, a_minute)
            if len(self._rates) > _REMEMBERED:
                self._rates.popitem(last=False)
        self._rates.move_to_end(ip)
        return rate.take()


class Guard:
    """The gate before an application: nothing behind it is reached without its leave.

    Args:
        app: What is guarded.
        gate: Whom it lets in.
        open_paths: Served without a token.
        plain_paths: WebSockets that are refused by an HTTP status, as their clients expect; others
            are accepted and closed, because a browser's script sees nothing but the close code.
        probe_paths: Served when all places are taken, too: a crowd is no reason to restart us.
    """

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        open_paths: Collection[str] = (),
        plain_paths: Collection[str] = (),
        probe_paths: Collection[str] = (),
    ) -> None:
        self._app, self._gate = app, gate
        self._open, self._plain = frozenset(open_paths), frozenset(plain_paths)
        self._probes = frozenset(probe_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, or a refusal (ASGI)."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        path = scope["path"]
        open_to_all = path in self._open or path.startswith("/static/")
        refusal = self._gate.refusal(connection, token=not open_to_all)
        if refusal is None:
            ip = address(connection)
            CALLER.set(ip)
            with self._gate.place(ip) as free:
                if free or path in self._probes:
                    await self._app(scope, receive, send)
                    return
            refusal = _CROWDED
        if scope["type"] == "http" or scope["path"] in self._plain:
            await denied(refusal)(scope, receive, send)
        else:
            await turn_away(refusal, connection, receive, send)


def denied(refusal: Refusal) -> Response:
    """A refusal as a response."""
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
    body = {"err_code": _PHRASES.get(refusal.status, "REFUSED"), "err_msg": refusal.reason}
    return JSONResponse(body, refusal.status, headers)


_PHRASES: Final = {
    400: "Bad Request",
    401: "INVALID_AUTH",
    403: "FORBIDDEN",
    429: "TOO_MANY_REQUESTS",
    503: "TOO_MANY_CONNECTIONS",
}


async def turn_away(
    refusal: Refusal, connection: HTTPConnection, receive: Receive, send: Send
) -> None:
    """Accept a WebSocket and close it at once, so that the client learns why."""
    await receive()  # its "connect"
    accept: Message = {"type": "websocket.accept", "subprotocol": subprotocol(connection)}
    try:
        await send(accept)
        await send({"type": "websocket.close", "code": refusal.code, "reason": refusal.reason})
    except OSError:
        return  # it has gone by itself


def shown(connection: HTTPConnection) -> str | None:
    """The token a client shows: ``Authorization``, the subprotocols ``token, …``, or our cookie."""
    scheme, _, credential = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() in {"bearer", "token"}:
        return credential.strip()
    offered = _offered(connection)
    if len(offered) > 1 and offered[0].lower() in {"bearer", "token"}:
        return offered[1]
    try:
        cookie = SimpleCookie(connection.headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return cookie.value if cookie is not None else None


def subprotocol(connection: HTTPConnection) -> str | None:
    """What to answer to the subprotocols a client offers: a browser wants one of them."""
    offered = _offered(connection)
    return offered[0] if offered and offered[0].lower() in {"bearer", "token"} else None


def address(connection: HTTPConnection) -> str:
    """Where a client connects from."""
    return connection.client.host if connection.client else ""


def _offered(connection: HTTPConnection) -> list[str]:
    offered: list[str] = connection.scope.get("subprotocols", [])
    return offered


def _name(host: str) -> str:
    """``[::1]:80`` → ``::1``, ``localhost:80`` → ``localhost``."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def clipped(reason: str, limit: int = 123) -> str:
    """At most as many bytes as a close frame holds."""
    return reason.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")
