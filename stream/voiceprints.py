"""Enrolled voices: embeddings of people who agreed to be recognised, in one SQLite file.

A voiceprint is biometric data: it is kept with the consent it rests on and may expire, the file is
readable by its owner alone, and `forget` overwrites what it deletes.
"""

import json
import os
import sqlite3
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import mkstemp
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from stream.database import Unusable, open_database
from stream.tracks.voices import Gallery

VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE voices (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE COLLATE NOCASE,
    created TEXT NOT NULL,
    consent TEXT NOT NULL,
    expires TEXT
) STRICT;
CREATE TABLE clips (
    id INTEGER PRIMARY KEY,
    voice INTEGER NOT NULL REFERENCES voices (id) ON DELETE CASCADE,
    checkpoint TEXT NOT NULL,
    embedding BLOB NOT NULL,
    evidence_s REAL NOT NULL,
    created TEXT NOT NULL
) STRICT;
CREATE INDEX clips_voice ON clips (voice);
"""


class VoiceprintError(Exception):
    """A voice that is not there or does not fit; what was given and what was expected."""


@dataclass(frozen=True, slots=True)
class Voice:
    """An enrolled person.

    Attributes:
        name: As enrolled; names that differ only in case are one.
        clips: Recordings it was enrolled from.
        evidence_s: Seconds of speech in them.
        created: When the first was enrolled.
        consent: The note of what the person agreed to.
        expires: When it is erased; None is never.
        checkpoints: Content ids of the checkpoints that made the embeddings.
    """

    name: str
    clips: int
    evidence_s: float
    created: datetime
    consent: str
    expires: datetime | None
    checkpoints: tuple[str, ...]


def default_path() -> Path:
    """Where this user's voices are, by the platform's custom."""
    home = Path.home()
    if sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "livesat" / "voices.db"


_LARGEST: Final = float(np.finfo(np.float32).max)


class ExportedClip(BaseModel):
    """A clip in an exported file."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    checkpoint: str
    embedding: list[Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]] = Field(min_length=1)
    evidence_s: float = Field(ge=0)
    created: AwareDatetime


