import errno
import json
import os
import sqlite3
import stat
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from stream.voiceprints import VoiceprintError, Voiceprints, default_path

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def vector(seed, size=192):
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def enrol(store, name, seed, **options):
    given = {"checkpoint": "abc", "evidence_s": 3.0, "consent": "said yes", "now": NOW, **options}
    return store.add(name, vector(seed), **given)


@pytest.fixture
def store():
    with Voiceprints.open() as store:
        yield store


def test_a_voice_is_the_weighted_mean_of_its_clips(store):
    enrol(store, "Ada", 1, evidence_s=1.0)
    voice = enrol(store, "ada", 2, evidence_s=3.0, consent="")
    assert (voice.name, voice.clips, voice.evidence_s) == ("Ada", 2, 4.0)
    assert (voice.created, voice.consent, voice.expires) == (NOW, "said yes", None)
    assert voice.checkpoints == ("abc",)
    enrol(store, "  Grace   Hopper ", 3)
    gallery = store.gallery("abc")
    assert gallery.names == ("Ada", "Grace Hopper")
    assert gallery.vectors.dtype == np.float32
    expected = np.stack([0.25 * vector(1) + 0.75 * vector(2), vector(3)])
    np.testing.assert_allclose(gallery.vectors, expected, rtol=1e-6)


def test_an_empty_store_has_an_empty_gallery(store):
    assert store.voices() == []
    gallery = store.gallery("abc")
    assert gallery.names == ()
    assert gallery.vectors.shape == (0, 0)


def test_another_checkpoint_is_refused(store):
    enrol(store, "Ada", 1)
    with pytest.raises(VoiceprintError, match=r"Ada: has clips of checkpoint abc, .* of def"):
        enrol(store, "Ada", 2, checkpoint="def")
    enrol(store, "Bo", 2, checkpoint="def")
    with pytest.raises(VoiceprintError, match=r"Bo: enrolled with another checkpoint than abc"):
        store.gallery("abc")
    gallery = store.gallery("abc", strict=False)
    assert (gallery.names, gallery.left_out) == (("Ada",), ("Bo",))


def test_a_voice_of_another_size_is_not_looked_for(store):
    enrol(store, "Ada", 1)
    assert store.gallery("abc", size=192).names == ("Ada",)
    gallery = store.gallery("abc", size=512, strict=False)
    assert (gallery.names, gallery.left_out) == ((), ("Ada",))
    with pytest.raises(VoiceprintError, match="Ada: enrolled with another checkpoint"):
        store.gallery("abc", size=512)


def test_what_cannot_be_a_voice_is_refused(store):
    with pytest.raises(VoiceprintError, match="expected a name"):
        enrol(store, "  ", 1)
    with pytest.raises(VoiceprintError, match="Ada: expected a note of consent"):
        enrol(store, "Ada", 1, consent=" ")
    options = {"checkpoint": "abc", "evidence_s": 1.0, "consent": "yes"}
    with pytest.raises(VoiceprintError, match=r"expected a finite embedding \[E\], got \(2, 3\)"):
        store.add("Ada", np.zeros((2, 3)), **options)
    with pytest.raises(VoiceprintError, match="expected a finite embedding"):
        store.add("Ada", np.array([np.nan]), **options)
    with pytest.raises(VoiceprintError, match="expiry with a time zone"):
        enrol(store, "Ada", 1, expires=datetime(2027, 1, 1))  # noqa: DTZ001 - the point
    enrol(store, "Ada", 1)
    with pytest.raises(VoiceprintError, match=r"expected an embedding of 192 values .* got 3"):
        store.add("Bo", np.ones(3), **options)
    assert [voice.name for voice in store.voices()] == ["Ada"]


def test_rename(store):
    enrol(store, "Ada", 1)
    enrol(store, "Bo", 2)
    assert store.rename("ada", "Ada L.").name == "Ada L."
    with pytest.raises(VoiceprintError, match=r"ada l.: this name is taken"):
        store.rename("Bo", "ada l.")
    with pytest.raises(VoiceprintError, match=r"Cy: nobody .* there is Ada L., Bo"):
        store.rename("Cy", "Di")
    with pytest.raises(VoiceprintError, match="expected a name"):
        store.rename("Bo", "")


def test_forgotten_is_erased_from_the_file(tmp_path):
    path = tmp_path / "deep" / "voices.db"
    with Voiceprints.open(path) as store:
        for seed in range(40):
            enrol(store, f"Person {seed}", seed)
        enrol(store, "Secretive", 99)
    assert vector(99).tobytes()[:64] in path.read_bytes()
    with Voiceprints.open(path) as store:
        assert store.forget("secretive").name == "Secretive"
        with pytest.raises(VoiceprintError, match="nobody of that name"):
            store.get("Secretive")
        assert len(store.voices()) == 40
    content = path.read_bytes()
    assert vector(99).tobytes()[:64] not in content
    assert b"Secretive" not in content
    assert [file.name for file in path.parent.iterdir()] == ["voices.db"]


