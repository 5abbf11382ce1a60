"""Callers of a server and their sessions: a session outlives the connection that carries it.

A call is a line, the session over it, and how much of the caller's audio has been heard. When its
connection breaks, the call waits for the caller to come back with the resume token; audio that is
sent again is skipped by its position, so that nothing is heard twice and nothing is missing.
"""

import asyncio
import hmac
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Final

import structlog

from sinks.events import Event, SessionOpened
from stream.engine import EngineFull
from stream.inference import EngineError
from stream.sources.line import Line
from stream.sources.pcm import Form, PcmEar
from stream.sources.source import Intake, Resumed, Returns, SourceError

log = structlog.get_logger(__name__)

CALLER: Final[ContextVar[str]] = ContextVar("caller", default="")
"""The address that the present connection is from; the gate sets it, for every endpoint."""

CLOSED: Final = 256
"""Calls that ended and are still known, so that a late caller learns that and not "unknown"."""

LONGEST_GAP_S: Final = 86_400
"""What a caller may say is missing before the audio it goes on with."""


class Call:
    """One caller's session, from the first connection to `session.closed`.

    Attributes:
        name: The stream's.
        address: Who opened it.
        line: What the session hears.
        ear: Turns the caller's bytes into samples.
        session_id: Known once the session is open.
        resume_token: Likewise: the secret that lets the caller come back; None if it may not.
        closed: `session.closed` was emitted.
        attached: A connection carries it now.
    """

    def __init__(self, name: str, line: Line, ear: PcmEar | None, resume_s: float) -> None:
        self.name = name
        self.address = CALLER.get()
        self.line = line
        self.ear = ear
        self.session_id = ""
        self.resume_token: str | None = None
        self.closed = False
        self.attached = True
        self._resume_s = resume_s
        self.returns: Returns = "token" if resume_s > 0 else "never"
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._over = asyncio.Event()
        self._parked: asyncio.TimerHandle | None = None
        self._connection = 0

    async def opened(self) -> None:
        """Wait until the session is open.

        Raises:
            EngineFull: there is no slot for it.
            SourceError: it could not be opened.
        """
        await asyncio.shield(self._opened)

    async def over(self) -> None:
        """Wait until the session is closed."""
        await self._over.wait()

    def take(self) -> int:
        """A new connection carries the call from here on; an older one no longer does.

        Returns:
            Its number, for `carries` and `drop`.
        """
        if self._parked is not None:
            self._parked.cancel()
            self._parked = None
        self.attached = True
        self._connection += 1
        return self._connection

    def carries(self, connection: int) -> bool:
        """Whether this is the connection that carries the call."""
        return connection == self._connection

    def drop(self, connection: int) -> None:
        """The connection broke: wait for another one, for so long."""
        if not self.carries(connection) or self.closed or self.line.ended:
            return
        self.attached = False
        if self._resume_s <= 0:
            self.finish()
            return
        loop = asyncio.get_running_loop()
        self._parked = loop.call_later(self._resume_s, self.finish)
        log.info("caller gone", stream=self.name, session=self.session_id, waits_s=self._resume_s)

    async def hear(self, data: bytes) -> None:
        """The caller's next bytes; waits while the session is behind.

        A second at a time: of few samples a second a message becomes many of ours.
        """
        assert self.ear is not None, "a container feeds the line itself"
        for at in range(0, len(data), self.ear.form.second):
            piece = data[at : at + self.ear.form.second]
            await self.line.put(self.ear.hear(piece), self.ear.position)

    def go_on(self, offset: int) -> None:
        """The next byte is the caller's sample frame ``offset``: what lacks before it is a gap."""
        assert self.ear is not None, "nothing in a container has a position"
        if offset > self.ear.taken:
            self._add_rest(self.ear)
        self.line.lose(self.ear.reconnect(offset), "network")

    def finish(self) -> None:
        """There is no more audio: the session hears the rest and closes."""
        if self.ear is not None and not self.line.ended:
            self._add_rest(self.ear)
        self.line.end()

    def _add_rest(self, ear: PcmEar) -> None:
        """What its resampler held back belongs before what follows."""
        rest = ear.rest()
        self.line.add(rest, ear.position)

    def heard(self, event: Event) -> None:
        """The session's tap."""
        if isinstance(event, SessionOpened):
            self.session_id = event.session_id
            if self.returns == "token":
                self.resume_token = event.resume_token

    def begun(self) -> None:
        """The session is open."""
        self._opened.set_result(None)

    def ended(self, error: Exception | None) -> None:
        """The session is closed, or never opened."""
        self.closed = True
        if self._parked is not None:
            self._parked.cancel()
        if not self._opened.done():
            self._opened.set_exception(error or SourceError("the daemon is stopping"))
            self._opened.exception()  # who waits sees it; nobody may
        self._over.set()


