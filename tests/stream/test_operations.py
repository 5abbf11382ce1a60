"""What an operator does to a daemon: signals, systemd, questions about its health."""

import asyncio
import json
import os
import pkgutil
import signal
import socket
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
import soundfile
import yaml

from model.streaming import StreamingModel
from stream import daemon
from stream.config import load
from stream.daemon import run
from stream.doctor import examine
from stream.inference import EngineError
from stream.sources.source import SourceError
from stream.supervisor import Supervisor
from stream.survival import Survival
from stream.web import health
from tests.stream.conftest import speechlike
from tests.stream.house import House, free_port, pcm, serving, talk, until
from tests.stream.test_daemon import config

QUIET = {"session": {"heartbeat_s": 0}}


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """systemd's end of the line."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.bind(path)
        line.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        yield line


def told(line):
    messages = []
    while True:
        try:
            messages += line.recv(4096).decode().splitlines()
        except BlockingIOError:
            return messages


class TestSystemd:
    async def test_ready_comes_after_warm_up_and_stopping_at_the_end(self, checkpoint, systemd):
        async with serving(checkpoint) as house:
            assert "READY=1" in told(systemd)
            house.stop.set()
            await asyncio.sleep(0.05)
        assert told(systemd) == ["STOPPING=1"]

    @pytest.mark.parametrize(
        ("keys", "opening"),
        [
            ({"sources": {"door": {"kind": "tcp", "port": 0}}}, "asyncio.start_server"),
            ({"sources": {"door": {"kind": "wyoming", "port": 0}}}, "asyncio.start_server"),
            (None, "stream.daemon.House.stream"),
            ({"server": {"port": 0}}, "uvicorn.Server.startup"),
        ],
    )
    async def test_ready_comes_when_every_listener_listens(
        self, checkpoint, systemd, monkeypatch, tmp_path, keys, opening
    ):
        path = tmp_path / "two.wav"
        await asyncio.to_thread(soundfile.write, path, np.zeros((8000, 2)), 16_000)
        apart = {"sources": {"door": {"kind": "file", "path": path, "apart": 2, "realtime": True}}}
        keys = apart if keys is None else keys
        reached, may = asyncio.Event(), asyncio.Event()
        open_it = pkgutil.resolve_name(opening)

        async def held(*args, **given):
            reached.set()
            await may.wait()
            return await open_it(*args, **given)

        monkeypatch.setattr(opening, held)
        stop = asyncio.Event()
        settings = config(checkpoint, keys.get("sources", {}), server=keys.get("server"))
        running = asyncio.create_task(run(settings, stop=stop, fail_fast=False))
        await reached.wait()
        assert told(systemd) == []
        may.set()
        await until(lambda: "READY=1" in told(systemd))
        stop.set()
        await running

    @pytest.mark.parametrize("kind", ["tcp", "wyoming", "server"])
    async def test_who_cannot_listen_ends_the_daemon_unready(self, checkpoint, systemd, kind):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            door = {"sources": {"door": {"kind": kind, "port": port}}}
            keys = {"sources": {}, "server": {"port": port}} if kind == "server" else door
            with pytest.RaisesGroup(
                pytest.RaisesExc(
                    SourceError, match=rf"^{kind} 127\.0\.0\.1:{port}: cannot listen \(.* in use\)"
                )
            ):
                await run(config(checkpoint, **keys), fail_fast=False)
        assert "READY=1" not in told(systemd)

    async def test_the_watchdog_is_fed_from_the_inference_thread_alone(
        self, checkpoint, systemd, monkeypatch
    ):
        monkeypatch.setenv("WATCHDOG_USEC", "60000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        heard: list[str] = []
        async with serving(checkpoint):
            await until(lambda: heard.extend(told(systemd)) or heard.count("WATCHDOG=1") > 2)
        hanging = asyncio.Event()
        supervisor = Supervisor()
        watching = asyncio.create_task(supervisor.watch(hanging.wait))
        told(systemd)
        await asyncio.sleep(0.2)
        assert told(systemd) == []  # a thread that hangs feeds nobody
        watching.cancel()

    async def test_a_daemon_whose_inference_hangs_is_unready_and_ends(
        self, checkpoint, systemd, monkeypatch, tmp_path
    ):
        released = threading.Event()

        async def hang():
            monkeypatch.setattr("stream.inference.Inference.step", lambda *_: released.wait())

        try:
            await hung(checkpoint, systemd, monkeypatch, tmp_path / "events.jsonl", hang)
        finally:
            released.set()

    def test_without_systemd_nothing_is_sent(self):
        supervisor = Supervisor({})
        supervisor.ready()
        assert supervisor.watchdog_s == 0
        assert Supervisor({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}).watchdog_s == 0


async def hung(checkpoint, systemd, monkeypatch, file, hang, *, apart=False):
    """A daemon amid a call while its inference hangs: what it answers, and that it can be stopped.

    Args:
        checkpoint: Folders of heads.
        systemd: Its end of the line.
        monkeypatch: For the time limits.
        file: For a sink.
        hang: From now on no step returns.
        apart: The model computes in a process of its own.
    """
    monkeypatch.setenv("WATCHDOG_USEC", "60000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    monkeypatch.setattr(health, "STUCK_S", 0.05)
    monkeypatch.setattr(daemon, "HANGS_S", 0.3)
    house = House(free_port())
    sinks = {"log": {"kind": "jsonl", "path": file}}
    settings = config(checkpoint, {}, sinks, server={"port": house.port}, **QUIET)
    running = asyncio.create_task(
        run(settings, on_event=house.events.append, stop=house.stop, fail_fast=False, apart=apart)
    )
    async with house.http() as http:
        await until_up(http, running)
        async with house.connect("/v1/audio") as socket:
            await socket.recv()
            await socket.send(pcm(speechlike(32_000)))
            await until(lambda: any(event.type == "turn.started" for event in house.events))
            await hang()
            await socket.send(pcm(speechlike(32_000)))
            while (await http.get("/readyz")).status_code == 200:
                pass
            told(systemd)
            await asyncio.sleep(0.2)
            assert told(systemd) == []
            assert "stuck" in (await http.get("/readyz")).text
            assert (await http.get("/livez")).status_code == 200
            house.stop.set()
            async with asyncio.timeout(30):
                with pytest.RaisesGroup(pytest.RaisesExc(EngineError, match="inference hangs")):
                    await running
    assert told(systemd) == ["STOPPING=1"]
    lines = (await asyncio.to_thread(file.read_text)).splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [event.seq for event in house.events]


async def test_a_device_that_fails_ends_the_daemon_and_the_session_goes_on(
    checkpoint, tmp_path, monkeypatch
):
    broken, saved = False, asyncio.Event()
    step, save = StreamingModel.step, Survival.save

    def breaking(*given):
        if broken:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return step(*given)

    async def telling(*given):
        await save(*given)
        saved.set()

    monkeypatch.setattr(StreamingModel, "step", breaking)
    monkeypatch.setattr(Survival, "save", telling)
    keys = {"session": {"heartbeat_s": 0, "state": tmp_path / "state.db", "save_s": 1e-9}}
    data = pcm(speechlike(64_000))

    async def until_it_fails():
        nonlocal broken
        async with serving(checkpoint, **keys) as house:
            async with house.connect("/v1/audio") as socket:
                token = json.loads(await socket.recv())["resume_token"]
                await socket.send(data[:64_000])
                await saved.wait()
                broken = True
                await socket.send(data[64_000:])
                call.append((house.events[0].session_id, token))

    call = []
    failed = pytest.RaisesExc(EngineError, match="cpu cannot compute any more")
    with pytest.RaisesGroup(failed, flatten_subgroups=True):
        # As a process has it: with a loop of its own, which ends with what the daemon left in it.
        await asyncio.to_thread(asyncio.run, until_it_fails())
    broken, ((session, token),) = False, call
    async with serving(checkpoint, **keys) as again:
        async with again.connect(f"/v1/audio?resume={token}&have=0&after=0") as socket:
            received = json.loads(await socket.recv())["received"]
            await socket.send(data[received * 2 :])
            await socket.send('{"type": "close"}')
            *_, last = [json.loads(message) async for message in socket]
    assert received > 0
    assert (last["type"], last["reason"]) == ("session.closed", "ended")
    assert last["session_id"] == session
    assert last["end"] == 4.0


class TestReload:
    @pytest.fixture
    def file(self, checkpoint, tmp_path):
        """A configuration file with a server, and its tree to change."""
        tree = config(checkpoint, {}, server={"port": free_port()}, **QUIET).model_dump(
            mode="json", exclude_unset=True
        )
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path, tree

    async def test_what_can_change_does_and_no_stream_is_dropped(self, file, capsys):
        path, tree = file
        async with reloading(path, tree) as house:
            async with house.connect("/v1/audio?name=before") as socket:
                await socket.recv()
                await socket.send(pcm(speechlike(16_000)))
                tree["session"]["heartbeat_s"] = 0.5
                tree["session"]["state"] = str(path.with_name("sessions.db"))
                tree["log"]["level"] = "info"
                tree["engine"]["left_ms"] = 4000
                path.write_text(yaml.safe_dump(tree))
                os.kill(os.getpid(), signal.SIGHUP)
                output = await said(capsys, "reloaded")
                await asyncio.sleep(0.02)
                output += capsys.readouterr().err
                await socket.send('{"type": "close"}')
                async for _ in socket:
                    pass
            async with house.connect("/v1/audio?name=after") as socket:
                await socket.recv()
                await socket.send(pcm(speechlike(32_000)))
                await socket.send('{"type": "close"}')
                async for _ in socket:
                    pass
            path.write_text("engine: [")
            os.kill(os.getpid(), signal.SIGHUP)
            await said(capsys, "not reloaded")
            async with house.http() as http:
                assert (await http.get("/readyz")).status_code == 200
        assert "restart the daemon for these" in output
        assert "'engine', 'session.state'" in output
        of = {
            name: [e.type for e in house.events if e.stream_id == name]
            for name in ("before", "after")
        }
        assert of["before"][-1] == "session.closed"
        assert "heartbeat" not in of["before"]
        assert "heartbeat" in of["after"]

    async def test_what_cannot_be_read_changes_nothing(self, file, capsys, tmp_path):
        path, tree = file
        async with reloading(path, tree) as house:
            (tmp_path / "voices.db").write_bytes(b"no database" * 99)
            tree |= {"voiceprints": str(tmp_path / "voices.db")}
            tree["session"]["heartbeat_s"] = 0.5
            path.write_text(yaml.safe_dump(tree))
            os.kill(os.getpid(), signal.SIGHUP)
            output = await said(capsys, "not reloaded")
            await talk(house, speechlike(32_000))
        assert "voices.db" in output
        assert "heartbeat" not in {event.type for event in house.events}

    async def test_another_decoder_is_for_the_sessions_that_follow(self, file, capsys, monkeypatch):
        path, tree = file
        opened = []
        monkeypatch.setattr(
            "stream.daemon.open_language_model", lambda words, *_: opened.append(words.decoder)
        )
        async with reloading(path, tree):
            tree["log"]["level"] = "info"
            for words in ({}, {"decoder": "greedy"}):
                tree["tracks"]["words"] = words
                path.write_text(yaml.safe_dump(tree))
                os.kill(os.getpid(), signal.SIGHUP)
                output = await said(capsys, "reloaded")
                assert "not reloaded" not in output
        assert opened[-1] == "greedy"
        assert len(opened) == 2


@asynccontextmanager
async def reloading(path, tree):
    """A daemon of a configuration file; drained at the end."""
    house = House(tree["server"]["port"])
    running = asyncio.create_task(
        run(
            await asyncio.to_thread(load, path),
            on_event=house.events.append,
            stop=house.stop,
            fail_fast=False,
            reload=lambda: load(path),
        )
    )
    async with house.http() as http:
        await until_up(http, running)
        yield house
    house.stop.set()
    await running


async def said(capsys, what):
    """What is logged until this is."""
    output = ""
    while what not in output:
        output += capsys.readouterr().err
        await asyncio.sleep(0.01)
    return output


async def until_up(http, running):
    import httpx

    while True:
        try:
            await http.get("/livez")
        except httpx.TransportError:
            assert not running.done()
            await asyncio.sleep(0.02)
        else:
            return


class TestDoctor:
    async def test_a_good_configuration_has_nothing_bad(self, checkpoint, tmp_path):
        sinks = {"log": {"kind": "jsonl", "path": tmp_path / "a.jsonl"}}
        settings = config(checkpoint, {}, sinks, server={"port": free_port()})
        findings = [finding async for finding in examine(settings)]
        assert not [finding for finding in findings if finding.state == "bad"]
        subjects = [finding.subject for finding in findings]
        assert {"versions", "gpu", "checkpoint", "speed", "server", "sink log"} <= set(subjects)

    async def test_every_fault_comes_with_its_fix(self, checkpoint, tmp_path):
        blocked = tmp_path / "a file, no folder"
        blocked.touch()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            settings = config(
                [str(tmp_path / "missing")],
                {"door": {"kind": "tcp", "port": port}},
                {
                    "broker": {"kind": "mqtt", "host": "127.0.0.1", "port": 9},
                    "log": {"kind": "jsonl", "path": tmp_path / "no" / "a.jsonl"},
                },
                server={"port": port},
                voiceprints=blocked / "voices.db",
            )
            bad = {f.subject: f async for f in examine(settings) if f.state == "bad"}
        assert set(bad) == {
            "checkpoint",
            "server",
            "source door",
            "sink broker",
            "sink log",
            "voiceprints",
        }
        assert all(finding.fix for finding in bad.values())


async def test_a_daemon_that_drained_has_succeeded_whatever_failed_before(checkpoint, tmp_path):
    path = tmp_path / "cut.flac"
    await asyncio.to_thread(soundfile.write, path, speechlike(160_000), 16_000)
    await asyncio.to_thread(os.truncate, path, path.stat().st_size // 2)
    sources = {"cut": {"kind": "file", "path": path}}
    async with serving(checkpoint, sources=sources, **QUIET) as house:
        await until(lambda: bool(house.events) and house.events[-1].type == "session.closed")
        assert house.events[-1].reason == "error"
        os.kill(os.getpid(), signal.SIGTERM)
        await house.stop.wait()
    # Leaving it raised nothing: the exit code is 0.


async def test_trouble_with_a_sink_is_told_to_those_who_read_another(checkpoint, tmp_path):
    sinks = {"down": {"kind": "mqtt", "host": "127.0.0.1", "port": 9}}
    async with serving(checkpoint, sinks=sinks, **QUIET) as house:
        async with house.connect("/v1/audio") as socket:
            await socket.recv()
            await socket.send(pcm(speechlike(32_000)))
            await until(lambda: any(e.type == "warning" for e in house.events))
            await socket.send('{"type": "close"}')
            async for _ in socket:
                pass
    (warning,) = [e for e in house.events if e.type == "warning"]
    assert warning.code == "sink.failed"
    assert warning.message.startswith("down: ")