def test_what_is_forgotten_is_in_no_journal_on_disk(tmp_path):
    path, seen = tmp_path / "voices.db", set()
    with Voiceprints.open(path) as store:
        for name in ("Ada", "Bo"):
            enrol(store, name, 1)
        store._db.set_trace_callback(lambda _: seen.update(f.name for f in tmp_path.iterdir()))
        store.forget("Ada")
        assert seen == {"voices.db"}
        enrol(store, "Cy", 2)
        assert seen == {"voices.db", "voices.db-journal"}  # what is added outlives a crash


class TestExport:
    def test_only_its_owner_can_read_a_file_that_was_there(self, store, tmp_path):
        enrol(store, "Ada", 1)
        path = tmp_path / "voices.json"
        path.write_text("an earlier copy")
        path.chmod(0o644)
        assert store.export(path) == 1
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert json.loads(path.read_text())["voices"][0]["name"] == "Ada"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_full_disk_leaves_the_earlier_copy(self, store, tmp_path, monkeypatch):
        enrol(store, "Ada", 1)
        path = tmp_path / "voices.json"
        path.write_text("an earlier copy")

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(VoiceprintError, match=r"voices.json: cannot be written \(No space"):
            store.export(path)
        assert path.read_text() == "an earlier copy"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_pipe_is_written_to(self, store, tmp_path):
        enrol(store, "Ada", 1)
        reading, writing = os.pipe()
        with os.fdopen(reading) as reader:
            store.export(Path(f"/dev/fd/{writing}"))
            os.close(writing)
            assert json.loads(reader.read())["voices"][0]["name"] == "Ada"

    def test_a_value_that_no_embedding_has_is_refused(self, store, tmp_path):
        enrol(store, "Ada", 1)
        path = tmp_path / "voices.json"
        store.export(path)
        exported = json.loads(path.read_text())
        exported["voices"][0] |= {"name": "Bo"}
        exported["voices"][0]["clips"][0]["embedding"][3] = 3e39
        path.write_text(json.dumps(exported))
        with pytest.raises(VoiceprintError, match=r"voices.0.clips.0.embedding.3: Input should be"):
            store.take_in(path)
        assert [voice.name for voice in store.voices()] == ["Ada"]


def test_expired_voices_are_erased_when_the_store_opens(tmp_path):
    path = tmp_path / "voices.db"
    with Voiceprints.open(path, now=NOW) as store:
        enrol(store, "Ada", 1, expires=NOW + timedelta(days=30))
        enrol(store, "Bo", 2)
    with Voiceprints.open(path, now=NOW + timedelta(days=29)) as store:
        assert store.get("Ada").expires == NOW + timedelta(days=30)
    with Voiceprints.open(path, now=NOW + timedelta(days=30)) as store:
        assert [voice.name for voice in store.voices()] == ["Bo"]
    assert vector(1).tobytes()[:64] not in path.read_bytes()


def test_the_file_is_its_owners_alone(tmp_path):
    path = tmp_path / "new" / "voices.db"
    with Voiceprints.open(path):
        pass
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_that_is_no_store_is_refused(tmp_path):
    text = tmp_path / "voices.db"
    text.write_text("not a database, but long enough to be read as one\n" * 100)
    with (
        pytest.raises(
            VoiceprintError,
            match=r"voices.db: expected a database of voices of version 1",
        ),
        Voiceprints.open(text),
    ):
        pass
    with (
        pytest.raises(VoiceprintError, match=r"voices.db: cannot be opened \(Not a directory\)"),
        Voiceprints.open(text / "below" / "voices.db"),
    ):
        pass


def test_a_page_that_is_damaged_is_said(tmp_path):
    path = tmp_path / "voices.db"
    with Voiceprints.open(path) as store:
        enrol(store, "Ada", 1)
    with closing(sqlite3.connect(path)) as database:
        (page,) = database.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = 'clips'"
        ).fetchone()
    content = bytearray(path.read_bytes())
    content[4096 * (page - 1) : 4096 * page] = b"\xff" * 4096
    path.write_bytes(content)
    with (
        pytest.raises(VoiceprintError, match=r"voices.db: cannot be used \(.*malformed"),
        Voiceprints.open(path) as store,
    ):
        store.gallery("abc")


def test_a_disk_without_room_is_said(tmp_path):
    with (
        pytest.raises(VoiceprintError, match=r"voices.db: cannot be used \(.*full"),
        Voiceprints.open(tmp_path / "voices.db") as store,
        closing(store._db.execute("PRAGMA max_page_count = 1")),  # no more than there are
    ):
        enrol(store, "Ada", 1, consent="a long note " * 1000)


def test_a_store_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "voices.db"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(VoiceprintError, match="got version 9: of a newer"), Voiceprints.open(path):
        pass


def test_the_default_place_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_path() == tmp_path / "livesat" / "voices.db"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert default_path() == Path.home() / ".local" / "share" / "livesat" / "voices.db"
