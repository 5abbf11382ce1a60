import asyncio
import contextlib
import json
import pkgutil
import sqlite3
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
from websockets.exceptions import ConnectionClosedError

from benchmarks.daemon import Daemon
from sinks.events import dump
from stream import daemon
from stream.clock import SAMPLE_RATE
from stream.survival import AHEAD, Lobby, Survival, SurvivalError, Survivor
from stream.web.wire import Wire
from tests.sinks.samples import Talk
from tests.stream.conftest import speechlike
from tests.stream.house import House, about_audio, finals, free_port, pcm, serving, talk, until
from tests.stream.test_daemon import config

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


async def test_who_missed_what_an_earlier_daemon_said_is_told_it(checkpoint, speech, tmp_path):
    data, keys = pcm(speech), {"session": {**QUIET, "state": tmp_path / "state.db"}}
    events, token, said = await cut_off(checkpoint, data, keys)
    async with serving(checkpoint, **keys) as house:
        async with house.connect(f"/v1/audio?resume={token}&after=0") as socket:
            assert json.loads(await socket.recv())["complete"] is True
            told = [json.loads(await socket.recv()) for _ in said[1:]]
        async with house.http() as http:
            (entry,) = (await http.get("/v1/sessions")).json()["sessions"]
        ready, later = await go_on(house, data, token, told[-1]["seq"])
    assert told == [json.loads(dump(event)) for event in said[1:]]
    assert (entry["session"], entry["state"]) == (events[0]["session_id"], "open")
    assert ready["complete"] is True
    assert later[0]["seq"] == told[-1]["seq"] + 1
    assert house.events[0].seq == later[0]["seq"]  # what was told again was not said again


class Kill:
    """A daemon that is killed amid a call, some time after it saved it for the last time.

    Attributes:
        events: All it has said.
        token: The caller's.
        keys: Of the configuration of the next one, which finds the files as they were then.
    """

    def __init__(self, checkpoint, monkeypatch, folder):
        self._checkpoint, self._folder = checkpoint, folder
        self.keys = {"session": {**QUIET, "state": folder / "after.db"}}
        write = Survival.save
        self.saved = 0

        async def save(survival, survivor):
            if not self.saved and survivor.received >= SAMPLE_RATE:
                self.saved = survivor.received
                await write(survival, survivor)

        monkeypatch.setattr(Survival, "save", save)

    async def of(self, data, meanwhile=None):
        state = self._folder / "before.db"
        keys = {"session": {**QUIET, "state": state, "save_s": 1e-9}}
        async with serving(self._checkpoint, **keys) as house:
            async with house.connect("/v1/audio?name=desk") as socket:
                self.token = json.loads(await socket.recv())["resume_token"]
                for at in range(0, 8 * SAMPLE_RATE, 3200):
                    await socket.send(data[at : at + 3200])
                    if at == 5 * SAMPLE_RATE // 3200 * 3200 and meanwhile is not None:
                        await until(lambda: any(e.type == "turn.ended" for e in house.events))
                        await meanwhile(house)
                await until(lambda: house.events[-1].end > 3.5)
                assert 0 < self.saved < 3 * SAMPLE_RATE
                while await asyncio.to_thread(self._copy, state) < len(house.events):
                    pass  # the last events are being written
                self.events = list(house.events)
        return self

    def _copy(self, state):
        with (
            contextlib.closing(sqlite3.connect(state)) as living,
            contextlib.closing(sqlite3.connect(self._folder / "after.db")) as dead,
        ):
            living.backup(dead)
            return dead.execute("SELECT count(*) FROM said").fetchone()[0]

    def lose(self, count):
        """The last events had not been written yet."""
        with contextlib.closing(sqlite3.connect(self._folder / "after.db")) as dead, dead:
            last = "SELECT seq FROM said ORDER BY seq DESC LIMIT ?"
            dead.execute(f"DELETE FROM said WHERE seq IN ({last})", (count,))


def by_number(*said):
    """Number → what the event with it says; fails where one number is given to two events."""
    numbers = {}
    for event in said:
        content = {k: v for k, v in event.items() if k not in {"wall_time", "lag_ms"}}
        assert numbers.setdefault(event["seq"], content) == content
    return numbers


def plain(events):
    return [json.loads(dump(event)) for event in events]


