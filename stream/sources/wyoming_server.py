"""Wyoming, the protocol of Home Assistant's voice services, over TCP: we are an ASR service.

``describe`` is answered by ``info``. ``transcribe`` (optional), ``audio-start``, ``audio-chunk``
and ``audio-stop`` make one utterance, which is a session of its own. While it goes on,
``transcript-start``, a ``transcript-chunk`` for each final stretch of words and ``transcript-stop``
are sent; then ``transcript`` with all of it, whose context names the speakers::

    {"speakers": [{"label": "S1", "identity": null, "start": 0.6, "end": 3.1, "text": "…"}, …]}

The protocol has no authentication: loopback unless told otherwise, and not part of the default
configuration. The package wyoming is imported when the port opens.
"""

import asyncio
import importlib
import warnings
from importlib import metadata
from itertools import groupby
from typing import Any, Final, Literal

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from sinks.events import Event, SpeakerIdentified, TranscriptFinal, Word
from stream.engine import EngineFull
from stream.sources.line import Line
from stream.sources.pcm import Form, PcmEar
from stream.sources.source import Intake, SourceError

log = structlog.get_logger(__name__)

LARGEST: Final = 1 << 20
"""Bytes of a part of a message; a longer one ends the connection."""

WRITE_S: Final = 5.0
"""How long a client may take to accept what it is told; then it is hung up on."""


class WyomingSource(BaseModel):
    """A port for Wyoming clients."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["wyoming"] = "wyoming"
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=10300, ge=0, le=65535, description="0 takes a free one.")
    streams: int = Field(default=4, ge=1, le=1024, description="Connections at a time.")
    idle_s: float = Field(default=60, gt=0, description="A connection silent for this is closed.")
    buffer_ms: int = Field(default=2000, ge=20, description="Audio that may wait for the engine.")

    async def serve(self, name: str, intake: Intake) -> None:
        """See `Listener.serve`."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # its use of audioop
                for part in ("event", "asr", "audio", "info"):
                    await asyncio.to_thread(importlib.import_module, f"wyoming.{part}")
        except ImportError as error:
            raise SourceError(
                "a wyoming source needs the package: pip install 'livesat[wyoming]'"
            ) from error
        info = await asyncio.to_thread(_info)
        clients: dict[asyncio.Task[None], _Client] = {}
        count = 0

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal count
            task = asyncio.current_task()
            assert task is not None
            try:
                if len(clients) >= self.streams:
                    log.warning("refused", source=name, streams=len(clients))
                    return
                count += 1
                client = _Client(self, f"{name}-{count}", intake, info, reader, writer)
                clients[task] = client
                await client.run()
            except asyncio.CancelledError:
                writer.transport.abort()  # nobody waits for what is not sent by now
                raise
            finally:
                await _close(writer)
                clients.pop(task, None)

        try:
            server = await asyncio.start_server(take, self.host, self.port, limit=LARGEST)
        except OSError as error:
            raise SourceError(
                f"wyoming {self.host}:{self.port}: cannot listen ({error.strerror or error})"
            ) from error
        async with server:
            port = server.sockets[0].getsockname()[1]
            log.info("listening", source=name, kind="wyoming", host=self.host, port=port)
            intake.listening(name)
            await intake.stop.wait()
            server.close()
            for task, client in list(clients.items()):
                if not client.speaking:  # an utterance is drained: the daemon ends its session
                    task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)


class _Bounded:
    """A reader for the package's own parser, with a bound on what a header may announce.

    Attributes:
        over: The client has said all. The parser answers None to that, and to some nonsense.
    """

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.over = False
        self._reader = reader

    async def readline(self) -> bytes:
        line = await self._reader.readline()
        self.over = not line
        return line

    async def readexactly(self, n: int) -> bytes:
        if not 0 <= n <= LARGEST:
            raise ValueError(f"expected at most {LARGEST} bytes, got {n}")
        return await self._reader.readexactly(n)


