import asyncio
import base64
import gc
import json
import os
import re
import socket as socketlib
import threading
from collections import defaultdict
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import ConnectionClosed, InvalidStatus

from benchmarks import hostile
from sinks.events import SpeechEnded, TranscriptPartial, parse
from stream.batcher import Batches
from stream.clock import SAMPLE_RATE
from stream.config import ConfigError
from stream.evaluate import turns as spans
from stream.feed import Feed
from stream.server import ServerSettings
from stream.session import Session
from stream.sources.line import Line
from stream.sources.pcm import PcmDecoder
from stream.web import exports
from stream.web.containers import Container, ContainerError
from stream.web.deepgram import _Conversation
from stream.web.server import Patient, serve
from tests.sinks.samples import Talk
from tests.stream.conftest import speechlike
from tests.stream.house import finals, free_port, pcm, serving, talk, until
from tests.stream.test_daemon import config

QUIET = {"session": {"heartbeat_s": 0}}
TOKEN = "a-token-that-is-long-enough"


@pytest.fixture(scope="module")
def speech():
    return speechlike(6 * SAMPLE_RATE + 123, seed=5)


async def closing(house, path, *messages, **keys):
    """Connect, send, and wait for the server to close → code, reason."""
    async with asyncio.timeout(30), house.connect(path, **keys) as socket:
        try:
            for message in messages:
                await socket.send(message)
            async for _ in socket:
                pass
        except ConnectionClosed:
            pass
        return socket.close_code, socket.close_reason


def in_bytes(samples, encoding):
    """Samples in an encoding → its bytes, and the same samples as s16le."""
    exact = np.frombuffer(pcm(samples), "<i2")
    if encoding == "f32le":
        return (exact / 32_768).astype("<f4").tobytes(), exact.tobytes()
    codes = np.arange(256, dtype=np.uint8)
    values = np.round(PcmDecoder("mulaw").step(codes.tobytes()) * 32_768).astype("<i2")
    nearest = np.abs(exact[:, None] - values.astype(np.int32)).argmin(1)
    return codes[nearest].tobytes(), values[nearest].tobytes()


