import asyncio
import os
import struct
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile

from stream.clock import SAMPLE_RATE
from stream.sources.file import FileSource
from stream.sources.source import SourceError
from stream.sources.stdin import StdinSource
from tests.stream.conftest import speechlike


async def read(source):
    async with source.open() as blocks:
        return [block async for block in blocks]


def joined(blocks):
    return np.concatenate([block.samples for block in blocks])


# -- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_ms", [7, 100, 60_000])
async def test_a_file_at_16_khz_arrives_bit_for_bit(tmp_path, block_ms):
    samples = speechlike(33_333)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    blocks = await read(FileSource(path=tmp_path / "a.wav", block_ms=block_ms))
    np.testing.assert_array_equal(joined(blocks), samples)
    assert all(block.lost == 0 and block.reason is None for block in blocks)


async def test_channels_are_averaged(tmp_path):
    left, right = speechlike(8000, 1), speechlike(8000, 2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    heard = joined(await read(FileSource(path=tmp_path / "a.wav")))
    np.testing.assert_allclose(heard, (left + right) / 2, atol=1e-7)


async def test_another_rate_is_resampled_and_keeps_its_length(tmp_path):
    tone = np.sin(2 * np.pi * 300 * np.arange(44_100 * 2) / 44_100).astype(np.float32) / 2
    soundfile.write(tmp_path / "a.flac", tone, 44_100)
    heard = joined(await read(FileSource(path=tmp_path / "a.flac")))
    assert len(heard) == 32_000
    expected = np.sin(2 * np.pi * 300 * np.arange(32_000) / 16_000) / 2
    np.testing.assert_allclose(heard[500:-500], expected[500:-500], atol=1e-3)


async def test_a_paced_file_says_when_each_sample_would_have_been_spoken(tmp_path):
    soundfile.write(tmp_path / "a.wav", speechlike(4800), 16_000)
    blocks = await read(FileSource(path=tmp_path / "a.wav", realtime=True, block_ms=50))
    times = [block.captured for block in blocks]
    assert np.diff(times) == pytest.approx([0.05] * 5)


def wav_header(channels, samples):
    data = samples * 2 * max(channels, 1)
    header = struct.pack("<4sI4s4sIHH", b"RIFF", 36 + data, b"WAVE", b"fmt ", 16, 1, channels)
    header += struct.pack("<IIHH4sI", 16_000, 32_000, 2, 16, b"data", data)
    return header + bytes(data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "the file is empty; expected audio"),
        (b"no audio at all, just words in a text file", "not an audio file that libsndfile reads"),
        (wav_header(0, 100), "not an audio file that libsndfile reads"),
        (wav_header(1, 0), r"of 0 sample\(s\) at 16000 Hz; expected"),
        (wav_header(1, 1), r"1 channel\(s\) of 1 sample\(s\) at 16000 Hz; expected"),
    ],
)
async def test_a_file_without_audio_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        await read(FileSource(path=path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


async def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(SourceError, match="expected an audio file, got a folder"):
        await read(FileSource(path=tmp_path))


async def test_a_damaged_file_gives_what_it_has_then_says_where_it_breaks(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, speechlike(160_000), 16_000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    blocks = []

    async def hear():
        async with FileSource(path=path, block_ms=100).open() as source:
            async for block in source:
                blocks.append(block)  # noqa: PERF401 - what came before the error counts

    with pytest.raises(SourceError, match=r"damaged after \d\.\d\d s"):
        await hear()
    assert 3 * 16_000 < len(joined(blocks)) < 6 * 16_000


async def test_a_read_that_is_given_up_does_not_outlive_the_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", speechlike(160_000), 16_000)
    async with FileSource(path=tmp_path / "a.wav", realtime=True).open() as blocks:
        await anext(blocks)
        pending = asyncio.create_task(anext(blocks))
        await asyncio.sleep(0)
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending


# -- standard input ----------------------------------------------------------------------------


@contextmanager
def stdin(monkeypatch, fd):
    with os.fdopen(fd, "rb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        yield


def pcm(samples):
    return (samples * 32767).astype("<i2")


async def piped(monkeypatch, data, cuts=(), **settings):
    """``data`` through a pipe, written in pieces."""
    out, into = os.pipe()

    def write():
        with os.fdopen(into, "wb", buffering=0) as pipe:
            for piece in np.split(np.frombuffer(data, np.uint8), list(cuts)):
                pipe.write(piece.tobytes())

    with stdin(monkeypatch, out):
        writing = asyncio.create_task(asyncio.to_thread(write))
        try:
            return await read(StdinSource(**settings))
        finally:
            await writing


async def test_raw_samples_from_a_pipe_arrive_bit_for_bit_whatever_the_pieces(monkeypatch):
    samples = pcm(speechlike(20_000))
    blocks = await piped(monkeypatch, samples.tobytes(), cuts=[1, 2, 777, 9001])
    np.testing.assert_array_equal(joined(blocks), samples.astype(np.float32) / 32768)


async def test_half_a_sample_at_the_end_is_no_sample(monkeypatch):
    samples = pcm(speechlike(1000))
    blocks = await piped(monkeypatch, samples.tobytes() + b"\x7f")
    assert len(joined(blocks)) == 1000


async def test_another_rate_on_stdin_is_resampled(monkeypatch):
    blocks = await piped(monkeypatch, pcm(speechlike(24_000)).tobytes(), rate=48_000)
    assert len(joined(blocks)) == 8000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"0 sample\(s\); expected at least 25 ms of raw s16le"),
        (b"\0\0", r"1 sample\(s\); expected at least 25 ms"),
        (b"RIFF" + bytes(5000), "got a WAV file; expected raw s16le"),
        (b"fLaC" + bytes(5000), "got a FLAC file; expected raw s16le"),
    ],
)
async def test_a_pipe_without_raw_audio_is_one_clear_error(monkeypatch, data, message):
    with pytest.raises(SourceError, match=message):
        await piped(monkeypatch, data)


async def test_one_channel_of_floats_on_stdin(monkeypatch):
    left, right = speechlike(4000, seed=1), speechlike(4000, seed=2)
    data = np.stack([left, right], 1).astype("<f4").tobytes()
    out, into = os.pipe()
    with os.fdopen(into, "wb") as pipe:
        pipe.write(data)
    with stdin(monkeypatch, out):
        blocks = await read(StdinSource(format="f32le", channels=2, channel=1))
    assert (joined(blocks) == right).all()
    with pytest.raises(ValueError, match="channel: expected 0 to 1, got 2"):
        StdinSource(channels=2, channel=2)
    with pytest.raises(ValueError, match="apart: expected 2 at most, got 3"):
        StdinSource(channels=2, apart=3)


async def read_apart(monkeypatch, data, **settings):
    """``data`` on stdin → the blocks of each channel, or the error it failed with."""
    out, into = os.pipe()

    def write():
        with os.fdopen(into, "wb") as pipe:
            pipe.write(data)

    with stdin(monkeypatch, out):
        writing = asyncio.create_task(asyncio.to_thread(write))
        each = [read(source) for source in StdinSource(**settings).split()]
        heard = await asyncio.gather(*each, return_exceptions=True)
        await writing
        return heard


async def test_channels_of_stdin_apart_are_streams_of_one_pipe(monkeypatch):
    seconds = 25  # more than may wait for a session
    both = [speechlike(seconds * 8000, seed=1), speechlike(seconds * 8000, seed=2)]
    data = pcm(np.stack([*both, both[0]], 1)).tobytes()
    heard = await read_apart(monkeypatch, data, channels=3, rate=8000, apart=2)
    assert len(heard) == 2
    for channel, blocks in enumerate(heard):
        alone = await piped(monkeypatch, data, channels=3, rate=8000, channel=channel)
        assert len(joined(alone)) == seconds * SAMPLE_RATE
        np.testing.assert_array_equal(joined(blocks), joined(alone))


async def test_a_channel_of_stdin_that_nobody_hears_holds_up_no_other(monkeypatch):
    out, into = os.pipe()
    with stdin(monkeypatch, out), os.fdopen(into, "wb") as pipe:
        first, second = StdinSource(channels=2, apart=2).split()
        async with first.open() as blocks:
            async with second.open() as given_up:
                pipe.write(bytes(6400))
                pipe.flush()
                await anext(given_up)
            assert len((await anext(blocks)).samples) == 1600
            writing = asyncio.create_task(asyncio.to_thread(pipe.write, bytes(4 * 16_000 * 25)))
            heard = 0
            while heard < 16_000 * 24:
                heard += len((await anext(blocks)).samples)
            await writing


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "expected at least 25 ms of raw s16le"), (b"RIFF" + bytes(5000), "got a WAV file")],
)
async def test_stdin_apart_without_audio_is_an_error_of_every_channel(monkeypatch, data, message):
    for error in await read_apart(monkeypatch, data, channels=2, apart=2):
        assert isinstance(error, SourceError)
        assert message in str(error)


