"""Live speakers get a name, and with consent their voice is kept: over HTTP, and as a command."""

import asyncio
import json
import shutil
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from stream.clock import SAMPLE_RATE
from stream.voiceprints import VoiceprintError, Voiceprints
from tests.stream.conftest import speechlike
from tests.stream.house import pcm, serving, until
from tests.stream.test_server import Desk

QUIET = {"session": {"heartbeat_s": 0}}
TOKEN = "a-token-that-is-long-enough"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def one_voice(checkpoint, tmp_path_factory):
    """The same heads, but one speaker talks all the time and nobody else: clean speech."""
    diarization, *others = checkpoint
    folder = tmp_path_factory.mktemp("one") / "diarization"
    shutil.copytree(diarization, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["classifier.weight"].zero_()
    tensors["classifier.bias"][:] = tensors["classifier.bias"].new_tensor([6.0, -6.0, -6.0])
    save_file(tensors, file, {"format": "pt"})
    return [str(folder), *others]


@asynccontextmanager
async def talking(checkpoint, voices, server=None, seconds=4):
    """A daemon that has heard a speaker for that long → house, session, label."""
    async with serving(checkpoint, server, voiceprints=voices, **QUIET) as house:
        headers = {"Authorization": f"Bearer {TOKEN}"} if server else None
        async with house.connect("/v1/audio", additional_headers=headers) as socket:
            session = json.loads(await socket.recv())["session_id"]
            await socket.send(pcm(speechlike(seconds * SAMPLE_RATE)))
            await until(lambda: any(e.type == "turn.started" for e in house.events))
            label = next(e for e in house.events if e.type == "turn.started").speaker.label
            yield house, session, label
            await socket.send('{"type": "close"}')
            async for _ in socket:
                pass


async def enrolled(http, where, body):
    """Ask until there is enough clean speech, which is on its way → the answer."""
    async with asyncio.timeout(60):
        while (answer := await http.put(where, json=body)).status_code == 409:
            assert "s of clean speech so far; expected at least 1 s" in answer.json()["error"]
            await asyncio.sleep(0.05)
    return answer


def kept(voices):
    with Voiceprints.open(voices) as store:
        return store.voices()


async def told(*arguments, **keys):
    """`livesat …` → exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "stream", *arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        **keys,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


class TestEnrolment:
    async def test_the_voice_is_kept_with_its_note_and_its_expiry(self, one_voice, tmp_path):
        voices = tmp_path / "voices.db"
        async with talking(one_voice, voices) as (house, session, label), house.http() as http:
            where = f"/v1/sessions/{session}/speakers/{label}"
            body = {"name": " Anna ", "enrol": True, "consent": " said yes, at noon ", "days": 30}
            answer = await enrolled(http, where, body)
            assert answer.status_code == 200
            told = {"session": session, "label": label, "name": "Anna", "enrolled": True}
            assert answer.json() == told
            assert (await http.get("/v1/voices")).json() == {"voices": ["Anna"]}
        (voice,) = await asyncio.to_thread(kept, voices)
        assert (voice.name, voice.clips, voice.consent) == ("Anna", 1, "said yes, at noon")
        assert voice.evidence_s >= 1
        expected = datetime.now(UTC) + timedelta(days=30)
        assert expected - timedelta(minutes=5) < voice.expires <= expected
        identified = [e for e in house.events if e.type == "speaker.identified"]
        assert (identified[0].speaker, identified[0].identity) == (label, "Anna")

    @pytest.mark.parametrize("more", [{}, {"consent": None, "days": None}])
    async def test_without_a_note_it_says_who_enrolled_whom(self, one_voice, tmp_path, more):
        voices = tmp_path / "voices.db"
        async with talking(one_voice, voices) as (house, session, label), house.http() as http:
            where = f"/v1/sessions/{session}/speakers/{label}"
            answer = await enrolled(http, where, {"name": "Anna", "enrol": True, **more})
            assert answer.status_code == 200
        (voice,) = await asyncio.to_thread(kept, voices)
        assert voice.consent == f"named and enrolled by a listener of session {session}"
        assert voice.expires is None

    async def test_a_voice_hardly_heard_is_refused(self, one_voice, tmp_path):
        voices = tmp_path / "voices.db"
        talk = talking(one_voice, voices, seconds=1)
        async with talk as (house, session, label), house.http() as http:
            where = f"/v1/sessions/{session}/speakers/{label}"
            answer = await http.put(where, json={"name": "Anna", "enrol": True})
            assert answer.status_code == 409
            assert "s of clean speech so far; expected at least 1 s" in answer.json()["error"]
        assert not voices.exists() or await asyncio.to_thread(kept, voices) == []

    async def test_what_is_wrong_is_told_and_nothing_is_kept(self, one_voice, tmp_path):
        voices = tmp_path / "voices.db"
        good = {"name": "Anna", "enrol": True}
        async with talking(one_voice, voices) as (house, session, label), house.http() as http:
            where = f"/v1/sessions/{session}/speakers/{label}"
            for body, said in (
                ({**good, "name": 5}, "name: expected 1 to 200 characters"),
                ({**good, "name": None}, "name: expected 1 to 200 characters"),
                ({**good, "enrol": "false"}, "enrol: expected true or false"),
                ({**good, "consent": " "}, "consent: expected 1 to 1000 characters"),
                ({**good, "consent": "x" * 1001}, "consent: expected 1 to 1000 characters"),
                ({**good, "consent": "a\nb"}, "consent: expected 1 to 1000 characters"),
                ({**good, "consent": True}, "consent: expected 1 to 1000 characters"),
                ({**good, "days": 0}, "days: expected a whole number from 1 to 36500"),
                ({**good, "days": 36_501}, "days: expected a whole number from 1 to 36500"),
                ({**good, "days": True}, "days: expected a whole number from 1 to 36500"),
                ({**good, "days": "30"}, "days: expected a whole number from 1 to 36500"),
                ({"name": "Anna", "days": 30}, "consent and days are kept with a voice"),
                ({"name": "Anna", "consent": "yes"}, "consent and days are kept with a voice"),
            ):
                answer = await http.put(where, json=body)
                assert answer.status_code == 400, body
                assert said in answer.json()["error"]
        assert not voices.exists() or await asyncio.to_thread(kept, voices) == []
        assert not [e for e in house.events if e.type == "speaker.identified" and e.identity]


class TestCommand:
    async def test_a_name_alone(self, one_voice, tmp_path):
        voices = tmp_path / "voices.db"
        async with talking(one_voice, voices) as (house, session, label):
            url = f"http://127.0.0.1:{house.port}"
            code, out, err = await told("name", label, "Anna", "--url", url)
            assert (code, out, err) == (0, f"{label} of session {session} is Anna\n", "")
            await until(lambda: any(e.type == "speaker.identified" for e in house.events))
        identified = next(e for e in house.events if e.type == "speaker.identified")
        assert (identified.speaker, identified.identity) == (label, "Anna")
        assert not voices.exists() or await asyncio.to_thread(kept, voices) == []

    @pytest.mark.parametrize("word", ["--enrol", "--enroll"])
    async def test_a_voice_with_its_note_to_a_server_with_a_token(self, one_voice, tmp_path, word):
        voices = tmp_path / "voices.db"
        server = {"token": TOKEN}
        async with talking(one_voice, voices, server) as (house, session, label):
            named = ("name", label, "Anna Zoë", "--url", f"http://127.0.0.1:{house.port}")
            code, _, err = await told(*named)
            assert code == 1
            assert "Traceback" not in err
            more = (word, "--consent", "signed, on paper", "--days", "7", "--session", session)
            async with asyncio.timeout(60):
                while True:
                    code, out, err = await told(*named, *more, "--token", TOKEN)
                    if code == 0:
                        break
                    assert "s of clean speech so far" in err
            assert out == f"{label} of session {session} is Anna Zoë, and enrolled\n"
        (voice,) = await asyncio.to_thread(kept, voices)
        assert (voice.name, voice.consent) == ("Anna Zoë", "signed, on paper")
        assert voice.expires - datetime.now(UTC) <= timedelta(days=7)

    @pytest.mark.parametrize("more", [("--consent", "yes"), ("--days", "3")])
    async def test_a_note_without_a_voice_is_wrong(self, more):
        code, _, err = await told("name", "S1", "Anna", *more)
        assert code == 2
        assert "expected --enroll with them" in err
        assert len(err.splitlines()) == 1


class TestUnreadable:
    class Desk(Desk):
        async def voices(self):
            raise VoiceprintError("voices.db: cannot be used (disk I/O error)")

        async def name_speaker(self, *_):
            raise VoiceprintError("voices.db: cannot be used (database or disk is full)")

    async def test_what_is_wrong_with_the_file_is_one_sentence(self):
        async with self.Desk().serving() as (port, _), httpx.AsyncClient() as http:
            url = f"http://127.0.0.1:{port}/v1"
            names = await http.get(f"{url}/voices")
            body = {"name": "Anna", "enrol": True}
            kept = await http.put(f"{url}/sessions/s/speakers/S1", json=body)
        assert names.status_code == 503
        assert names.json() == {"error": "voices.db: cannot be used (disk I/O error)"}
        assert kept.status_code == 409
        assert kept.json() == {"error": "voices.db: cannot be used (database or disk is full)"}
