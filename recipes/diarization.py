"""Frames → who spoke when, through the tracks of the product; and how wrong that is."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recipes.conversations import Clip
from recipes.corpus import HOP, RATE
from recipes.hearing import Heard
from recipes.student import Student
from stream.evaluate import turns
from stream.score import Diarization, Span, diarization_error, speaker_count_error
from stream.tracks.settings import TracksSettings
from stream.tracks.turns import Turns

Floats = NDArray[np.float32]


NOTHING = Diarization()


@dataclass(frozen=True, slots=True)
class Diarized:
    """Errors over some conversations.

    Attributes:
        error: seconds missed, falsely found and confused; collar 0, overlap scored.
        error_collar: the same with 0.25 s on either side of a reference boundary not scored.
        speakers: reference speakers, added up over conversations.
        found: labels given, likewise.
        count_error: speakers too many or too few, likewise.
        conversations: how many.
    """

    error: Diarization = NOTHING
    error_collar: Diarization = NOTHING
    speakers: int = 0
    found: int = 0
    count_error: int = 0
    conversations: int = 0

    def __add__(self, other: "Diarized") -> "Diarized":
        return Diarized(
            self.error + other.error,
            self.error_collar + other.error_collar,
            self.speakers + other.speakers,
            self.found + other.found,
            self.count_error + other.count_error,
            self.conversations + other.conversations,
        )

    def to_dict(self) -> dict[str, float]:
        """Rates in per cent of the reference speech; speakers."""
        error = self.error
        return {
            "der": percent(error.rate),
            "missed": percent(error.miss),
            "false_alarm": percent(error.false_alarm),
            "confusion": percent(error.confusion),
            "der_collar": percent(self.error_collar.rate),
            "speakers": self.speakers,
            "speakers_found": self.found,
            "speaker_count_error": self.count_error,
            "conversations": self.conversations,
        }


def percent(rate: float) -> float:
    """A rate in per cent, to two digits."""
    return round(100 * rate, 2)


def judge(clip: Clip, found: Sequence[Span]) -> Diarized:
    """One conversation against its reference."""
    return Diarized(
        error=diarization_error(clip.reference, found, clip.seconds),
        error_collar=diarization_error(clip.reference, found, clip.seconds, collar_s=0.25),
        speakers=clip.speakers,
        found=len({span.speaker for span in found}),
        count_error=abs(speaker_count_error(clip.reference, found)),
        conversations=1,
    )


def judge_all(pairs: Iterable[tuple[Clip, Sequence[Span]]]) -> Diarized:
    """All of them, seconds added up."""
    return sum((judge(clip, found) for clip, found in pairs), Diarized())


def stamp() -> Callable[[int, int], dict[str, Any]]:
    """Envelope fields of events that nobody receives."""
    numbers = count()

    def fields(start: int, end: int) -> dict[str, Any]:
        return {
            "session_id": "score",
            "stream_id": "score",
            "seq": next(numbers),
            "start": start / RATE,
            "end": end / RATE,
            "wall_time": "1970-01-01T00:00:00+00:00",
            "lag_ms": 0.0,
        }

    return fields


def embed(student: Student) -> Callable[[Floats, Floats, Floats], Floats]:
    """(mass [], first [512], second [512]) → [192], as the engine gives it to the tracks."""

    @torch.inference_mode()
    def pool(mass: Floats, first: Floats, second: Floats) -> Floats:
        moments = (torch.as_tensor(np.asarray(part)) for part in (mass, first, second))
        return student.speaker.embed(*moments).numpy()

    return pool


def diarize(student: Student, heard: Heard, settings: TracksSettings, samples: int) -> list[Span]:
    """Frames → turns with the labels they have in the end."""
    track = Turns(settings, embed(student), stamp())
    return turns([*track.step(heard.frames), *track.flush(samples)])


def local_turns(activity: Floats, threshold: float = 0.5) -> list[Span]:
    """The frame head alone: its local speakers taken for speakers.  activity: [T, S]."""
    found: list[Span] = []
    for speaker, row in enumerate((activity > threshold).T):
        at = 0
        for active, run in groupby(row.tolist()):
            length = sum(1 for _ in run)
            if active:
                found.append(Span(at * HOP / RATE, (at + length) * HOP / RATE, str(speaker)))
            at += length
    return found
