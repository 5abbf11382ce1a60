"""``/v1/listen``: the WebSocket protocol that Deepgram's clients speak, over our sessions.

Understood of the query: ``encoding`` (linear16, linear32, mulaw; none or opus for a container),
``sample_rate``, ``channels``, ``multichannel``, ``interim_results``, ``diarize`` or
``diarize_model``, ``vad_events``, ``utterance_end_ms``, ``tag``; the rest is accepted and ignored,
as models and languages are the checkpoint's. Messages: ``Results``, ``SpeechStarted``,
``UtteranceEnd``, ``Metadata``; commands: ``KeepAlive``, ``Finalize``, ``CloseStream``. Source: the
message types of deepgram-sdk 7.

One thing differs by nature: ``speech_final`` marks the last result before silence as our turns
hear it, and ``UtteranceEnd`` follows it at once; ``endpointing`` and the length in
``utterance_end_ms`` move neither.
"""

import asyncio
import hashlib
import re
import uuid
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from sinks.events import (
    Event,
    SessionClosed,
    SpeechEnded,
    SpeechStarted,
    TranscriptFinal,
    TranscriptPartial,
    Word,
)
from stream.calls import Call, Calls
from stream.engine import EngineFull
from stream.server import Desk, ServerSettings
from stream.sources.pcm import Form, PcmFormat
from stream.sources.source import SourceError
from stream.web.containers import Container, ContainerError
from stream.web.gate import LATER
from stream.web.wire import AWAY, INVALID, NORMAL, UNSUPPORTED, Hangup, Wire, command

_ENCODINGS: Final[dict[str, PcmFormat]] = {
    "linear16": "s16le",
    "linear32": "f32le",
    "mulaw": "mulaw",
}

_CONTAINED: Final = frozenset({"opus", "ogg-opus", "webm"})

_WAITING: Final = 1024
"""Messages that wait for the client; then interim ones are left out, then it is hung up on."""


class Listen:
    """The endpoint."""

    def __init__(self, settings: ServerSettings, desk: Desk, calls: Calls) -> None:
        self._settings, self._desk, self._calls = settings, desk, calls

    async def websocket(self, socket: WebSocket) -> None:
        """One connection: a session, or one a channel."""
        wire = Wire(socket, self._settings)
        await wire.open()
        try:
            conversation = _Conversation(wire, socket.query_params, socket)
            await conversation.open(self._calls)
        except ValueError as error:
            await wire.close(UNSUPPORTED, str(error))
            return
        except (EngineFull, SourceError) as error:
            await wire.close(LATER, str(error))
            return
        code, reason = await conversation.run(self._desk.stop)
        await wire.close(code, reason)


