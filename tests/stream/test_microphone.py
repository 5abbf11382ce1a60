import asyncio
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise

import numpy as np
import pytest

from stream.config import parse
from stream.daemon import run
from stream.sources.microphone import Continuity, MicrophoneSource, Track, list_devices
from stream.sources.source import SourceError
from tests.microphone import MISSING, FakeMicrophone

# -- telling lost samples from late ones -------------------------------------------------------

RATE = 16_000


def watched(pulses, **settings):
    """(count, at) of each look → [(upto, lost)]."""
    continuity = Continuity(RATE, **settings)
    return [continuity.step(count, at) for count, at in pulses]


def steady(seconds, *, rate=RATE, count=0, at=100.0, jitter=None):
    for i in range(1, round(seconds * 50) + 1):
        late = 0.0 if jitter is None else float(jitter.uniform(0, 0.05))
        yield count + round(i * rate / 50), at + i * 0.02 + late


def test_a_device_in_time_is_passed_on_at_once():
    pulses = list(steady(5, jitter=np.random.default_rng(0)))
    assert watched(pulses) == [(count, 0) for count, _ in pulses]


@pytest.mark.parametrize("drift", [0.99, 0.9995, 1.0005, 1.01])
def test_a_clock_that_drifts_loses_nothing(drift):
    pulses = list(steady(120, rate=RATE * drift))
    assert all(lost == 0 for _, lost in watched(pulses))


def test_a_stall_that_is_caught_up_with_loses_nothing():
    before = list(steady(2))
    count, at = before[-1]
    burst = [(count + 320 * i, at + 1.0 + i * 0.001) for i in range(1, 51)]
    count, at = burst[-1]
    after = list(steady(2, count=count, at=at))
    told = watched([*before, *burst, *after])
    assert all(lost == 0 for _, lost in told)
    assert told[-1][0] == after[-1][0]
    # Until it is clear that nothing is missing, what follows the stall is held back.
    assert told[len(before)][0] == before[-1][0]


def test_samples_lost_in_a_stall_are_counted_where_they_are_missing():
    before = list(steady(2))
    count, at = before[-1]
    after = list(steady(2, count=count, at=at + 0.75))
    told = watched([*before, *after])
    losses = [(upto, lost) for upto, lost in told if lost]
    assert losses == [(count, pytest.approx(0.75 * RATE, abs=80))]  # to 5 ms
    assert told[-1] == (after[-1][0], 0)


# -- channels ------------------------------------------------------------------------------------


def test_channels_keep_to_our_clock_together():
    """Two channels of one device whose clock is 0.05 % fast, for a minute."""
    one, other = (Track(RATE, correct=True) for _ in range(2))
    rng, count, given = np.random.default_rng(0), 0, 0
    for upto, at in steady(60, rate=RATE * 1.0005):
        said = rng.standard_normal(upto - count).astype(np.float32)
        count = upto
        made = one.step(said, at, 0)
        assert len(other.step(-said, at, 0)) == len(made)
        given += len(made)
    assert count == 60 * RATE + 480
    assert given == pytest.approx(60 * RATE, abs=0.006 * RATE)  # what is left alone, and a little


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"channels": 2, "channel": 2}, "channel: expected 0 to 1, got 2"),
        ({"channels": 2, "apart": 3}, "apart: expected 2 at most, got 3"),
    ],
)
def test_channels_that_are_not_there_are_said(choice, complaint):
    with pytest.raises(ValueError, match=complaint):
        MicrophoneSource(**choice)


@pytest.mark.parametrize(
    ("choice", "opened"),
    [({}, 1), ({"channel": 2}, 3), ({"apart": 2}, 2), ({"channels": 8, "apart": 2}, 8)],
)
def test_no_more_channels_are_opened_than_are_needed(choice, opened):
    assert MicrophoneSource(**choice).opened == opened


# -- a real one, as far as PortAudio can tell --------------------------------------------------

absent = pytest.mark.skipif(
    bool(MISSING), reason=f"the fake microphone needs {' and '.join(MISSING)} (Debian: pulseaudio)"
)


@pytest.fixture
def fake(tmp_path, monkeypatch, request):
    sounddevice = pytest.importorskip("sounddevice", reason="the microphone needs sounddevice")
    with FakeMicrophone(tmp_path, getattr(request, "param", 1)) as fake:
        monkeypatch.setenv("PULSE_SERVER", f"unix:{tmp_path}/native")
        monkeypatch.setenv("PULSE_SOURCE", "mic0")
        monkeypatch.setenv("HOME", str(tmp_path))
        sounddevice._terminate()
        sounddevice._initialize()
        if not any(device.name == "pulse" for device in list_devices()):
            pytest.skip("the fake microphone needs libasound2-plugins")
        yield fake


def ramp(blocks):
    """The samples as the ramp's values."""
    return np.round(np.concatenate([b.samples for b in blocks]) * 32768).astype(int)


async def hear(blocks, samples):
    heard = []
    while sum(len(block.samples) for block in heard) < samples:
        heard.append(await anext(blocks))
    return heard