class _Client:
    """One connection: utterance after utterance."""

    def __init__(
        self,
        settings: WyomingSource,
        name: str,
        intake: Intake,
        info: Any,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._settings, self._name, self._intake = settings, name, intake
        self._reader, self._writer = _Bounded(reader), writer
        self._info = info
        self._utterances = 0
        self._language: str | None = None
        self.speaking = False
        """Whether an utterance is under way, or its end is being told."""
        self._failure: Exception | None = (
            None  # of a task; raised there, it would be one of a group
        )

    async def run(self) -> None:
        try:
            while not self._over and (event := await self._read()) is not None:
                if event.type == "describe":
                    await self._write(self._info.event())
                elif event.type == "transcribe":
                    self._language = _text(event.data, "language")
                elif event.type == "audio-start":
                    await self._utterance(event)
                elif event.type == "ping":
                    await self._write_plain("pong", {"text": _text(event.data, "text")})
        except TimeoutError:
            log.info("closed", stream=self._name, why="idle", idle_s=self._settings.idle_s)
        except ValueError as error:
            log.warning("refused", stream=self._name, error=f"not a message: {error}")
        except (OSError, asyncio.IncompleteReadError):
            pass  # it has gone
        except (SourceError, EngineFull) as error:
            log.warning("refused", stream=self._name, error=str(error))
            await self._write_plain("error", {"text": str(error), "code": "busy"})

    @property
    def _over(self) -> bool:
        """Whether the client is to say no more: the daemon stops, or it was hung up on."""
        return self._intake.stop.is_set() or self._writer.is_closing()

    async def _utterance(self, start: Any) -> None:
        """Audio until ``audio-stop`` → its session, and what it said."""
        from wyoming.asr import Transcript, TranscriptStart, TranscriptStop

        ear = _ear(start.data)
        self._utterances += 1
        line = Line(f"wyoming:{self._name}", self._settings.buffer_ms)
        told: asyncio.Queue[TranscriptFinal | None] = asyncio.Queue()  # bound: an utterance's
        words: list[Word] = []
        people: dict[str, str | None] = {}

        def tap(event: Event) -> None:
            if isinstance(event, TranscriptFinal) and event.words:
                words.extend(event.words)
                told.put_nowait(event)
            elif isinstance(event, SpeakerIdentified):
                people[event.speaker] = event.identity

        await self._write(TranscriptStart(language=self._language).event())
        self.speaking = True
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._tell(told))
                hearing = group.create_task(self._hear(ear, line))
                try:
                    await self._intake.stream(f"{self._name}.{self._utterances}", line, tap=tap)
                except (SourceError, EngineFull) as error:
                    self._failure = error
                finally:
                    told.put_nowait(None)
                    hearing.cancel()
            if self._failure is not None:
                raise self._failure
            await self._write(TranscriptStop().event())
            said = " ".join(word.word for word in words)
            context = {"speakers": _speakers(words, people)}
            await self._write(Transcript(said, context=context, language=self._language).event())
        finally:
            self.speaking = False

    async def _hear(self, ear: PcmEar, line: Line) -> None:
        try:
            while (event := await self._read()) is not None:
                if event.type == "audio-chunk":
                    await line.put(ear.hear(event.payload or b""))
                elif event.type == "audio-stop":
                    break
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # what was heard is still told, if anyone listens
        except ValueError as error:
            self._failure = error  # what was heard before is kept
        finally:
            line.add(ear.rest())
            line.end()

    async def _tell(self, told: "asyncio.Queue[TranscriptFinal | None]") -> None:
        from wyoming.asr import TranscriptChunk

        while (event := await told.get()) is not None:
            await self._write(TranscriptChunk(event.text + " ").event())

    async def _read(self) -> Any:
        """The next message, whose data is an object; None when the client has said all.

        Raises:
            ValueError: it is malformed.
            TimeoutError: none came.
        """
        from wyoming.event import async_read_event

        try:
            async with asyncio.timeout(self._settings.idle_s):
                event = await async_read_event(self._reader)  # pyright: ignore[reportArgumentType]
        except (AttributeError, LookupError, TypeError, RecursionError) as error:
            raise ValueError("expected an object with a type") from error
        if event is None:
            if self._reader.over:
                return None
            raise ValueError(f"expected an object as JSON, and {LARGEST} bytes of it at most")
        data: Any = {} if event.data is None else event.data  # pyright: ignore[reportUnnecessaryComparison]
        if not isinstance(data, dict):
            raise ValueError("data: expected an object")
        event.data = data
        return event

    async def _write(self, event: Any) -> None:
        """Tell the client something; if it does not take it in time, it is hung up on."""
        from wyoming.event import async_write_event

        if self._writer.is_closing():
            return
        try:
            async with asyncio.timeout(WRITE_S):
                await async_write_event(event, self._writer)
        except TimeoutError:
            log.warning("closed", stream=self._name, why="reads too slowly", write_s=WRITE_S)
            self._writer.transport.abort()
        except OSError:
            pass  # it has gone

    async def _write_plain(self, kind: str, data: dict[str, Any]) -> None:
        from wyoming.event import Event as Message

        await self._write(Message(type=kind, data=data))


