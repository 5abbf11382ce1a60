import asyncio
import contextlib
import json
import signal
import sqlite3
import subprocess
import sys

import httpx
import pytest
import yaml
from websockets.exceptions import ConnectionClosedError

from stream.clock import SAMPLE_RATE
from stream.survival import Survival, SurvivalError, Survivor
from tests.stream.conftest import speechlike
from tests.stream.house import House, finals, free_port, pcm, serving, talk, until

QUIET = {"heartbeat_s": 0}


@pytest.fixture(scope="module")
def speech():
    return speechlike(6 * SAMPLE_RATE, seed=5)


async def begin(house, data, upto):
    """Open a call, send the first part, hear what is said of it so far → events, token."""
    async with house.connect("/v1/audio?name=desk") as socket:
        token = json.loads(await socket.recv())["resume_token"]
        for at in range(0, upto, 3200):
            await socket.send(data[at : min(at + 3200, upto)])
        events = [json.loads(await socket.recv()) for _ in range(3)]
        yield events, token
        with contextlib.suppress(ConnectionClosedError):
            while True:
                events.append(json.loads(await socket.recv()))
        assert (socket.close_code, socket.close_reason) == (1012, "the daemon is stopping; resume")


async def cut_off(checkpoint, data, keys):
    """A daemon that stops amid a call → what the caller was told, its token, all that was said."""
    async with serving(checkpoint, **keys) as house:
        async for heard, given in begin(house, data, 3 * SAMPLE_RATE * 2):
            await until(lambda: house.events[-1].end > 2.0)
            house.stop.set()
            events, token = heard, given
    return events, token, house.events


async def go_on(house, data, token, after):
    """Come back with the token, send what the daemon has not → its events."""
    async with house.connect(f"/v1/audio?resume={token}&have=0&after={after}") as socket:
        ready = json.loads(await socket.recv())
        for at in range(ready["received"] * 2, len(data), 3200):
            await socket.send(data[at : at + 3200])
        await socket.send('{"type": "close"}')
        return ready, [json.loads(message) async for message in socket]


async def test_a_session_outlives_a_stop_of_the_daemon(checkpoint, speech, tmp_path):
    data, state = pcm(speech), tmp_path / "state.db"
    async with serving(checkpoint, session=QUIET) as house:
        whole = await talk(house, speech)
    keys = {"session": {**QUIET, "state": state}}
    events, token, _ = await cut_off(checkpoint, data, keys)
    assert "session.closed" not in {event["type"] for event in events}
    async with serving(checkpoint, **keys) as house:
        ready, later = await go_on(house, data, token, events[-1]["seq"])
    assert 0 < ready["received"] <= 3 * SAMPLE_RATE
    assert [e["seq"] for e in later] == list(range(later[0]["seq"], later[-1]["seq"] + 1))
    seen = {event["seq"] for event in events}
    assert finals(events + [e for e in later if e["seq"] not in seen]) == finals(whole)
    assert {e["session_id"] for e in later} == {events[0]["session_id"]}


async def test_who_missed_what_an_earlier_daemon_said_is_told(checkpoint, speech, tmp_path):
    data, keys = pcm(speech), {"session": {**QUIET, "state": tmp_path / "state.db"}}
    events, token, _ = await cut_off(checkpoint, data, keys)
    async with serving(checkpoint, **keys) as house:
        async with house.connect(f"/v1/audio?resume={token}&after={events[0]['seq']}") as socket:
            assert json.loads(await socket.recv())["complete"] is False
        async with house.http() as http:
            (entry,) = (await http.get("/v1/sessions")).json()["sessions"]
        assert (entry["session"], entry["state"]) == (events[0]["session_id"], "open")
        ready, _ = await go_on(house, data, token, events[-1]["seq"])
        assert ready["complete"] is True


async def test_who_cannot_come_back_is_told_the_rest_before_the_daemon_stops(
    checkpoint, speech, tmp_path
):
    keys = {"session": {**QUIET, "state": tmp_path / "state.db"}}
    async with serving(checkpoint, **keys) as house:
        query = "encoding=linear16&sample_rate=16000"
        async with house.connect(f"/v1/listen?{query}") as socket:
            await socket.send(pcm(speech[: 3 * SAMPLE_RATE]))
            await until(lambda: bool(house.events) and house.events[-1].end > 2.0)
            house.stop.set()
            said = [json.loads(message) async for message in socket]
    assert house.events[-1].type == "session.closed"
    assert said[-1]["type"] == "Metadata"
    async with serving(checkpoint, **keys) as house:
        await asyncio.sleep(0)
    assert house.events == []  # nothing was kept


async def test_a_resume_that_was_refused_may_be_tried_again(checkpoint, speech, tmp_path):
    data, keys = pcm(speech), {"session": {**QUIET, "state": tmp_path / "state.db"}}
    events, token, _ = await cut_off(checkpoint, data, keys)
    async with serving(checkpoint, server={"max_streams": 1}, **keys) as house:
        async with house.connect("/v1/audio?name=other") as other:
            assert json.loads(await other.recv())["type"] == "ready"
            async with house.connect(f"/v1/audio?resume={token}") as socket:
                with contextlib.suppress(ConnectionClosedError):
                    await socket.recv()
                assert socket.close_code == 1013
            async with house.connect(f"/v1/audio?resume={token}&rate=x") as socket:
                with contextlib.suppress(ConnectionClosedError):
                    await socket.recv()
                assert socket.close_code == 1003
            await other.send('{"type": "close"}')
            async for _ in other:
                pass
        ready, _ = await go_on(house, data, token, events[-1]["seq"])
    assert ready["session_id"] == events[0]["session_id"]


