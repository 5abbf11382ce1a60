import asyncio
import json
import sqlite3
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs

from stream import daemon
from stream.daemon import House
from stream.engine import Engine
from stream.enrolled import Enrolled
from stream.voiceprints import VoiceprintError, Voiceprints
from tests.stream.conftest import speechlike
from tests.stream.house import pcm, serving, until
from tests.stream.test_daemon import config
from tests.stream.test_engine import settings

ANYBODY = {
    "turns": {"onset": 0.5, "offset": 0.5, "min_on_ms": 60, "min_off_ms": 60, "update_ms": 200},
    "speakers": {"sure_ms": 100},
    "voices": {"threshold": -1, "margin": 0, "keep": 0, "evidence_ms": 0, "cohort": 0},
}


async def loaded(checkpoint):
    async with Engine(settings(checkpoint)) as engine:
        return engine.loaded


def enrol(path, facts, name, *, checkpoint=None, size=None, **keys):
    vector = np.ones(size or facts.pooled[0].shape[0], np.float32)
    given = {"checkpoint": checkpoint or facts.voice_id, "evidence_s": 3.0, "consent": "a test"}
    with Voiceprints.open(path) as store:
        store.add(name, vector, **given, **keys)


async def test_a_running_daemon_learns_who_comes_and_who_is_forgotten(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(daemon, "VOICES_S", 0.02)
    facts, path = await loaded(checkpoint), tmp_path / "voices.db"

    def said(house):
        return [e.identity for e in house.events if e.type == "speaker.identified"]

    async with serving(checkpoint, voiceprints=path, tracks=ANYBODY) as house:
        async with house.connect("/v1/audio") as socket:
            json.loads(await socket.recv())
            speech = pcm(speechlike(16_000))

            async def talk():
                while True:
                    await socket.send(speech)
                    await asyncio.sleep(0.05)

            talking = asyncio.create_task(talk())
            await until(lambda: any(e.type == "turn.ended" for e in house.events))
            assert said(house) == []
            await asyncio.to_thread(enrol, path, facts, "Ada")
            await until(lambda: "Ada" in said(house))

            def forget():
                with Voiceprints.open(path) as store:
                    store.forget("Ada")

            await asyncio.to_thread(forget)
            await until(lambda: None in said(house))
            talking.cancel()
            await socket.send('{"type": "close"}')
            async for _ in socket:
                pass
    ended = [e for e in house.events if e.type == "turn.ended"]
    assert ended[-1].speaker.identity is None


def test_a_voice_that_has_expired_is_nobodys(checkpoint, tmp_path):
    facts, path = asyncio.run(loaded(checkpoint)), tmp_path / "voices.db"
    enrol(path, facts, "Ada", expires=datetime.now(UTC) - timedelta(seconds=1))
    enrol(path, facts, "Bo")
    people = Enrolled(path, facts)
    assert people.names() == ["Bo"]
    gallery = people.gallery()
    assert gallery is not None
    assert gallery.names == ("Bo",)
    assert gallery.same(people.gallery())
    enrol(path, facts, "Cy")
    assert not gallery.same(people.gallery())


class TestARunningDaemon:
    """What it does with a file that is not as it was at the start."""

    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "voices.db"

    @pytest.fixture
    async def facts(self, checkpoint):
        return await loaded(checkpoint)

    @pytest.fixture
    def house(self, checkpoint, facts, path):
        given = config(checkpoint, {"in": {"kind": "stdin"}}, voiceprints=path)
        house = House(given, None, asyncio.Event())
        house.engine = SimpleNamespace(loaded=facts)
        structlog.reset_defaults()  # another test's configuration may be quieter
        enrol(path, facts, "Ada")
        house.gallery = house.enrolled.gallery()
        return house

    @pytest.fixture
    def looked_for(self, house):
        """Names that an open session was given, each time."""
        given = []
        tracks = SimpleNamespace(look_for=lambda gallery: given.append(gallery.names))
        house.live["s"] = SimpleNamespace(session=SimpleNamespace(tracks=tracks))
        return given

    @pytest.mark.parametrize("other", [{"checkpoint": "other"}, {"checkpoint": "x", "size": 3}])
    async def test_a_voice_that_does_not_fit_keeps_nobody_else_recognised(
        self, house, looked_for, facts, path, other
    ):
        await asyncio.to_thread(enrol, path, facts, "Bo", **other)
        with pytest.raises(VoiceprintError, match="Bo: enrolled with another checkpoint"):
            await asyncio.to_thread(house.enrolled.gallery)
        with capture_logs() as logs:
            await house.look_again()
            await house.look_again()
            await asyncio.to_thread(forget, path, "Ada")
            await house.look_again()
        assert looked_for == [("Ada",), ()]
        assert [(line["log_level"], line["names"]) for line in logs] == [("warning", ("Bo",))]

    async def test_a_size_that_is_not_the_checkpoints_does_not_fit(
        self, house, looked_for, facts, path
    ):
        await asyncio.to_thread(forget, path, "Ada")
        await asyncio.to_thread(enrol, path, facts, "Bo", size=3)
        await house.look_again()
        assert looked_for == [()]
        assert house.gallery.left_out == ("Bo",)

    async def test_a_file_that_cannot_be_read_is_nobodys_and_the_end_of_nothing(
        self, house, looked_for, monkeypatch
    ):
        def malformed(*_, **__):
            raise sqlite3.DatabaseError("database disk image is malformed")

        monkeypatch.setattr(daemon, "VOICES_S", 0)
        with capture_logs() as logs, monkeypatch.context() as damaged:
            damaged.setattr(Voiceprints, "gallery", malformed)
            looking = asyncio.create_task(house._keep_looking())
            await until(lambda: looked_for == [()])
            for _ in range(3):
                with pytest.raises(VoiceprintError):
                    await house.look_again()
            assert not looking.done()
        await until(lambda: looked_for == [(), ("Ada",)])
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
        assert [line["event"] for line in logs] == ["enrolled voices not read"]
        assert "malformed" in logs[0]["error"]

    async def test_a_voice_that_was_kept_is_no_error(self, house, facts, path, monkeypatch):
        tracks = SimpleNamespace(
            speaker=lambda label: 1, profile=lambda number: (np.ones(facts.pooled[1].size), 3.0)
        )
        house.live["s"] = live = SimpleNamespace(session=SimpleNamespace(tracks=tracks))
        named = []
        monkeypatch.setattr(live.session, "name_speaker", named.append, raising=False)

        async def emit(live, make):
            named.append(make.args)

        monkeypatch.setattr(house, "_emit", emit)

        async def unread():
            raise VoiceprintError("cannot be read")

        monkeypatch.setattr(house, "look_again", unread)
        await house.name_speaker("s", "S1", "Bo", enrol=True)
        assert named == [(1, "Bo")]
        assert await asyncio.to_thread(house.enrolled.names) == ["Ada", "Bo"]


def forget(path, name):
    with Voiceprints.open(path) as store:
        store.forget(name)