class Calls:
    """The calls of one server.

    Args:
        group: Their tasks run in it.
        intake: Where streams are brought.
        limit: Calls at a time.
        limit_each: Those of one address; None is no fewer than all.
        resume_s: Asked how long a call waits for its caller to come back; 0 ends it at once.
        buffer_ms: Audio that may wait for the engine.
        names: Asked which names streams have that are not callers of this server.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        intake: Intake,
        *,
        limit: int,
        limit_each: int | None,
        resume_s: Callable[[], float],
        buffer_ms: int,
        names: Callable[[], set[str]],
    ) -> None:
        self._group, self._intake = group, intake
        self._limit_each = limit if limit_each is None else limit_each
        self._limit, self._resume_s, self._buffer_ms = limit, resume_s, buffer_ms
        self._names = names
        self._count = 0
        self._open: list[Call] = []  # the oldest first; bounded by `limit`
        self._gone: deque[str] = deque(maxlen=CLOSED)  # tokens of closed calls

    def __len__(self) -> int:
        return len(self._open)

    async def open(
        self,
        prefix: str,
        source: str,
        form: Form | None = None,
        *,
        tap: Callable[[Event], None] | None = None,
        resume: Resumed | None = None,
        resumable: bool = True,
    ) -> Call:
        """Begin a call → it, once its session is open.

        Args:
            prefix: The stream's name; a number is added if there is one of it already.
            source: What a subscriber reads in `session.opened`.
            form: Of raw PCM; None if the caller of this feeds the line itself.
            tap: Called with each event of the session.
            resume: Go on with a session of an earlier process.
            resumable: Whether the caller may come back.

        Raises:
            EngineFull: too many calls, or no slot for this one.
            SourceError: it could not be opened.
            ValueError: the form makes no sense.
        """
        await self._make_room()
        name = resume.stream if resume is not None else self._name(prefix)
        ear = None if form is None else PcmEar(form, resume.taken if resume else 0)
        line = Line(source, self._buffer_ms)
        call = Call(name, line, ear, self._resume_s() if resumable else 0.0)
        if resume is not None:
            call.session_id, call.resume_token = resume.session_id, resume.token
        self._open.append(call)
        self._group.create_task(self._run(call, tap, resume), name=f"call:{name}")
        await call.opened()
        return call

    def find(self, token: str) -> Call | None:
        """The open call of a resume token."""
        return next((call for call in self._open if same(call.resume_token or "", token)), None)

    def ended(self, token: str) -> bool:
        """Whether the call of this token has ended."""
        return any(same(gone, token) for gone in self._gone)

    async def over(self) -> None:
        """Wait until every call has ended."""
        for call in list(self._open):
            await call.over()

    async def _run(
        self, call: Call, tap: Callable[[Event], None] | None, resume: Resumed | None
    ) -> None:
        def both(event: Event) -> None:
            call.heard(event)
            if tap is not None:
                tap(event)

        failure: Exception | None = None
        try:
            await self._intake.stream(
                call.name,
                call.line,
                tap=both,
                resume=resume,
                returns=call.returns,
                form="" if call.ear is None else call.ear.form.stated,
                opened=call.begun,
            )
        except (SourceError, EngineFull) as error:
            failure = error
            log.warning("refused", stream=call.name, error=str(error))
        except EngineError:
            raise  # of no call's making, and the end of all
        except Exception:
            failure = SourceError("an internal error")
            log.exception("call failed", stream=call.name, session=call.session_id)
        finally:
            call.line.end()
            call.ended(failure)
            self._open.remove(call)
            if call.resume_token:
                self._gone.append(call.resume_token)

    async def _make_room(self) -> None:
        """Who is here goes before who may come back.

        Raises:
            EngineFull: everyone is here.
        """
        while crowd := self._crowd():
            parked = next((call for call in crowd if not call.attached), None)
            if parked is None:
                whose = " of this address" if len(crowd) < len(self._open) else ""
                raise EngineFull(f"{len(crowd)} streams{whose} are open, which is the limit")
            parked.finish()
            await parked.over()

    def _crowd(self) -> list[Call]:
        """The calls that are as many as may be, if another one is too many."""
        ours = [call for call in self._open if call.address == CALLER.get()]
        if len(ours) >= self._limit_each:
            return ours
        return list(self._open) if len(self._open) >= self._limit else []

    def _name(self, prefix: str) -> str:
        """The first of ``prefix``, ``prefix-1``, ``prefix-2``, … that is no stream's."""
        taken = {call.name for call in self._open} | self._names()
        if prefix not in taken:
            return prefix
        while f"{prefix}-{self._count}" in taken or not self._count:
            self._count += 1
        return f"{prefix}-{self._count}"


def same(one: str, other: str) -> bool:
    """Whether two secrets are; takes the same time for every one of a length."""
    return hmac.compare_digest(*(each.encode("utf-8", "surrogatepass") for each in (one, other)))