class _Conversation:
    """A client's audio and what it is told."""

    def __init__(self, wire: Wire, query: Mapping[str, str], socket: WebSocket) -> None:
        self.request_id = str(uuid.uuid4())
        self._wire = wire
        self._interim = _yes(query, "interim_results")
        self._diarize = _yes(query, "diarize") or query.get("diarize_model", "") not in {"", "none"}
        self._vad = _yes(query, "vad_events")
        self._utterances = bool(query.get("utterance_end_ms"))
        self._channels = _number(query, "channels", 1, 1, 16)
        self._multichannel = _yes(query, "multichannel") and self._channels > 1
        self._hash = hashlib.sha256()
        self._began = datetime.now(UTC)
        self._messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()  # see `_put`
        self._fell_behind = False
        self._finalizing: set[int] = set()  # channels whose flush is under way
        self._held: dict[int, TranscriptFinal] = {}  # a final that may be the last before silence
        self._last_word: dict[int, float] = {}
        self._ended: defaultdict[int, float] = defaultdict(float)  # where speech last ended
        self._heard = 0.0  # seconds, known when a session has closed
        host = socket.client.host if socket.client else "?"
        self._source = f"deepgram:{host}"
        self._name = re.sub(r"[\x00-\x1f/]", "_", query.get("tag", ""))[:64] or "listen"
        encoding = query.get("encoding", "")
        self._contained = encoding in _CONTAINED or not encoding
        self._forms = self._all_forms(query, encoding)
        self.calls: list[Call] = []

    def _all_forms(self, query: Mapping[str, str], encoding: str) -> list[Form | None]:
        """The form of each session's audio; None for a container's."""
        if self._contained:
            if self._multichannel:
                raise ValueError("multichannel: expected with a raw encoding")
            return [None]
        if encoding not in _ENCODINGS:
            known = ", ".join([*_ENCODINGS, "opus"])
            raise ValueError(f"encoding: expected {known}, got {encoding[:20]!r}")
        rate = _number(query, "sample_rate", 0, 1000, 768_000)
        heard = range(self._channels) if self._multichannel else [None]
        return [Form(_ENCODINGS[encoding], rate, self._channels, index) for index in heard]

    async def open(self, calls: Calls) -> None:
        """Open the sessions.

        Raises:
            EngineFull: there is no slot for one of them.
            SourceError: one could not be opened.
        """
        try:
            for index, form in enumerate(self._forms):
                tap = partial(self._tell, index)
                call = await calls.open(self._name, self._source, form, tap=tap, resumable=False)
                self.calls.append(call)
        except (EngineFull, SourceError):
            self.finish()
            raise

    def finish(self) -> None:
        """No more audio: the sessions hear the rest and close."""
        for call in self.calls:
            call.finish()

    async def run(self, stop: asyncio.Event) -> tuple[int, str]:
        """Until the client has said all, and was told all → close code and reason."""
        hearing = asyncio.create_task(self._hear(), name="listen:hear")
        telling = asyncio.create_task(self._send(), name="listen:send")
        over = asyncio.create_task(self._over(), name="listen:over")
        code, reason = NORMAL, ""
        try:
            await asyncio.wait({hearing, telling, over}, return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():
                code, reason = hearing.result()
            if code == NORMAL and not telling.done():
                self.finish()
                await asyncio.wait({over, telling}, return_when=asyncio.FIRST_COMPLETED)
                if not telling.done():
                    self._put(self._metadata())
                    self._put(None)
                await telling
                if stop.is_set():
                    code, reason = AWAY, "the daemon is stopping"
            elif telling.done():
                telling.result()
        except Hangup as hangup:
            code, reason = hangup.code, str(hangup)
        except WebSocketDisconnect:
            pass
        finally:
            self.finish()
            for task in (hearing, telling, over):
                task.cancel()
            await asyncio.gather(hearing, telling, over, return_exceptions=True)
        return code, reason

    async def _over(self) -> None:
        for call in self.calls:
            await call.over()

    async def _hear(self) -> tuple[int, str]:
        container = None
        try:
            if self._contained:
                container = await Container.open(self.calls[0].line)
            while True:
                message = await self._wire.receive()
                if message is None:
                    return AWAY, ""
                if isinstance(message, bytes):
                    self._hash.update(message)
                    if not message:
                        continue  # some clients keep alive, or end, by an empty one
                    if container is not None:
                        await container.feed(message)
                    else:
                        for call in self.calls:
                            await call.hear(message)
                    continue
                match command(message).get("type"):
                    case "KeepAlive":
                        pass
                    case "Finalize":
                        self._finalize()
                    case "CloseStream":
                        if container is not None:
                            await container.end()
                        return NORMAL, ""
                    case other:
                        what = "KeepAlive, Finalize or CloseStream"
                        return INVALID, f"type: expected {what}, got {str(other)[:40]!r}"
        except Hangup as hangup:
            return hangup.code, str(hangup)
        except (ValueError, ContainerError) as error:
            for call in self.calls:
                call.line.fail(str(error))
            return INVALID, str(error)
        finally:
            if container is not None:
                await container.close()

    async def _send(self) -> None:
        while (message := await self._messages.get()) is not None:
            await self._wire.send_json(message)
        if self._fell_behind:
            raise Hangup(LATER, "reads too slowly")

    def _put(self, message: dict[str, Any] | None) -> None:
        waiting = self._messages.qsize()
        if waiting >= _WAITING and message is not None:
            if not message.get("is_final", True):
                return
            self._fell_behind = True
            message = None
        self._messages.put_nowait(message)

    # -- events → messages ----------------------------------------------------------------------

    def _tell(self, channel: int, event: Event) -> None:
        match event:
            case SpeechStarted() if self._vad:
                index = [channel, len(self._forms)]
                self._put({"type": "SpeechStarted", "channel": index, "timestamp": event.start})
            case TranscriptPartial() if self._interim and event.words:
                self._go_on(channel, event.words[0].start)
                self._put(self._results(channel, event, final=False))
            case TranscriptFinal() if event.words:
                self._go_on(channel, event.words[0].start)
                self._held[channel] = event
                self._last_word[channel] = event.words[-1].end
                if event.words[-1].start < self._ended[channel]:
                    # What was said before silence is often known after it has begun; of several
                    # finals that come together the last one is the last before it.
                    asyncio.get_running_loop().call_soon(self._settle, channel)
            case SpeechEnded():
                self._ended[channel] = event.end
                self._pause(channel)
            case SessionClosed():
                self._pause(channel)
                self._heard = max(self._heard, event.totals["audio_s"])
            case _:
                pass

    def _go_on(self, channel: int, start: float) -> None:
        """Further words follow, from ``start`` on: the final before them need not wait for them."""
        if start >= self._ended[channel]:
            self._settle(channel)
        self._release(channel, speech_final=False)

    def _settle(self, channel: int) -> None:
        """No more words come of speech that has ended."""
        held = self._held.get(channel)
        if held is not None and held.words[-1].start < self._ended[channel]:
            self._pause(channel)

    def _pause(self, channel: int) -> None:
        """Nothing more is known to have been said before silence."""
        self._release(channel, speech_final=True)
        end = self._last_word.pop(channel, None)
        if self._utterances and end is not None:
            index = [channel, len(self._forms)]
            self._put({"type": "UtteranceEnd", "channel": index, "last_word_end": end})

    def _finalize(self) -> None:
        for channel, call in enumerate(self.calls):
            if channel not in self._finalizing:
                self._finalizing.add(channel)
                call.line.flush(partial(self._finalized, channel))

    def _finalized(self, channel: int) -> None:
        """Everything heard before a Finalize has been told."""
        if channel in self._held:
            self._release(channel, speech_final=True)
        else:
            nothing = self._result(channel, 0.0, 0.0, "", [], final=True, speech_final=True)
            self._put(nothing | {"from_finalize": True})
        self._finalizing.discard(channel)

    def _release(self, channel: int, *, speech_final: bool) -> None:
        event = self._held.pop(channel, None)
        if event is not None:
            self._put(self._results(channel, event, final=True, speech_final=speech_final))

    def _results(
        self,
        channel: int,
        event: TranscriptFinal | TranscriptPartial,
        *,
        final: bool,
        speech_final: bool = False,
    ) -> dict[str, Any]:
        words = [self._word(word) for word in event.words]
        duration = round(event.end - event.start, 6)
        return self._result(
            channel,
            event.start,
            duration,
            event.text,
            words,
            final=final,
            speech_final=speech_final,
        )

    def _result(
        self,
        channel: int,
        start: float,
        duration: float,
        text: str,
        words: list[dict[str, Any]],
        *,
        final: bool,
        speech_final: bool,
    ) -> dict[str, Any]:
        sure = float(np.mean([word["confidence"] for word in words])) if words else 0.0
        return {
            "type": "Results",
            "channel_index": [channel, len(self._forms)],
            "start": start,
            "duration": duration,
            "is_final": final,
            "speech_final": speech_final,
            "from_finalize": final and channel in self._finalizing,
            "channel": {
                "alternatives": [{"transcript": text, "confidence": round(sure, 4), "words": words}]
            },
            "metadata": {
                "request_id": self.request_id,
                "model_uuid": self.request_id,
                "model_info": {"name": "livesat", "version": "1", "arch": "unispeech-sat"},
            },
        }

    def _word(self, word: Word) -> dict[str, Any]:
        told: dict[str, Any] = {
            "word": word.word,
            "punctuated_word": word.word,
            "start": word.start,
            "end": word.end,
            "confidence": word.confidence,
        }
        if self._diarize and word.speaker is not None:
            number = word.speaker.removeprefix("S")
            told["speaker"] = max(int(number) - 1, 0) if number.isdigit() else 0
        return told

    def _metadata(self) -> dict[str, Any]:
        return {
            "type": "Metadata",
            "transaction_key": "deprecated",
            "request_id": self.request_id,
            "sha256": self._hash.hexdigest(),
            "created": self._began.isoformat().replace("+00:00", "Z"),
            "duration": round(self._heard, 6),
            "channels": len(self.calls),
            "models": [],
            "model_info": {},
        }


def _yes(query: Mapping[str, str], key: str) -> bool:
    return query.get(key, "false").lower() in {"true", "1", "yes"}


def _number(query: Mapping[str, str], key: str, default: int, least: int, most: int) -> int:
    text = query.get(key)
    if text is None and default:
        return default
    if text is None or not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise ValueError(f"{key}: expected {least} to {most}, got {(text or 'nothing')[:20]!r}")
    return int(text)
