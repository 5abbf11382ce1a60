import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from stream.clock import SAMPLE_RATE
from stream.daemon import run
from stream.engine import EngineFull
from stream.sources.line import Line
from stream.sources.pcm import BYTES, PcmDecoder
from stream.sources.source import SourceError
from stream.sources.tcp import TcpSource
from tests.stream.conftest import speechlike
from tests.stream.house import until
from tests.stream.test_daemon import collected, config, content


async def heard(line):
    async with line.open() as blocks:
        return [block async for block in blocks]


class TestLine:
    async def test_gives_what_it_was_fed_and_ends(self):
        line = Line("x")
        line.feed(np.ones(100, np.float32))
        line.lose(50, "network")
        line.feed(np.ones(10, np.float32))
        line.end()
        line.feed(np.ones(1, np.float32))  # after the end: nobody hears it
        blocks = await heard(line)
        assert [(len(b.samples), b.lost, b.reason) for b in blocks] == [
            (100, 0, None),
            (0, 50, "network"),
            (10, 0, None),
        ]

    @given(st.lists(st.integers(1, 700), max_size=40))
    def test_fed_faster_than_heard_it_accounts_for_every_sample(self, sizes):
        async def scene():
            line = Line("x", buffer_ms=50)  # 800 samples
            total = 0
            for size in sizes:
                line.feed(np.arange(total, total + size, dtype=np.float32))
                total += size
            line.end()
            at = kept = 0
            for block in await heard(line):
                at += block.lost
                assert (block.samples == np.arange(at, at + len(block.samples))).all()
                assert not block.lost or block.reason == "overflow"
                at += len(block.samples)
                kept += len(block.samples)
            assert at == total
            assert kept <= 800
            assert line.lost == total - kept

        asyncio.run(scene())

    async def test_a_patient_sender_waits_and_loses_nothing(self):
        line = Line("x", buffer_ms=20)  # 320 samples

        async def send():
            for _ in range(20):
                await line.put(np.ones(200, np.float32))
                assert line.waiting <= 320 + 200
            line.end()

        sending = asyncio.create_task(send())
        blocks = await heard(line)
        await sending
        assert sum(len(b.samples) for b in blocks) == 4000
        assert line.lost == 0

    async def test_a_failure_comes_after_what_was_heard(self):
        line = Line("x")
        line.feed(np.ones(100, np.float32))
        line.fail("x: cut off")
        async with line.open() as blocks:
            assert len((await anext(blocks)).samples) == 100
            with pytest.raises(SourceError, match="cut off"):
                await anext(blocks)


class TestPcm:
    @pytest.mark.parametrize("form", BYTES)
    @given(st.lists(st.integers(0, 9), max_size=30))
    def test_packets_of_any_size_give_the_same_samples(self, form, cuts):
        data = np.random.default_rng(0).integers(0, 256, 120, np.uint8).tobytes()
        if form == "f32le":
            data = np.linspace(-1, 1, 30).astype("<f4").tobytes()
        whole = PcmDecoder(form, 2).step(data)
        decoder, parts, at = PcmDecoder(form, 2), [], 0
        for cut in [*cuts, len(data)]:
            parts.append(decoder.step(data[at : at + cut]))
            at += cut
        assert np.array_equal(np.concatenate(parts), whole)

    def test_mulaw_is_that_of_the_standard(self, tmp_path):
        codes = np.arange(256, dtype=np.uint8)
        path = tmp_path / "codes.raw"
        path.write_bytes(codes.tobytes())
        expected, _ = soundfile.read(
            path, dtype="float32", samplerate=8000, channels=1, format="RAW", subtype="ULAW"
        )
        assert np.allclose(PcmDecoder("mulaw").step(codes.tobytes()), expected, atol=1e-6)

    def test_one_channel_or_their_mean(self):
        data = np.array([[100, -200], [300, 500]], "<i2").tobytes()
        assert np.allclose(PcmDecoder("s16le", 2, 1).step(data) * 32768, [-200, 500])
        assert np.allclose(PcmDecoder("s16le", 2).step(data) * 32768, [-50, 400])

    def test_a_channel_that_is_not_there(self):
        with pytest.raises(ValueError, match=r"channel: expected 0…1, got 2"):
            PcmDecoder("s16le", 2, 2)