async def test_who_does_not_come_back_has_a_session_that_is_closed_in_order(
    checkpoint, speech, tmp_path
):
    data = pcm(speech)
    keys = {"session": {**QUIET, "state": tmp_path / "state.db", "resume_s": 0.3}}
    _, _, first = await cut_off(checkpoint, data, keys)
    async with serving(checkpoint, **keys) as house:
        await until(lambda: any(e.type == "session.closed" for e in house.events))
    assert house.events[0].session_id == first[0].session_id
    assert house.events[0].seq == first[-1].seq + 1
    assert house.events[-1].totals["audio_s"] > 2.0
    async with serving(checkpoint, **keys) as house:
        await asyncio.sleep(0.05)
    assert house.events == []  # it is closed for good


async def test_a_changed_window_is_said_and_nothing_breaks(checkpoint, speech, tmp_path):
    keys = {"session": {**QUIET, "state": tmp_path / "state.db"}}
    async with serving(checkpoint, **keys) as house:
        async for _, given in begin(house, pcm(speech), 2 * SAMPLE_RATE * 2):
            house.stop.set()
            token = given
    async with serving(checkpoint, engine={"left_ms": 1000}, **keys) as house:
        async with house.connect(f"/v1/audio?resume={token}") as socket:
            with pytest.raises(ConnectionClosedError):
                await socket.recv()
            assert socket.close_code == 1013
            assert "cannot go on" in socket.close_reason


class Daemon:
    """`livesat run` in a process of its own."""

    def __init__(self, checkpoint, folder, port):
        tree = {
            "server": {"port": port},
            "engine": {
                "checkpoint": checkpoint,
                "chunk_ms": 400,
                "lookahead_ms": 200,
                "left_ms": 2000,
                "device": "cpu",
                "threads": 1,
            },
            "tracks": {"turns": {"onset": 0.5, "offset": 0.5, "min_on_ms": 60, "min_off_ms": 60}},
            "session": {**QUIET, "state": str(folder / "state.db"), "save_s": 0.2},
            "sinks": {"log": {"kind": "jsonl", "path": str(folder / "events.jsonl")}},
            "log": {"level": "warning"},
        }
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(tree))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stream", "run", "--config", str(config)]
        )
        self.house = House(port)

    async def ready(self):
        async with self.house.http() as http:
            while True:
                assert self.process.poll() is None, "the daemon ended"
                try:
                    if (await http.get("/readyz")).status_code == 200:
                        return self.house
                except httpx.TransportError:
                    await asyncio.sleep(0.05)

    async def end(self, number):
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 30)


@pytest.mark.slow
async def test_a_killed_daemon_goes_on_with_its_sessions(checkpoint, speech, tmp_path):
    data = pcm(speech)
    async with serving(checkpoint, session=QUIET) as house:
        whole = await talk(house, speech)
    port = free_port()
    events, token, kills = [], None, 0
    while True:
        daemon = await asyncio.to_thread(Daemon, checkpoint, tmp_path, port)
        house = await daemon.ready()
        query = f"&resume={token}&have=0&after={events[-1]['seq']}" if token else ""
        async with house.connect(f"/v1/audio?name=desk{query}") as socket:
            ready = json.loads(await socket.recv())
            token = ready["resume_token"]
            begin, last = ready["received"] * 2, kills == 2
            end = len(data) if last else min(begin + 2 * SAMPLE_RATE * 2, len(data))
            for at in range(begin, end, 3200):
                await socket.send(data[at : min(at + 3200, end)])
                await asyncio.sleep(0.02)
            if last:
                await socket.send('{"type": "close"}')
                events += [json.loads(message) async for message in socket]
                break
            events.append(json.loads(await socket.recv()))
            await daemon.end(signal.SIGKILL)
            kills += 1
    assert await daemon.end(signal.SIGTERM) == 0
    # The sink has it all, each event at least once and every line whole.
    text = await asyncio.to_thread((tmp_path / "events.jsonl").read_text)
    written = {e["seq"]: e for e in map(json.loads, text.splitlines())}
    assert finals([written[seq] for seq in sorted(written)]) == finals(whole)
    assert sorted(written) == list(range(len(written)))


class TestFile:
    async def test_keeps_a_session_until_it_is_forgotten(self, tmp_path):
        path = tmp_path / "new" / "state.db"
        session = Survivor("s1", "desk", "t", "mic", False, 3, 4, 5.0, 6, b"\x00data")
        async with Survival.open(path) as (survival, found):
            assert found == []
            await survival.save(session)
            survival.note("s1", 9)
        async with Survival.open(path) as (survival, found):
            assert [(each.seq, each.data) for each in found] == [(9, b"\x00data")]
            assert found[0].resumed(exact=False).next_seq == 10
            assert found[0].resumed(exact=True).next_seq is None
            await survival.forget("s1")
        async with Survival.open(path) as (_, found):
            assert found == []
        assert path.stat().st_mode & 0o077 == 0

    @pytest.mark.parametrize("content", [b"not a database at all" * 99, None])
    async def test_another_file_is_refused(self, tmp_path, content):
        path = tmp_path / "state.db"
        if content is None:
            with sqlite3.connect(path) as database:
                database.execute("PRAGMA user_version = 99")
            database.close()
        else:
            path.write_bytes(content)
        with pytest.raises(SurvivalError, match=r"session\.state: .*expected"):
            async with Survival.open(path):
                pass