class ExportedVoice(BaseModel):
    """A person in an exported file."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    created: AwareDatetime
    consent: str = Field(min_length=1)
    expires: AwareDatetime | None
    clips: list[ExportedClip] = Field(min_length=1)


class Exported(BaseModel):
    """An exported file."""

    model_config = ConfigDict(extra="forbid")

    livesat_voices: Literal[1]
    voices: list[ExportedVoice]


def expiry(days: int | None) -> datetime | None:
    """When a voice is erased that is kept for so many days from now; None: it is not."""
    return None if days is None else datetime.now(UTC) + timedelta(days=days)


class Voiceprints:
    """The store; use `open`. Every method is a transaction of its own."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._db = database

    @classmethod
    @contextmanager
    def open(cls, path: Path | None = None, *, now: datetime | None = None) -> Generator[Self]:
        """Opens the store, making it if there is none; voices that have expired are erased.

        Args:
            path: The file; None keeps everything in memory.
            now: For expiry; None is the present.

        Raises:
            VoiceprintError: the file cannot be opened, is no store, or is one of a newer version;
                or, while it is open, it cannot be read or written.
        """
        try:
            # No write-ahead log: what is erased must not live on in one.
            database = open_database(
                path,
                "a database of voices",
                version=VERSION,
                schema=_SCHEMA,
                wal=False,
                shared=True,
            )
        except Unusable as error:
            raise VoiceprintError(str(error)) from error
        try:
            store = cls(database)
            store._prepare()
            store._expire(now or datetime.now(UTC))
            yield store
        except sqlite3.Error as error:
            raise VoiceprintError(f"{path}: cannot be used ({error})") from error
        finally:
            database.close()

    def add(
        self,
        name: str,
        embedding: NDArray[np.floating[Any]],
        *,
        checkpoint: str,
        evidence_s: float,
        consent: str,
        expires: datetime | None = None,
        now: datetime | None = None,
    ) -> Voice:
        """Enrols a clip of a person; a further clip of a known name adds to that voice.

        Args:
            name: The person's.
            embedding: [E] as the x-vector head gives it.
            checkpoint: Content id of the checkpoint that made it.
            evidence_s: Seconds of speech behind it.
            consent: What the person agreed to; a further clip replaces the note if not empty.
            expires: When to erase the voice; with a zone.
            now: None is the present.

        Raises:
            VoiceprintError: an empty name or consent, an embedding that is not finite or of
                another size, or clips of that voice from another checkpoint.
        """
        name = " ".join(name.split())
        vector = np.ascontiguousarray(embedding, "<f4")
        if not name:
            raise VoiceprintError("expected a name, got an empty one")
        if vector.ndim != 1 or not vector.size or not np.isfinite(vector).all():
            raise VoiceprintError(f"{name}: expected a finite embedding [E], got {vector.shape}")
        if expires is not None and expires.tzinfo is None:
            raise VoiceprintError(f"{name}: expected an expiry with a time zone, got {expires}")
        moment = (now or datetime.now(UTC)).isoformat()
        with self._db:
            row = self._db.execute("SELECT id FROM voices WHERE name = ?", (name,)).fetchone()
            if row is None and not consent.strip():
                raise VoiceprintError(f"{name}: expected a note of consent, got an empty one")
            self._refuse_others(name, checkpoint, vector.size)
            if row is None:
                cursor = self._db.execute(
                    "INSERT INTO voices (name, created, consent) VALUES (?, ?, ?)",
                    (name, moment, consent.strip()),
                )
                voice = cursor.lastrowid
            else:
                voice = row[0]
                if consent.strip():
                    self._db.execute(
                        "UPDATE voices SET consent = ? WHERE id = ?", (consent.strip(), voice)
                    )
            if expires is not None:
                when = expires.astimezone(UTC).isoformat()
                self._db.execute("UPDATE voices SET expires = ? WHERE id = ?", (when, voice))
            self._db.execute(
                "INSERT INTO clips (voice, checkpoint, embedding, evidence_s, created) "
                "VALUES (?, ?, ?, ?, ?)",
                (voice, checkpoint, vector.tobytes(), float(evidence_s), moment),
            )
        return self.get(name)

    def voices(self) -> list[Voice]:
        """All voices, by name."""
        names = self._db.execute("SELECT name FROM voices ORDER BY name COLLATE NOCASE")
        return [self.get(name) for (name,) in names.fetchall()]

    def get(self, name: str) -> Voice:
        """A voice by its name.

        Raises:
            VoiceprintError: nobody of that name; the message names those there are.
        """
        row = self._db.execute(
            "SELECT id, name, created, consent, expires FROM voices WHERE name = ?", (name,)
        ).fetchone()
        if row is None:
            raise VoiceprintError(self._nobody(name))
        voice, name, created, consent, expires = row
        clips = self._db.execute(
            "SELECT checkpoint, evidence_s FROM clips WHERE voice = ? ORDER BY id", (voice,)
        ).fetchall()
        return Voice(
            name=name,
            clips=len(clips),
            evidence_s=sum(evidence for _, evidence in clips),
            created=datetime.fromisoformat(created),
            consent=consent,
            expires=None if expires is None else datetime.fromisoformat(expires),
            checkpoints=tuple(dict.fromkeys(checkpoint for checkpoint, _ in clips)),
        )

    def rename(self, name: str, new: str) -> Voice:
        """Gives a voice another name.

        Raises:
            VoiceprintError: nobody of that name, or the new one is empty or taken.
        """
        new = " ".join(new.split())
        if not new:
            raise VoiceprintError("expected a name, got an empty one")
        voice = self.get(name)
        try:
            with self._db:
                self._db.execute("UPDATE voices SET name = ? WHERE name = ?", (new, voice.name))
        except sqlite3.IntegrityError as error:
            raise VoiceprintError(f"{new}: this name is taken; forget it first") from error
        return self.get(new)

    def forget(self, name: str) -> Voice:
        """Erases a voice: its bytes are overwritten and the file is written anew without them.

        Returns:
            What was forgotten.

        Raises:
            VoiceprintError: nobody of that name.
        """
        voice = self.get(name)
        self._erase([voice.name])
        return voice

    def gallery(self, checkpoint: str, *, size: int | None = None, strict: bool = True) -> Gallery:
        """The voices to look for: each the mean of its clips, weighted by their speech.

        Args:
            checkpoint: Content id of the checkpoint that runs.
            size: Values of its embeddings: a file that was taken in may say anything of itself.
            strict: Voices of other checkpoints are an error; else they are left out.

        Raises:
            VoiceprintError: a voice was enrolled with another checkpoint: embeddings of two
                checkpoints cannot be compared.
        """
        rows = self._db.execute(
            "SELECT name, checkpoint, embedding, evidence_s "
            "FROM clips JOIN voices ON voices.id = voice ORDER BY name COLLATE NOCASE, clips.id"
        )
        clips: dict[str, list[tuple[NDArray[np.float32], float]]] = {}
        others: list[str] = []
        for name, made_by, blob, evidence_s in rows:
            if made_by == checkpoint and size in {None, len(blob) / 4}:
                vector = np.frombuffer(blob, "<f4")
                clips.setdefault(name, []).append((vector, max(evidence_s, 1e-3)))
            elif name not in others:
                others.append(name)
        if strict and others:
            raise VoiceprintError(
                f"{', '.join(others)}: enrolled with another checkpoint than {checkpoint}; "
                f"enroll again with this one, or run with that"
            )
        means = [
            np.average([v for v, _ in each], axis=0, weights=[w for _, w in each])
            for each in clips.values()
        ]
        vectors = np.asarray(means, np.float32) if means else np.zeros((0, 0), np.float32)
        return Gallery(tuple(clips), vectors, left_out=tuple(others))

    def export(self, path: Path) -> int:
        """Write every voice to a JSON file that only its owner can read → how many.

        Raises:
            VoiceprintError: the file cannot be written; it is as it was before.
        """
        people: list[dict[str, Any]] = []
        for voice in self.voices():
            clips = self._db.execute(
                "SELECT checkpoint, embedding, evidence_s, clips.created FROM clips "
                "JOIN voices ON voices.id = voice WHERE name = ? ORDER BY clips.id",
                (voice.name,),
            )
            people.append(
                {
                    "name": voice.name,
                    "created": voice.created.isoformat(),
                    "consent": voice.consent,
                    "expires": None if voice.expires is None else voice.expires.isoformat(),
                    "clips": [
                        {
                            "checkpoint": checkpoint,
                            "embedding": np.frombuffer(blob, "<f4").tolist(),
                            "evidence_s": evidence_s,
                            "created": created,
                        }
                        for checkpoint, blob, evidence_s, created in clips
                    ],
                }
            )
        try:
            _replace(path, json.dumps({"livesat_voices": VERSION, "voices": people}, indent=1))
        except OSError as error:
            raise VoiceprintError(f"{path}: cannot be written ({error.strerror})") from error
        return len(people)

    def take_in(self, path: Path) -> list[str]:
        """Add the voices of an exported file, all of them or none → their names.

        Raises:
            VoiceprintError: it cannot be read, is no such file, or a name in it is here already.
        """
        try:
            given = Exported.model_validate_json(path.read_bytes())
        except OSError as error:
            raise VoiceprintError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "all of it"
            raise VoiceprintError(
                f"{path}: expected a file of livesat export-voices; {where}: {first['msg']}"
            ) from error
        with self._db:
            for voice in given.voices:
                known = self._db.execute("SELECT 1 FROM voices WHERE name = ?", (voice.name,))
                if known.fetchone() is not None:
                    raise VoiceprintError(f"{path}: {voice.name} is enrolled here already")
                cursor = self._db.execute(
                    "INSERT INTO voices (name, created, consent, expires) VALUES (?, ?, ?, ?)",
                    (
                        voice.name,
                        voice.created.isoformat(),
                        voice.consent,
                        None if voice.expires is None else voice.expires.isoformat(),
                    ),
                )
                for clip in voice.clips:
                    self._refuse_others(voice.name, clip.checkpoint, len(clip.embedding))
                    self._db.execute(
                        "INSERT INTO clips (voice, checkpoint, embedding, evidence_s, created) "
                        "VALUES (?, ?, ?, ?, ?)",
                        (
                            cursor.lastrowid,
                            clip.checkpoint,
                            np.asarray(clip.embedding, "<f4").tobytes(),
                            clip.evidence_s,
                            clip.created.isoformat(),
                        ),
                    )
        return [voice.name for voice in given.voices]

    def _prepare(self) -> None:
        # Deleted content is overwritten, also in the pages that VACUUM copies.
        self._db.execute("PRAGMA secure_delete = ON")
        self._db.execute("PRAGMA temp_store = MEMORY")
        self._db.execute("PRAGMA foreign_keys = ON")

    def _expire(self, now: datetime) -> None:
        rows = self._db.execute("SELECT name, expires FROM voices WHERE expires IS NOT NULL")
        gone = [name for name, at in rows.fetchall() if datetime.fromisoformat(at) <= now]
        if gone:
            self._erase(gone)

    def _erase(self, names: Iterable[str]) -> None:
        # A journal on disk would keep what is erased: it is deleted, but not overwritten.
        self._db.execute("PRAGMA journal_mode = MEMORY")
        try:
            with self._db:
                given = [(name,) for name in names]
                self._db.executemany("DELETE FROM voices WHERE name = ?", given)
            self._db.execute("VACUUM")
        finally:
            self._db.execute("PRAGMA journal_mode = DELETE")

    def _refuse_others(self, name: str, checkpoint: str, size: int) -> None:
        rows = self._db.execute(
            "SELECT checkpoint, length(embedding), name = ? COLLATE NOCASE "
            "FROM clips JOIN voices ON voices.id = voice",
            (name,),
        ).fetchall()
        for other, length, same in rows:
            if same and other != checkpoint:
                raise VoiceprintError(
                    f"{name}: has clips of checkpoint {other}, this one is of {checkpoint}; "
                    "forget the voice and enroll it again"
                )
            if other == checkpoint and length != 4 * size:
                raise VoiceprintError(
                    f"{name}: expected an embedding of {length // 4} values like the others of "
                    f"checkpoint {checkpoint}, got {size}"
                )

    def _nobody(self, name: str) -> str:
        rows = self._db.execute("SELECT name FROM voices ORDER BY name COLLATE NOCASE")
        names = ", ".join(known for (known,) in rows.fetchall())
        return f"{name}: nobody of that name is enrolled; there is {names or 'no voice yet'}"


def _replace(path: Path, text: str) -> None:
    """Put a file that only its owner can read in the place of what is there, in one step.

    Raises:
        OSError: what is there is as it was.
    """
    if path.exists() and not path.is_file():
        path.write_text(text)  # a pipe, say
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, name = mkstemp(dir=path.parent, prefix=".")
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
