import asyncio
import json
from datetime import UTC, datetime, timedelta

import numpy as np

from stream import daemon
from stream.engine import Engine
from stream.enrolled import Enrolled
from stream.voiceprints import Voiceprints
from tests.stream.conftest import speechlike
from tests.stream.house import pcm, serving, until
from tests.stream.test_engine import settings

ANYBODY = {
    "turns": {"onset": 0.5, "offset": 0.5, "min_on_ms": 60, "min_off_ms": 60, "update_ms": 200},
    "speakers": {"sure_ms": 100, "new_ms": 100},
    "voices": {"threshold": -1, "margin": 0, "keep": 0, "evidence_ms": 0, "cohort": 0},
}


async def loaded(checkpoint):
    async with Engine(settings(checkpoint)) as engine:
        return engine.loaded


def enrol(path, facts, name, **keys):
    vector = np.ones(facts.pooled[0].shape[0], np.float32)
    with Voiceprints.open(path) as store:
        store.add(name, vector, checkpoint=facts.voice_id, evidence_s=3.0, consent="a test", **keys)


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