async def test_audio_sent_again_after_a_kill_is_not_annotated_twice(
    checkpoint, speech, tmp_path, monkeypatch
):
    data = pcm(speech)
    async with serving(checkpoint, session=QUIET) as house:
        whole = await talk(house, speech)
    kill = await Kill(checkpoint, monkeypatch, tmp_path).of(data)
    sinks = {"log": {"kind": "jsonl", "path": tmp_path / "events.jsonl"}}
    async with serving(checkpoint, sinks=sinks, **kill.keys) as house:
        ready, later = await go_on(house, data, kill.token, 3)
    assert ready["complete"] is True
    assert ready["received"] == kill.saved
    told = plain(kill.events[:4]) + later
    assert about_audio(told) == about_audio(whole)
    numbers = [event["seq"] for event in told]
    assert numbers == sorted(by_number(*plain(kill.events), *told))
    # From one process to the next there is a gap, which is said.
    (gap,) = [n for n, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    assert numbers[gap] == kill.events[-1].seq
    assert told[gap + 1]["code"] == "session.resumed"
    assert f"numbers {numbers[gap] + 1} to {numbers[gap + 1] - 1}" in told[gap + 1]["message"]
    assert told[-1]["totals"]["events"] == len(told)
    # Sinks are given again what may not have reached them, under its number.
    text = await asyncio.to_thread((tmp_path / "events.jsonl").read_text)
    written = by_number(*map(json.loads, text.splitlines()))
    assert {e.seq for e in kill.events if e.is_final and e.end * SAMPLE_RATE > kill.saved} <= set(
        written
    )


@pytest.mark.parametrize("have", ["", "&have=0", "&have=48000"])
async def test_no_number_is_given_to_two_events(checkpoint, speech, tmp_path, monkeypatch, have):
    async def name(house):
        async with house.http() as http:
            label = next(e.speaker.label for e in house.events if e.type == "turn.ended")
            path = f"/v1/sessions/{house.events[0].session_id}/speakers/{label}"
            assert (await http.put(path, json={"name": "Anna"})).status_code == 200

    data = pcm(speech)
    kill = await Kill(checkpoint, monkeypatch, tmp_path).of(data, name)
    await asyncio.to_thread(kill.lose, 3)
    async with serving(checkpoint, **kill.keys) as house:
        path = f"/v1/audio?resume={kill.token}&after=0{have}"
        async with house.connect(path) as socket:
            at = json.loads(await socket.recv())["received"] * 2
            for begin in range(at, len(data), 3200):
                await socket.send(data[begin : begin + 3200])
            await socket.send('{"type": "close"}')
            told = [json.loads(message) async for message in socket]
    by_number(*plain(kill.events), *told, *plain(house.events))
    assert {e["seq"] for e in told if e["seq"] < len(kill.events)} == set(
        range(1, len(kill.events) - 3)
    )


async def test_who_cannot_come_back_is_told_the_rest_before_the_daemon_stops(
    checkpoint, speech, tmp_path, monkeypatch
):
    told = Wire.send_json

    async def slowly(wire, value):
        if house.stop.is_set():
            await asyncio.sleep(0.3)  # longer than the server takes to notice that it ends
        await told(wire, value)

    monkeypatch.setattr(Wire, "send_json", slowly)
    keys = {"session": {**QUIET, "state": tmp_path / "state.db"}}
    async with serving(checkpoint, **keys) as house:
        query = "encoding=linear16&sample_rate=16000"
        async with house.connect(f"/v1/listen?{query}") as socket:
            await socket.send(pcm(speech[: 3 * SAMPLE_RATE]))
            await until(lambda: bool(house.events) and house.events[-1].end > 2.0)
            house.stop.set()
            said = [json.loads(message) async for message in socket]
            assert socket.close_code == 1001
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


async def test_a_newcomer_does_not_take_the_name_of_who_may_come_back(checkpoint, speech, tmp_path):
    data, keys = pcm(speech), {"session": {**QUIET, "state": tmp_path / "state.db"}}
    events, token, _ = await cut_off(checkpoint, data, keys)
    async with serving(checkpoint, **keys) as house:
        async with house.connect("/v1/audio?name=desk") as newcomer:
            await newcomer.recv()
            opened = json.loads(await newcomer.recv())
            _, later = await go_on(house, data, token, events[-1]["seq"])
            await newcomer.send('{"type": "close"}')
            own = [json.loads(message) async for message in newcomer]
    assert opened["stream_id"] == "desk-1"
    assert {event["stream_id"] for event in later} == {"desk"}
    assert later[-1]["type"] == own[-1]["type"] == "session.closed"


async def test_who_has_said_all_is_told_that_the_end_of_it_was_not_heard(
    checkpoint, speech, tmp_path, monkeypatch
):
    data, keys = pcm(speech), {"session": {**QUIET, "state": tmp_path / "state.db"}}
    taken = daemon.House._take_in

    async def held_up(house, live, block):
        if live.session.received > 2 * SAMPLE_RATE:
            await house.stop.wait()
        await taken(house, live, block)

    async with serving(checkpoint, session=QUIET) as house:
        whole = await talk(house, speech)
    monkeypatch.setattr(daemon.House, "_take_in", held_up)
    async with serving(checkpoint, **keys) as house, house.connect("/v1/audio") as socket:
        token = json.loads(await socket.recv())["resume_token"]
        for at in range(0, len(data), 3200):
            await socket.send(data[at : at + 3200])
        await socket.send('{"type": "close"}')
        events = [json.loads(await socket.recv())]
        await until(lambda: house.events[-1].end > 1.0)
        house.stop.set()
        with contextlib.suppress(ConnectionClosedError):
            while True:
                events.append(json.loads(await socket.recv()))
        assert (socket.close_code, socket.close_reason) == (1012, "the daemon is stopping; resume")
    monkeypatch.undo()
    async with serving(checkpoint, **keys) as house:
        _, later = await go_on(house, data, token, events[-1]["seq"])
    assert finals(events + later) == finals(whole)


async def test_the_form_of_the_audio_is_kept_and_another_refused(checkpoint, speech, tmp_path):
    keys = {"session": {**QUIET, "state": tmp_path / "state.db"}}
    data = (speech * 0.9).astype("<f4").tobytes()
    query = "encoding=f32le&rate=16000&name=desk"
    async with serving(checkpoint, **keys) as house:
        whole = await talk_in(house, query, data)
        async with house.connect(f"/v1/audio?{query}") as socket:
            token = json.loads(await socket.recv())["resume_token"]
            await socket.send(data[: 4 * 30_001 + 2])
            events = [json.loads(await socket.recv()) for _ in range(3)]
            socket.transport.abort()
        for stated in ("encoding=s16le", "encoding=f32le&rate=8000", "channels=2&channel=1"):
            async with house.connect(f"/v1/audio?resume={token}&{stated}") as socket:
                with contextlib.suppress(ConnectionClosedError):
                    await socket.recv()
                assert socket.close_code == 1003
                assert "as it was: encoding=f32le&rate=16000&channels=1" in socket.close_reason
        await until(lambda: house.events[-1].end > 1.0)
    async with serving(checkpoint, **keys) as house:
        for wrong, reason in (
            ("encoding=mulaw", "resume: expected the audio's form as it was"),
            ("have=999999999999999", "have: expected at most a day after"),
        ):
            async with house.connect(f"/v1/audio?resume={token}&{wrong}") as socket:
                with contextlib.suppress(ConnectionClosedError):
                    await socket.recv()
                assert socket.close_code == 1003
                assert reason in socket.close_reason
        async with house.connect(f"/v1/audio?resume={token}&after={events[-1]['seq']}") as socket:
            ready = json.loads(await socket.recv())
            await socket.send(data[ready["received"] * 4 :])
            await socket.send('{"type": "close"}')
            later = [json.loads(message) async for message in socket]
    assert finals(events + later) == finals(whole)


async def talk_in(house, query, data):
    """Send all of the bytes → the session's events."""
    async with house.connect(f"/v1/audio?{query}") as socket:
        await socket.recv()
        await socket.send(data)
        await socket.send('{"type": "close"}')
        return [json.loads(message) async for message in socket]


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
    *_, error, closed = house.events
    assert (error.type, error.code, closed.type) == ("error", "session.lost", "session.closed")
    async with serving(checkpoint, **keys) as house:
        await asyncio.sleep(0.05)
    assert house.events == []  # it is closed for good


async def test_a_source_whose_session_cannot_go_on_has_a_new_one(checkpoint, tmp_path):
    keys = {
        "session": {**QUIET, "state": tmp_path / "state.db"},
        "sources": {"desk": {"kind": "rtp", "port": free_port()}},
    }
    said = []
    for left_ms in (2000, 1000, 1000):
        async with serving(checkpoint, engine={"left_ms": left_ms}, **keys) as house:
            await until(lambda: any(e.type == "session.opened" for e in house.events[-1:]) or said)
        said.append(house.events)
    (opened,), (error, closed, anew), last = said
    assert error.session_id == closed.session_id == opened.session_id
    assert [error.seq, closed.seq] == [1, 2]
    assert (error.code, closed.type) == ("session.lost", "session.closed")
    assert anew.type == "session.opened"
    assert anew.session_id != opened.session_id
    assert {event.session_id for event in last} == {anew.session_id}  # the new one goes on


async def test_a_disk_that_takes_nothing_holds_up_neither_audio_nor_names(
    checkpoint, speech, tmp_path, monkeypatch
):
    write, taken, may = Survival.save, [], asyncio.Event()

    async def save(survival, survivor):
        taken.append(survivor.received)
        await may.wait()
        await write(survival, survivor)

    monkeypatch.setattr(Survival, "save", save)
    packers = set()

    def packing(pack, *args):
        packers.add(threading.current_thread().name)
        return pack(*args)

    for name in ("stream.session.pack", "stream.tracks.pipeline.pack", "model.state.save_tensors"):
        monkeypatch.setattr(name, partial(packing, pkgutil.resolve_name(name)))
    keys = {"session": {**QUIET, "state": tmp_path / "state.db", "save_s": 1e-9}}
    async with serving(checkpoint, **keys) as house, house.http() as http:
        async with house.connect("/v1/audio") as socket:
            await socket.recv()
            for at in range(0, 8 * SAMPLE_RATE, 3200):
                await socket.send(pcm(speech)[at : at + 3200])
            await until(lambda: house.events[-1].end > 3.5)
            label = next(e.speaker.label for e in house.events if e.type == "turn.ended")
            path = f"/v1/sessions/{house.events[0].session_id}/speakers/{label}"
            assert (await http.put(path, json={"name": "Anna"})).status_code == 200
            assert len(taken) == 1  # one at a time
            may.set()
            await socket.send(pcm(speech)[8 * SAMPLE_RATE :])
            await until(lambda: len(taken) > 1)
            assert taken[1] >= 3.5 * SAMPLE_RATE  # and the newest state, not the next one
    assert packers
    assert not packers & {"MainThread", "inference"}


@pytest.mark.parametrize("first_s", [1e-9, 3600])
async def test_a_young_session_and_a_name_are_saved_soon(
    checkpoint, speech, tmp_path, monkeypatch, first_s
):
    def saved():
        with contextlib.closing(sqlite3.connect(state)) as database:
            return database.execute("SELECT count(*) FROM sessions").fetchone()[0]

    monkeypatch.setattr("stream.daemon.FIRST_S", first_s)
    state = tmp_path / "state.db"
    keys = {"session": {**QUIET, "state": state, "save_s": 3600}}
    async with serving(checkpoint, **keys) as house, house.http() as http, asyncio.timeout(30):
        async with house.connect("/v1/audio") as socket:
            await socket.recv()
            await socket.send(pcm(speech[: 3 * SAMPLE_RATE]))
            await until(lambda: any(e.type == "turn.ended" for e in house.events))
            if first_s > 1:
                assert await asyncio.to_thread(saved) == 0
                label = next(e.speaker.label for e in house.events if e.type == "turn.ended")
                path = f"/v1/sessions/{house.events[0].session_id}/speakers/{label}"
                await http.put(path, json={"name": "Anna"})
                await socket.send(pcm(speech[3 * SAMPLE_RATE : 4 * SAMPLE_RATE]))
            while not await asyncio.to_thread(saved):
                pass


@pytest.mark.slow
async def test_a_killed_daemon_goes_on_with_its_sessions(checkpoint, speech, tmp_path):
    data = pcm(speech)
    async with serving(checkpoint, session=QUIET) as house:
        whole = await talk(house, speech)
    daemon = Daemon(tmp_path, free_port())
    house = House(daemon.port)
    tree = config(
        checkpoint,
        {},
        {"log": {"kind": "jsonl", "path": str(tmp_path / "events.jsonl")}},
        server={"port": daemon.port},
        session={**QUIET, "state": str(tmp_path / "state.db"), "save_s": 0.2},
        log={"level": "warning"},
    ).model_dump(mode="json", exclude_unset=True)
    events, token, kills = [], None, 0
    while True:
        await daemon.start(tree)
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
            await daemon.kill()
            kills += 1
    await daemon.stop()
    assert daemon.code == 0
    # The sink has it all, each event at least once and every line whole. What was said at the very
    # moment of a kill may be there twice, under two numbers.
    text = await asyncio.to_thread((tmp_path / "events.jsonl").read_text)
    written = by_number(*map(json.loads, text.splitlines()))
    said = about_audio([written[seq] for seq in sorted(written)])
    assert [e for n, e in enumerate(said) if e not in said[:n]] == about_audio(whole)


class TestLobby:
    @staticmethod
    def waiting(token, *, saved, called=True):
        return Survivor(token, "desk", token, "mic", called, 0, 0, saved, 0, b"")

    async def test_each_goes_out_once_to_whom_it_belongs(self):
        now = time.time()
        caller, own = self.waiting("a", saved=now), self.waiting("b", saved=now, called=False)
        lobby = Lobby([caller, own, self.waiting("late", saved=now - 99)], lambda: 60)
        assert lobby.claim("nobody") is None
        assert lobby.claim("late") is None
        assert lobby.claim_source("desk") is own  # a caller's has the name too
        assert lobby.claim_source("desk") is None
        assert lobby.claim("a") is caller
        assert lobby.claim("a") is None
        lobby.give_back(caller)
        assert lobby.claim("a") is caller

    async def test_who_is_late_comes_out_oldest_first_and_so_does_one_given_back(self):
        now = time.time()
        older, newer = (self.waiting(name, saved=now - age) for name, age in (("a", 9), ("b", 7)))
        lobby = Lobby([newer, older], lambda: 5)
        assert [await lobby.late(), await lobby.late()] == [older, newer]
        waiting = asyncio.create_task(lobby.late())
        await asyncio.sleep(0)
        assert not waiting.done()
        lobby.give_back(newer)
        assert await waiting is newer


class TestFile:
    async def test_keeps_a_session_until_it_is_forgotten(self, tmp_path):
        path = tmp_path / "new" / "state.db"
        talk = Talk()
        said = [talk.warning(str(number)) for number in range(3)]
        session = Survivor("s1", "desk", "t", "mic", False, 3, 4, 5.0, 6, b"\x00data")
        async with Survival.open(path) as (survival, found):
            assert found == []
            await survival.save(session)
            for event in said:
                survival.note("s1", event.seq, dump(event))
            survival.note("never saved", 0, dump(said[0]))
        async with Survival.open(path) as (_, found):
            assert found == [replace(session, said=tuple(said))]
            assert found[0].resumed().next_seq == 6
        async with Survival.open(path) as (survival, found):
            assert (
                found[0].resumed().next_seq == 6 + AHEAD
            )  # the one before may have begun to count
            survival.forget("s1")
        async with Survival.open(path) as (_, found):
            assert found == []
        with contextlib.closing(sqlite3.connect(path)) as database:
            assert database.execute("SELECT * FROM said").fetchall() == []
        assert path.stat().st_mode & 0o077 == 0

    async def test_keeps_no_more_events_than_a_caller_misses(self, tmp_path, monkeypatch):
        monkeypatch.setattr("stream.survival.KEPT", 2)
        talk = Talk()
        session = Survivor("s1", "desk", "t", "mic", False, 3, 4, 5.0, 6, b"")
        async with Survival.open(tmp_path / "state.db") as (survival, _):
            for number in range(5):
                survival.note("s1", number, dump(talk.warning(str(number))))
            await survival.save(session)
            survival.note("s1", 5, dump(talk.warning("5")))
        async with Survival.open(tmp_path / "state.db") as (_, (found,)):
            assert [event.message for event in found.said] == ["2", "3", "4", "5"]

    async def test_events_before_one_that_was_not_written_are_not_kept(self, tmp_path):
        talk = Talk()
        session = Survivor("s1", "desk", "t", "mic", False, 3, 4, 5.0, 6, b"")
        async with Survival.open(tmp_path / "state.db") as (survival, _):
            survival.note("s1", 0, dump(talk.warning("kept")))
            await survival.save(session)
            survival.note("s1", "no number", dump(talk.warning("lost")))
            await survival.save(session)  # in the same transaction, or after it
            survival.note("s1", 2, dump(talk.warning("kept again")))
            await survival.save(session)
        async with Survival.open(tmp_path / "state.db") as (_, (found,)):
            assert [event.message for event in found.said] == ["kept again"]

    async def test_a_file_of_the_version_before_is_taken_over(self, tmp_path):
        path = tmp_path / "state.db"
        session = Survivor("s1", "desk", "t", "mic", True, 3, 4, 5.0, 6, b"x", form="rate=8000")
        async with Survival.open(path) as (survival, _):
            await survival.save(session)
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.executescript("ALTER TABLE sessions DROP COLUMN form; PRAGMA user_version = 2")
        async with Survival.open(path) as (_, found):
            assert found == [replace(session, form="")]
        async with Survival.open(path) as (survival, _):
            await survival.save(session)
        async with Survival.open(path) as (_, found):
            assert found[0].form == "rate=8000"

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