@absent
@pytest.mark.mic
async def test_samples_arrive_bit_for_bit(fake):
    fake.speak()
    async with MicrophoneSource(device="pulse").open() as blocks:
        heard = await hear(blocks, 16_000)
    assert (np.diff(ramp(heard)) % 30_000 == 1).all()
    assert all(block.lost == 0 and block.reason is None for block in heard)
    assert all(b.captured > a.captured for a, b in pairwise(heard))


@absent
@pytest.mark.mic
@pytest.mark.parametrize("fake", [2], indirect=True)
async def test_one_channel_of_two_is_heard_alone(fake):
    fake.speak()
    async with MicrophoneSource(device="pulse", channel=1).open() as blocks:
        heard = await hear(blocks, 8_000)
    falling = -ramp(heard)
    assert (np.diff(falling) % 30_000 == 1).all()


@absent
@pytest.mark.mic
@pytest.mark.parametrize("fake", [2], indirect=True)
async def test_the_mean_of_two_channels_is_heard(fake):
    """The second says the opposite of the first, so their mean is silence."""
    fake.speak()
    async with MicrophoneSource(device="pulse", channels=2).open() as blocks:
        heard = await hear(blocks, 8_000)
    assert not ramp(heard).any()


@pytest.fixture
def openings(monkeypatch):
    """The streams PortAudio was asked for."""
    import sounddevice

    made, opens = [], sounddevice.RawInputStream

    def opened(**keys):
        made.append(opens(**keys))
        return made[-1]

    monkeypatch.setattr(sounddevice, "RawInputStream", opened)
    return made