def in_container(samples, path):
    """Opus in what the file's name says → its bytes."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.frombuffer(pcm(samples), "<i2")[None].copy(), "s16", "mono"
        )
        frame.rate = SAMPLE_RATE
        resampler = av.AudioResampler("s16", "mono", 48_000, frame_size=960)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path.read_bytes()


class TestAudio:
    async def test_says_what_a_file_of_the_same_audio_says(self, checkpoint, speech, tmp_path):
        import soundfile

        from tests.stream.test_daemon import collected

        path = tmp_path / "same.wav"
        await asyncio.to_thread(
            soundfile.write, path, np.frombuffer(pcm(speech), "<i2"), SAMPLE_RATE
        )
        filed, _ = await collected(
            config(checkpoint, {"a": {"kind": "file", "path": path}}, **QUIET)
        )
        async with serving(checkpoint, **QUIET) as house:
            events = await talk(house, speech, "/v1/audio?name=desk")
        assert finals(events) == finals([e.model_dump(mode="json") for e in filed])
        assert {e["stream_id"] for e in events} == {"desk"}

    async def test_a_cut_connection_resumed_gives_the_events_of_an_uncut_one(
        self, checkpoint, speech
    ):
        async with serving(checkpoint, **QUIET) as house:
            whole = await talk(house, speech)
            cut = await self.talk_with_cuts(house, speech, every=0.7, seed=1)
        assert finals(cut) == finals(whole)
        assert [e["seq"] for e in cut] == list(range(len(cut)))

    @staticmethod
    async def talk_with_cuts(house, speech, every, seed):
        """Break the connection all the time, also amid a sample; come back with what is needed."""
        rng = np.random.default_rng(seed)
        data, events, token = pcm(speech), [], None
        while True:
            query = "" if token is None else f"&resume={token}&have=0&after={events[-1]['seq']}"
            async with house.connect(f"/v1/audio?name=x{query}") as socket:
                ready = json.loads(await socket.recv())
                token = ready["resume_token"]
                at = ready["received"] * 2
                budget = int(every * SAMPLE_RATE) * 2 + int(rng.integers(-999, 999))
                end = min(at + budget, len(data))
                for begin in range(at, end, 3201):
                    await socket.send(data[begin : min(begin + 3201, end)])
                if end == len(data):
                    await socket.send('{"type": "close"}')
                    events += [json.loads(message) async for message in socket]
                    return events
                try:  # some of what it says, so that the rest must be said again
                    for _ in range(int(rng.integers(1, 6))):
                        async with asyncio.timeout(0.3):
                            events.append(json.loads(await socket.recv()))
                except TimeoutError:
                    pass
                socket.transport.abort()

    async def test_what_the_caller_cannot_send_again_is_a_gap(self, checkpoint, speech):
        async with serving(checkpoint, **QUIET) as house:
            async with house.connect("/v1/audio") as socket:
                ready = json.loads(await socket.recv())
                await socket.send(pcm(speech[:16_000]))
                await until(lambda: house.events[-1].end > 0)
                socket.transport.abort()
            path = f"/v1/audio?resume={ready['resume_token']}&have=20000&after=-1"
            async with house.connect(path) as socket:
                assert json.loads(await socket.recv())["received"] == 20_000
                await socket.send(pcm(speech[20_000:30_000]))
                await socket.send('{"type": "close"}')
                events = [json.loads(message) async for message in socket]
        (gap,) = [e for e in events if e["type"] == "gap"]
        assert (gap["lost_samples"], gap["reason"]) == (4000, "network")
        assert events[-1]["end"] == 30_000 / SAMPLE_RATE

    async def test_a_caller_that_stays_away_is_waited_for_and_then_not(self, checkpoint, speech):
        async with serving(checkpoint, session={"heartbeat_s": 0, "resume_s": 0.2}) as house:
            async with house.connect("/v1/audio") as socket:
                token = json.loads(await socket.recv())["resume_token"]
                await socket.send(pcm(speech[:8000]))
            await until(lambda: house.events[-1].type == "session.closed")
            code, reason = await closing(house, f"/v1/audio?resume={token}")
        assert (code, reason) == (1008, "the session of this resume token has ended")

    async def test_other_encodings_and_rates(self, checkpoint):
        tone = np.sin(np.arange(48_000) / 30).astype("<f4") * 0.3
        async with serving(checkpoint, **QUIET) as house:
            async with house.connect("/v1/audio?encoding=f32le&rate=48000&channels=2") as socket:
                await socket.recv()
                await socket.send(np.repeat(tone, 2).tobytes())
                await socket.send('{"type": "close"}')
                last = [json.loads(message) async for message in socket][-1]
        assert last["totals"]["audio_s"] == 1.0

    @pytest.mark.parametrize("encoding", ["f32le", "mulaw"])
    async def test_an_encoding_is_heard_as_the_samples_it_stands_for(
        self, checkpoint, speech, encoding
    ):
        data, exact = in_bytes(speech, encoding)
        async with serving(checkpoint, **QUIET) as house:
            said = []
            for query, sent in ((encoding, data), ("s16le", exact)):
                async with house.connect(f"/v1/audio?encoding={query}") as socket:
                    await socket.recv()
                    for at in range(0, len(sent), 4001):  # amid a sample, too
                        await socket.send(sent[at : at + 4001])
                    await socket.send('{"type": "close"}')
                    said.append([json.loads(message) async for message in socket])
        assert finals(said[0]) == finals(said[1])
        assert {e["type"] for e in said[0]} >= {"turn.ended", "transcript.final"}

    @pytest.mark.parametrize(
        ("encoding", "session"), [("opus", {}), ("s16le", {"resume_s": 0}), ("s16le", {})]
    )
    async def test_a_token_is_given_where_it_is_of_use(self, checkpoint, encoding, session):
        pytest.importorskip("av")
        async with serving(checkpoint, session={"heartbeat_s": 0, **session}) as house:
            async with house.connect(f"/v1/audio?encoding={encoding}") as socket:
                ready = json.loads(await socket.recv())
                opened = json.loads(await socket.recv())
            wanted = opened["resume_token"] if encoding == "s16le" and not session else None
            assert ready["resume_token"] == wanted
            if wanted is None:  # nor does the one of the event bring anybody back
                await until(lambda: house.events[-1].type == "session.closed")
                code, reason = await closing(house, f"/v1/audio?resume={opened['resume_token']}")
                assert (code, reason) == (1008, "the session of this resume token is not known")

    async def test_a_session_in_a_container_is_not_taken_over(self, checkpoint, speech, tmp_path):
        pytest.importorskip("av")
        data = await asyncio.to_thread(in_container, speech, tmp_path / "a.webm")
        async with (
            serving(checkpoint, **QUIET) as house,
            house.connect("/v1/audio?encoding=opus") as socket,
        ):
            await socket.recv()
            await socket.send(data[:2000])
            token = json.loads(await socket.recv())["resume_token"]
            raw = await closing(house, f"/v1/audio?resume={token}")
            contained = await closing(house, f"/v1/audio?resume={token}&encoding=opus")
            await socket.send(data[2000:])
            await socket.send('{"type": "close"}')
            last = [json.loads(message) async for message in socket][-1]
        assert raw == (1008, "the session of this resume token is not known")
        assert contained[0] == 1003
        assert "expected raw PCM" in contained[1]
        assert last["totals"]["audio_s"] == pytest.approx(len(speech) / SAMPLE_RATE, abs=0.05)

    async def test_opus_in_ogg_and_webm(self, checkpoint, speech, tmp_path):
        pytest.importorskip("av")
        async with serving(checkpoint, **QUIET) as house:
            for form in ("ogg", "webm"):
                data = await asyncio.to_thread(in_container, speech, tmp_path / f"a.{form}")
                async with house.connect("/v1/audio?encoding=opus") as socket:
                    await socket.recv()
                    for at in range(0, len(data), 700):
                        await socket.send(data[at : at + 700])
                    await socket.send('{"type": "close"}')
                    last = [json.loads(message) async for message in socket][-1]
                assert last["totals"]["audio_s"] == pytest.approx(len(speech) / 16_000, abs=0.05)
            code, reason = await closing(
                house, "/v1/audio?encoding=opus", b"no container" * 900, '{"type": "close"}'
            )
        assert code == 1007
        assert "expected audio in Ogg or WebM" in reason

    @pytest.mark.parametrize(
        "begin",
        [
            b"ffconcat version 1.0\nfile 'stream/demo/meeting.flac'\n",
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nstream/demo/meeting.flac\n",
        ],
    )
    async def test_a_container_names_no_file_or_address_to_open(self, checkpoint, begin):
        pytest.importorskip("av")
        async with serving(checkpoint, **QUIET) as house:
            message = '{"type": "close"}'
            code, reason = await closing(house, "/v1/audio?encoding=opus", begin, message)
        assert code == 1007
        assert "expected audio in Ogg or WebM" in reason
        assert house.events[-1].totals["audio_s"] == 0

    async def test_pieces_that_nobody_decodes_hold_up_no_thread(self, monkeypatch):
        pytest.importorskip("av")
        go = threading.Event()

        def gives_up(_):
            go.wait()
            raise ContainerError("made up")

        monkeypatch.setattr(Container, "_decode", gives_up)
        container = await Container.open(Line("x"))
        for _ in range(1000):
            await container.feed(b"x")
        full = asyncio.create_task(container.feed(bytes(2 << 20)))
        waiting = asyncio.create_task(container.feed(b"x"))
        await asyncio.sleep(0)
        assert full.done()
        assert not waiting.done()
        go.set()
        async with asyncio.timeout(30):
            with pytest.raises(ContainerError, match="made up"):
                await waiting
            await container.close()

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("encoding=mp3", "encoding: expected s16le, f32le, mulaw or opus, got 'mp3'"),
            ("rate=7", "rate: expected 1000 to 768000"),
            ("rate=-1", "rate: expected a whole number, got '-1'"),
            ("channels=65", "channels: expected 1 to 64, got 65"),
            ("channels=2&channel=2", "channel: expected 0 to 1, got 2"),
            ("name=a/b", "name: expected 1 to 128 characters"),
        ],
    )
    async def test_what_is_wrong_with_a_query_is_said(self, checkpoint, query, expected):
        async with serving(checkpoint) as house:
            code, reason = await closing(house, f"/v1/audio?{query}")
        assert code == 1003
        assert expected in reason

    async def test_more_callers_than_streams_are_turned_away(self, checkpoint):
        async with serving(checkpoint, {"max_streams": 1}) as house:
            async with house.connect("/v1/audio") as socket:
                await socket.recv()
                code, reason = await closing(house, "/v1/audio")
        assert code == 1013
        assert "1 streams are open, which is the limit" in reason


@dataclass
class Desk:
    """As much of a house as the feed asks for."""

    feed: Feed = field(default_factory=Feed)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    resume_s: float = 0.0
    names: frozenset[str] = frozenset()

    async def drained(self):
        """No other streams."""

    @asynccontextmanager
    async def serving(self):
        settings = ServerSettings(port=free_port())
        with socketlib.create_server(("127.0.0.1", settings.port)) as listening:
            running = asyncio.create_task(serve(settings, self, listening))
            try:
                yield settings.port, running
            finally:
                self.stop.set()
                await running


async def _first(answer, prefix, count):
    """As many lines of a response that begin so."""
    async for line in answer.aiter_lines():
        if line.startswith(prefix):
            yield line
            count -= 1
            if not count:
                return


class TestFeed:
    async def test_a_subscriber_resumes_by_seq_and_by_cursor(self, checkpoint, speech):
        async with serving(checkpoint, **QUIET) as house:
            said = await talk(house, speech)
            session = said[0]["session_id"]
            path = f"/v1/events?session={session}&after=3&partials=false"
            async with house.connect(path) as socket:
                assert json.loads(await socket.recv())["complete"]
                wanted = [e for e in said if e["seq"] > 3 and e["is_final"]]
                assert [json.loads(await socket.recv()) for _ in wanted] == wanted
            async with house.connect("/v1/events?cursor=0") as socket:
                ready = json.loads(await socket.recv())
                told = [json.loads(await socket.recv()) for _ in said]
                assert [each["event"] for each in told] == said
            # Cut before it had read anything, it misses nothing either.
            async with house.connect(f"/v1/events?cursor={ready['cursor']}") as socket:
                assert json.loads(await socket.recv())["complete"]
                assert json.loads(await socket.recv()) == told[0]
            async with house.connect(f"/v1/events?cursor={told[-2]['cursor']}") as socket:
                await socket.recv()
                assert json.loads(await socket.recv())["event"] == said[-1]

    async def test_server_sent_events_go_on_after_the_last_id(self, checkpoint, speech):
        async with serving(checkpoint, **QUIET) as house, house.http() as http:
            said = await talk(house, speech)
            heard: list[tuple[str, dict]] = []

            async def read(count, **headers):
                url = "/v1/events?partials=false&cursor=0"
                async with http.stream("GET", url, headers=headers) as answer:
                    assert answer.headers["content-type"].startswith("text/event-stream")
                    identity = ""
                    async for line in answer.aiter_lines():
                        if line.startswith("id: "):
                            identity = line[4:]
                        if line.startswith("data: "):
                            heard.append((identity, json.loads(line[6:])))
                            if len(heard) == count:
                                return

            wanted = [e for e in said if e["is_final"]]
            await read(4)
            await read(len(wanted), **{"Last-Event-ID": heard[3][0]})
        assert [event for _, event in heard] == wanted

    async def test_a_cut_before_the_first_line_loses_nothing(self, checkpoint, speech):
        async with serving(checkpoint, **QUIET) as house, house.http() as http:
            await talk(house, speech)
            async with http.stream("GET", "/v1/events?cursor=0") as answer:
                ids = [line[4:] async for line in _first(answer, "id: ", 2)]
        assert [each.partition(".")[2] for each in ids] == ["0", "1"]

    async def test_its_readers_get_the_last_event_of_a_source_that_drains_slowly(
        self, checkpoint, audio, monkeypatch
    ):
        may, step = asyncio.Event(), Batches.step

        async def held(batches, ready):
            if house.stop.is_set():
                await may.wait()
            return await step(batches, ready)

        monkeypatch.setattr(Batches, "step", held)
        sources = {"a": {"kind": "file", "path": audio, "realtime": True}}
        async with serving(checkpoint, sources=sources, **QUIET) as house, house.http() as http:
            async with (
                house.connect("/v1/events") as socket,
                http.stream("GET", "/v1/events") as sse,
            ):
                await until(lambda: bool(house.events) and house.events[-1].end > 0.4)
                house.stop.set()
                await asyncio.sleep(0.1)  # time enough to end before the source has
                may.set()
                told = [json.loads(message) async for message in socket]
                last = [line async for line in sse.aiter_lines() if line.startswith("event: ")][-1]
        assert told[-1]["type"] == house.events[-1].type == "session.closed"
        assert last == "event: session.closed"

    async def test_its_readers_end_when_the_server_does(self, caplog):
        desk = Desk()
        async with desk.serving() as (port, running):
            url = f"http://127.0.0.1:{port}/v1/events"
            async with httpx.AsyncClient() as http, http.stream("GET", url) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                desk.stop.set()
                async for _ in lines:  # to its proper end, which httpx asks for
                    pass
            await running
        assert "Exception in ASGI" not in caplog.text

    async def test_a_reader_that_never_reads_is_cut_off(self, monkeypatch, caplog):
        monkeypatch.setattr("stream.web.feed.SEND_S", 0.05)
        desk, said = Desk(feed=Feed(history=16 << 20)), Talk()
        for _ in range(1500):  # more than the kernel's buffers take, and all of it kept
            desk.feed.publish(said.warning("x" * 10_000))
        async with desk.serving() as (port, _), asyncio.timeout(30):
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
            writer.write(b"GET /v1/events?cursor=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await until(lambda: len(desk.feed) == 1)
            await until(lambda: len(desk.feed) == 0)
            writer.transport.abort()
        assert "Exception in ASGI" not in caplog.text
        assert "completing" not in caplog.text

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("types=turn.end", "types: 'turn.end' is not a type of event"),
            ("after=3", "after: expected with session"),
            ("session=x&after=y", "after: expected a whole number"),
        ],
    )
    async def test_what_is_wrong_with_a_query_is_said(self, checkpoint, query, expected):
        async with serving(checkpoint) as house, house.http() as http:
            code, reason = await closing(house, f"/v1/events?{query}")
            answer = await http.get(f"/v1/events?{query}")
        assert code == 1003
        assert expected in reason
        assert answer.status_code == 400
        assert expected in answer.json()["error"]

    async def test_text_that_is_none_ends_the_connection_in_one_line(self, checkpoint, caplog):
        async with serving(checkpoint) as house, house.connect("/v1/events") as socket:
            await socket.send([b"fine so far ", b"\xff\xfe"], text=True)
            async with asyncio.timeout(30):
                await socket.wait_closed()
            assert socket.close_code == 1007
            assert socket.close_reason == "expected UTF-8 in a text message"
        assert "Traceback" not in caplog.text
        assert "Invalid UTF-8" not in caplog.text

    async def test_a_session_is_exported_in_every_form(self, checkpoint, speech):
        async with serving(checkpoint, **QUIET) as house, house.http() as http:
            said = await talk(house, speech)
            session = said[0]["session_id"]
            got = {
                form: await http.get(f"/v1/sessions/{session}/export.{form}")
                for form in ("rttm", "vtt", "srt", "json", "txt", "doc")
            }
            missing = await http.get("/v1/sessions/nobody/export.rttm")
            (listed,) = (await http.get("/v1/sessions")).json()["sessions"]
        turns = [e for e in said if e["type"] == "turn.ended"]
        assert len(got["rttm"].text.splitlines()) == len(turns) > 0
        assert got["vtt"].text.startswith("WEBVTT")
        assert " --> " in got["srt"].text
        assert got["json"].json() == {
            "session_id": session,
            "stream_id": said[0]["stream_id"],
            "complete": True,
            "kept_from": 0.0,
            "events": [e for e in said if e["is_final"]],
        }
        assert not any("X-Livesat-Kept-From" in answer.headers for answer in got.values())
        assert re.match(r"(S\d+|\?): \w", got["txt"].text)
        assert (got["doc"].status_code, missing.status_code) == (404, 404)
        assert listed["state"] == "closed"
        revised = {span.speaker for span in spans(parse(json.dumps(e)) for e in said)}
        assert set(listed["speakers"]) == set(listed["turns"]) == revised
        assert sum(listed["turns"].values()) == len(turns)

    async def test_an_export_says_what_is_no_longer_kept(self, monkeypatch):
        threads = set()
        monkeypatch.setattr(exports, "parse", lambda data: threads.add(get_ident()) or parse(data))
        desk, said = Desk(), Talk()
        desk.feed = Feed(history=4000)
        for at in range(40):
            desk.feed.publish(said.turn(f"t{at}", "S1", at, at + 0.5))
            desk.feed.publish(said.said("well then", "S1", at, at + 0.5))
        async with desk.serving() as (port, _), httpx.AsyncClient() as http:
            got = {
                form: await http.get(f"http://127.0.0.1:{port}/v1/sessions/s1/export.{form}")
                for form in ("rttm", "vtt", "srt", "json", "txt")
            }
        kept_from = got["json"].json()["kept_from"]
        assert not got["json"].json()["complete"]
        assert 30 < kept_from < 40
        note = f"What was said before {kept_from} s is no longer kept."
        assert got["rttm"].text.startswith(f";; {note}\nSPEAKER ")
        assert got["vtt"].text.startswith(f"WEBVTT\n\nNOTE {note}\n\n")
        assert got["txt"].text.startswith(f"({note})\nS1: well then")
        assert got["srt"].text.startswith("1\n")
        for answer in got.values():
            assert answer.headers["X-Livesat-Kept-From"] == f"{kept_from:.3f}"
        assert threads
        assert get_ident() not in threads


class TestPatience:
    """A pong comes behind the audio that was sent before it."""

    @pytest.mark.parametrize(
        ("came", "paused", "cut"),
        [(79.0, False, True), (81.0, False, False), (0.0, True, False)],
    )
    def test_who_is_silent_is_cut_off_and_nobody_else(self, monkeypatch, came, paused, cut):
        told, later = [], []
        monkeypatch.setattr(
            WebSocketsSansIOProtocol, "keepalive_timeout", lambda _: told.append("cut")
        )

        class Loop:
            time = staticmethod(lambda: 100.0)
            call_later = staticmethod(lambda delay, call: later.append((delay, call)))

        wire = Patient.__new__(Patient)
        wire.loop, wire.ping_timeout, wire.read_paused, wire._came = Loop(), 20.0, paused, came
        wire.keepalive_timeout()
        assert told == ["cut"] * cut
        assert later == ([] if cut else [(20.0, wire.keepalive_timeout)])

    async def test_every_websocket_has_it(self, checkpoint, monkeypatch):
        heard: list[bytes] = []
        received = Patient.data_received
        monkeypatch.setattr(
            Patient, "data_received", lambda wire, data: heard.append(data) or received(wire, data)
        )
        async with serving(checkpoint, **QUIET) as house:
            async with house.connect("/v1/events") as socket:
                await socket.recv()
                await (await socket.ping())
        assert heard


class TestPeople:
    async def test_a_live_speaker_gets_a_name_and_the_past_turns_too(
        self, checkpoint, speech, tmp_path
    ):
        voices = tmp_path / "voices.db"
        async with serving(checkpoint, voiceprints=voices, **QUIET) as house, house.http() as http:
            async with house.connect("/v1/audio") as socket:
                session = json.loads(await socket.recv())["session_id"]
                await socket.send(pcm(speech))
                await until(lambda: any(e.type == "turn.ended" for e in house.events))
                label = next(e for e in house.events if e.type == "turn.ended").speaker.label
                where = f"/v1/sessions/{session}/speakers/{label}"
                answer = await http.put(where, json={"name": "Anna"})
                assert answer.status_code == 200
                for body, status in (({"name": ""}, 400), ({}, 400), ([1], 400)):
                    assert (await http.put(where, json=body)).status_code == status
                nobody = f"/v1/sessions/{session}/speakers/S99"
                assert (await http.put(nobody, json={"name": "B"})).status_code == 404
                assert (await http.get("/v1/voices")).json() == {"voices": []}  # not asked for
                await socket.send('{"type": "close"}')
                async for _ in socket:
                    pass
        identified = next(e for e in house.events if e.type == "speaker.identified")
        assert (identified.speaker, identified.identity) == (label, "Anna")
        revised = [e for e in house.events if e.type == "speaker.revised"]
        assert any(e.reason == "identified" and e.to_label == "Anna" for e in revised)
        later = [e for e in house.events if e.type == "turn.ended" and e.seq > identified.seq]
        assert all(e.speaker.identity == "Anna" for e in later if e.speaker.label == label)
        assert [e.seq for e in house.events] == list(range(len(house.events)))


class TestDeepgram:
    @staticmethod
    async def by_sdk(house, data, **query):
        """What the SDK's own client is told of it."""
        from deepgram import AsyncDeepgramClient
        from deepgram.core.events import EventType
        from deepgram.environment import DeepgramClientEnvironment

        where = f"ws://127.0.0.1:{house.port}"
        http = f"http://127.0.0.1:{house.port}"
        client = AsyncDeepgramClient(
            api_key=TOKEN,
            environment=DeepgramClientEnvironment(
                base=http, production=where, agent=where, agent_rest=http
            ),
        )
        said = []
        async with client.listen.v1.connect(model="nova-3", **query) as connection:
            connection.on(EventType.MESSAGE, said.append)
            listening = asyncio.create_task(connection.start_listening())
            await connection.send_keep_alive()
            for at in range(0, len(data), 8000):
                await connection.send_media(data[at : at + 8000])
            if query.get("encoding") == "linear16":
                await connection.send_finalize()
                await until(lambda: any(getattr(e, "from_finalize", False) for e in said))
            await connection.send_close_stream()
            await listening
        return said

    @pytest.mark.filterwarnings("ignore:websockets:DeprecationWarning")  # the SDK's own imports
    async def test_the_deepgram_sdk_is_at_home(self, checkpoint, speech):
        async with serving(checkpoint, {"token": TOKEN}, **QUIET) as house:
            said = await self.by_sdk(
                house,
                pcm(speech),
                encoding="linear16",
                sample_rate=16_000,
                interim_results="true",
                diarize="true",
                vad_events="true",
            )
        kinds = [each.type for each in said]
        assert kinds[-1] == "Metadata"
        assert said[-1].duration == pytest.approx(len(speech) / SAMPLE_RATE, abs=1e-3)
        assert {"Results", "SpeechStarted"} <= set(kinds)
        assert {tuple(e.channel) for e in said if e.type == "SpeechStarted"} == {(0, 1)}
        results = [each for each in said if each.type == "Results"]
        done = [each for each in results if each.is_final]
        interim = [each for each in results if not each.is_final]
        assert done
        assert interim
        words = [word for each in done for word in each.channel.alternatives[0].words]
        wanted = [w for e in house.events if e.type == "transcript.final" for w in e.words]
        assert [word.word for word in words] == [word.word for word in wanted]
        assert [word.start for word in words] == [word.start for word in wanted]
        labels = [int(word.speaker[1:]) - 1 if word.speaker else None for word in wanted]
        assert [getattr(word, "speaker", None) for word in words] == labels

    @pytest.mark.filterwarnings("ignore:websockets:DeprecationWarning")
    @pytest.mark.parametrize("asked", [{}, {"utterance_end_ms": "1000"}])
    async def test_the_end_of_an_utterance_is_told_to_who_asks(self, checkpoint, speech, asked):
        async with serving(checkpoint, {"token": TOKEN}, **QUIET) as house:
            said = await self.by_sdk(
                house, pcm(speech), encoding="linear16", sample_rate=16_000, **asked
            )
        words = [w for e in house.events if e.type == "transcript.final" for w in e.words]
        told = [each for each in said if each.type == "UtteranceEnd"]
        assert bool(told) == bool(asked)
        assert all(list(each.channel) == [0, 1] for each in told)
        for each in told:  # what it ends has been said, and as the last before silence
            before = said[said.index(each) - 1]
            assert (before.is_final, before.speech_final) == (True, True)
            assert before.channel.alternatives[0].words[-1].end == each.last_word_end
        if asked:
            assert told[-1].last_word_end == words[-1].end

    async def test_what_is_known_after_speech_has_ended_was_the_last_before_silence(self):
        query = {"encoding": "linear16", "sample_rate": "16000", "interim_results": "true"}
        listen = _Conversation(
            None, query | {"utterance_end_ms": "1000"}, SimpleNamespace(client=None)
        )
        talk = Talk()

        async def brief(*events):
            for event in events:
                listen._tell(0, event)
            await asyncio.sleep(0)  # the engine's step is over
            messages = [listen._messages.get_nowait() for _ in range(listen._messages.qsize())]
            return [
                (each["start"], each["is_final"], each["speech_final"])
                if each["type"] == "Results"
                else (each["type"], each["last_word_end"])
                for each in messages
            ]

        def ended(start, end):
            return SpeechEnded(**talk.envelope(start, end))

        first, second, third, fourth, later = (
            talk.said("a b", "S1", at, at + 1) for at in (1.0, 3.0, 5.0, 7.0, 9.0)
        )
        interim = TranscriptPartial(**talk.envelope(11, 12), text="a b", words=later.words)
        assert await brief(first) == []
        assert await brief(ended(1.0, 2.0)) == [(1, True, True), ("UtteranceEnd", 2)]
        assert await brief(ended(3.0, 8.5)) == []
        last = [(3, True, False), (5, True, True), ("UtteranceEnd", 6)]
        assert await brief(second, third) == last
        assert await brief(fourth, later) == [(7, True, True), ("UtteranceEnd", 8)]
        assert await brief(interim) == [(9, True, False), (11, False, False)]

    @pytest.mark.filterwarnings("ignore:websockets:DeprecationWarning")
    async def test_mulaw_is_heard_as_the_samples_it_stands_for(self, checkpoint, speech):
        data, exact = in_bytes(speech, "mulaw")
        async with serving(checkpoint, {"token": TOKEN}, **QUIET) as house:
            told = []
            for encoding, sent in (("mulaw", data), ("linear16", exact)):
                query = {"encoding": encoding, "sample_rate": 16_000}
                said = await self.by_sdk(house, sent, **query)
                results = [each for each in said if each.type == "Results"]
                words = [word for each in results for word in each.channel.alternatives[0].words]
                told.append([(word.word, word.start, word.end) for word in words])
                assert said[-1].duration == pytest.approx(len(speech) / SAMPLE_RATE, abs=1e-3)
        assert told[0] == told[1] != []

    @pytest.mark.filterwarnings("ignore:websockets:DeprecationWarning")
    @pytest.mark.parametrize(
        ("form", "query"), [("ogg", {"encoding": "opus"}), ("webm", {}), ("ogg", {})]
    )
    async def test_opus_in_a_container_is_heard_and_its_length_told(
        self, checkpoint, speech, tmp_path, form, query
    ):
        pytest.importorskip("av")
        data = await asyncio.to_thread(in_container, speech, tmp_path / f"a.{form}")
        async with serving(checkpoint, {"token": TOKEN}, **QUIET) as house:
            said = await self.by_sdk(house, data, **query)
        assert any(each.type == "Results" and each.channel.alternatives[0].words for each in said)
        assert said[-1].duration == house.events[-1].totals["audio_s"]
        assert said[-1].duration == pytest.approx(len(speech) / SAMPLE_RATE, abs=0.05)

    async def test_channels_apart_are_sessions_apart(self, checkpoint, speech):
        async with serving(checkpoint, **QUIET) as house:
            query = "encoding=linear16&sample_rate=16000&channels=2&multichannel=true"
            async with house.connect(f"/v1/listen?{query}") as socket:
                both = np.stack([speech, np.zeros_like(speech)], 1).reshape(-1)
                for at in range(0, len(both), 8000):
                    await socket.send(pcm(both[at : at + 8000]))
                await socket.send('{"type": "CloseStream"}')
                said = [json.loads(message) async for message in socket]
        assert said[-1]["type"] == "Metadata"
        assert said[-1]["channels"] == 2
        assert {tuple(e["channel_index"]) for e in said if e["type"] == "Results"} >= {(0, 2)}

    async def test_a_bad_token_is_refused_with_a_status(self, checkpoint):
        async with serving(checkpoint, {"token": TOKEN}) as house:
            with pytest.raises(InvalidStatus) as refused:
                async with house.connect(
                    "/v1/listen", additional_headers={"Authorization": "Token wrong"}
                ):
                    pass
        assert refused.value.response.status_code == 401

    @pytest.mark.parametrize(
        ("query", "expected"),
        [
            ("encoding=amr-nb", "encoding: expected linear16, linear32, mulaw, opus"),
            ("encoding=linear16", "sample_rate: expected 1000 to 768000, got 'nothing'"),
            ("encoding=linear16&sample_rate=16000&channels=99", "channels: expected 1 to 16"),
            ("channels=000000000002000000&encoding=mulaw", "channels: expected 1 to 16, got"),
        ],
    )
    async def test_what_is_wrong_with_a_query_is_said(self, checkpoint, query, expected):
        async with serving(checkpoint) as house:
            code, reason = await closing(house, f"/v1/listen?{query}")
        assert code == 1003
        assert expected in reason