async def _close(writer: asyncio.StreamWriter) -> None:
    """End a connection; what the client does not take in time is thrown away."""
    writer.close()
    try:
        async with asyncio.timeout(WRITE_S):
            await writer.wait_closed()
    except OSError:  # of which a TimeoutError is one
        pass
    finally:
        if writer.transport.get_write_buffer_size():
            writer.transport.abort()


def _text(data: dict[str, Any], key: str) -> str | None:
    """A text of a message's data, if there is one.

    Raises:
        ValueError: it is no text.
    """
    text = data.get(key)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{key}: expected text")
    return text


def _ear(data: dict[str, Any]) -> PcmEar:
    """For the form ``audio-start`` announces.

    Raises:
        ValueError: it makes no sense.
    """
    try:
        rate, width, channels = (int(data[key]) for key in ("rate", "width", "channels"))
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError("audio-start: expected rate, width and channels as numbers") from error
    if width not in {2, 4} or not 1000 <= rate <= 768_000 or not 1 <= channels <= 64:
        raise ValueError(f"audio-start: got {rate} Hz, {width} bytes, {channels} channels")
    return (PcmEar if width == 2 else _WideEar)(Form("s16le", rate, channels))


class _WideEar(PcmEar):
    """32-bit integers: their upper halves are 16-bit ones."""

    def __init__(self, form: Form) -> None:
        super().__init__(form)
        self._odd = b""

    def hear(self, data: bytes) -> NDArray[np.float32]:
        data = self._odd + data
        whole = len(data) // 4 * 4
        self._odd = data[whole:]
        return super().hear(np.frombuffer(data[:whole], "<i2")[1::2].tobytes())


def _speakers(words: list[Word], people: dict[str, str | None]) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    for label, run in groupby(words, key=lambda word: word.speaker):
        said = list(run)
        told.append(
            {
                "label": label,
                "identity": people.get(label or ""),
                "start": said[0].start,
                "end": said[-1].end,
                "text": " ".join(word.word for word in said),
            }
        )
    return told


def _info() -> Any:
    """What ``describe`` is answered with; blocks."""
    from wyoming.info import AsrModel, AsrProgram, Attribution, Info

    us = Attribution(name="livesat", url="https://pypi.org/project/livesat/")
    version = metadata.version("livesat")
    model = AsrModel(
        name="livesat",
        attribution=us,
        installed=True,
        description="CTC words with speakers",
        version=version,
        languages=["en"],
    )
    return Info(
        asr=[
            AsrProgram(
                name="livesat",
                attribution=us,
                installed=True,
                description="Live diarization and transcription",
                version=version,
                models=[model],
                supports_transcript_streaming=True,
            )
        ]
    )
