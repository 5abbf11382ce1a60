"""The enrolled people as a daemon has to do with them: whom to look for, and one more of them."""

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stream.enrolment import LEAST_S
from stream.inference import Loaded
from stream.tracks import Gallery
from stream.voiceprints import VoiceprintError, Voiceprints, default_path


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A file of voiceprints beside a loaded checkpoint; everything here blocks.

    Attributes:
        path: The file; None is the user's own, if there is one.
        loaded: What computes embeddings.
    """

    path: Path | None
    loaded: Loaded

    def gallery(self, *, strict: bool = True) -> Gallery | None:
        """Whom to look for; None without a speaker head, or a file.

        Args:
            strict: Voices of another checkpoint in a file that was asked for are an error; else
                they are left out, as in the user's own.

        Raises:
            VoiceprintError: the file cannot be used, or there are such voices.
        """
        if self.loaded.voice_id is None or (self.path is None and not self._file.is_file()):
            return None
        size = None if self.loaded.pooled is None else self.loaded.pooled[1].size
        with Voiceprints.open(self._file) as store:
            gallery = store.gallery(
                self.loaded.voice_id, size=size, strict=strict and self.path is not None
            )
        return replace(gallery, cohort=self.loaded.cohort)

    def names(self) -> list[str]:
        """Everybody in the file.

        Raises:
            VoiceprintError: it cannot be used.
        """
        if not self._file.is_file():
            return []
        with Voiceprints.open(self._file) as store:
            return [voice.name for voice in store.voices()]

    def add(
        self,
        name: str,
        embedding: NDArray[np.float32],
        evidence_s: float,
        consent: str,
        expires: datetime | None = None,
    ) -> None:
        """Keep a live speaker's voice.

        Args:
            name: The person.
            embedding: [E].
            evidence_s: Seconds of clean speech behind it.
            consent: The note that is kept with it.
            expires: When it is erased, with a zone; None is never.

        Raises:
            VoiceprintError: there is no speaker head, too little speech, or the file cannot be
                used.
        """
        if self.loaded.voice_id is None:
            raise VoiceprintError("no speaker head is loaded: there is no voice to keep")
        if evidence_s < LEAST_S:
            raise VoiceprintError(
                f"{name}: {evidence_s:.1f} s of clean speech so far; "
                f"expected at least {LEAST_S:.0f} s"
            )
        with Voiceprints.open(self._file) as store:
            store.add(
                name,
                embedding,
                checkpoint=self.loaded.voice_id,
                evidence_s=evidence_s,
                consent=consent,
                expires=expires,
            )

    @property
    def _file(self) -> Path:
        return self.path or default_path()