@pytest.fixture
def listening(monkeypatch):
    """The port a TCP source was given."""
    found = asyncio.Queue()
    start = asyncio.start_server

    async def started(*args, **keys):
        server = await start(*args, **keys)
        found.put_nowait(server.sockets[0].getsockname()[1])
        return server

    monkeypatch.setattr(asyncio, "start_server", started)
    return found


async def send(port, data, pieces=7):
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in np.array_split(np.frombuffer(data, np.uint8), pieces):
        writer.write(part.tobytes())
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def test_a_tcp_connection_is_a_stream_like_the_file(checkpoint, tmp_path, listening):
    samples = speechlike(6 * SAMPLE_RATE, 5)
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="PCM_16")
    pcm, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    keys = {"session": {"heartbeat_s": 0}}
    file = {"kind": "file", "path": tmp_path / "a.wav"}
    expected, _ = await collected(config(checkpoint, {"door-1": file}, **keys))
    door = {"kind": "tcp", "port": 0, "streams": 2}
    stop, events = asyncio.Event(), []

    def seen(event):
        events.append(event)
        if event.type == "session.closed":
            stop.set()

    settings = config(checkpoint, {"door": door}, **keys)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(run(settings, on_event=seen, stop=stop))
        await send(await listening.get(), pcm.astype("<i2").tobytes())
        summary = await running
    assert content(events) == content(expected)
    assert summary.sessions == 1


@asynccontextmanager
async def door(checkpoint, listening, engine=None, **keys):
    """A daemon with nothing but a TCP port → the port, its events; drained at the end."""
    stop, events = asyncio.Event(), []
    sources = {"door": {"kind": "tcp", "port": 0, **keys}}
    settings = config(checkpoint, sources, engine=engine, session={"heartbeat_s": 0})
    running = asyncio.create_task(run(settings, on_event=events.append, stop=stop))
    try:
        yield await listening.get(), events
    finally:
        stop.set()
        await running


def of_type(events, kind):
    return [event for event in events if event.type == kind]


@pytest.mark.parametrize("channel", [None, 0, 1])
async def test_of_a_tcp_connections_channels_one_or_the_mean_is_heard(
    checkpoint, tmp_path, listening, channel
):
    both = np.stack([speechlike(3 * SAMPLE_RATE, seed) for seed in (5, 6)], 1)
    soundfile.write(tmp_path / "a.wav", both, SAMPLE_RATE, subtype="PCM_16")
    pcm, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    file = {"kind": "file", "path": tmp_path / "a.wav", "channel": channel}
    expected, _ = await collected(config(checkpoint, {"door-1": file}, session={"heartbeat_s": 0}))
    async with door(checkpoint, listening, channels=2, channel=channel) as (port, events):
        # Pieces of odd lengths: a sample, and a frame, may come in two.
        await send(port, pcm.astype("<i2").tobytes(), pieces=13)
        async with asyncio.timeout(30):
            await until(lambda: bool(of_type(events, "session.closed")))
    assert content(events) == content(expected)


async def test_a_tcp_connections_channels_apart_are_streams_apart(checkpoint, tmp_path, listening):
    both = np.stack([speechlike(3 * SAMPLE_RATE, seed) for seed in (5, 6)], 1)
    soundfile.write(tmp_path / "a.wav", both, SAMPLE_RATE, subtype="PCM_16")
    pcm, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    names = ["door-1-1", "door-1-2"]
    async with (
        asyncio.timeout(60),
        # The one connection's two streams are all there is room for.
        door(checkpoint, listening, channels=2, apart=2, streams=3) as (port, events),
    ):
        sending = asyncio.create_task(send(port, pcm.astype("<i2").tobytes(), pieces=13))
        await until(lambda: len(of_type(events, "session.opened")) == 2)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
        writer.close()
        await sending
        await until(lambda: len(of_type(events, "session.closed")) == 2)
    assert {event.stream_id for event in events} == set(names)
    for channel, name in enumerate(names):
        file = {"kind": "file", "path": tmp_path / "a.wav", "channel": channel}
        expected, _ = await collected(config(checkpoint, {name: file}, session={"heartbeat_s": 0}))
        assert content(event for event in events if event.stream_id == name) == content(expected)


