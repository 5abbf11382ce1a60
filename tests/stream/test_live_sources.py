"""Sources that bring audio over the network, each with a real sender."""

import asyncio
import http.server
import json
import shutil
import socket
import struct
import subprocess
import threading
import warnings
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from structlog.testing import CapturingLogger

from stream.clock import SAMPLE_RATE
from stream.config import ConfigError
from stream.daemon import run
from stream.sources.line import Line
from stream.sources.media import MediaSource
from stream.sources.rtp import Damaged, Heard, Jitter, Lost, Packet, RtpSource, _Port, decoder
from stream.sources.source import SourceError
from stream.sources.wyoming_server import WyomingSource
from tests.sinks.samples import Talk
from tests.stream.conftest import speechlike
from tests.stream.house import finals, free_port, pcm, until
from tests.stream.test_daemon import collected, config

QUIET = {"session": {"heartbeat_s": 0}}

ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


class Sender:
    """An ffmpeg that sends, at the speed of the audio."""

    def __init__(self, *arguments):
        self.arguments = arguments
        self.start()

    def start(self):
        command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-re", *self.arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


@pytest.fixture(scope="module")
def tone(tmp_path_factory):
    """Twenty seconds of noise that comes and goes."""
    path = tmp_path_factory.mktemp("tone") / "tone.wav"
    soundfile.write(path, speechlike(20 * SAMPLE_RATE, seed=2), SAMPLE_RATE, subtype="PCM_16")
    return str(path)


async def heard(source, seconds, within_s=40):
    """The first seconds of a source → samples, samples lost."""
    samples, lost = [], 0
    async with asyncio.timeout(within_s), source.open() as blocks:
        async for block in blocks:
            samples.append(block.samples)
            lost += block.lost
            if sum(map(len, samples)) >= seconds * SAMPLE_RATE:
                break
    return np.concatenate(samples), lost


def level(samples):
    return float(np.sqrt(np.mean(samples**2)))


class Files(http.server.SimpleHTTPRequestHandler):
    """Files with their length, as a web server has them."""

    def log_message(self, *_):
        pass

    def send_head(self):
        if self.path == "/forbidden":
            return self.send_error(403)
        return super().send_head()