@asynccontextmanager
async def opened_apart(source):
    """Each of its channels, all at once."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(each.open()) for each in source.split()]


@absent
@pytest.mark.mic
@pytest.mark.parametrize("fake", [2], indirect=True)
async def test_channels_apart_are_of_one_opening_and_the_same_time(fake, openings):
    fake.speak()
    async with opened_apart(MicrophoneSource(device="pulse", apart=2)) as channels:
        rising, falling = [ramp(await hear(blocks, 8_000)) for blocks in channels]
        assert [each.channels for each in openings] == [2]
    assert (np.diff(rising) % 30_000 == 1).all()
    assert np.array_equal(rising[:8_000], -falling[:8_000])
    assert [each.closed for each in openings] == [True]


@absent
@pytest.mark.mic
@pytest.mark.parametrize("fake", [2], indirect=True)
async def test_channels_apart_are_taken_up_again_together(fake):
    fake.speak()
    async with opened_apart(MicrophoneSource(device="pulse", apart=2, retry_ms=100)) as channels:
        for blocks in channels:
            await hear(blocks, 8_000)
        await asyncio.to_thread(fake.unplug)
        for blocks in channels:
            await until_stopped(blocks)
        await asyncio.to_thread(fake.plug)
        fake.speak()
        one, other = [await hear(blocks, 8_000) for blocks in channels]
    for resumed in (one, other):
        assert (resumed[0].reason, len(resumed[0].samples)) == ("unplugged", 0)
        assert sum(block.lost for block in resumed) == resumed[0].lost > 0
    assert one[0].lost == other[0].lost
    rising, falling = ramp(one), ramp(other)
    assert (np.diff(rising) % 30_000 == 1).all()
    assert np.array_equal(rising[:8_000], -falling[:8_000])


@absent
@pytest.mark.mic
@pytest.mark.parametrize("fake", [2], indirect=True)
async def test_channels_apart_are_sessions_apart_with_the_same_gap(fake, checkpoint):
    given = {
        "sources": {"desk": {"kind": "microphone", "device": "pulse", "apart": 2, "retry_ms": 100}},
        "engine": {"checkpoint": checkpoint, "chunk_ms": 200, "device": "cpu", "threads": 1},
        "session": {"heartbeat_s": 0.4},
        "log": {"level": "error"},
    }
    events, stop = [], asyncio.Event()

    async def both(kind):
        while {e.stream_id for e in events if e.type == kind} != {"desk-1", "desk-2"}:
            if running.done():
                await running  # … failed, and says why
            await asyncio.sleep(0.02)

    fake.speak()
    running = asyncio.create_task(
        run(parse(given, where="test"), on_event=events.append, stop=stop)
    )
    async with asyncio.timeout(60):
        await both("heartbeat")
        await asyncio.to_thread(fake.unplug)
        await both("warning")
        await asyncio.to_thread(fake.plug)
        fake.speak()
        await both("gap")
        stop.set()
        await running
    one, other = [event for event in events if event.type == "gap"]
    assert one.reason == other.reason == "unplugged"
    assert (one.start, one.lost_samples) == (other.start, other.lost_samples)


@absent
@pytest.mark.mic
async def test_a_device_nobody_listened_to_is_let_go(fake, openings):
    async with MicrophoneSource(device="pulse").open():
        pass
    assert [each.closed for each in openings] == [True]


@absent
@pytest.mark.mic
async def test_a_device_with_fewer_channels_is_one_clear_error(fake):
    (there,) = [device.channels for device in list_devices() if device.name == "pulse"]
    source = MicrophoneSource(device="pulse", apart=there + 1)
    with pytest.raises(SourceError, match=f"expected {there + 1} channels, the device has {there}"):
        async with opened_apart(source):
            pass


@absent
@pytest.mark.mic
async def test_a_device_that_has_no_16_khz_is_resampled(fake, monkeypatch):
    import sounddevice

    def refuse(**_):
        raise sounddevice.PortAudioError("Invalid sample rate")

    monkeypatch.setattr(sounddevice, "check_input_settings", refuse)
    fake.speak()
    async with MicrophoneSource(device="pulse", correct_drift=False).open() as blocks:
        heard = await hear(blocks, 24_000)
    assert [device.rate for device in list_devices() if device.name == "pulse"] == [44_100]
    # The ramp rises as fast as it was spoken, but for the ringing where it falls.
    steps = np.diff(ramp(heard)[4_000:])
    assert np.mean(np.abs(steps - 1) <= 1) > 0.95
    assert all(block.lost == 0 for block in heard)


async def until_stopped(blocks):
    """→ blocks up to the one that says the audio has stopped, without it."""
    heard = []
    while (block := await anext(blocks)).reason != "unplugged":
        heard.append(block)
    assert (block.lost, len(block.samples)) == (0, 0)
    return heard


@absent
@pytest.mark.mic
async def test_an_unplugged_microphone_is_noticed_and_taken_up_again(fake):
    fake.speak()
    source = MicrophoneSource(device="pulse", retry_ms=100)
    async with source.open() as blocks:
        heard = await hear(blocks, 8000)
        await asyncio.to_thread(fake.unplug)
        heard += await until_stopped(blocks)
        await asyncio.to_thread(fake.plug)
        fake.speak()
        resumed = await hear(blocks, 8000)
    assert resumed[0].reason == "unplugged"
    assert sum(block.lost for block in resumed) == resumed[0].lost > 0
    # The gap is as long as the clock says, so that the session's time stays true.
    first = resumed[0].captured - len(resumed[0].samples) / RATE
    assert resumed[0].lost == pytest.approx((first - heard[-1].captured) * RATE, abs=320)
    assert (np.diff(ramp(resumed)) % 30_000 == 1).all()


@absent
@pytest.mark.mic
async def test_a_microphone_that_hangs_is_noticed_and_taken_up_again(fake):
    fake.speak()
    source = MicrophoneSource(device="pulse", hang_ms=300, retry_ms=100)
    async with source.open() as blocks:
        await hear(blocks, 8000)
        await asyncio.to_thread(fake.hush)
        await until_stopped(blocks)
        fake.speak()
        resumed = await hear(blocks, 8000)
    gaps = [block for block in resumed if block.lost]
    assert [block.reason for block in gaps] == ["unplugged"]


@absent
@pytest.mark.mic
async def test_a_session_goes_on_after_its_microphone_was_unplugged(fake, checkpoint):
    given = {
        "sources": {"desk": {"kind": "microphone", "device": "pulse", "retry_ms": 100}},
        "engine": {"checkpoint": checkpoint, "chunk_ms": 200, "device": "cpu", "threads": 1},
        "session": {"heartbeat_s": 0.4},
        "log": {"level": "error"},
    }
    events, stop = [], asyncio.Event()

    async def happens(wanted):
        while not any(wanted(event) for event in events):
            if running.done():
                await running  # … failed, and says why
            await asyncio.sleep(0.02)

    def beat(event, after_s=0.0):
        return event.type == "heartbeat" and event.end > after_s

    fake.speak()
    running = asyncio.create_task(
        run(parse(given, where="test"), on_event=events.append, stop=stop)
    )
    await happens(beat)
    await asyncio.to_thread(fake.unplug)
    await happens(lambda event: event.type == "warning")
    await asyncio.to_thread(fake.plug)
    fake.speak()
    await happens(lambda event: event.type == "gap")
    (gap,) = [event for event in events if event.type == "gap"]
    await happens(lambda event: beat(event, gap.end))
    stop.set()
    summary = await running
    assert gap.reason == "unplugged"
    assert gap.end - gap.start == pytest.approx(gap.lost_samples / RATE, abs=1e-5)
    assert [event.seq for event in events] == list(range(len(events)))
    assert events[-1].type == "session.closed"
    assert summary.lost_s == pytest.approx(gap.lost_samples / RATE, abs=1e-5)


@absent
@pytest.mark.mic
@pytest.mark.parametrize("device", ["no such thing", 99])
async def test_an_unknown_device_is_one_clear_error(fake, device):
    with pytest.raises(SourceError, match=r"unknown microphone .*; expected one of these: .*pulse"):
        async with MicrophoneSource(device=device).open():
            pass


async def test_without_the_driver_there_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(SourceError, match=r'pip install "livesat\[mic\]"'):
        async with MicrophoneSource().open():
            pass
