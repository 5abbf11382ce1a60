"""``/v1/twilio``: what a caller may get wrong, and where its audio is on the timeline."""

import asyncio
import base64
import json
from contextlib import suppress

import numpy as np
from websockets.exceptions import ConnectionClosed

from stream.calls import Call
from stream.clock import SAMPLE_RATE
from stream.resample import Resampler
from stream.sources.line import Line
from stream.sources.pcm import Form, PcmDecoder, PcmEar
from stream.web.twilio import RATE, _Track
from tests.stream.conftest import speechlike
from tests.stream.house import finals, serving

QUIET = {"session": {"heartbeat_s": 0}}
PAYLOAD = base64.b64encode(bytes(160)).decode()


def start(**fields):
    return {"event": "start", "start": fields}


def media(**fields):
    return {"event": "media", "media": {"payload": PAYLOAD, **fields}}


async def ended(socket):
    """The server's close code and reason."""
    with suppress(ConnectionClosed):
        async with asyncio.timeout(20):
            async for _ in socket:
                pass
    return socket.close_code, socket.close_reason


async def said_to(house, *messages):
    async with house.connect("/v1/twilio") as socket:
        for message in messages:
            await socket.send(json.dumps(message))
        return await ended(socket)


def mulaw(samples):
    """samples: [n] float32 → the codes nearest to them"""
    values = PcmDecoder("mulaw").step(bytes(range(256)))
    order = np.argsort(values, kind="stable")
    between = (values[order][1:] + values[order][:-1]) / 2
    return order[np.searchsorted(between, samples)].astype(np.uint8).tobytes()


NONSENSE = (
    ([{"event": "start"}], "start"),
    ([{"event": "start", "start": 5}], "start"),
    ([start(callSid="\ud800")], "callSid"),
    ([start(callSid="CA\x00")], "callSid"),
    ([start(callSid="CA\x1b[2J")], "callSid"),
    ([start(callSid="x" * 65)], "callSid"),
    ([start(callSid=0)], "callSid"),
    ([start(callSid={"a": 1})], "callSid"),
    ([start(streamSid="MZ\udfff")], "callSid"),
    ([start(tracks=[{}])], "tracks"),
    ([start(tracks=[["inbound"]])], "tracks"),
    ([start(tracks={"inbound": 1})], "tracks"),
    ([start(customParameters=["token"])], "customParameters"),
    ([start(mediaFormat="audio/x-mulaw")], "mediaFormat"),
    ([start(), {"event": "media"}], "media"),
    ([start(), {"event": "media", "media": [1]}], "media"),
    ([start(), media(track=["inbound"])], "media.track"),
    ([start(), media(track="\ud800")], "media.track"),
    ([start(), media(payload=None)], "media.payload"),
    ([start(), media(payload=5)], "media.payload"),
    ([start(), media(payload="\ud800")], "media.payload"),
    ([start(), media(timestamp=[1])], "media.timestamp"),
    ([start(), media(timestamp=True)], "media.timestamp"),
)
"""Messages, and what is at fault."""


async def test_nonsense_ends_its_connection_with_a_reason_and_nothing_else(checkpoint):
    async with serving(checkpoint, **QUIET) as house:
        for messages, key in NONSENSE:
            code, reason = await said_to(house, *messages)
            assert (code, key in reason) == (1007, True), (messages, reason)
        async with house.connect("/v1/audio") as socket:
            assert json.loads(await socket.recv())["type"] == "ready"


async def test_a_token_that_is_no_text_is_not_ours(checkpoint):
    async with serving(checkpoint, {"token": "a-token-that-is-long-enough"}) as house:
        for token in (None, 5, ["\ud800"], "\ud800"):
            code, reason = await said_to(house, start(customParameters={"token": token}))
            assert (code, reason) == (1008, "expected the custom parameter token")


async def test_who_never_starts_is_hung_up_on(checkpoint, monkeypatch):
    monkeypatch.setattr("stream.web.twilio.START_S", 0.2)
    async with serving(checkpoint) as house, house.connect("/v1/twilio") as socket:
        ending = asyncio.create_task(ended(socket))
        with suppress(ConnectionClosed):
            async with asyncio.timeout(20):
                while True:  # each of them well within the time
                    await socket.send(json.dumps({"event": "connected"}))
                    await asyncio.sleep(0.02)
        assert await ending == (1008, "no start message came within 0.2 s")


async def test_what_was_heard_before_a_loss_stays_before_it():
    before, after = (speechlike(RATE, seed) for seed in (1, 2))
    line = Line("x")
    track = _Track(Call("x", line, PcmEar(Form("mulaw", RATE)), 0))
    lost_ms = 500
    await track.hear(mulaw(before), 0)
    await track.hear(mulaw(after), 1000 + lost_ms)
    track.call.finish()
    async with line.open() as blocks:
        told = [block async for block in blocks]
    (at,) = [number for number, block in enumerate(told) if block.lost]
    assert told[at].lost == lost_ms * SAMPLE_RATE // 1000
    for sent, heard in ((before, told[:at]), (after, told[at:])):
        resampler = Resampler(RATE)
        samples = PcmDecoder("mulaw").step(mulaw(sent))
        expected = np.concatenate([resampler.step(samples), resampler.flush()])
        assert np.array_equal(np.concatenate([block.samples for block in heard]), expected)


async def test_each_track_is_a_session_with_its_own_audio(checkpoint):
    said = {
        name: mulaw(speechlike(3 * RATE, seed)) for name, seed in (("inbound", 5), ("outbound", 6))
    }
    expected = {}
    async with serving(checkpoint, **QUIET) as house:
        for name, data in said.items():
            async with house.connect("/v1/audio?encoding=mulaw&rate=8000") as socket:
                await socket.recv()
                await socket.send(data)
                await socket.send('{"type": "close"}')
                expected[name] = finals([json.loads(event) async for event in socket])
        begun = len(house.events)
        messages = [start(callSid="CA1", tracks=list(said))]
        for at in range(0, 3 * RATE, 160):
            for name, data in said.items():
                payload = base64.b64encode(data[at : at + 160]).decode()
                when = str(at * 1000 // RATE)
                messages.append(media(track=name, payload=payload, timestamp=when))
        assert await said_to(house, *messages, {"event": "stop"}) == (1000, "")
    events = [event.model_dump(mode="json") for event in house.events[begun:]]
    assert {event["stream_id"] for event in events} == {"CA1-inbound", "CA1-outbound"}
    heard = {
        name: finals(event for event in events if event["stream_id"] == f"CA1-{name}")
        for name in said
    }
    assert heard == expected
    assert heard["inbound"] != heard["outbound"]


async def test_the_outbound_track_alone(checkpoint):
    async with serving(checkpoint, **QUIET) as house:
        heard = [media(track="outbound", timestamp=str(number * 20)) for number in range(50)]
        ending = await said_to(house, start(tracks=["outbound"]), *heard, {"event": "stop"})
        other = await said_to(house, start(tracks=["outbound"]), media(track="inbound"))
    assert ending == (1000, "")
    assert other == (1007, "media.track: 'inbound' was not announced")
    (first, _) = [event for event in house.events if event.type == "session.closed"]
    assert (first.stream_id, first.totals["audio_s"]) == ("call-outbound", 1.0)