@pytest.fixture
def served():
    """A folder → its URL."""
    servers = []

    def serve(folder):
        handler = partial(Files, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@ffmpeg
class TestMedia:
    async def test_a_file_says_what_libsndfile_says(self, checkpoint, tone):
        given = {"kind": "av", "url": tone}
        by_ffmpeg, _ = await collected(config(checkpoint, {"a": given}, **QUIET))
        filed = {"kind": "file", "path": tone}
        by_libsndfile, _ = await collected(config(checkpoint, {"a": filed}, **QUIET))
        assert finals([e.model_dump(mode="json") for e in by_ffmpeg]) == finals(
            [e.model_dump(mode="json") for e in by_libsndfile]
        )

    async def test_http(self, tone):
        port = free_port()
        url = f"http://127.0.0.1:{port}/a.ogg"
        source = MediaSource(url=url, retry_first_s=0.05, retry_longest_s=0.1)
        with Sender("-i", tone, "-c:a", "libopus", "-f", "ogg", "-listen", "1", url):
            samples, _ = await heard(source, 2)
        assert level(samples) > 0.05

    async def test_mpeg_ts_over_udp(self, tone):
        url = f"udp://127.0.0.1:{free_port()}"
        with Sender("-i", tone, "-c:a", "aac", "-f", "mpegts", f"{url}?pkt_size=1316"):
            samples, _ = await heard(MediaSource(url=url, retry_first_s=0.05), 2)
        assert level(samples) > 0.05

    async def test_mpeg_ts_in_rtp(self, tone):
        url = f"rtp://127.0.0.1:{free_port()}"
        with Sender("-i", tone, "-c:a", "aac", "-f", "rtp_mpegts", url):
            samples, _ = await heard(MediaSource(url=url, retry_first_s=0.05), 2)
        assert level(samples) > 0.05

    async def test_rtsp(self, tone):
        url = f"rtsp://127.0.0.1:{free_port()}/live"
        options = {"rtsp_flags": "listen", "listen_timeout": "5", "rtsp_transport": "tcp"}
        source = MediaSource(url=url, options=options, retry_first_s=0.05)
        push = ("-i", tone, "-c:a", "aac", "-rtsp_transport", "tcp", "-f", "rtsp", url)
        async with asyncio.timeout(60):
            hearing = asyncio.create_task(heard(source, 2))
            with Sender(*push) as sender:
                while not hearing.done():
                    await asyncio.sleep(0.1)
                    if sender.process.poll() is not None:  # nobody listened yet
                        sender.start()
        samples, _ = await hearing
        assert level(samples) > 0.05

    async def test_a_sender_that_comes_back_is_a_gap_of_the_length_it_was_away(self, tone):
        port = free_port()
        source = MediaSource(
            url=f"tcp://127.0.0.1:{port}?listen=1",
            options={"format": "wav"},
            retry_first_s=0.05,
            retry_longest_s=0.1,
        )
        url = f"tcp://127.0.0.1:{port}"
        loop, total = asyncio.get_running_loop(), 0
        async with asyncio.timeout(60), source.open() as blocks:
            with Sender("-i", tone, "-f", "wav", url) as sender:
                while sender.process.poll() is not None:
                    await asyncio.sleep(0.05)
                    sender.start()
                first = broke = gap = starting = None
                async for block in blocks:
                    now = loop.time()
                    first = first or now
                    total += block.lost + len(block.samples)
                    if block.lost:
                        gap, back = block, now
                    # What FFmpeg read to know the format comes at once: wait until it has.
                    if broke is None and now - first > 1:
                        await asyncio.to_thread(sender.kill)
                        broke, before = now, total
                        starting = asyncio.create_task(self.again(sender))
                    elif gap is not None and now - back > 1:
                        break
                await starting
        assert gap.reason == "network"
        assert gap.lost > 0
        # The gap and what came after it fill the time: no more, no less.
        assert (total - before) / SAMPLE_RATE == pytest.approx(now - broke, abs=0.5)

    @staticmethod
    async def again(sender):
        await asyncio.sleep(0.5)
        while True:
            await asyncio.to_thread(sender.start)
            await asyncio.sleep(0.3)
            if sender.process.poll() is None:
                return

    async def test_channels_apart_are_streams_apart(self, checkpoint, tmp_path):
        path = tmp_path / "two.wav"
        left, right = speechlike(32_000, seed=1), speechlike(32_000, seed=2)
        await asyncio.to_thread(
            soundfile.write, path, np.stack([left, right], 1), SAMPLE_RATE, subtype="FLOAT"
        )
        both = {
            "f": {"kind": "file", "path": path, "apart": 2},
            "m": {"kind": "av", "url": str(path), "apart": 2},
            "left": {"kind": "file", "path": path, "channel": 0},
            "right": {"kind": "av", "url": str(path), "channel": 1},
        }
        events, _ = await collected(config(checkpoint, both, **QUIET))
        of = {}
        for event in events:
            of.setdefault(event.stream_id, []).append(event.model_dump(mode="json"))
        assert set(of) == {"f-1", "f-2", "m-1", "m-2", "left", "right"}
        said = {name: finals(each) for name, each in of.items()}
        assert said["f-1"] == said["m-1"] == said["left"]
        assert said["f-2"] == said["m-2"] == said["right"]
        assert said["f-1"] != said["f-2"]

    async def test_what_is_no_audio_is_said(self, tmp_path, checkpoint):
        text = tmp_path / "a.txt"
        text.write_text("no audio")
        for url in (str(text), str(tmp_path / "missing.wav")):
            with pytest.raises(SourceError, match=r"av:.*: "):
                async with MediaSource(url=url).open():
                    pass
        with pytest.raises(ConfigError, match="got 'gopher'"):
            config(checkpoint, {"a": {"kind": "av", "url": "gopher://x"}})
        mono = {"a": {"kind": "file", "path": "stream/demo/meeting.flac", "channel": 1}}
        with pytest.raises(SourceError, match="channel 1: the file has 1; expected 0 to 0"):
            await run(config(checkpoint, mono))

    async def test_a_url_that_has_an_end_is_heard_once_and_whole(self, tone, tmp_path, served):
        given, _ = await asyncio.to_thread(soundfile.read, tone, dtype="float32")
        await asyncio.to_thread(
            soundfile.write, tmp_path / "a.wav", given, SAMPLE_RATE, subtype="PCM_16"
        )
        source = MediaSource(url=f"{served(tmp_path)}/a.wav", buffer_ms=500)
        blocks = await self.all(source)
        assert sum(block.lost for block in blocks) == 0
        assert np.array_equal(np.concatenate([block.samples for block in blocks]), given)

    @staticmethod
    async def all(source):
        async with asyncio.timeout(60), source.open() as blocks:
            return [block async for block in blocks]

    async def test_what_is_missing_in_a_stream_is_a_gap_where_it_is_missing(self, tone, tmp_path):
        """MPEG-TS with a hole of three seconds, as UDP would leave it."""
        whole, holed = tmp_path / "a.ts", tmp_path / "b.ts"
        command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i", tone, "-c:a", "aac", whole]
        await asyncio.to_thread(subprocess.run, command, check=True)
        data = whole.read_bytes()
        packets = len(data) // 188
        cut = slice(packets // 2 * 188, (packets // 2 + packets * 3 // 20) * 188)
        holed.write_bytes(data[: cut.start] + data[cut.stop :])
        expected = await self.all(MediaSource(url=str(whole)))
        told = await self.all(MediaSource(url=str(holed)))
        lost = [block for block in told if block.lost]
        assert {block.reason for block in lost} == {"network"}
        assert sum(block.lost for block in lost) / SAMPLE_RATE == pytest.approx(3, abs=0.3)
        total = sum(block.lost + len(block.samples) for block in told)
        wanted = sum(len(block.samples) for block in expected)
        assert total / SAMPLE_RATE == pytest.approx(wanted / SAMPLE_RATE, abs=0.05)
        # After the hole the same audio is at the same place as without it.
        tail = np.concatenate([block.samples for block in told])[-4 * SAMPLE_RATE :]
        same = np.concatenate([block.samples for block in expected])[-4 * SAMPLE_RATE :]
        assert level(tail - same) < 0.1 * level(same)

    async def test_damage_is_skipped_and_counted(self, tone, tmp_path):
        path = tmp_path / "a.flac"
        given, _ = await asyncio.to_thread(soundfile.read, tone, dtype="float32")
        await asyncio.to_thread(soundfile.write, path, given, SAMPLE_RATE, subtype="PCM_16")
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 20_000] = bytes(20_000)
        path.write_bytes(data)
        blocks = await self.all(MediaSource(url=str(path)))
        total = sum(block.lost + len(block.samples) for block in blocks)
        assert any(block.lost for block in blocks)
        assert total / SAMPLE_RATE == pytest.approx(20, abs=0.3)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("v.mp4", "expected a stream of audio"), ("forbidden", "403 Forbidden")],
    )
    async def test_a_url_that_can_never_be_heard_is_one_error(
        self, tmp_path, served, name, message
    ):
        silent = ["-f", "lavfi", "-i", "testsrc=duration=1", "-c:v", "mpeg4", tmp_path / "v.mp4"]
        command = ["ffmpeg", "-nostdin", "-loglevel", "error", *silent]
        await asyncio.to_thread(subprocess.run, command, check=True)
        with pytest.raises(SourceError, match=message):
            await self.all(MediaSource(url=f"{served(tmp_path)}/{name}"))

    async def test_a_channel_that_is_not_there_is_one_error(self, tone, served):
        url = f"{served(Path(tone).parent)}/tone.wav"
        for keys, message in (
            ({"channel": 1}, "channel 1: there are 1; expected 0 to 0"),
            ({"url": tone, "channel": 3}, "channel 3: there are 1"),
        ):
            with pytest.raises(SourceError, match=message):
                await self.all(MediaSource(**{"url": url, **keys}))

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("gopher://x", "got 'gopher'"),
            ("rtsp://", "expected a host after rtsp://"),
            ("udp://127.0.0.1", "expected udp://host:port"),
            ("http://x:99999/", "expected a port from 0 to 65535"),
        ],
    )
    def test_a_url_that_makes_no_sense_is_said_at_once(self, url, message):
        with pytest.raises(ValueError, match=message):
            MediaSource(url=url)

    async def test_closing_does_not_wait_for_a_sender_that_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            source = MediaSource(url=f"http://127.0.0.1:{port}/", timeout_s=6)
            async with asyncio.timeout(5), source.open() as blocks:
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await anext(blocks)
            for thread in threading.enumerate():  # and it ends by itself
                if thread.name == "media":
                    await asyncio.to_thread(thread.join, 10)
                    assert not thread.is_alive()

    def test_a_password_in_the_url_is_not_told(self):
        assert MediaSource(url="rtsp://u:hush@cam/x?t=hush").name == "av:rtsp://cam/x"