class TestTwilio:
    async def test_a_media_stream_is_heard_and_what_is_missing_is_a_gap(self, checkpoint):
        async with serving(checkpoint, {"token": TOKEN}, **QUIET) as house:
            async with house.connect("/v1/twilio") as socket:
                await socket.send(json.dumps({"event": "connected", "protocol": "Call"}))
                start = {
                    "callSid": "CA1",
                    "tracks": ["inbound"],
                    "customParameters": {"token": TOKEN},
                    "mediaFormat": {
                        "encoding": "audio/x-mulaw",
                        "sampleRate": 8000,
                        "channels": 1,
                    },
                }
                await socket.send(json.dumps({"event": "start", "start": start}))
                payload = base64.b64encode(bytes(range(160))).decode()
                for number in range(100):
                    if 40 <= number < 60:
                        continue  # lost on the way: 400 ms
                    media = {"track": "inbound", "payload": payload, "timestamp": str(number * 20)}
                    await socket.send(json.dumps({"event": "media", "media": media}))
                await socket.send(json.dumps({"event": "stop"}))
                async for _ in socket:
                    pass
                assert socket.close_code == 1000
        (gap,) = [e for e in house.events if e.type == "gap"]
        assert (gap.lost_samples, gap.reason) == (6400, "network")
        assert house.events[-1].totals["audio_s"] == pytest.approx(2.0, abs=1e-3)
        assert house.events[0].stream_id == "CA1-inbound"

    async def test_a_call_that_goes_on_when_the_daemon_stops_is_told_why_it_ends(
        self, checkpoint, monkeypatch
    ):
        may, step = asyncio.Event(), Batches.step

        async def held(batches, ready):
            await may.wait()
            return await step(batches, ready)

        monkeypatch.setattr(Batches, "step", held)
        async with serving(checkpoint, **QUIET) as house:
            async with house.connect("/v1/twilio") as socket:
                await socket.send(json.dumps({"event": "start", "start": {}}))
                media = {"payload": base64.b64encode(bytes(16_000)).decode()}
                await socket.send(json.dumps({"event": "media", "media": media}))
                await until(lambda: bool(house.events))
                house.stop.set()
                await socket.send(json.dumps({"event": "media", "media": media}))
                may.set()
                async for _ in socket:
                    pass
                assert (socket.close_code, socket.close_reason) == (1001, "the daemon is stopping")
        assert house.events[-1].type == "session.closed"

    @pytest.mark.parametrize(
        ("message", "expected"),
        [
            ({"event": "start", "start": {}}, (1008, "expected the custom parameter token")),
            ({"event": "media"}, (1007, "event: expected start, got 'media'")),
            ([], (1007, "expected a JSON object")),
        ],
    )
    async def test_what_is_wrong_is_said(self, checkpoint, message, expected):
        async with serving(checkpoint, {"token": TOKEN}) as house:
            code, reason = await closing(house, "/v1/twilio", json.dumps(message))
        assert code == expected[0]
        assert expected[1] in reason

    @pytest.mark.parametrize("timestamp", ["9" * 12, "9" * 400, float("inf"), -7, "soon"])
    async def test_a_senseless_timestamp_ends_that_call_alone(self, checkpoint, timestamp):
        async with serving(checkpoint, **QUIET) as house:
            payload = base64.b64encode(bytes(160)).decode()
            messages = [json.dumps({"event": "start", "start": {}})]
            for each in ("0", timestamp):
                media = {"payload": payload, "timestamp": each}
                messages.append(json.dumps({"event": "media", "media": media}))
            code, reason = await closing(house, "/v1/twilio", *messages)
            assert code == 1007
            assert "media.timestamp" in reason
            async with house.connect("/v1/audio") as socket:
                assert json.loads(await socket.recv())["type"] == "ready"