async def test_a_channel_that_is_refused_does_not_hold_up_the_other(listening):
    """What would wait for it is longer than its buffer."""

    class Half:
        """An intake with room for the first channel only."""

        def __init__(self):
            self.stop, self.heard = asyncio.Event(), 0

        def listening(self, name):
            pass

        async def stream(self, name, source):
            if name == "door-1-2":
                raise EngineFull("no slot is free")
            async with source.open() as blocks:
                async for block in blocks:
                    self.heard += len(block.samples)
            self.stop.set()

    intake = Half()
    source = TcpSource(port=0, channels=2, apart=2, buffer_ms=100)
    async with asyncio.timeout(20):
        serving = asyncio.create_task(source.serve("door", intake))
        await send(await listening.get(), np.zeros((3 * SAMPLE_RATE, 2), "<i2").tobytes())
        await serving
    assert intake.heard == 3 * SAMPLE_RATE


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"channels": 2, "channel": 2}, "channel: expected 0 to 1, got 2"),
        ({"channels": 2, "apart": 3}, "apart: expected 2 at most, got 3"),
        ({"channels": 2, "apart": 2, "streams": 1}, "streams: expected at least 2, got 1"),
    ],
)
def test_a_channel_a_tcp_connection_does_not_have_is_said(choice, complaint):
    with pytest.raises(ValueError, match=complaint):
        TcpSource(port=0, **choice)


async def test_one_tcp_connection_too_many_is_hung_up_on_until_another_ends(checkpoint, listening):
    second = np.zeros(SAMPLE_RATE, "<i2").tobytes()
    async with asyncio.timeout(60), door(checkpoint, listening, streams=2) as (port, events):
        callers = []
        for count in (1, 2):
            callers.append(await asyncio.open_connection("127.0.0.1", port))
            callers[-1][1].write(second)
            await until(lambda count=count: len(of_type(events, "session.opened")) == count)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
        writer.close()
        assert len(of_type(events, "session.opened")) == 2
        callers[0][1].close()
        await until(lambda: bool(of_type(events, "session.closed")))
        await send(port, second)
        await until(lambda: len(of_type(events, "session.closed")) == 2)
        callers[1][1].close()
        await until(lambda: len(of_type(events, "session.closed")) == 3)
    streams = [event.stream_id for event in of_type(events, "session.opened")]
    assert streams == ["door-1", "door-2", "door-3"]


async def test_a_silent_tcp_connection_is_closed_and_its_audio_heard(checkpoint, listening):
    async with asyncio.timeout(60), door(checkpoint, listening, idle_s=0.3) as (port, events):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(4):  # longer than `idle_s`, but never silent for so long
            writer.write(np.zeros(SAMPLE_RATE // 4, "<i2").tobytes())
            await asyncio.sleep(0.15)
        assert not of_type(events, "session.closed")
        assert await reader.read() == b""
        writer.close()
        await until(lambda: bool(of_type(events, "session.closed")))
    (closed,) = of_type(events, "session.closed")
    assert closed.reason == "error"
    (error,) = of_type(events, "error")
    assert "no audio for 0.3 s" in error.message
    assert closed.totals["audio_s"] == pytest.approx(1.0)


async def test_a_port_that_is_taken_is_said_in_one_line(checkpoint):
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(BaseException) as caught:  # noqa: PT011 - a group of one
            await run(config(checkpoint, {"door": {"kind": "tcp", "port": port}}))
    assert f"tcp 127.0.0.1:{port}: cannot listen" in str(
        caught.value.exceptions[0] if hasattr(caught.value, "exceptions") else caught.value
    )