def packet(number, payload, *, ssrc=7, first=1000, seq=65_530, length=160, kind=0):
    timestamp = (first + number * length) & 0xFFFFFFFF
    return struct.pack("!BBHII", 0x80, kind, (seq + number) & 0xFFFF, timestamp, ssrc) + payload


def linear(frames, step=960):
    """frames: [n, C] → payloads of L16, ``step`` frames each."""
    data = np.round(frames * 32767).astype(">i2")
    return [data[at : at + step].tobytes() for at in range(0, len(data), step)]


def opus(frames):
    """frames: [n, 2] at 48 kHz → payloads of Opus, 20 ms each."""
    codec = av.CodecContext.create("libopus", "w")
    codec.sample_rate, codec.layout, codec.format = 48_000, "stereo", "s16"
    codec.open()
    sent = []
    for at in range(0, len(frames), 960):
        flat = np.round(frames[at : at + 960] * 32767).astype("<i2").reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(flat, format="s16", layout="stereo")
        frame.sample_rate = 48_000
        sent += [bytes(made) for made in codec.encode(frame)]
    return sent


class TestJitter:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.2]), st.integers(0, 2**32 - 1))
    def test_the_timeline_is_the_senders_whatever_the_network_does(self, seed, loss, first):
        """Reliability bar, row 7: 5 % loss (and bursts of 20 %), 40 ± 20 ms: no sample's error."""
        rng = np.random.default_rng(seed)
        jitter = Jitter(8000, depth_s=0.1)
        arrivals = []
        for number in range(300):
            lose = rng.random() < (loss if number // 50 % 2 else 0.05)
            if lose and 0 < number < 299:
                continue
            data = packet(number, number.to_bytes(4, "big") * 40, first=first)
            times = number * 0.02 + 0.04 + rng.uniform(-0.02, 0.02, 1 + (rng.random() < 0.05))
            arrivals += [(float(at), data) for at in times]
        arrivals.sort(key=lambda each: each[0])
        at, played, told = 0, set(), []
        for now, data in arrivals:
            parsed = Packet.parse(data)
            told += jitter.push(parsed, 160, now)
        told += jitter.flush()
        first_heard = None
        for each in told:
            if isinstance(each, Lost):
                at += each.timestamps
                continue
            number = int.from_bytes(each.payload[:4], "big")
            if first_heard is None:
                first_heard, at = number, number * 160
            assert at == number * 160
            played.add(number)
            at += 160
        assert at == 300 * 160
        sent = {int.from_bytes(data[12:16], "big") for _, data in arrivals}
        assert played == {number for number in sent if number >= first_heard}

    def test_a_packet_in_turn_leaves_at_once_and_a_gap_after_its_time(self):
        jitter = Jitter(8000, depth_s=0.1)
        push = lambda n, now: jitter.push(Packet.parse(packet(n, b"%d" % n * 160)), 160, now)  # noqa: E731
        assert push(0, 0.0) == [Heard(b"0" * 160)]
        assert push(2, 0.04) == []
        assert jitter.due(0.1) == []
        assert jitter.due(0.15) == [Lost(160), Heard(b"2" * 160)]
        assert push(1, 0.16) == []  # too late
        assert push(2, 0.17) == []
        assert jitter.counts == {"late": 2}

    def test_another_sender_has_to_wait_until_the_first_is_silent(self):
        jitter = Jitter(8000, depth_s=0.1)
        jitter.push(Packet.parse(packet(0, b"a" * 160)), 160, 0.0)
        other = Packet.parse(packet(5, b"b" * 160, ssrc=8))
        assert jitter.push(other, 160, 1.0) == []
        assert jitter.push(other, 160, 2.5) == [Lost(20_000), Heard(b"b" * 160)]
        assert jitter.counts == {"foreign": 1}

    @staticmethod
    def arrive(jitter, number, now, payload=b"a" * 160, **keys):
        """A packet that arrives → what is told, or None if it is no audio."""
        parsed = Packet.parse(packet(number, payload, **keys))
        return jitter.push(parsed, len(payload), now) if jitter.takes(parsed, now) else None

    def test_noise_that_comes_first_is_not_taken_for_the_audio(self):
        jitter = Jitter(8000, depth_s=0.1)
        assert self.arrive(jitter, 0, 0.0, b"n", kind=13) is None
        assert self.arrive(jitter, 5, 0.1) == [Heard(b"a" * 160)]

    def test_a_sender_of_noise_keeps_the_port_and_what_it_sends_fills_no_time(self):
        jitter = Jitter(8000, depth_s=0.1)
        self.arrive(jitter, 0, 0.0)
        for number in range(50, 250, 50):
            assert self.arrive(jitter, number, number / 50, b"n", kind=13) is None
            assert self.arrive(jitter, 0, number / 50 + 0.5, ssrc=8) == []
        assert jitter.counts == {"other": 4, "foreign": 4}
        # It is silent for long enough at last; the time is that since its audio.
        assert self.arrive(jitter, 0, 6.5, ssrc=8) == [Lost(52_000), Heard(b"a" * 160)]

    def test_another_stream_may_have_another_payload_type(self):
        jitter = Jitter(8000, depth_s=0.1)
        self.arrive(jitter, 0, 0.0)
        told = self.arrive(jitter, 0, 3.0, b"b" * 160, kind=96, ssrc=8)
        assert told == [Lost(24_000), Heard(b"b" * 160)]
        assert self.arrive(jitter, 1, 3.0, kind=0, ssrc=8) is None
        told = self.arrive(jitter, 1, 3.0, b"b" * 160, kind=96, ssrc=8)
        assert told == [Heard(b"b" * 160)]

    def test_a_key_press_that_came_first_makes_nobody_deaf_for_ever(self):
        jitter = Jitter(8000, depth_s=0.1)
        self.arrive(jitter, 0, 0.0, b"keys", kind=101)
        told = [self.arrive(jitter, number, number * 0.02) for number in range(1, 601)]
        assert told[:499] == [None] * 499
        assert told[499] == []  # it waits for what is missing before it
        heard = [each for some in told[499:] for each in some]
        assert heard == [Lost(500 * 160 - 4), *[Heard(b"a" * 160)] * 101]

    @given(st.binary(max_size=64))
    def test_any_datagram_is_parsed_or_refused(self, data):
        parsed = Packet.parse(data)
        assert parsed is None or len(parsed.payload) <= len(data)


class TestPayloadTypes:
    @staticmethod
    async def heard(datagrams):
        """What a port that waits for nothing makes of them → samples, (where, how many lost)."""
        source, line = RtpSource(port=0, payload="mulaw", jitter_ms=0), Line("x")
        port = _Port(source, [line], decoder(source))
        for datagram in datagrams:
            port.datagram_received(datagram, None)
        line.end()
        at, samples, losses = 0, [], []
        async with line.open() as blocks:
            async for block in blocks:
                if block.lost:
                    losses.append((at, block.lost))
                samples.append(block.samples)
                at += block.lost + len(block.samples)
        return np.concatenate(samples), losses

    @pytest.fixture
    def spoken(self):
        """A second of audio, 20 ms a packet."""
        codes = np.random.default_rng(0).integers(0, 256, (50, 160), np.uint8)
        return [packet(number, codes[number].tobytes()) for number in range(50)]

    async def test_key_presses_beside_the_audio_are_not_heard(self, spoken, monkeypatch):
        sent = []
        for number, datagram in enumerate(spoken):
            if 10 <= number < 20:  # an event's packets all have the time of its beginning
                event = bytes([5, 10, *struct.pack("!H", (number - 9) * 160)])
                sent.append(packet(10, event, kind=101))
            sent.append(datagram)
        log = CapturingLogger()
        monkeypatch.setattr("stream.sources.rtp.log", log)
        samples, losses = await self.heard(sent)
        expected, _ = await self.heard(spoken)
        assert losses == []
        assert np.array_equal(samples, expected)
        assert [(call.args[0], call.kwargs["payload_type"]) for call in log.calls] == [
            ("ignored", 101)
        ]

    async def test_comfort_noise_between_the_audio_is_a_loss_of_what_it_stands_for(self, spoken):
        silent = {*range(20, 30), 35}
        sent = [
            packet(number, b"\x40", kind=13) if number in {20, 25, 35} else datagram
            for number, datagram in enumerate(spoken)
            if number in {20, 25, 35} or number not in silent
        ]
        samples, losses = await self.heard(sent)
        expected, _ = await self.heard(
            [datagram for number, datagram in enumerate(spoken) if number not in silent]
        )
        assert losses == [(20 * 320, 10 * 320), (35 * 320, 320)]
        assert np.array_equal(samples, expected)

    async def test_noise_does_not_hide_that_the_audio_has_stopped(self, spoken):
        """What was heard before must not wait for the end of a silence that noise fills."""
        source = RtpSource(port=free_port(), payload="mulaw", hang_ms=100)

        async def send():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(spoken[0], ("127.0.0.1", source.port))
                for number in range(1, 10_000):
                    noise = packet(number, b"\x40", kind=13)
                    sender.sendto(noise, ("127.0.0.1", source.port))
                    await asyncio.sleep(0.01)

        async with asyncio.timeout(20), source.open() as blocks:
            sending = asyncio.create_task(send())
            told = [await anext(blocks), await anext(blocks)]
            sending.cancel()
        assert [(len(block.samples), block.reason) for block in told] == [
            (320, None),
            (0, "network"),
        ]


class TestRtp:
    async def test_loss_is_marked_and_nothing_shifts(self):
        port = free_port()
        source = RtpSource(port=port, payload="mulaw", jitter_ms=40, hang_ms=200)
        codes = np.random.default_rng(0).integers(0, 256, (100, 160), np.uint8)
        decoded = decoder(source)
        samples, lost = [], []
        async with source.open() as blocks:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for number in range(100):
                    if number not in {30, 31, 60}:
                        sender.sendto(packet(number, codes[number].tobytes()), ("127.0.0.1", port))
                    await asyncio.sleep(0.001)
            async with asyncio.timeout(20):
                total = 0
                async for block in blocks:
                    if block.lost:
                        lost.append((total, block.lost))
                    samples.append(block.samples)
                    total += block.lost + len(block.samples)
                    if total >= 100 * 320:
                        break
        assert lost == [(30 * 320, 640), (60 * 320, 320)]
        assert total == 100 * 320
        assert level(np.concatenate(samples)) == pytest.approx(
            level(decoded.decode(codes.tobytes())), rel=0.05
        )

    @staticmethod
    async def told(source, sent):
        """(number, payload, timestamps a packet) sent in this order → (samples, lost) of blocks."""
        async with source.open() as blocks:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for number, payload, length in sent:
                    data = packet(number, payload, length=length)
                    sender.sendto(data, ("127.0.0.1", source.port))
                    await asyncio.sleep(0.001)
            told = []
            async with asyncio.timeout(20):
                async for block in blocks:
                    if block.reason is not None and not block.lost:
                        break  # silent for `hang_ms`: everything was told
                    told.append((block.samples, block.lost))
        return told

    async def test_a_damaged_opus_packet_is_lost_as_long_as_it_was(self):
        wave = np.stack([speechlike(60 * 960, seed=seed) for seed in (1, 2)], 1)
        whole = opus(wave)
        broken = list(whole)
        # Frames of the right length by their first bytes, and padding beyond the packet's end.
        for number in (12, 31):
            broken[number] = bytes([whole[number][0] | 3, 0x41, 255, 255])
        broken[45] = bytes([whole[45][0] | 3, 63, 0])  # 1.26 s: more than a packet can be
        with pytest.raises(Damaged):
            decoder(RtpSource(port=0, payload="opus")).decode(broken[12])
        # 12 leaves in one batch with 11 and 13; 30 never comes, so the clock tells it and 31.
        order = [number for number in range(60) if number not in {11, 30}]
        order.insert(order.index(13) + 1, 11)

        async def heard_of(payloads, order):
            keys = {"payload": "opus", "jitter_ms": 60, "hang_ms": 300}
            source = RtpSource(port=free_port(), **keys)
            return await self.told(source, [(each, payloads[each], 960) for each in order])

        told = await heard_of(broken, order)
        assert sum(len(samples) + lost for samples, lost in told) == 60 * 320
        at, losses = 0, []
        for samples, lost in told:
            if lost:
                losses.append((at, lost))
            at += len(samples) + lost
        assert losses == [(12 * 320, 320), (30 * 320, 320), (31 * 320, 320), (45 * 320, 320)]
        # What is heard between is where it is without a loss.
        same = np.concatenate([samples for samples, _ in await heard_of(whole, range(60))])
        filled = np.concatenate([np.append(np.zeros(lost), made) for made, lost in told])
        part = slice(35 * 320, 44 * 320)
        assert level(filled[part] - same[part]) < 0.1 * level(same[part])

    async def test_a_packet_cut_short_is_lost_where_it_is_cut(self):
        sent = linear(np.stack([speechlike(50 * 320, seed=seed) for seed in (1, 2)], 1), 320)
        sent[20] = sent[20][:-3]  # the last frame of four bytes is not whole
        sent[30] = sent[30][:3]  # no frame is whole
        source = RtpSource(port=free_port(), channels=2, rate=16_000, jitter_ms=40, hang_ms=200)
        told = await self.told(source, [(number, sent[number], 320) for number in range(50)])
        assert [lost for _, lost in told if lost] == [1, 320]
        assert sum(len(samples) + lost for samples, lost in told) == 50 * 320

    async def test_many_losses_round_to_no_shift(self):
        """At 11025 Hz 100 timestamps are 145.1 samples: each loss alone would take 0.1 of one."""
        source = RtpSource(port=free_port(), rate=11_025, jitter_ms=0, hang_ms=500)
        sent = [(number, bytes(200), 100) for number in range(0, 401, 2)]
        told = await self.told(source, sent)
        total = sum(len(samples) + lost for samples, lost in told)
        assert total == pytest.approx(401 * 100 * SAMPLE_RATE / 11_025, abs=1)

    @ffmpeg
    @pytest.mark.parametrize(
        ("payload", "codec", "options"),
        [
            ("l16", "pcm_s16be", ["-ar", "44100"]),
            ("alaw", "pcm_alaw", ["-ar", "8000"]),
            ("opus", "libopus", ["-ar", "48000"]),
        ],
    )
    async def test_what_ffmpeg_sends(self, tone, payload, codec, options):
        port = free_port()
        source = RtpSource(port=port, payload=payload)
        send = ["-i", tone, "-ac", "1", *options, "-c:a", codec, "-f", "rtp"]
        async with asyncio.timeout(30), source.open() as blocks:
            with Sender(*send, f"rtp://127.0.0.1:{port}"):
                samples, total = [], 0
                async for block in blocks:
                    samples.append(block.samples)
                    total += len(block.samples)
                    if total > 2 * SAMPLE_RATE:
                        break
        given, _ = await asyncio.to_thread(soundfile.read, tone, dtype="float32")
        got = np.concatenate(samples)[: 2 * SAMPLE_RATE]
        wanted = given[: len(got)]
        spectrum = np.fft.rfft(got, 65_536) * np.conj(np.fft.rfft(wanted, 65_536))
        shift = np.fft.irfft(spectrum)
        assert np.abs(shift).max() > 0.5 * np.linalg.norm(got) * np.linalg.norm(wanted)

    @pytest.mark.parametrize("payload", ["l16", "opus"])
    async def test_a_channel_is_heard_alone_or_with_the_other(self, payload):
        time = np.arange(48_000) / 48_000
        left = 0.25 * np.sin(2 * np.pi * 440 * time)
        both = np.stack([left, np.zeros_like(left)], 1)
        sent = opus(both) if payload == "opus" else linear(both)

        async def levels(**choice):
            port = free_port()
            channels = {"channels": 2} if payload == "l16" else {}
            source = RtpSource(port=port, payload=payload, rate=48_000, **channels, **choice)
            each = [source] if source.apart is None else source.split()

            async def level_of(one):
                samples, _ = await heard(one, 0.5)
                return level(samples[1600:])

            hearing = [asyncio.ensure_future(level_of(one)) for one in each]
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                number = 0
                while not all(task.done() for task in hearing):
                    data = packet(number, sent[number % 50], length=960)
                    sender.sendto(data, ("127.0.0.1", port))
                    number += 1
                    await asyncio.sleep(0.005)
            return [await task for task in hearing]

        (mean,) = await levels()
        (alone,) = await levels(channel=0)
        one, other = await levels(apart=2)
        assert mean == pytest.approx(alone / 2, rel=0.1)
        assert one == pytest.approx(alone, rel=0.1)
        assert other < alone / 100

    @pytest.mark.parametrize(
        ("choice", "complaint"),
        [
            ({"payload": "mulaw", "channels": 2}, "channels: expected 1 of mulaw, got 2"),
            ({"channels": 2, "channel": 2}, "channel: expected 0 to 1, got 2"),
            ({"payload": "opus", "apart": 3}, "apart: expected 2 at most, got 3"),
        ],
    )
    def test_channels_that_are_not_there_are_said(self, choice, complaint):
        with pytest.raises(ValidationError, match=complaint):
            RtpSource(port=0, **choice)

    async def test_channels_apart_are_streams_apart_on_one_port(self, checkpoint):
        port = free_port()
        source = {"kind": "rtp", "port": port, "channels": 2, "rate": 16_000, "apart": 2}
        stop, events = asyncio.Event(), []
        settings = config(checkpoint, {"mixer": source}, session={"heartbeat_s": 0.5})
        running = asyncio.ensure_future(run(settings, stop=stop, on_event=events.append))
        sent = linear(np.stack([speechlike(16_000, seed=seed) for seed in (1, 2)], 1), 320)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            number = 0
            async with asyncio.timeout(60):
                while len({e.stream_id for e in events if e.type == "heartbeat"}) < 2:
                    data = packet(number, sent[number % 50], length=320)
                    sender.sendto(data, ("127.0.0.1", port))
                    number += 1
                    await asyncio.sleep(0.005)
        stop.set()
        await running
        assert {event.stream_id for event in events} == {"mixer-1", "mixer-2"}
        opened = {event.session_id for event in events if event.type == "session.opened"}
        assert len(opened) == 2

    async def test_a_port_that_is_taken_is_said(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.1", 0))
            source = RtpSource(port=taken.getsockname()[1], payload="mulaw")
            with pytest.raises(SourceError, match="cannot listen"):
                async with source.open():
                    pass


def shrink(sock, buffer):
    sock.setsockopt(socket.SOL_SOCKET, buffer, 4096)


def ping(size):
    """A message of Wyoming that is answered by one as long."""
    return json.dumps({"type": "ping", "data": {"text": "x" * size}}).encode() + b"\n"


class Talker:
    """An intake whose session has much to say, and ends with its audio."""

    def __init__(self):
        self.stop, self.ready, self.over = asyncio.Event(), asyncio.Event(), False

    def listening(self, name):
        self.ready.set()

    async def stream(self, name, source, *, tap):
        tap(Talk().said("word " * 30_000, "S1", 0.0, 1.0))
        async with source.open() as blocks:
            async for _ in blocks:
                pass
        self.over = True


class TestWyoming:
    @pytest.fixture(autouse=True)
    def quiet(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # audioop
            import wyoming.audio  # noqa: F401

    @staticmethod
    @asynccontextmanager
    async def listening(checkpoint, engine=None, **keys):
        """A daemon with a port for Wyoming → the port, what is emitted, how to stop it."""
        port, stop, events = free_port(), asyncio.Event(), []
        source = {"kind": "wyoming", "port": port, **keys}
        served = config(checkpoint, {"ha": source}, engine=engine, **QUIET)
        running = asyncio.create_task(run(served, stop=stop, on_event=events.append))
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            except OSError:
                assert not running.done()
                await asyncio.sleep(0.02)
        try:
            yield port, events, stop
        finally:
            stop.set()
            await running

    async def test_the_packages_own_client_is_at_home(self, checkpoint):
        from wyoming.asr import Transcribe, Transcript
        from wyoming.audio import AudioChunk, AudioStart, AudioStop
        from wyoming.client import AsyncTcpClient
        from wyoming.info import Describe, Info

        async with self.listening(checkpoint) as (port, events, _):
            client = AsyncTcpClient("127.0.0.1", port)
            await client.connect()
            await client.write_event(Describe().event())
            info = Info.from_event(await client.read_event())
            assert info.asr[0].supports_transcript_streaming
            for _ in range(2):  # utterance after utterance over one connection
                begun = len(events)
                await client.write_event(Transcribe(language="en").event())
                await client.write_event(AudioStart(rate=16_000, width=2, channels=1).event())
                data = pcm(speechlike(3 * SAMPLE_RATE, seed=5))
                for at in range(0, len(data), 2048):
                    chunk = AudioChunk(rate=16_000, width=2, channels=1, audio=data[at : at + 2048])
                    await client.write_event(chunk.event())
                await client.write_event(AudioStop().event())
                types, text = [], ""
                while True:
                    event = await client.read_event()
                    types.append(event.type)
                    if event.type == "transcript-chunk":
                        text += event.data["text"]
                    if event.type == "transcript":
                        break
                finals_ = [e for e in events[begun:] if e.type == "transcript.final" and e.words]
                transcript = Transcript.from_event(event)
                words = [word for each in finals_ for word in each.words]
                assert transcript.text == " ".join(word.word for word in words)
                assert text.split() == transcript.text.split()
                assert types[0] == "transcript-start"
                assert types[-2] == "transcript-stop"
                speakers = transcript.context["speakers"]
                assert " ".join(each["text"] for each in speakers) == transcript.text
                assert {each["label"] for each in speakers} == {word.speaker for word in words}
            await client.disconnect()

    async def test_an_utterance_is_drained_when_the_daemon_stops(self, checkpoint):
        from wyoming.audio import AudioChunk, AudioStart
        from wyoming.client import AsyncTcpClient

        async with self.listening(checkpoint) as (port, events, stop):
            client = AsyncTcpClient("127.0.0.1", port)
            await client.connect()
            await client.write_event(AudioStart(rate=16_000, width=2, channels=1).event())
            data = pcm(speechlike(3 * SAMPLE_RATE, seed=5))
            await client.write_event(AudioChunk(16_000, 2, 1, data).event())
            await until(lambda: bool(events) and events[-1].end > 2)
            stop.set()
            types = []
            while (event := await client.read_event()) is not None:
                types.append(event.type)
            await client.disconnect()
        assert types[-1] == "transcript"
        assert events[-1].type == "session.closed"

    async def test_without_room_the_client_is_told(self, checkpoint):
        from wyoming.audio import AudioStart
        from wyoming.client import AsyncTcpClient

        async with self.listening(checkpoint, engine={"slots": 1}) as (port, events, _):
            first, second = (AsyncTcpClient("127.0.0.1", port) for _ in range(2))
            await first.connect()
            await first.write_event(AudioStart(rate=16_000, width=2, channels=1).event())
            await until(lambda: bool(events))
            await second.connect()
            await second.write_event(AudioStart(rate=16_000, width=2, channels=1).event())
            told = []
            while (event := await second.read_event()) is not None:
                told.append(event)
            assert [each.type for each in told] == ["transcript-start", "error"]
            assert told[-1].data["code"] == "busy"
            await first.disconnect()
            await second.disconnect()

    NONSENSE = (
        b"no json\n",
        b"[1]\n",
        b"5\n",
        b"{}\n",
        b"[" * 200_000 + b"\n",
        b" " * (1 << 20) + b"\n",
        b'{"type": "transcribe", "data": [1]}\n',
        b'{"type": "transcribe", "data": {"language": [1]}}\n',
        b'{"type": "transcribe", "data_length": 3}\n[1]',
        b'{"type": "transcribe", "data_length": "3"}\n{}',
        b'{"type": "ping", "data": {"text": "\\ud800"}}\n',
        b'{"type": "audio-start", "data": {"rate": 1}}\n',
        b'{"type": "audio-start", "data": {"rate": Infinity, "width": 2, "channels": 1}}\n',
        b'{"type": "audio-start", "data": {"rate": [1], "width": 2, "channels": 1}}\n',
        b'{"type": "audio-chunk", "payload_length": 999999999}\n',
        b'{"type": "audio-chunk", "payload_length": Infinity}\n',
    )

    @pytest.fixture
    def log(self, monkeypatch):
        """What is logged of the port and its clients."""
        log = CapturingLogger()
        monkeypatch.setattr("stream.sources.wyoming_server.log", log)
        return log

    async def test_nonsense_is_hung_up_on(self, checkpoint, log):
        async with self.listening(checkpoint, idle_s=0.3) as (port, events, _):
            for message, line in [*((each, "refused") for each in self.NONSENSE), (b"", "closed")]:
                log.calls.clear()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(message)
                with suppress(ConnectionError):  # what was not read is thrown away
                    async with asyncio.timeout(10):
                        assert await reader.read() == b""
                writer.close()
                assert [call.args[0] for call in log.calls] == [line], message[:80]
        assert events == []

    async def test_nonsense_in_an_utterance_ends_it_with_what_was_heard(self, checkpoint, log):
        from wyoming.audio import AudioChunk, AudioStart, AudioStop
        from wyoming.client import AsyncTcpClient

        start = AudioStart(rate=16_000, width=2, channels=1).event()
        speech = AudioChunk(16_000, 2, 1, pcm(speechlike(3 * SAMPLE_RATE, seed=5))).event()
        told = []
        async with self.listening(checkpoint) as (port, events, _):
            for last in (None, *self.NONSENSE[:5]):
                events.clear()
                log.calls.clear()
                client = AsyncTcpClient("127.0.0.1", port)
                await client.connect()
                await client.write_event(start)
                await client.write_event(speech)
                if last is None:
                    await client.write_event(AudioStop().event())
                else:
                    client._writer.write(last)
                async with asyncio.timeout(20):
                    await until(lambda: bool(events) and events[-1].type == "session.closed")
                    if last is not None:
                        while await client.read_event() is not None:
                            pass
                        assert [call.args[0] for call in log.calls] == ["refused"]
                await client.disconnect()
                told.append(finals([event.model_dump(mode="json") for event in events]))
        assert all(each == told[0] for each in told)

    @pytest.fixture
    def writers(self, monkeypatch):
        """Of the connections a port takes; what a client does not read soon stays in them."""
        found, start = [], asyncio.start_server

        async def started(take, *args, **keys):
            async def taken(reader, writer):
                shrink(writer.get_extra_info("socket"), socket.SO_SNDBUF)
                found.append(writer)
                await take(reader, writer)

            return await start(taken, *args, **keys)

        monkeypatch.setattr(asyncio, "start_server", started)
        return found

    @staticmethod
    @asynccontextmanager
    async def unread(message):
        """A client that says something and reads nothing → the intake, the port's serving."""
        intake, port = Talker(), free_port()
        serving = asyncio.create_task(WyomingSource(port=port).serve("ha", intake))
        with socket.socket() as client:
            shrink(client, socket.SO_RCVBUF)
            client.setblocking(False)
            async with asyncio.timeout(20):
                await intake.ready.wait()
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, ("127.0.0.1", port))
                await loop.sock_sendall(client, message)
                yield intake, serving
                intake.stop.set()
                await serving

    async def test_a_client_that_does_not_read_is_hung_up_on(self, writers, log, monkeypatch):
        monkeypatch.setattr("stream.sources.wyoming_server.WRITE_S", 0.05)
        async with self.unread(ping(1_000_000)):
            await until(lambda: bool(writers) and writers[0].is_closing())
        assert [call.kwargs.get("why") for call in log.calls] == [None, "reads too slowly"]

    @pytest.mark.parametrize(
        ("message", "closing"),
        [(ping(1_000_000), False), (ping(60_000) + b"no json\n", True)],
        ids=["being told", "being hung up on"],
    )
    async def test_a_client_that_does_not_read_holds_up_no_stop(
        self, writers, log, monkeypatch, message, closing
    ):
        monkeypatch.setattr("stream.sources.wyoming_server.WRITE_S", 3600)
        async with self.unread(message) as (intake, serving):
            await until(
                lambda: (
                    bool(writers)
                    and writers[0].is_closing() == closing
                    and writers[0].transport.get_write_buffer_size() > 20_000
                )
            )
            intake.stop.set()
            await serving

    async def test_a_client_that_does_not_read_what_it_said_ends_its_utterance(
        self, writers, log, monkeypatch
    ):
        monkeypatch.setattr("stream.sources.wyoming_server.WRITE_S", 0.05)
        start = b'{"type": "audio-start", "data": {"rate": 16000, "width": 2, "channels": 1}}\n'
        async with self.unread(start) as (intake, _):
            await until(lambda: intake.over)