async def test_a_fault_in_one_session_ends_no_other(checkpoint, speech, monkeypatch):
    feed = Session.feed

    def broken(session, block):
        if session.stream_id == "bad" and session.received > SAMPLE_RATE:
            raise ArithmeticError("made up")
        return feed(session, block)

    monkeypatch.setattr(Session, "feed", broken)
    async with serving(checkpoint, **QUIET) as house:
        good, bad = await asyncio.gather(
            talk(house, speech, "/v1/audio?name=good"), talk(house, speech, "/v1/audio?name=bad")
        )
    assert [e["type"] for e in bad[-2:]] == ["error", "session.closed"]
    assert (bad[-2]["code"], bad[-1]["reason"]) == ("internal", "error")
    assert good[-1]["reason"] == "ended"


class TestGate:
    async def test_without_the_token_nothing_is_served_but_the_page_and_the_probes(
        self, checkpoint, capfd
    ):
        async with serving(checkpoint, {"token": TOKEN}) as house, house.http() as http:
            for path in ("/", "/static/app.js", "/livez", "/readyz"):
                assert (await http.get(path)).status_code == 200
            for path in ("/metrics", "/v1/events", "/v1/sessions", "/v1/status", "/v1/voices"):
                assert (await http.get(path)).status_code == 401
                headers = {"Authorization": f"Bearer {TOKEN}x"}
                assert (await http.get(path, headers=headers)).status_code == 401
            assert (await closing(house, "/v1/events"))[0] == 1008
            assert (await http.post("/v1/login", json={"token": "wrong"})).status_code == 401
            assert (await http.post("/v1/login", json={"token": TOKEN})).status_code == 200
            assert (await http.get("/v1/sessions")).status_code == 200  # by the cookie
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with house.connect("/v1/audio", additional_headers=headers) as socket:
                assert json.loads(await socket.recv())["type"] == "ready"
            async with house.connect("/v1/audio", subprotocols=["token", TOKEN]) as socket:
                assert json.loads(await socket.recv())["type"] == "ready"
        assert TOKEN not in "".join(capfd.readouterr())

    async def test_pages_of_other_sites_are_kept_out(self, checkpoint):
        async with serving(checkpoint, {"origins": ["https://ours.example"]}) as house:
            foreign = {"additional_headers": {"Origin": "https://evil.example"}}
            assert (await closing(house, "/v1/audio", **foreign))[0] == 1008
            ours = {"additional_headers": {"Origin": "https://ours.example"}}
            async with house.connect("/v1/audio", **ours) as socket:
                assert json.loads(await socket.recv())["type"] == "ready"
            async with house.http(headers={"Host": "rebound.example"}) as http:
                assert (await http.get("/v1/sessions")).status_code == 403

    async def test_every_answer_forbids_what_the_page_does_not_need(self, checkpoint):
        async with serving(checkpoint) as house, house.http() as http:
            for path in ("/", "/static/app.js", "/v1/status", "/nothing"):
                answer = await http.get(path)
                policy = answer.headers["content-security-policy"]
                assert "default-src 'none'" in policy
                assert "unsafe" not in policy
                assert answer.headers["x-content-type-options"] == "nosniff"

    @pytest.mark.parametrize("given", [{"host": "0.0.0.0"}, {"token": "short"}, {"tls_cert": "x"}])
    def test_an_unsafe_configuration_is_refused(self, checkpoint, given):
        with pytest.raises(ConfigError, match="expected"):
            config(checkpoint, {}, server=given)