async def test_a_regular_file_as_stdin_works_too(monkeypatch, tmp_path):
    samples = pcm(speechlike(5000))
    (tmp_path / "a.raw").write_bytes(samples.tobytes())
    with stdin(monkeypatch, os.open(tmp_path / "a.raw", os.O_RDONLY)):
        blocks = await read(StdinSource())
    np.testing.assert_array_equal(joined(blocks), samples.astype(np.float32) / 32768)


async def test_a_silent_pipe_can_be_given_up(monkeypatch):
    out, into = os.pipe()
    with stdin(monkeypatch, out), os.fdopen(into, "wb", buffering=0) as pipe:
        async with StdinSource().open() as blocks:
            pipe.write(bytes(640))
            assert len((await anext(blocks)).samples) == 320
            pending = asyncio.create_task(anext(blocks))
            await asyncio.sleep(0)
            pending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pending


async def test_a_pipe_is_not_read_ahead_without_end(monkeypatch, tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(6400 * 100))
    fd = os.open(tmp_path / "a.raw", os.O_RDONLY)
    with stdin(monkeypatch, fd):
        async with StdinSource().open() as blocks:
            await anext(blocks)
            await asyncio.to_thread(lambda: None)
            await asyncio.sleep(0.05)
            assert os.lseek(fd, 0, os.SEEK_CUR) <= 6400 * 10


async def test_a_closed_stdin_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SourceError, match="stdin is closed; expected raw s16le"):
        await read(StdinSource())