async def said_to(house, data):
    """Send bytes and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
    writer.write(data)
    try:
        return await reader.read()
    finally:
        writer.close()


class TestLimits:
    async def test_hostile_clients_are_refused_and_a_good_one_notices_nothing(
        self, checkpoint, speech, monkeypatch
    ):
        """Reliability bar, row 10; how late the good one is, `benchmarks.hostile` measures."""
        for module in ("server", "body"):
            monkeypatch.setattr(f"stream.web.{module}.REQUEST_S", 1.0)
        hostile.bomb()  # made before anything waits for the loop, and before memory is looked at
        server = {
            "token": TOKEN,
            "max_message_bytes": hostile.LIMIT,
            "connects_per_minute": 100_000,
            "max_streams": 16,
            "idle_s": 3,
        }
        async with serving(checkpoint, server, **QUIET) as house:
            target = hostile.Target(house.port, TOKEN)
            house.connect = partial(house.connect, additional_headers=target.known)
            alone = await talk(house, speech)
            await hostile.attacks(target, 3 * len(hostile.ATTACKS))  # what stays of the first stays
            hostile.forget_peak(os.getpid())
            before = hostile.peak_mib(os.getpid())
            good = asyncio.create_task(talk(house, speech))
            outcomes = await hostile.attacks(target, 16 * len(hostile.ATTACKS), seed=3)
            beside = await good
            grown = hostile.peak_mib(os.getpid()) - before
            after = await talk(house, speech)
            gc.collect()  # a task's exception is unseen when the task has gone
            async with house.http(headers=target.known) as http:
                assert (await http.get("/readyz")).status_code == 200
                assert (await http.get("/v1/status")).json()["faults"] == 0
        assert finals(beside) == finals(after) == finals(alone)
        assert grown <= 32
        assert hostile.through(outcomes) == {}
        became = defaultdict(set)
        for kind, what in outcomes:
            became[kind].add(what)
        assert became["bomb"] <= {"1002", "1013"}  # refused unread, or no room for a stream
        assert outcomes["bomb", "1002"]
        assert became["unknown token"] == {"1008", "401"}
        assert became["slow"] <= {"ended", "408", "1008", "1013"}
        assert outcomes["slow", "ended"]
        assert outcomes["slow", "408"]
        assert outcomes["slow", "1008"]
        assert became["too long"] <= {"1009", "1013"}

    async def test_a_flood_of_tiny_messages_is_hung_up_on(self, checkpoint):
        async with serving(checkpoint, {"messages_per_s": 20}) as house:
            code, reason = await closing(house, "/v1/audio", *['{"type": "keepalive"}'] * 200)
        assert (code, reason) == (1008, "too many messages; send 20 ms of audio or more in each")

    async def test_who_asks_and_never_reads_the_answer_is_cut_off(self, checkpoint):
        ping = bytes([0x89, 0x80 | 125]) + bytes(4 + 125)  # RFC 6455, 5.5.2; masked by zeros
        upgrade = (
            "GET /v1/twilio HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        async with serving(checkpoint) as house, asyncio.timeout(60):
            client = socketlib.socket()
            client.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_RCVBUF, 4096)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", house.port))
            reader, writer = await asyncio.open_connection(sock=client, limit=1024)
            writer.write(upgrade.encode())
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            sent = 0
            with suppress(ConnectionError):
                while sent < 64 << 20:
                    writer.write(ping * 500)
                    await writer.drain()
                    sent += 500 * len(ping)
            writer.close()
        assert sent < 64 << 20

    def test_who_does_not_read_the_last_is_cut_off(self, monkeypatch):
        for name in ("on_task_complete", "connection_lost"):
            monkeypatch.setattr(WebSocketsSansIOProtocol, name, lambda *_: None)
        timers = []

        def call_later(delay, call):
            timers.append(SimpleNamespace(delay=delay, call=call, cancelled=False))
            timers[-1].cancel = lambda: setattr(timers[-1], "cancelled", True)
            return timers[-1]

        wire = Patient.__new__(Patient)
        wire.loop, wire.close_timeout = SimpleNamespace(call_later=call_later), 10.0
        wire.transport, wire.disconnected = SimpleNamespace(abort=print), False
        wire._cut = None
        wire.on_task_complete(None)
        (timer,) = timers
        assert (timer.delay, timer.call, timer.cancelled) == (10.0, print, False)
        wire.connection_lost(None)
        assert timer.cancelled

    async def test_a_silent_connection_is_closed(self, checkpoint):
        async with serving(checkpoint, {"idle_s": 0.1}) as house:
            code, reason = await closing(house, "/v1/audio")
        assert (code, reason) == (1008, "nothing came for 0.1 s")

    @pytest.mark.parametrize("key", ["max_connections", "max_connections_per_ip"])
    async def test_more_connections_than_may_be_are_turned_away(self, checkpoint, key):
        async with serving(checkpoint, {key: 2}) as house, house.http() as http:
            async with house.connect("/v1/events") as one:
                await one.recv()
                async with house.connect("/v1/events") as two:
                    await two.recv()
                    code, reason = await closing(house, "/v1/events")
                    with pytest.raises(InvalidStatus) as refused:
                        await closing(house, "/v1/listen")
                    assert (await http.get("/v1/status")).status_code == 503
                    assert (await http.get("/livez")).status_code == 200
                while (await http.get("/v1/status")).status_code != 200:
                    pass  # until the server has seen it go
        assert (code, reason) == (1013, "too many connections; try again later")
        assert refused.value.response.status_code == 503

    async def test_an_address_behind_a_proxy_takes_its_own_places_only(self, checkpoint):
        server = {"max_connections_per_ip": 1, "proxies": ["127.0.0.1"]}
        async with serving(checkpoint, server) as house:
            first, second = ({"additional_headers": {"X-Forwarded-For": ip}} for ip in "12")
            async with house.connect("/v1/events", **first) as one:
                await one.recv()
                assert (await closing(house, "/v1/events", **first))[0] == 1013
                async with house.connect("/v1/events", **second) as two:
                    assert json.loads(await two.recv())["type"] == "ready"

    async def test_an_address_takes_its_own_streams_only(self, checkpoint):
        server = {"max_streams_per_ip": 1, "proxies": ["127.0.0.1"]}
        raw = "encoding=linear16&sample_rate=16000"
        start = json.dumps({"event": "start", "start": {"tracks": ["inbound"]}})
        async with serving(checkpoint, server, **QUIET) as house:
            first, second = ({"additional_headers": {"X-Forwarded-For": ip}} for ip in "12")
            async with house.connect("/v1/audio", **first) as socket:
                token = json.loads(await socket.recv())["resume_token"]
                async with house.connect("/v1/audio", **second) as other:
                    assert json.loads(await other.recv())["type"] == "ready"
                    refused = [
                        await closing(house, path, *messages, **first)
                        for path, *messages in (
                            ("/v1/audio",),
                            (f"/v1/listen?{raw}",),
                            ("/v1/twilio", start),
                        )
                    ]
                # The one it has may change its connection all the same.
                async with house.connect(f"/v1/audio?resume={token}", **first) as again:
                    assert json.loads(await again.recv())["type"] == "ready"
            two = await closing(house, f"/v1/listen?{raw}&channels=2&multichannel=true", **second)
        said = "1 streams of this address are open, which is the limit"
        assert refused == [(1013, said)] * 3
        assert two[0] == 1013

    @pytest.mark.parametrize("way", ["POST /v1/login", "PUT /v1/sessions/x/speakers/S1"])
    async def test_a_body_without_end_is_cut(self, checkpoint, way, monkeypatch):
        chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
        head = f"{way} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with serving(checkpoint) as house, asyncio.timeout(30):
            assert b" 413 " in await said_to(house, head.encode() + chunk * 11)
            monkeypatch.setattr("stream.web.body.REQUEST_S", 0.1)
            assert b" 408 " in await said_to(house, head.encode() + chunk)

    async def test_half_a_second_request_is_not_waited_for(self, checkpoint, monkeypatch):
        monkeypatch.setattr("stream.web.server.REQUEST_S", 0.2)
        get = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        async with serving(checkpoint) as house, asyncio.timeout(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
            for _ in range(2):
                writer.write(get)
                assert b" 200 " in await reader.readuntil(b"\r\n\r\nok\n")
            writer.write(get[:20])
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()

    async def test_too_many_connections_of_an_address_must_wait(self, checkpoint):
        async with serving(checkpoint, {"connects_per_minute": 5}) as house, house.http() as http:
            codes = [(await http.get("/livez")).status_code for _ in range(8)]
        assert codes[-1] == 429


class TestHealth:
    async def test_a_stuck_engine_is_not_ready_but_alive(self, checkpoint, speech, monkeypatch):
        from stream.batcher import Batches

        async with serving(checkpoint) as house, house.http() as http:
            assert (await http.get("/readyz")).text == "ready\n"
            monkeypatch.setattr(Batches, "busy_s", property(lambda _: 2.5))
            stuck = await http.get("/readyz")
            assert stuck.status_code == 503
            assert "stuck for 2.5 s" in stuck.text
            assert (await http.get("/livez")).status_code == 200

    async def test_metrics_tell_what_was_done(self, checkpoint, speech):
        from prometheus_client.parser import text_string_to_metric_families

        async with serving(checkpoint, **QUIET) as house, house.http() as http:
            await talk(house, speech)
            text = (await http.get("/metrics")).text
        samples = {
            (s.name, *s.labels.values()): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }
        assert samples[("livesat_audio_seconds_total",)] == pytest.approx(len(speech) / 16_000)
        ended = sum(e.type == "turn.ended" for e in house.events)
        assert samples[("livesat_events_total", "turn.ended")] == ended
        assert samples[("livesat_slots",)] == 4
